"""Arrays of other libraries: taken by DLPack without a copy, and given back exactly once.

The producer below is made by hand from dlpack.h, so that every field can be right or wrong.
"""

import ctypes
import gc
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn import _dlpack
from fastattn.attention import attention_backward, attention_forward

ml_dtypes = pytest.importorskip("ml_dtypes")
bfloat16 = np.dtype(ml_dtypes.bfloat16)

CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = 1, 2, 3, 10, 13
CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5, "b": 6}  # bfloat16's kind is V
int64_p = ctypes.POINTER(ctypes.c_int64)


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", int64_p),
        ("strides", int64_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
capsule_is_valid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
Function = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Producer:
    """Exports an ndarray; any field of the structure can be overridden.

    It knows DLPack 1 unless `versioned` is False. `deleted` counts the calls of the deleter.
    """

    def __init__(self, array, *, versioned=True, read_only=False, device=CPU, **fields):
        self.array, self.versioned, self.device = array, versioned, device
        self.deleted = self.exported = 0
        self.stream = None
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        self.managed = (DLManagedTensorVersioned if versioned else DLManagedTensor)()
        if versioned:
            self.managed.major, self.managed.flags = 1, int(read_only)
        self.deleter, self.destructor = Function(self._delete), Function(self._destroy)
        self.managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p)
        tensor = self.managed.dl_tensor
        tensor.data, tensor.device_type = array.__array_interface__["data"][0], device
        tensor.ndim = array.ndim
        tensor.code, tensor.lanes = CODES[array.dtype.kind], 1
        tensor.bits = 8 * array.itemsize
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        tensor.shape = ctypes.cast(self.shape, int64_p)
        tensor.strides = ctypes.cast(self.strides, int64_p)
        for name, value in fields.items():
            setattr(tensor if hasattr(tensor, name) else self.managed, name, value)

    def _delete(self, pointer):
        assert pointer == ctypes.addressof(self.managed)
        self.deleted += 1

    def _destroy(self, capsule):
        """What a capsule does that nobody took: the protocol's rule for its destructor."""
        if capsule_is_valid(capsule, self.name):
            self.deleter(ctypes.addressof(self.managed))

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        assert max_version == (1, 0) and copy is False
        self.stream = stream
        return self._capsule()

    def _capsule(self):
        self.exported += 1
        return new_capsule(
            ctypes.addressof(self.managed), self.name, ctypes.cast(self.destructor, ctypes.c_void_p)
        )


class OldProducer(Producer):
    """One from before versions, read-only flags and the arguments of `__dlpack__`."""

    def __init__(self, array, **fields):
        super().__init__(array, versioned=False, **fields)

    def __dlpack__(self, stream=None):
        self.stream = stream
        return self._capsule()


PRODUCERS = [Producer, OldProducer]


def arrays(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, 3, n, 8)).astype(dtype) for n in (4, 5, 5)]


def same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert type(x) is np.ndarray and x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


LAYOUTS = {
    "C": lambda x: x.copy(),
    "swapped": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "strided": lambda x: x.repeat(3, axis=-1)[..., ::3],
    "reversed": lambda x: x[:, ::-1, :, ::-1].copy()[:, ::-1, :, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1, :, :1], x.shape),
}


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", ["float16", bfloat16, "float32", "float64"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_taken_as_it_lies(producer, dtype, layout):
    given = [LAYOUTS[layout](x) for x in arrays(dtype)]
    result = attention_forward(*map(producer, given))
    expected = attention_forward(*given)
    same_bits(result, expected)
    assert result.out.strides == expected.out.strides

    dout = result.out
    grads = attention_backward(*map(producer, (dout, *given, *result)))
    same_bits(grads[:3], attention_backward(dout, *given, *expected)[:3])


@pytest.mark.parametrize("producer", PRODUCERS)
def test_byte_offset(producer):
    memory = np.zeros(1000, bfloat16)
    given = arrays(bfloat16)
    moved = []
    for i, x in enumerate(given):
        view = memory[300 * i + 7 :][: x.size].reshape(x.shape)
        view[...] = x
        base = memory.__array_interface__["data"][0]
        offset = view.__array_interface__["data"][0] - base
        moved.append(producer(view, data=base, byte_offset=offset))
    same_bits(attention_forward(*moved), attention_forward(*given))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_null_strides_mean_c_order(producer):
    given = arrays(bfloat16)
    result = attention_forward(*(producer(x, strides=None) for x in given))
    same_bits(result, attention_forward(*given))


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", ["float32", bfloat16], ids=str)
def test_no_elements_have_no_memory(producer, dtype):
    x = np.zeros((2, 0, 8), dtype)
    result = attention_forward(*(producer(x, data=None) for _ in range(3)))
    assert result.out.shape == (2, 0, 8) and result.out.dtype == dtype


@pytest.mark.parametrize("producer", PRODUCERS)
def test_options(producer):
    q, k, v = arrays()
    mask = np.random.default_rng(1).random((4, 5)) < 0.7
    options = dict(
        attn_mask=mask, bias=np.ones((3, 1, 5), bfloat16), causal_offset=np.array([1, 2]),
        kv_lens=np.array([3, 5], np.int32), q_lens=np.array([4, 2], np.uint8),
        q_segment_ids=np.array([0, 0, 1, 1]), kv_segment_ids=np.array([0, 0, 0, 1, 1], np.int8),
        sinks=np.ones(3), alibi_slopes=np.ones(3, np.float16),
    )  # fmt: skip
    exported = {name: producer(x) for name, x in options.items()}
    same_bits(attention_forward(q, k, v, **exported), attention_forward(q, k, v, **options))

    result = attention_forward(q, k, v, **options)
    wrt = ("bias", "sinks", "alibi_slopes")
    grads = attention_backward(result.out, q, k, v, *result, wrt=wrt, **exported)
    expected = attention_backward(result.out, q, k, v, *result, wrt=wrt, **options)
    same_bits(grads[3:], expected[3:])
    assert grads.dbias.dtype == bfloat16


@pytest.mark.parametrize("producer", PRODUCERS)
def test_other_functions(producer):
    x = arrays(bfloat16)[0]
    lse = np.zeros(x.shape[:-1], np.float32)
    same_bits([fastattn.safe_softmax(producer(x))], [fastattn.safe_softmax(x)])
    same_bits(
        [fastattn.safe_softmax_backward(producer(x), producer(x))],
        [fastattn.safe_softmax_backward(x, x)],
    )
    same_bits(
        fastattn.merge_attention_states(*map(producer, (x, lse, x, lse))),
        fastattn.merge_attention_states(x, lse, x, lse),
    )
    flat = x[0, 0]
    same_bits(
        [fastattn.scaled_dot_product_attention(*map(producer, (flat, flat, flat)))],
        [fastattn.scaled_dot_product_attention(flat, flat, flat)],
    )


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", ["float32", bfloat16], ids=str)
def test_out_is_written_where_it_lies(producer, dtype):
    given = arrays(dtype)
    out = np.zeros((2, 4, 3, 8), dtype).swapaxes(1, 2)
    result = attention_forward(*given, out=producer(out))
    assert np.shares_memory(result.out, out)
    same_bits([out.copy()], [attention_forward(*given).out])


def test_read_only_flag():
    q, k, v = arrays()
    expected = attention_forward(q, k, v)
    same_bits(attention_forward(*(Producer(x, read_only=True) for x in (q, k, v))), expected)
    out = np.full_like(q, 7)
    with pytest.raises(ValueError, match="out is read-only"):
        attention_forward(q, k, v, out=Producer(out, read_only=True))
    assert (out == 7).all()


@pytest.mark.parametrize("producer", PRODUCERS)
def test_out_over_an_input_is_seen(producer):
    q, k, v = arrays()
    with pytest.raises(ValueError, match="out shares an element with q"):
        attention_forward(q, k, v, out=producer(q))
    with pytest.raises(ValueError, match="out shares an element with q"):
        attention_forward(producer(q), k, v, out=q)


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("dtype", ["float32", bfloat16], ids=str)
def test_deleter_is_called_once_when_the_array_dies(producer, dtype):
    given = arrays(dtype)
    producers = [producer(x) for x in given]
    attention_forward(*producers)
    gc.collect()
    assert [p.exported for p in producers] == [p.deleted for p in producers] == [1, 1, 1]

    out = producer(np.zeros_like(given[0]))
    result = attention_forward(*given, out=out)
    view = result.out[0]
    exports = out.exported
    del result
    gc.collect()
    # The check for overlap takes no more exports of `out`, and the view keeps the one there is.
    assert (exports, out.deleted) == (1, 0)
    del view
    gc.collect()
    assert out.deleted == 1


@pytest.mark.parametrize("producer", PRODUCERS)
def test_deleter_may_be_null(producer):
    given = arrays()
    result = attention_forward(*(producer(x, deleter=None) for x in given))
    same_bits(result, attention_forward(*given))


def test_producer_lives_as_long_as_its_array():
    out = attention_forward(*arrays(), out=Producer(np.zeros_like(arrays()[0]))).out
    gc.collect()
    expected = attention_forward(*arrays()).out
    same_bits([out.copy()], [expected])


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(code=5, bits=64), "dtype code 5, 64 bits, 1 lanes"),
        (dict(code=2, bits=8), "dtype code 2, 8 bits, 1 lanes"),
        (dict(code=0, bits=4), "dtype code 0, 4 bits, 1 lanes"),
        (dict(code=10, bits=8), "dtype code 10, 8 bits, 1 lanes"),
        (dict(lanes=2), "dtype code 2, 32 bits, 2 lanes"),
    ],
)
def test_unknown_dtype(producer, fields, message):
    q, k, v = arrays()
    bad = producer(q, **fields)
    with pytest.raises(TypeError, match=f"q is a .*roducer of DLPack's {message}; expected bool"):
        attention_forward(bad, k, v)
    gc.collect()
    assert bad.deleted == bad.exported == 1


@pytest.mark.parametrize("producer", PRODUCERS)
def test_dtypes_of_other_use_are_named(producer):
    q, k, v = arrays()
    with pytest.raises(TypeError, match="k must be one of float16, .* got int32"):
        attention_forward(q, producer(k.view(np.int32)), v)
    with pytest.raises(TypeError, match="attn_mask must be bool, where True .* got uint8"):
        attention_forward(q, k, v, attn_mask=producer(np.ones((4, 5), np.uint8)))


def test_newer_major_version_is_refused():
    q, k, v = arrays()
    bad = Producer(q, major=2, minor=3)
    with pytest.raises(TypeError, match=r"q is a .*Producer .* DLPack version 2.3 is not known"):
        attention_forward(bad, k, v)


def test_other_devices_are_refused_before_they_export():
    q, k, v = arrays()
    bad = Producer(k, device=ROCM)
    with pytest.raises(
        TypeError, match=r"k is .* on a device of DLPack type 10, not CPU or CUDA.* tensor\.cpu\(\)"
    ):
        attention_forward(q, bad, v)
    assert bad.exported == 0


@pytest.mark.parametrize("device", [CUDA, CUDA_MANAGED])
def test_cuda_memory_without_cupy_says_what_to_install(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "cupy", None)
    q, k, v = arrays()
    bad = Producer(k, device=device)
    message = (
        "k is a .*Producer that cannot be taken by DLPack: .* CuPy 14 or newer, .*"
        r'pip install "fastattn\[cuda12\]" or "fastattn\[cuda13\]".* tensor\.cpu\(\)'
    )
    with pytest.raises(TypeError, match=message):
        attention_forward(q, bad, v)
    assert bad.exported == 0


class TestForCuPy:
    """What CuPy's `from_dlpack` is given, by one that only asks; the taking itself needs a GPU."""

    @pytest.fixture(autouse=True)
    def from_dlpack(self, monkeypatch):
        def from_dlpack(exported, *, copy):
            assert copy is False
            self.device = exported.__dlpack_device__()
            return exported.__dlpack__(stream=7, max_version=(1, 0), copy=copy)

        cupy = SimpleNamespace(from_dlpack=from_dlpack)
        monkeypatch.setattr(_dlpack, "load_cupy", lambda: cupy)

    @pytest.mark.parametrize("producer", PRODUCERS)
    @pytest.mark.parametrize("device", [CUDA, CUDA_MANAGED])
    def test_is_exported_once_for_the_stream(self, producer, device):
        given = producer(np.zeros(3), device=device)
        capsule = _dlpack.from_dlpack("q", given)
        assert (self.device, given.stream, given.exported) == ((device, 0), 7, 1)
        del capsule  # taken by no one here
        assert given.deleted == 1

    @pytest.mark.parametrize("error", [BufferError, TypeError, RuntimeError])
    def test_refusal_says_what_helps(self, error):
        given = Refusing(np.zeros(3), error("Can't export tensors that require gradient"))
        given.device = CUDA
        with pytest.raises(TypeError, match=r"q is a .*: Can't export .*\.detach\(\)"):
            _dlpack.from_dlpack("q", given)

    def test_newer_major_version_is_refused(self):
        given = Producer(np.zeros(3), device=CUDA, major=2, minor=0)
        with pytest.raises(TypeError, match=r"q is a .* DLPack version 2.0 is not known"):
            _dlpack.from_dlpack("q", given)

    def test_read_only_memory_is_not_written(self):
        given = Producer(np.zeros(3), device=CUDA, read_only=True)
        _dlpack.from_dlpack("q", given)
        with pytest.raises(ValueError, match="out is read-only, and the result"):
            _dlpack.from_dlpack("out", given, written=True)
        _dlpack.from_dlpack("out", Producer(np.zeros(3), device=CUDA), written=True)


class CudaTensor:
    """A CuPy array of which a consumer sees DLPack only."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", bfloat16, "float32", "float64"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_memory_is_taken_as_it_lies(dtype, layout):
    import cupy

    given = [LAYOUTS[layout](cupy.asarray(x)) for x in arrays(dtype)]
    expected = attention_forward(*given)
    result = attention_forward(*map(CudaTensor, given))
    for x, y in zip(result, expected):
        assert type(x) is cupy.ndarray and x.strides == y.strides
    same_bits(map(cupy.asnumpy, result), map(cupy.asnumpy, expected))

    out = cupy.zeros_like(expected.out)
    result = attention_forward(*given, out=CudaTensor(out))
    assert type(result.out) is cupy.ndarray and result.out.data.ptr == out.data.ptr
    same_bits([cupy.asnumpy(out)], [cupy.asnumpy(expected.out)])
    with pytest.raises(ValueError, match="out (shares an element with q|has elements that share)"):
        attention_forward(*map(CudaTensor, given), out=CudaTensor(given[0]))


@pytest.mark.gpu
def test_integers_in_cuda_memory():
    import cupy

    q, k, v = map(cupy.asarray, arrays())
    options = dict(kv_lens=np.array([3, 5], np.int32), seed=np.array([7], np.uint64))
    exported = {name: CudaTensor(cupy.asarray(x)) for name, x in options.items()}
    expected = attention_forward(q, k, v, kv_lens=[3, 5], seed=7, dropout_p=0.5)
    result = attention_forward(q, k, v, **exported, dropout_p=0.5)
    same_bits(map(cupy.asnumpy, result), map(cupy.asnumpy, expected))


def test_pinned_host_memory_is_taken():
    given = arrays()
    result = attention_forward(*(Producer(x, device=CUDA_HOST) for x in given))
    same_bits(result, attention_forward(*given))


class Refusing(Producer):
    def __init__(self, array, error):
        super().__init__(array)
        self.error = error

    def __dlpack__(self, **_):
        raise self.error


class Negated(Producer):
    """PyTorch's x.conj().imag: its memory holds -x, and its export does not say so."""

    def is_neg(self):
        return True


def test_a_sign_that_memory_does_not_hold_is_not_lost():
    q, k, v = arrays()
    with pytest.raises(TypeError, match=r"k is a .*Negated whose .* pass k.resolve_neg\(\)"):
        attention_forward(q, Negated(k), v)


@pytest.mark.parametrize("error", [RuntimeError, BufferError, TypeError, ValueError])
def test_refusal_says_what_helps(error):
    q, k, v = arrays()
    bad = Refusing(v, error("Can't export tensors that require gradient"))
    message = r"v is a .*Refusing .*: Can't export tensors that require gradient.*\.detach\(\)"
    with pytest.raises(TypeError, match=message) as raised:
        attention_forward(q, k, bad)
    assert isinstance(raised.value.__cause__, error)


def test_out_of_memory_stays_what_it_is():
    q, k, v = arrays()
    with pytest.raises(MemoryError):
        attention_forward(q, k, Refusing(v, MemoryError()))


class Careless:
    """Has the method, and nothing of what it should return."""

    def __dlpack__(self, **_):
        return "capsule"

    def __dlpack_device__(self):
        return CPU, 0


def test_what_is_no_capsule_is_refused():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="q is a .*Careless that cannot be taken by DLPack"):
        attention_forward(Careless(), k, v)


def test_bfloat16_without_ml_dtypes_says_so():
    code = """
import sys
sys.modules["ml_dtypes"] = None
from fastattn._dlpack import _bfloat16
try:
    _bfloat16("q")
except TypeError as error:
    print(error)
"""
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("q is bfloat16, for which NumPy needs ml_dtypes")
