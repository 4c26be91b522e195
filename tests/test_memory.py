"""Memory: how much is used, what is touched, and where it may lie.

Most of this runs in another process: what is measured there is ours alone, and what crashes there
fails here.
"""

import contextlib
import ctypes
import itertools
import mmap
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    DTYPES,
    KERNELS,
    acc_of,
    assert_same_bits,
    make_case,
    run_python,
)  # fmt: skip
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided

from fastattn import _backends, _cpu
from fastattn.attention import attention_backward, attention_forward
from fastattn.testing import assert_forward, assert_gradients

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is measured through Linux's /proc"
)
MiB = 1 << 20
kernels = pytest.mark.parametrize(
    ("isa", "dtype"),
    [pytest.param(row["isa"], row["dtype"], id="{isa}-{dtype}".format(**row)) for row in KERNELS],
    indirect=["isa"],
)


def run_here(*calls, isa=None, timeout=120, **environment):
    """Call functions of this module in another process."""
    if isa:
        environment["FASTATTN_CPU_ISA"] = isa
    code = "\n".join(["import test_memory", *(f"test_memory.{call}" for call in calls)])
    return run_python(code, timeout=timeout, **environment)


# ---------------------------------------------------------------- how much (promise 5)


def measured(call):
    """The bytes by which a call makes this process's memory peak above what it held before."""

    def peak():
        (line,) = (x for x in Path("/proc/self/status").open() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = peak()
    call()
    return peak() - before


def ones(dtype, *shape, copied=False):
    """Memory that is there, for its pages were written; `copied`: not to be read in place."""
    full = np.ones((*shape[:-1], 2 * shape[-1] if copied else shape[-1]), dtype)
    return full[..., ::2] if copied else full


def warm_up(threads):
    """Start the threads and load the code, without memory that a call to come could use again."""
    tiny = make_case(np.random.default_rng(0), np.float32, Hq=2, Lq=300, Lk=300, D=8)
    tiny.run(num_threads=threads)


def assert_grows_little(call, bound, threads):
    warm_up(threads)
    grown = measured(call)
    assert grown <= bound, f"{grown / MiB:.2f} MiB, allowed {bound / MiB:.2f}"


# glibc keeps what is freed for later, unless told not to.
MALLOC = dict(MALLOC_MMAP_THRESHOLD_="65536", OMP_STACKSIZE="256k")
MASKS = {
    "no_mask": lambda Lq, Lk: {},
    "masks_of_keys": lambda Lq, Lk: dict(
        attn_mask=np.zeros(Lk, np.float16), bias=np.zeros((1, 1, Lk))
    ),
    "masks_of_rows": lambda Lq, Lk: dict(
        attn_mask=np.ones((Lq, 1), bool), bias=np.zeros((1, Lq, 1), np.float16)
    ),
    "masks_of_nothing": lambda Lq, Lk: dict(
        attn_mask=np.zeros((), np.float32), bias=np.zeros((1, 1), DTYPES["bfloat16"])
    ),
    "all_options": lambda Lq, Lk: dict(
        attn_mask=np.zeros(Lk, np.float16), bias=np.zeros((1, 1, Lk)), softcap=5.0,
        q_segment_ids=0, kv_segment_ids=np.zeros(Lk, int), alibi_slopes=[0.1, 0.2],
        sinks=[0.0, 1.0], dropout_p=0.5, seed=3, kv_lens=Lk - 1, q_lens=Lq - 1,
    ),
}  # fmt: skip


def arrays_for(options):
    return {name: np.array(x) if isinstance(x, list) else x for name, x in options.items()}


def forward_workspace(dtype, Lq, Lk, D, threads, masks, copied, window=None):
    dtype = DTYPES[dtype]
    q, k, v, out = (ones(dtype, 2, L, D, copied=copied) for L in (Lq, Lk, Lk, Lq))
    lse = ones(acc_of(dtype), 2, Lq)
    options = dict(arrays_for(MASKS[masks](Lq, Lk)), window_size=window, num_threads=threads)
    assert_grows_little(
        lambda: attention_forward(q, k, v, **options, out=(out, lse)), threads * 2 * MiB, threads
    )


L = 16384
SIZES = {"window": (L, L, (40, 0)), "keys": (128, L, None), "rows": (L, 128, None)}


@linux
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_takes_2_MiB_a_thread(dtype):
    calls = (
        f"forward_workspace({dtype!r}, {Lq}, {Lk}, 256, {threads}, {masks!r}, True, {window})"
        for (Lq, Lk, window), masks in [
            (SIZES["window"], "no_mask"),
            (SIZES["window"], "all_options"),
            (SIZES["keys"], "no_mask"),
            (SIZES["rows"], "masks_of_keys"),
        ]
        for threads in (1, 2)
    )
    run_here(*calls, **MALLOC)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_takes_2_MiB_a_thread_for_all_pairs(dtype, threads):
    """A bit for each pair of the two heads would take 16 MiB."""
    run_here(
        f"forward_workspace({dtype!r}, {L // 2}, {L // 2}, 256, {threads}, 'no_mask', True)",
        timeout=600, **MALLOC,
    )  # fmt: skip


@linux
@pytest.mark.parametrize("masks", list(MASKS)[1:])
def test_broadcast_masks_are_never_materialised(masks):
    """In float32 and as large as the scores, a mask would take 1 GiB."""
    Lq, Lk, window = SIZES["window"]
    run_here(
        *(
            f"forward_workspace('float32', {Lq}, {Lk}, 32, 1, {masks!r}, {copied}, {window})"
            for copied in (False, True)
        ),
        **MALLOC,
    )


def full_masks(dtype):
    q = ones(np.float32, 1, 2000, 8)
    out, lse = ones(np.float32, 1, 2000, 8), ones(np.float32, 1, 2000)
    masks = dict(attn_mask=np.zeros((2000, 2000), bool), bias=np.zeros((2000, 2000), dtype))
    masks["attn_mask"][:] = masks["bias"][:] = 1
    assert_grows_little(
        lambda: attention_forward(q, q, q, **masks, out=(out, lse), num_threads=1), 2 * MiB, 1
    )


@linux
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_masks_are_not_converted_as_a_whole(dtype):
    run_here(f"full_masks({dtype!r})", **MALLOC)


def backward_workspace(dtype, Lq, Lk, D, heads, threads, wrt, masks="no_mask", window=None):
    dtype = DTYPES[dtype]
    q, k, v, dout, out = (
        ones(dtype, heads, n, D, copied=True) for n in (Lq, Lk, Lk, Lq, Lq)
    )  # fmt: skip
    lse = ones(acc_of(dtype), heads, Lq)
    options = dict(arrays_for(MASKS[masks](Lq, Lk)), window_size=window)
    attention_forward(q, k, v, **options, out=(out, lse), num_threads=1)
    results = sum(dict(q=q, k=k, v=v)[name].size * dtype.itemsize for name in wrt)
    sums = min(threads, heads) * len(set(wrt) & {"k", "v"}) * Lk * D * lse.itemsize
    workspace = threads * 2 * MiB
    assert_grows_little(
        lambda: attention_backward(
            dout, q, k, v, out, lse, wrt=tuple(wrt), num_threads=threads, **options
        ),
        results + sums + workspace, threads,
    )  # fmt: skip


@linux
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_adds_dk_and_dv_of_the_heads_in_work(dtype):
    calls = []
    for threads in (1, 2):
        few_rows = f"{dtype!r}, 32, {L}, 64, 7, {threads}"
        wide = f"{dtype!r}, 256, 1024, 256, 2, {threads}"
        window = f"{dtype!r}, {L}, {L}, 32, 2, {threads}, 'qkv', 'all_options', (40, 0)"
        calls += [f"{few_rows}, {wrt!r}" for wrt in ("qkv", "q", "v")] + [f"{wide}, 'qkv'", window]
    run_here(*(f"backward_workspace({call})" for call in calls), **MALLOC)


# ---------------------------------------------------------------- more than there is

big = 2**31 - 1
ABSURD = {  # shapes of q, k, v and options; zeros that are broadcast, so only the call takes memory
    "out": ((1, 2**45, 1), (1, 1, 1), (1, 1, 1), {}),
    "64_bit_out": ((1, 2**59, 0), (1, 1, 0), (1, 1, 8), {}),
    "lse": ((1, 2**59, 0), (1, 1, 0), (1, 1, 0), {}),
    "heads": ((2**40, 1, 0), (2**40, 1, 0), (2**40, 1, 0), {}),
    "batch": ((2**20, 2**20, 1, 1, 0),) * 3 + ({},),
    "dk": ((1, 1, 1), (1, 2**45, 1), (1, 2**45, 1), dict(kv_lens=3)),
    "sums_of_dv": ((1, 2, 1), (1, 2**58, 1), (1, 2**58, 0), dict(kv_lens=3)),
    "D": ((1, 1, 2**30), (1, 1, 2**30), (1, 1, 1), {}),
    "largest_int_D": ((1, 1, big), (1, 1, big), (1, 1, 1), dict(kv_lens=0)),
    "64_bit_D": ((1, 1, 2**33), (1, 1, 2**33), (1, 1, 1), {}),
    "largest_int_Dv": ((1, 1, 1), (1, 1, 1), (1, 1, big), dict(kv_lens=0)),
    "64_bit_Dv": ((1, 1, 1), (1, 1, 1), (1, 1, 2**33), {}),
}


def absurd(dtype):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2)
    zero = DTYPES[dtype].type(0)
    for name, (*shapes, options) in ABSURD.items():
        print(name, flush=True)
        q, k, v = (np.broadcast_to(zero, shape) for shape in shapes)
        try:
            r = attention_forward(q, k, v, **options)
            attention_backward(r.out, q, k, v, *r, wrt=("k", "v"), **options)
        except MemoryError as error:
            assert str(error), "a MemoryError without a word"
        else:
            raise AssertionError("no MemoryError")
        small = np.ones((1, 2, 3), DTYPES[dtype])
        assert_same_bits(attention_forward(small, small, small).out, small)


@linux
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_more_than_there_is_gives_a_memory_error(dtype):
    run_here(f"absurd({dtype!r})")


# ---------------------------------------------------------------- what is touched, and where


class Elsewhere:
    """A backend that has _cpu compute on copies of all arrays, which `place` puts somewhere.

    `place(x, output)` gives an array like x (the same values if not output) and a check to make
    after the call.
    """

    def __init__(self, place):
        self.place = place

    def compute(self, function, problem, inputs, outputs):
        problem = problem._replace(
            **{
                name: self.place(x, False)[0]
                for name, x in problem._asdict().items()
                if isinstance(x, np.ndarray)
            }
        )
        inputs = [x if x is None else self.place(x, False)[0] for x in inputs]
        placed = [(x, None) if x is None else self.place(x, True) for x in outputs]
        function(problem, *inputs, *(x for x, _ in placed))
        for to, (x, check) in zip(outputs, placed):
            if to is not None:
                check()
                np.copyto(to, x)

    def forward(self, problem, *results):
        self.compute(_cpu.forward, problem, [], results)

    def backward(self, problem, *arrays):
        self.compute(_cpu.backward, problem, arrays[:4], arrays[4:])


@contextlib.contextmanager
def computing(place):
    before = _backends._BACKENDS[np.ndarray]
    _backends._BACKENDS[np.ndarray] = Elsewhere(place)
    try:
        yield
    finally:
        _backends._BACKENDS[np.ndarray] = before


PAGE = mmap.PAGESIZE
NO_ACCESS, READ_ONLY = 0, 1  # PROT_NONE, PROT_READ
UNTOUCHED = 0xA5


def protect(address, size, how):
    libc = ctypes.CDLL(None, use_errno=True)
    if size and libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), how):
        raise OSError(ctypes.get_errno(), "mprotect")


def between_guards(at_end, spread):
    """A place whose arrays reach to a page that no one may touch, at their end or their start.

    Inputs cannot be written. Outputs, their last axis spread out, may be written at their elements
    only.
    """

    def place(x, output):
        if output and spread and 0 not in x.strides:
            x = np.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]
        low, high = byte_bounds(x) if x.size else (0, 0)
        first = x.__array_interface__["data"][0] - low if x.size else 0
        pages = -(-(high - low) // PAGE) * PAGE
        mapping = mmap.mmap(-1, pages + 2 * PAGE)
        memory = np.frombuffer(mapping, np.uint8)
        memory[:] = UNTOUCHED
        start = PAGE + pages - (high - low) if at_end else PAGE
        placed = np.ndarray(x.shape, x.dtype, mapping, start + first, x.strides)
        if not output:
            np.copyto(placed, x)
            protect(memory.ctypes.data + PAGE, pages, READ_ONLY)
        for guard in (0, PAGE + pages):
            protect(memory.ctypes.data + guard, PAGE, NO_ACCESS)

        def check():
            result = placed.copy()
            placed.view(f"u{x.itemsize}")[...] = int.from_bytes([UNTOUCHED] * x.itemsize)
            assert (memory[PAGE : PAGE + pages] == UNTOUCHED).all(), "written beside a result"
            np.copyto(placed, result)

        return placed, check

    return place


def columns(x):
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def padded(x):
    return np.concatenate([x, x[..., :1], x[..., :1], x[..., :1]], axis=-1)[..., : x.shape[-1]]


LAYOUTS = {
    "tight": lambda x: x,
    "padded": padded,
    "every_second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "columns": columns,
    "backwards": lambda x: np.flip(np.flip(x).copy()),
    "heads_last": lambda x: np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3),
}
SHAPES = [  # Lq, Lk, D, Dv
    (1, 1, 1, 1), (3, 5, 3, 2), (5, 9, 64, 64), (17, 40, 40, 24), (33, 129, 17, 15),
    (65, 7, 34, 30), (97, 131, 31, 33), (2, 257, 16, 128), (0, 3, 4, 5), (3, 0, 5, 4), (4, 5, 0, 0),
]  # fmt: skip


OPTION_NAMES = ("plain", "causal", "masks", "masks_of_keys", "everything")


def options_for(rng, Lq, Lk, dtype):
    masks = dict(
        attn_mask=rng.random((2, 4, Lq, Lk)) < 0.7,
        bias=padded(rng.standard_normal((4, Lq, Lk)).astype(dtype)),
    )
    return {
        "plain": {},
        "causal": dict(is_causal=True, causal_offset="lower_right"),
        "masks": masks,
        "masks_of_keys": dict(
            attn_mask=rng.standard_normal((2, 1, 1, Lk)).astype(dtype)[..., ::-1],
            bias=rng.standard_normal((4, Lq, 1)).astype(dtype),
        ),
        "everything": dict(
            masks, q_segment_ids=np.arange(Lq) // 9, kv_segment_ids=np.arange(Lk) // 11,
            q_lens=[Lq, Lq // 2], kv_lens=[Lk // 2, Lk], alibi_slopes=rng.random(4),
            sinks=rng.random(4), softcap=2.0, dropout_p=0.2, seed=3, window_size=(20, 20),
        ),
    }  # fmt: skip


def guard_pages(dtype, share):
    """Run one in `share` of all combinations; any shape, option and layout is in some of them."""
    combinations = itertools.product(SHAPES, OPTION_NAMES, (False, True), LAYOUTS)
    mask_dtypes = itertools.cycle(DTYPES.values())
    for shape, name, at_end, layout in itertools.islice(combinations, 0, None, share):
        print(dtype, shape, name, layout, f"{at_end=}", flush=True)
        rng = np.random.default_rng(0)
        Lq, Lk, D, Dv = shape
        options = options_for(rng, Lq, Lk, next(mask_dtypes))[name]
        case = make_case(
            rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=Lq, Lk=Lk, D=D, Dv=Dv, **options
        )
        expected = case.run()
        arrays = {x: LAYOUTS[layout](getattr(case, x)) for x in ("q", "k", "v", "dout")}
        with computing(between_guards(at_end, spread=layout != "tight")):
            assert_same_bits(case.with_(**arrays).run(), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="pages are guarded by mprotect")
@kernels
@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow, id="all"), 17])
def test_nothing_is_touched_beside_the_arrays(isa, dtype, share):
    run_here(f"guard_pages({dtype!r}, {share})", isa=isa)


def test_the_guards_guard():
    """A read and a write beside an array, and a write to an input, do end the process."""
    for do in ("x[-1].__array_interface__['data'][0]", "0"):
        code = f"""
            import ctypes, numpy as np, test_memory as m
            x, _ = m.between_guards(True, False)(np.ones(5, np.float32), False)
            assert x.sum() == 5
            print("here", flush=True)
            if {do} == 0:
                x[0] = 1
            ctypes.string_at(x.ctypes.data + 20, 1)
        """
        with pytest.raises(AssertionError, match="(?s)exit status -.*here"):
            run_python(code)


# ---------------------------------------------------------------- more than 2^31 elements


def far_apart(axis, step, directory):
    """A place where neighbours along an axis lie 2^31 elements and more apart, in a sparse file."""

    def place(x, output):
        strides = list(x.strides)
        if x.ndim >= max(2, -axis) and x.shape[axis] > 1 and strides[axis]:
            like = np.empty_like(x)
            strides = list(like.strides)
            strides[axis] = step * (2**31 + 9) * x.itemsize
        extent = [(n - 1) * s for n, s in zip(x.shape, strides)]
        first = -sum(s for s in extent if s < 0)
        size = first + sum(s for s in extent if s > 0) + x.itemsize
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        placed = np.ndarray(x.shape, x.dtype, memory, first, strides)
        if not output:
            np.copyto(placed, x)
        return placed, lambda: None

    return place


@pytest.mark.parametrize("step", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("axis", [-1, -2, -3, -4], ids=["columns", "rows", "heads", "batch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbours_are_far_apart(axis, step, dtype, tmp_path, rng):
    """In all inputs and all results."""
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=3, Lk=5, D=4, Dv=3, dlse=True,
        attn_mask=rng.random((2, 4, 3, 5)) < 0.7, bias=rng.standard_normal((2, 4, 3, 5)),
        q_segment_ids=[[0, 1, 1], [2, 2, 2]], kv_segment_ids=[[0, 1, 1, 1, 0], [2, 3, 2, 2, 2]],
        is_causal=True, causal_offset=3,
    )  # fmt: skip
    expected = case.run()
    with computing(far_apart(axis, step, tmp_path)):
        assert_same_bits(case.run(), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_more_than_2_31_keys(dtype, tmp_path, rng):
    """Only the last of them are seen by any row, through a window; the rest is never read."""
    n, few, dtype = 2**31 + 1234, 500, DTYPES[dtype]
    start = (n - few) // 128 * 128
    few = n - start

    def sparse(name, *shape, dtype=dtype):
        memory = np.memmap(tmp_path / name, dtype, "w+", shape=(1, n, *shape))
        return np.asarray(memory)

    small = make_case(
        rng, dtype, Hq=2, Hkv=1, Lq=7, Lk=few, D=3, Dv=2, dlse=False, causal_offset=few - 100,
        window_size=(150, 50), attn_mask=rng.random((1, few)) < 0.8, q_segment_ids=1,
        kv_segment_ids=np.arange(few) // 400, alibi_slopes=np.array([0.01, 0.1]),
    )  # fmt: skip
    k, v = sparse("k", 3), sparse("v", 2)
    mask, segments = sparse("mask", dtype=bool), sparse("segments", dtype=np.int64)
    k[:, start:], v[:, start:] = small.k, small.v
    mask[:, start:] = small.options["attn_mask"]
    segments[:, start:] = small.options["kv_segment_ids"]
    large = small.with_(k=k, v=v, attn_mask=mask, kv_segment_ids=segments[0], causal_offset=n - 100)
    out, lse = large.forward()
    assert_forward(small.q, small.k, small.v, out, lse, **small.options)
    grads = large.backward(out, lse, wrt=("q", "alibi_slopes"))
    assert_gradients(
        small.dout, small.q, small.k, small.v, out, lse, grads,
        wrt=("q", "alibi_slopes"), **small.options,
    )  # fmt: skip


def test_more_than_2_31_keys_of_stride_0(rng):
    """Every key is the same key, and every row the same row."""
    n = 2**31 + 5
    row = rng.standard_normal((1, 1, 8)).astype(np.float32)
    k = np.broadcast_to(row, (1, n, 8))
    mask = np.broadcast_to(np.True_, (1, 2, n))
    q = np.broadcast_to(row, (1, 2, 8))
    offsets = dict(window_size=(9, 9), causal_offset=n - 5)
    out, lse = attention_forward(q, k, k, attn_mask=mask, **offsets)
    np.testing.assert_allclose(out, q, rtol=1e-6)
    scores = (row * row).sum() / np.sqrt(8)
    np.testing.assert_allclose(lse, [scores + np.log([14, 13])], rtol=1e-6)
    dq = attention_backward(out, q, k, k, out, lse, attn_mask=mask, wrt="q", **offsets).dq
    np.testing.assert_allclose(dq, 0, atol=1e-5)


def test_out_beyond_2_31_elements(tmp_path, rng):
    """out and lse as slots of a buffer larger than that; nothing beside them is written."""
    memory = np.memmap(tmp_path / "out", np.float32, "w+", shape=(2**31 + 2**20,))
    case = make_case(rng, np.float32, Hq=1, Lq=5, Lk=6, D=7)
    start, step = 100, (2**31 // 4) + 1000
    strides = (0, 4 * step, 4)
    out = as_strided(memory[start:], (1, 5, 7), strides)
    lse = as_strided(memory[start + 7 :], (1, 5), strides[:2])
    around = as_strided(memory, (5, 1000), strides[1:])
    around[:] = 7
    case.forward(out=(out, lse))
    assert_same_bits(out, case.forward().out)
    assert_same_bits(lse, case.forward().lse)
    out[:] = lse[:] = 7
    assert (around == 7).all()
