"""What the tests of attention share: a Case is one problem, with what its backward needs."""

import contextlib
import ctypes
import itertools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from fastattn import _cpu, testing
from fastattn.attention import attention_backward, attention_forward
from fastattn.testing import assert_forward, assert_gradients, live_pairs, random_problem

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# Every row of the kernel table, but for those that repeat a row of a lower ISA: the same kernels.
_ROWS = {tuple(row[key] for key in row if key != "isa"): row for row in _cpu.kernel_table()[::-1]}
KERNELS = list(_ROWS.values())[::-1]
RUNNABLE_ISAS = [row["name"] for row in _cpu.isa_table() if not row["missing"]]
GRADIENTS = ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")
inf, nan = np.inf, np.nan

_CPU_ROWS = [
    pytest.param(row["isa"], DTYPES[row["dtype"]], id="{isa}-{dtype}".format(**row))
    for row in KERNELS
]
_GPU_ROWS = [
    pytest.param("cupy", dtype, id=f"cupy-{name}", marks=pytest.mark.gpu)
    for name, dtype in DTYPES.items()
]
# What every target has to keep to, and what only the CPU has: threads, pages.
all_kernels = pytest.mark.parametrize(
    ("target", "dtype"), _CPU_ROWS + _GPU_ROWS, indirect=["target"]
)
cpu_kernels = pytest.mark.parametrize(("isa", "dtype"), _CPU_ROWS, indirect=["isa"])
GPU_TILES = (16, 32, 64, 128)  # the sizes that tiles of rows and of keys have there


def gpu_rows(*values):
    """Rows of a table of tests: each of these values on the GPU, with every dtype."""
    for name, value in itertools.product(DTYPES, values):
        yield pytest.param("cupy", name, *value, marks=pytest.mark.gpu)


def beside(*sizes):
    """Each size, one less and one more."""
    return sorted({size + step for size in sizes for step in (-1, 0, 1)})


def _remembered(oracle, size=16):
    """The oracle's answers do not depend on the ISA: it is asked once for each problem."""
    answers = {}

    def digest(x):
        if isinstance(x, np.ndarray):
            return x.shape, x.dtype, x.tobytes()
        if isinstance(x, (tuple, list)):
            return tuple(map(digest, x))
        return repr(x)

    def ask(reference, arrays, q, pairs, **given):
        key = reference, digest(arrays), pairs, digest(sorted(given.items()))
        if key not in answers:
            if len(answers) == size:
                del answers[next(iter(answers))]
            answers[key] = oracle(reference, arrays, q, pairs, **given)
        return answers[key]

    return ask


testing._exact_and_plain = _remembered(testing._exact_and_plain)


def acc_of(dtype):
    """The accumulation dtype, which is also that of lse."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Case:
    """One problem: arrays, options, and the gradients of the results."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray | None = None
    options: dict = field(default_factory=dict)

    @property
    def wrt(self):
        given = (name for name in ("bias", "sinks", "alibi_slopes") if name in self.options)
        return ("q", "k", "v", *given)

    def with_(self, **changes):
        """A copy with other arrays; what is no field is an option."""
        fields = {name: changes.pop(name) for name in list(changes) if hasattr(self, name)}
        return replace(self, options={**self.options, **changes}, **fields)

    def forward(self, **kwargs):
        return call(attention_forward, self.q, self.k, self.v, **self.options, **kwargs)

    def backward(self, out, lse, wrt=None, **kwargs):
        return call(
            attention_backward, self.dout, self.q, self.k, self.v, out, lse,
            dlse=self.dlse, wrt=self.wrt if wrt is None else wrt, **self.options, **kwargs,
        )  # fmt: skip

    def run(self, **kwargs):
        """Forward and backward: name -> array, of all results there are."""
        out, lse = self.forward(**kwargs)
        grads = self.backward(out, lse, **kwargs)
        named = {"out": out, "lse": lse, **grads._asdict()}
        return {name: x for name, x in named.items() if x is not None}

    def live(self):
        return live_pairs(self.q, self.k, **self.options)

    def check(self):
        """Hold forward and backward against the oracle; returns the results."""
        results = self.run()
        out, lse = results["out"], results["lse"]
        assert_forward(self.q, self.k, self.v, out, lse, **self.options)
        grads = [results.get(name) for name in GRADIENTS]
        assert_gradients(
            self.dout, self.q, self.k, self.v, out, lse, grads,
            dlse=self.dlse, wrt=self.wrt, **self.options,
        )  # fmt: skip
        return results


def make_case(rng, dtype, *, lead=(), Hq=2, Hkv=None, Lq, Lk, D, Dv=None, dlse=True, **options):
    """Draw a Case from the standard normal distribution."""
    Hkv, Dv, dtype = Hkv or Hq, D if Dv is None else Dv, np.dtype(dtype)

    def normal(*shape, dtype=dtype):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)

    return Case(
        q=normal(*lead, Hq, Lq, D),
        k=normal(*lead, Hkv, Lk, D),
        v=normal(*lead, Hkv, Lk, Dv),
        dout=normal(*lead, Hq, Lq, Dv),
        dlse=normal(*lead, Hq, Lq, dtype=acc_of(dtype)) if dlse else None,
        options=options,
    )


def draw_case(seed, dtype, **fixed):
    """A Case from a drawn problem: dlse or not, NaN in dout where no pair is live."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[dtype]
    problem = random_problem(rng, dtype=dtype, **fixed)
    q, k, v, options = (problem[name] for name in ("q", "k", "v", "options"))
    dout = np.asarray(rng.standard_normal((*q.shape[:-1], v.shape[-1]))).astype(dtype)
    dlse = np.asarray(rng.standard_normal(q.shape[:-1])).astype(acc_of(dtype))
    dead = ~live_pairs(q, k, **options).any(axis=-1)
    if options.get("sinks") is None:  # else lse is not -inf, and the row counts for dsinks
        dout[dead] = np.nan
        dlse[dead] = np.inf
    return Case(q, k, v, dout, dlse if rng.random() < 0.5 else None, options)


def shape_id(shape):
    """The id of a test whose parameter is a dict of sizes."""
    sizes = (f"{k}{'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in shape.items())
    return "-".join(sizes)


def bits(x):
    """The bytes of the elements in C order."""
    return np.ascontiguousarray(x).tobytes()


def assert_same_bits(actual, expected, what=""):
    """Assert that two arrays, or two dicts of arrays, are equal to the last bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_same_bits(actual[name], expected[name], f"{what} {name}".strip())
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if bits(actual) != bits(expected):
        words = [np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (actual, expected)]
        differ = words[0] != words[1]
        at = tuple(map(int, np.argwhere(differ)[0]))
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} elements differ in their bits, the first at"
            f" {at}: {actual[at]!r}, expected {expected[at]!r}"
        )


def assert_targets_agree(actual, expected):
    """Assert that results of two targets differ by rounding only: in size, not in kind."""
    assert actual.keys() == expected.keys()
    acc = acc_of(expected["out"].dtype)
    for name, x in expected.items():
        eps = max(testing.EPS[dtype.name] for dtype in (expected["out"].dtype, x.dtype, acc))
        x, y = x.astype(np.float64), actual[name].astype(np.float64)
        np.testing.assert_array_equal(y == -np.inf, x == -np.inf)
        live = np.isfinite(x)
        bound = 16 * eps * abs(x[live]).max(initial=0)
        np.testing.assert_allclose(y[live], x[live], rtol=0, atol=bound, err_msg=name)
        dead = (x == 0) if name in ("out", "dq") else np.zeros(x.shape, bool)
        assert not y[dead.all(axis=-1)].any(), f"{name}: rows that are dead on one target only"


def run_python(code, *, timeout=120, **environment):
    """Run code in a fresh interpreter; returns what it printed. It may import these helpers."""
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env=env,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


# ---------------------------------------------------------------- where a call computes

_on_gpu = False


def on_gpu():
    """Whether `call` computes on the GPU now."""
    return _on_gpu


@contextlib.contextmanager
def computing_on(target):
    """Have `call`, and Cases with it, compute elsewhere.

    A target is an ISA of the CPU, "numpy" for the one that is chosen by itself, or "cupy".
    """
    global _on_gpu
    before = _on_gpu
    isa_before = None if target in ("numpy", "cupy") else _cpu.use_isa(target)
    _on_gpu = target == "cupy"
    try:
        yield
    finally:
        _on_gpu = before
        if isa_before is not None:
            assert _cpu.use_isa(isa_before) == target


def call(function, *args, **kwargs):
    """Call a public function on the target under test: NumPy arrays in, NumPy arrays out.

    On the GPU, no input may have been written, nor what lies beside inputs, results and the memory
    that the function allocates, which is full of NaN.
    """
    if not _on_gpu:
        return function(*args, **kwargs)
    import cupy

    copies, allocator = DeviceCopies((args, kwargs)), GuardedAllocator()
    args, kwargs = copies.on_device((args, kwargs))
    with cupy.cuda.using_allocator(allocator):
        results = function(*args, **kwargs)
    allocator.check()
    copies.take_back(kwargs.get("out"))
    return _map(copies.on_host, results, (cupy.ndarray, np.ndarray))


def to_device(tree):
    """Copies on the GPU of a tree's NumPy arrays, which lie there as they lie here."""
    return DeviceCopies(tree).on_device(tree)


def to_host(tree):
    """Copies as NumPy arrays of a tree's CuPy arrays, which lie here as they lie there."""
    import cupy

    return _map(_as_numpy, tree, cupy.ndarray)


def _map(function, tree, kind):
    """Apply a function to the arrays in tuples and dicts; anything else stays as it is."""
    if isinstance(tree, dict):
        return {name: _map(function, x, kind) for name, x in tree.items()}
    if isinstance(tree, tuple):
        mapped = [_map(function, x, kind) for x in tree]
        return tree._make(mapped) if hasattr(tree, "_make") else tuple(mapped)
    return function(tree) if isinstance(tree, kind) else tree


GUARD = 512  # bytes on either side of what lies on the GPU, and its alignment


class _Block(NamedTuple):
    """Memory of the host and its copy on the GPU, which lies between guards."""

    low: int  # the address on the host
    high: int
    inside: slice  # of the bytes on the GPU, what is not a guard
    sent: np.ndarray  # the bytes that were copied, guards included
    memory: Any  # cupy.cuda.MemoryPointer


class DeviceCopies:
    """The NumPy arrays of a tree, copied to the GPU as they lie in memory.

    Strides and alignment stay, and arrays that share memory share it there. The guards on either
    side are NaN in any dtype: reading them shows, and so does writing.
    """

    def __init__(self, tree):
        import cupy

        arrays = []
        _map(arrays.append, tree, np.ndarray)
        extents = sorted(_extent(x) for x in arrays if x.size)
        self.blocks, self.pairs = [], []  # pairs: (NumPy array, CuPy array)
        while extents:
            low, high = extents.pop(0)
            while extents and extents[0][0] < high:
                high = max(high, extents.pop(0)[1])
            first = GUARD + low % 16
            inside = slice(first, first + high - low)
            sent = np.full(inside.stop + GUARD, 0xFF, np.uint8)
            sent[inside] = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
            memory = cupy.cuda.alloc(sent.size)
            memory.copy_from_host_async(sent.ctypes.data, sent.size)
            self.blocks.append(_Block(low, high, inside, sent, memory))

    def on_device(self, tree):
        return _map(self._copy_of, tree, np.ndarray)

    def _copy_of(self, x):
        import cupy

        for array, copy in self.pairs:
            if array is x:
                return copy
        if x.size:
            block = self._block_of(x)
            at = block.memory + (block.inside.start + _address(x) - block.low)
            copy = cupy.ndarray(x.shape, x.dtype, at, x.strides)
        else:
            copy = cupy.empty(x.shape, x.dtype)
        self.pairs.append((x, copy))
        return copy

    def _block_of(self, x):
        return next(block for block in self.blocks if block.low <= _address(x) < block.high)

    def on_host(self, y):
        """The array that y is a copy of, or else a copy of y."""
        import cupy

        assert type(y) is cupy.ndarray, f"a {type(y)} as result of a call with CuPy arrays"
        for array, copy in self.pairs:
            if copy is y:
                return array
        return _as_numpy(y)

    def take_back(self, written):
        """Copy what was to be written to where it came from; nothing else may have changed."""
        results = []
        _map(results.append, written, object)
        results = [x for x, copy in self.pairs if x.size and any(copy is y for y in results)]
        blocks = [self._block_of(x) for x in results]
        for block in self.blocks:
            now = _bytes_of(block.memory, block.sent.size)
            if any(block is other for other in blocks):
                ctypes.memmove(block.low, now[block.inside].ctypes.data, block.high - block.low)
                now[block.inside] = block.sent[block.inside]
            assert np.array_equal(now, block.sent), "an input was written, or memory beside arrays"


def _address(x):
    """Where element 0 lies, of a NumPy or a CuPy array."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def _extent(x):
    """The addresses of the first byte of an array's elements and of that behind the last."""
    reach = [(n - 1) * s for n, s in zip(x.shape, x.strides)]
    low = _address(x) + sum(s for s in reach if s < 0)
    return low, _address(x) + sum(s for s in reach if s > 0) + x.itemsize


def _bytes_of(memory, size):
    """A copy of device memory, after all that was asked of the current stream before."""
    import cupy

    copy = np.empty(size, np.uint8)
    memory.copy_to_host_async(copy.ctypes.data, size)
    cupy.cuda.get_current_stream().synchronize()
    return copy


def _as_numpy(x):
    if not x.size:
        return np.empty(x.shape, x.dtype)
    low, high = _extent(x)
    copy = _bytes_of(x.data + (low - x.data.ptr), high - low)
    return np.ndarray(x.shape, x.dtype, copy, x.data.ptr - low, x.strides)


class GuardedAllocator:
    """CuPy's allocator, but its memory is NaN in any dtype, and so are the guards around it."""

    def __init__(self):
        self.allocated = []

    def __call__(self, size):
        import cupy

        memory = cupy.get_default_memory_pool().malloc(size + 2 * GUARD)
        memory.memset_async(0xFF, size + 2 * GUARD)
        self.allocated.append((memory, size))
        return memory + GUARD

    def check(self):
        for memory, size in self.allocated:
            for guard in (memory, memory + (GUARD + size)):
                assert (_bytes_of(guard, GUARD) == 0xFF).all(), "memory beside arrays was written"


# ---------------------------------------------------------------- options to try

LEAD, HQ, HKV, LQ, LK, D, DV = (2,), 4, 2, 37, 70, 24, 20


def _float_mask(rng, *shape, dtype=np.float32):
    mask = rng.standard_normal(shape).astype(dtype)
    mask[rng.random(shape) < 0.3] = -inf
    return mask


def _segments(rng, length):
    return np.sort(rng.integers(0, 5, (*LEAD, length)))


# Each option alone, and some that only mean something together, for arrays of the sizes above.
OPTIONS = {
    "none": lambda rng: {},
    "bool_mask": lambda rng: dict(attn_mask=rng.random((*LEAD, HQ, LQ, LK)) < 0.6),
    "bool_mask_of_keys": lambda rng: dict(attn_mask=rng.random((2, 1, 1, LK)) < 0.6),
    "bool_mask_of_rows": lambda rng: dict(attn_mask=rng.random((LQ, 1)) < 0.6),
    "float_mask": lambda rng: dict(attn_mask=_float_mask(rng, HQ, LQ, LK)),
    "float64_mask": lambda rng: dict(attn_mask=_float_mask(rng, LQ, LK, dtype=np.float64)),
    "float16_mask": lambda rng: dict(attn_mask=_float_mask(rng, LQ, LK, dtype=np.float16)),
    "finfo_min_mask": lambda rng: dict(
        attn_mask=np.where(rng.random((LQ, LK)) < 0.5, 0, np.finfo(np.float32).min)
    ),
    "bias": lambda rng: dict(bias=_float_mask(rng, *LEAD, HQ, LQ, LK)),
    "bias_of_keys": lambda rng: dict(bias=_float_mask(rng, 2, 1, 1, LK)),
    "bias_of_rows": lambda rng: dict(bias=_float_mask(rng, HQ, LQ, 1)),
    "bias_of_heads": lambda rng: dict(bias=rng.standard_normal((HQ, 1, 1)).astype(np.float32)),
    "bias_of_batch": lambda rng: dict(bias=rng.standard_normal((2, 1, LQ, LK))),
    "bias_bfloat16": lambda rng: dict(bias=_float_mask(rng, HQ, 1, LK, dtype=DTYPES["bfloat16"])),
    "bias_float64": lambda rng: dict(bias=_float_mask(rng, LQ, LK, dtype=np.float64)),
    "mask_and_bias": lambda rng: dict(
        attn_mask=_float_mask(rng, LQ, LK), bias=_float_mask(rng, HQ, 1, LK)
    ),
    "causal": lambda rng: dict(is_causal=True),
    "lower_right": lambda rng: dict(is_causal=True, causal_offset="lower_right"),
    "causal_offsets": lambda rng: dict(is_causal=True, causal_offset=[-5, 40]),
    "far_offset": lambda rng: dict(is_causal=True, causal_offset=2**61),
    "window": lambda rng: dict(window_size=(7, 3)),
    "window_left": lambda rng: dict(window_size=(7, None), causal_offset=10),
    "window_right": lambda rng: dict(window_size=(None, 0), causal_offset=[-3, 3]),
    "widest_window": lambda rng: dict(window_size=(2**80, 2**80), causal_offset=-(2**61)),
    "q_lens": lambda rng: dict(q_lens=[LQ, 17]),
    "kv_lens": lambda rng: dict(kv_lens=[33, 0]),
    "all_lens": lambda rng: dict(
        q_lens=[30, 0], kv_lens=[LK, 41], is_causal=True, causal_offset="lower_right"
    ),
    "segments": lambda rng: dict(
        q_segment_ids=_segments(rng, LQ), kv_segment_ids=_segments(rng, LK)
    ),
    "segments_shuffled": lambda rng: dict(
        q_segment_ids=rng.integers(-(2**63), 2**63 - 1, LQ) // 2**62,
        kv_segment_ids=rng.integers(-(2**63), 2**63 - 1, LK) // 2**62,
    ),
    "scale": lambda rng: dict(scale=0.7),
    "scale_negative": lambda rng: dict(scale=-0.4),
    "scale_zero": lambda rng: dict(scale=0.0),
    # The GPU flushes subnormal numbers, which are far too large an error beside 1e-35.
    "scale_tiny": lambda rng: dict(scale=1e-30 if on_gpu() else 1e-35),
    "softcap": lambda rng: dict(softcap=0.8),
    "softcap_large": lambda rng: dict(softcap=1e6, scale=2.0),
    "alibi": lambda rng: dict(alibi_slopes=rng.standard_normal(HQ).astype(np.float32)),
    "alibi_offsets": lambda rng: dict(
        alibi_slopes=rng.random(HQ) / 8, causal_offset=[33, -4], is_causal=True
    ),
    "sinks": lambda rng: dict(sinks=rng.standard_normal(HQ).astype(np.float32)),
    "sinks_of_dead_rows": lambda rng: dict(
        sinks=rng.standard_normal(HQ), kv_lens=[5, 0], q_lens=[LQ, 9]
    ),
    "sinks_bfloat16": lambda rng: dict(sinks=rng.standard_normal(HQ).astype(DTYPES["bfloat16"])),
    "dropout": lambda rng: dict(dropout_p=0.3, seed=2**64 - 1),
    "dropout_all": lambda rng: dict(dropout_p=1.0, seed=5),
    "dropout_window": lambda rng: dict(dropout_p=0.1, seed=1 << 33, window_size=(9, 9)),
    "everything": lambda rng: dict(
        attn_mask=rng.random((2, 1, LQ, LK)) < 0.9,
        bias=_float_mask(rng, HQ, 1, LK),
        is_causal=True,
        causal_offset=[20, 33],
        window_size=(30, 4),
        q_lens=[LQ, 30],
        kv_lens=[60, LK],
        scale=0.3,
        softcap=5.0,
        dropout_p=0.2,
        seed=7,
        q_segment_ids=np.arange(LQ) // 30,
        kv_segment_ids=np.arange(LK) // 60,
        alibi_slopes=rng.random(HQ).astype(np.float32),
        sinks=rng.standard_normal(HQ),
    ),  # fmt: skip
}


def option_case(rng, dtype, name):
    """A Case with one entry of OPTIONS."""
    options = OPTIONS[name](rng)
    return make_case(
        rng, dtype, lead=LEAD, Hq=HQ, Hkv=HKV, Lq=LQ, Lk=LK, D=D, Dv=DV, **options
    )  # fmt: skip
