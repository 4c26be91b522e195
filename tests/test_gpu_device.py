"""What only a GPU has: streams, graphs, options on the device, and a CPU to agree with.

What both devices promise is tested elsewhere, with the same tests. Here, a Case of NumPy arrays
computes on the CPU, or on the GPU under the fixture `gpu`; one of CuPy arrays, see `on_device`, is
passed on as it is.
"""

import gc
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import (
    DTYPES,
    OPTIONS,
    Case,
    assert_same_bits,
    assert_targets_agree,
    bits,
    call,
    computing_on,
    draw_case,
    inf,
    make_case,
    nan,
    option_case,
    run_python,
    to_device,
    to_host,
)  # fmt: skip

from fastattn import merge_attention_states, safe_softmax, safe_softmax_backward
from fastattn.attention import attention_backward, attention_forward
from fastattn.testing import (
    assert_forward,
    assert_gradients,
    dropout_keep,
    reference_backward,
    reference_forward,
)

cupy = sys.modules.get("cupy")  # imported by conftest.py where FASTATTN_TEST_BACKENDS asks for it
pytestmark = pytest.mark.gpu
MiB, GiB = 1 << 20, 1 << 30


@pytest.fixture
def gpu():
    with computing_on("cupy"):
        yield


@pytest.fixture
def memory():
    """The free bytes of the device, after all that other tests left was given back."""
    pool = cupy.get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    yield cupy.cuda.Device().mem_info[0]
    gc.collect()
    pool.free_all_blocks()


@pytest.fixture
def no_plans(monkeypatch):
    """Each call is planned anew."""
    from fastattn._gpu import driver

    class Forgetful(dict):
        def get(self, key):
            return None

    monkeypatch.setattr(driver, "_plans", Forgetful())
    monkeypatch.setattr(driver, "_known", Forgetful())


def needs(free, size):
    if free < size:
        pytest.skip(f"needs {size / GiB:.0f} GiB of device memory, {free / GiB:.0f} are free")


def on_device(case):
    """The same Case of CuPy arrays, laid out alike."""
    arrays = to_device((case.q, case.k, case.v, case.dout, case.dlse, case.options))
    return Case(*arrays)


def on_gpu(case, **kwargs):
    """What a Case of NumPy arrays gives on the GPU."""
    with computing_on("cupy"):
        return case.run(**kwargs)


_SPIN = """
extern "C" __global__ void spin(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""


def spin(seconds):
    """Keep the current stream busy, and the host not."""
    cupy.RawKernel(_SPIN, "spin")((1,), (1,), (np.int64(seconds * 1e9),))


# ---------------------------------------------------------------- the helpers


def test_copies_on_the_device_lie_as_the_arrays_do(rng):
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    arrays = {
        "plain": x, "flipped": x[::-1, :, ::-2], "columns": x.T, "unaligned": odd, "none": x[:0],
        "spread": np.broadcast_to(x[0, 0], (7, 5)), "bool": x[1:] > 0, "scalar": np.array(3.0),
        "bfloat16": x.astype(DTYPES["bfloat16"])[:, 1:], "int": np.arange(7)[::-1],
    }  # fmt: skip
    copies = to_device(arrays)
    for name, array in arrays.items():
        assert type(copies[name]) is cupy.ndarray
        if array.size:
            assert copies[name].strides == array.strides, name
            assert (copies[name].data.ptr - array.ctypes.data) % 16 == 0, name
        back = to_host(copies[name])
        assert (back.shape, back.dtype, bits(back)) == (array.shape, array.dtype, bits(array))
        assert back.strides == array.strides or not array.size, name
    shared = arrays["columns"].ctypes.data - x.ctypes.data
    assert copies["columns"].data.ptr - copies["plain"].data.ptr == shared


def test_a_call_that_writes_where_it_may_not_is_noticed(gpu):
    x, result = np.ones((2, 3), np.float32), np.ones(4, np.float32)

    def beside(x):
        cupy.ndarray((1,), x.dtype, x.data + x.nbytes).fill(5)

    def beside_result(x):
        beside(cupy.empty(1, x.dtype))

    for wrong in (lambda x: x.fill(5), beside, beside_result):
        with pytest.raises(AssertionError, match="was written"):
            call(wrong, x)
    call(lambda x, out: out.fill(5), x, out=result)
    assert (result == 5).all()
    assert np.isnan(call(lambda: cupy.empty(4, np.float32))).all()


# ---------------------------------------------------------------- the CPU and the GPU


@pytest.mark.parametrize(
    "name", ["none", "lower_right", "sinks_of_dead_rows", "dropout", "everything"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_and_the_gpu_agree(dtype, name, rng):
    case = option_case(rng, DTYPES[dtype], name)
    assert_targets_agree(on_gpu(case), case.run())


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_and_the_gpu_agree_on_random_problems(dtype, number):
    """Both keep to the oracle, and have the same rows dead."""
    case = draw_case(number, dtype)
    on_the_cpu = case.check()
    with computing_on("cupy"):
        on_the_gpu = case.check()
    assert on_the_cpu.keys() == on_the_gpu.keys()
    assert_same_bits(on_the_gpu["lse"] == -inf, on_the_cpu["lse"] == -inf)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize(("Lq", "Lk"), [(40, 60), (1, 64), (64, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_pairs_that_it_should(dtype, Lq, Lk, dropout_p, gpu):
    """Every pair counts alike, and v and dout are the identity: out and dv show what is kept."""
    dtype, lead, H, seed = DTYPES[dtype], (2, 2), 4, 0xDEADBEEF_12345678
    keep = dropout_keep(seed, dropout_p, 4, H, Lq, Lk).reshape(*lead, H, Lq, Lk)
    options = dict(dropout_p=dropout_p, seed=seed)

    def zeros(heads, *shape):
        return np.zeros((*lead, heads, *shape), dtype)

    q, k, v = zeros(H, Lq, 8), zeros(2, Lk, 8), zeros(2, Lk, Lk) + np.eye(Lk, dtype=dtype)
    out = call(attention_forward, q, k, v, **options).out
    np.testing.assert_array_equal(out != 0, keep)

    k, v, dout = zeros(H, Lk, 8), zeros(H, Lk, Lq), zeros(H, Lq, Lq) + np.eye(Lq, dtype=dtype)
    out, lse = call(attention_forward, q, k, v, **options)
    dv = call(attention_backward, dout, q, k, v, out, lse, wrt="v", **options).dv
    np.testing.assert_array_equal(dv != 0, keep.swapaxes(-1, -2))


def test_dropout_of_a_long_row(gpu):
    """Keys that are shared out among blocks are counted from the row's first."""
    Lk, seed = 20_000, 3
    keep = dropout_keep(seed, 0.5, 1, 2, 1, Lk)[0]
    q, k = np.zeros((2, 1, 8), np.float32), np.zeros((2, Lk, 8), np.float32)
    for start in (0, 1000, 9_990, Lk - 32):
        v = np.zeros((2, Lk, 32), np.float32)
        v[:, start : start + 32] = np.eye(32)
        out = call(attention_forward, q, k, v, dropout_p=0.5, seed=seed).out
        np.testing.assert_array_equal(out != 0, keep[..., start : start + 32])


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_a_seed_on_the_device(seed, shape, rng):
    case = option_case(rng, np.float32, "dropout").with_(seed=seed)
    given = on_device(case).with_(seed=to_device(np.full(shape, seed, np.uint64)))
    assert_same_bits(to_host(given.run()), on_gpu(case))


# ---------------------------------------------------------------- integers on the device


def lengths_case(rng, **options):
    return make_case(rng, np.float32, lead=(2, 3), Hq=4, Hkv=2, Lq=37, Lk=70, D=24, **options)


@pytest.mark.parametrize("integer", ["int64", "int32", "uint16", "int8"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)], ids=str)
def test_lengths_on_the_device(shape, integer, rng):
    q_lens, kv_lens = rng.integers(0, 38, shape), rng.integers(0, 71, shape)
    case = lengths_case(rng, is_causal=True, causal_offset="lower_right")
    on_host = case.with_(q_lens=q_lens.tolist(), kv_lens=kv_lens.tolist())
    arrays = (np.asarray(x).astype(integer) for x in (q_lens, kv_lens))
    given = dict(zip(("q_lens", "kv_lens"), to_device(tuple(arrays))))
    assert_same_bits(to_host(on_device(case).with_(**given).run()), on_gpu(on_host))


@pytest.mark.parametrize("offset", [0, 5, "lower_right"])
def test_lengths_beyond_their_axis_are_clamped(offset, rng):
    """On the device they are not checked, for that would have to wait."""
    case = lengths_case(rng, is_causal=True, causal_offset=offset)
    far = np.array([[-1, 71, 2**40], [-(2**63), 2**63 - 1, 38]])
    given = to_device(dict(q_lens=far, kv_lens=far[::-1]))
    clamped = case.with_(q_lens=far.clip(0, 37), kv_lens=far[::-1].clip(0, 70))
    assert_same_bits(to_host(on_device(case).with_(**given).run()), on_gpu(clamped))


@pytest.mark.parametrize("lengths", ["q_lens", "kv_lens"])
def test_one_of_the_lengths_on_the_device(lengths, rng):
    case = lengths_case(rng, is_causal=True, causal_offset="lower_right")
    values = rng.integers(0, 37, (2, 3))
    given = on_device(case).with_(**{lengths: to_device(values)})
    assert_same_bits(to_host(given.run()), on_gpu(case.with_(**{lengths: values.tolist()})))


def test_offsets_and_segments_on_the_device_and_on_the_host(rng):
    case = lengths_case(rng, is_causal=True, window_size=(30, 9))
    options = dict(
        causal_offset=rng.integers(-9, 40, (2, 3)), q_segment_ids=np.arange(37) // 30,
        kv_segment_ids=np.sort(rng.integers(0, 3, (2, 1, 70))),
    )  # fmt: skip
    expected = on_gpu(case.with_(**options))
    on_host = {name: x.tolist() for name, x in options.items()}
    assert_same_bits(on_gpu(case.with_(**on_host)), expected)
    assert_same_bits(to_host(on_device(case).with_(**options).run()), expected)
    strided = {name: np.repeat(x, 2, axis=-1)[..., ::2] for name, x in options.items()}
    assert_same_bits(on_gpu(case.with_(**strided)), expected)


# ---------------------------------------------------------------- the same bits


def busy_case(rng, dtype, name):
    """Enough blocks to fill a GPU several times."""
    sizes, options = {
        "prefill": (dict(lead=(4,), Hq=16, Hkv=4, Lq=500, Lk=700, D=64), dict(is_causal=True)),
        "decode": (dict(lead=(3,), Hq=16, Hkv=2, Lq=1, Lk=9000, D=64), {}),
        "few_heads": (dict(Hq=2, Hkv=1, Lq=1500, Lk=1100, D=64), dict(window_size=(400, 400))),
        "general": (
            dict(lead=(4,), Hq=8, Hkv=2, Lq=300, Lk=500, D=64),
            dict(
                bias=rng.standard_normal((8, 1, 500)), sinks=rng.random(8), softcap=3.0,
                alibi_slopes=rng.random(8) / 50, dropout_p=0.1, seed=4,
                attn_mask=rng.random((300, 500)) < 0.9,
            ),
        ),
    }[name]  # fmt: skip
    return on_device(make_case(rng, dtype, **sizes, **options))


BUSY = ["prefill", "decode", "few_heads", "general"]


@pytest.mark.parametrize("name", BUSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_300_runs_give_the_same_bits(dtype, name, rng):
    case = busy_case(rng, DTYPES[dtype], name)
    expected, differ = case.run(), cupy.zeros((), bool)
    for _ in range(300):
        for result, x in case.run().items():
            words = (y.view(f"u{y.itemsize}") for y in (x, expected[result]))
            differ |= cupy.not_equal(*words).any()
    assert not differ


@pytest.mark.parametrize("name", ["decode", "few_heads", "bias_of_keys", "everything"])
def test_without_determinism_gradients_are_as_exact(name, rng):
    draw = busy_case if name in BUSY else lambda *args: on_device(option_case(*args))
    case = draw(rng, DTYPES["float16"], name)
    out, lse = case.forward()
    grads = to_host(case.backward(out, lse, deterministic=False))
    arrays = to_host((case.dout, case.q, case.k, case.v, out, lse))
    options = to_host(dict(case.options, dlse=case.dlse))
    assert_gradients(*arrays, grads, wrt=case.wrt, **options)


@pytest.mark.parametrize(
    "shape",
    [(1, 3000), (1, 20), (4, 900), (70, 300), (300, 500)],
    ids=lambda shape: "Lq{}-Lk{}".format(*shape),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_of_a_large_batch_have_the_bits_that_they_have_alone(dtype, shape, rng):
    """No split of keys and no tile is chosen by how much else there is to do."""
    Lq, Lk = shape
    case = on_device(
        make_case(
            rng, DTYPES[dtype], lead=(60,), Hq=8, Hkv=4, Lq=Lq, Lk=Lk, D=64, is_causal=True,
            causal_offset="lower_right",
        )
    )  # fmt: skip
    expected = to_host(case.run())
    arrays = case.q, case.k, case.v, case.dout, case.dlse
    for entries in (np.s_[:1], np.s_[37:38], np.s_[10:50]):
        part = Case(*(x[entries] for x in arrays), options=case.options).run()
        assert_same_bits(to_host(part), {name: x[entries] for name, x in expected.items()})
    for head in (0, 3):
        of_q, of_kv = np.s_[5:6, 2 * head : 2 * head + 2], np.s_[5:6, head : head + 1]
        where = dict.fromkeys(expected, of_q) | dict(dk=of_kv, dv=of_kv)
        part = Case(*(x[at] for x, at in zip(arrays, (of_q, of_kv, of_kv, of_q, of_q))))
        part = to_host(part.with_(**case.options).run())
        assert_same_bits(part, {name: x[where[name]] for name, x in expected.items()})


# ---------------------------------------------------------------- streams and threads


def functions(rng, name):
    """A function of nothing that calls public functions with CuPy arrays, and gives a dict."""
    if name in OPTIONS:
        return on_device(option_case(rng, DTYPES["float16"], name)).run
    scores = to_device(rng.standard_normal((4, 50, 60)).astype(np.float32))
    states = to_device(tuple(rng.standard_normal((4, 50, 60)[:n]) for n in (3, 2, 3, 2)))
    if name == "safe_softmax":
        return lambda: {
            "probs": (probs := safe_softmax(scores)),
            "dscores": safe_softmax_backward(scores, probs),
        }
    return lambda: merge_attention_states(*states)._asdict()


FUNCTIONS = [
    "none", "causal", "float_mask", "bias", "all_lens", "causal_offsets", "segments", "dropout",
    "sinks_of_dead_rows", "everything", "safe_softmax", "merge_attention_states",
]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_call_waits_for_the_gpu(name, rng):
    function = functions(rng, name)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(3):  # compiles, loads the kernels, and has memory in the pool
            expected = function()
        spin(0)
        expected = to_host(expected)
        spin(0.5)
        results = function()
        assert not stream.done
        assert_same_bits(to_host(results), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_run_on_the_current_stream(name, rng):
    """After what that stream was given before them, whatever the default stream does."""
    if name in OPTIONS:
        case = on_device(option_case(rng, DTYPES["float32"], name))
        function, x = case.run, case.q
    else:
        x = to_device(rng.standard_normal((4, 50, 60)).astype(np.float32))
        others = to_device(
            tuple(rng.standard_normal((4, 50, 60)[:n]).astype(np.float32) for n in (2, 3, 2))
        )

        def function():
            if name == "safe_softmax":
                return {"probs": safe_softmax(x)}
            return merge_attention_states(x, *others)._asdict()

    expected, content = to_host(function()), x.copy()
    x.fill(nan)
    default = cupy.cuda.get_current_stream()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.copyto(x, x)
        function()
        cupy.cuda.Device().synchronize()
        spin(0.2)
        cupy.copyto(x, content)
        assert_same_bits(to_host(function()), expected)
        with default:
            spin(1)
        results = to_host(function())
        assert stream.done and not default.done
        assert_same_bits(results, expected)
    default.synchronize()


@pytest.mark.parametrize("own", [True, False], ids=["own_streams", "one_stream"])
def test_calls_of_many_python_threads(own, rng):
    names = ["none", "causal", "everything", "all_lens", "bias", "dropout", "sinks", "softcap"]
    cases = [
        on_device(option_case(rng, dtype, name))
        for name, dtype in zip(names, [*DTYPES.values(), *DTYPES.values()])
    ]
    barrier, default = threading.Barrier(len(cases), timeout=60), cupy.cuda.get_current_stream()
    cupy.cuda.Device().synchronize()

    def work(case):
        with cupy.cuda.Stream(non_blocking=True) if own else default:
            barrier.wait()
            return [to_host(case.run()) for _ in range(20)]

    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(work, cases))
    for case, runs in zip(cases, results):
        expected = to_host(case.run())
        for actual in runs:
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_plan_serves_other_arrays(name, rng, request):
    """And other seeds: their results are those of calls that are planned for them."""
    case, other = (on_device(option_case(rng, DTYPES["float16"], name)) for _ in range(2))
    if "seed" in other.options:
        other.options["seed"] = 2**64 - 3
    results = [to_host(each.run()) for each in (case, other, case)]
    request.getfixturevalue("no_plans")
    for each, planned in zip((case, other, case), results):
        assert_same_bits(planned, to_host(each.run()))


# ---------------------------------------------------------------- graphs


def captured(stream, pool, case):
    """A Case on the device, the graph of its run, and where that leaves its results."""
    with cupy.cuda.using_allocator(pool.malloc):
        case = on_device(case)
        case.run()
        stream.begin_capture()
        try:
            results = case.run()
        finally:
            graph = stream.end_capture()
    return case, graph, results


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "name",
    ["none", "causal", "lower_right", "all_lens", "float_mask", "bias", "sinks", "causal_offsets",
     "segments", "dropout", "everything"],
)  # fmt: skip
def test_a_graph_is_replayed_with_other_contents(name, dtype, rng):
    first, other = (option_case(rng, DTYPES[dtype], name) for _ in range(2))
    if name in ("all_lens", "causal_offsets"):  # arrays may change, lists are the graph's own
        for case in (first, other):
            for option, x in case.options.items():
                if isinstance(x, list):
                    x = rng.integers(0, 37, 2) if case is other else np.array(x)
                    case.options[option] = x
    elif name == "dropout":
        for seed, case in enumerate((first, other)):
            case.options["seed"] = np.full(1, seed, np.uint64)
    pool = cupy.cuda.MemoryPool()  # no one else allocates from it, and it outlives the graph
    with cupy.cuda.Stream(non_blocking=True) as stream:
        case, graph, results = captured(stream, pool, first)
        case_of_other = on_device(other)
        expected = to_host(case_of_other.run())
        litter = [cupy.full(n << 16, nan) for n in range(1, 9)]
        del litter[::2]
        before, after = (
            (x.q, x.k, x.v, x.dout, x.dlse, *x.options.values()) for x in (case, case_of_other)
        )
        for x, y in zip(before, after):
            if isinstance(x, cupy.ndarray):
                cupy.copyto(x, y)
        for _ in range(2):
            graph.launch()
            assert_same_bits(to_host(results), expected)


def test_a_graph_holds_lengths_that_were_given_by_the_host(rng):
    """In lists, which are no one's memory when the graph is replayed."""
    case = option_case(rng, np.float32, "all_lens")
    expected = on_gpu(case)
    pool = cupy.cuda.MemoryPool()  # no one else allocates from it, and it outlives the graph
    with cupy.cuda.Stream(non_blocking=True) as stream:
        case, graph, results = captured(stream, pool, case)
        for fill in (1, 2):  # goes through the memory that copies from the host use
            on_device(case.with_(q_lens=[fill, fill + 1], kv_lens=[fill, 3])).run()
        graph.launch()
        assert_same_bits(to_host(results), expected)


# ---------------------------------------------------------------- sizes


# (D, Dv), each with one dtype: kernels are compiled for each class of sizes.
HEAD_SIZES = [
    (1, 300), (300, 1), (7, 33), (33, 7), (48, 72), (72, 48), (100, 130), (130, 100), (160, 160),
    (200, 64), (64, 200), (257, 80), (80, 257), (300, 300), (64, 512), (512, 64),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "D", "Dv"),
    [(dtype, *sizes) for dtype, sizes in zip(itertools.cycle(DTYPES), HEAD_SIZES)],
)
def test_head_sizes(dtype, D, Dv, rng, gpu):
    make_case(rng, DTYPES[dtype], Hq=2, Hkv=1, Lq=40, Lk=75, D=D, Dv=Dv, is_causal=True).check()


@pytest.mark.parametrize(
    ("group", "Lk"),
    [(2, 1), (3, 2), (4, 63), (5, 64), (7, 65), (8, 255), (8, 1000), (12, 4097), (16, 5000),
     (1, 20_000), (2, 12_345)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(dtype, group, Lk, rng, gpu):
    """One query per head, its keys shared out among blocks, and heads of a group together."""
    case = make_case(rng, DTYPES[dtype], lead=(2,), Hq=group, Hkv=1, Lq=1, Lk=Lk, D=64)
    case.with_(kv_lens=[Lk, Lk // 3]).check()


FEW_QUERIES = {
    "none": {},
    "lower_right": dict(is_causal=True, causal_offset="lower_right"),
    "window": dict(window_size=(600, 300), causal_offset=700),
    "lens": dict(q_lens=np.array([0, 2]), kv_lens=np.array([300, 1001])),
    "sinks": dict(sinks=np.array([0.5, -1, 3, 30, 2, 0]), kv_lens=np.array([0, 40])),
    "scale": dict(scale=3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW_QUERIES)
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (90, 96), (128, 128), (192, 128), (256, 256)])
def test_few_queries_keep_to_the_oracle(D, Dv, name, rng, gpu):
    options = FEW_QUERIES[name]
    for dtype, Lq, Lk in (("bfloat16", 2, 2100), ("float16", 5, 1111), ("float32", 3, 1030)):
        case = make_case(
            rng, DTYPES[dtype], lead=(2,), Hq=6, Hkv=2, Lq=Lq, Lk=Lk, D=D, Dv=Dv, **options
        )
        assert_forward(case.q, case.k, case.v, *case.forward(), **options)
        out = np.empty(case.q.shape[:-1] + (Dv,), np.float32)
        if case.q.dtype.itemsize == 2:
            wide = call(attention_forward, case.q, case.k, case.v, out=out, **options)
            assert np.array_equal(wide.out.astype(case.q.dtype), case.forward().out)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_few_queries_keep_poison_where_it_belongs(dtype, D, rng, gpu):
    """In whichever split, warp and tile it is."""
    Lk, seen = 1500, np.array([1400, 777])
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=3, Lk=Lk, D=D, is_causal=True,
        causal_offset=seen - 3, kv_lens=seen,
    )  # fmt: skip
    clean = case.forward()._asdict()
    for poison in (nan, inf):
        k, v = case.k.copy(), case.v.copy()
        for entry, count in enumerate(seen):
            k[entry, :, count:] = v[entry, :, count:] = poison
        found = case.with_(k=k, v=v).forward()._asdict()
        for name, x in found.items():
            assert_same_bits(x, clean[name], name)
        v[0, :, 1398], k[1, :, 776] = poison, nan  # which rows 1 and 2, and row 2 see
        found = case.with_(k=k, v=v).forward()._asdict()
        for entry, row in ((0, 1), (1, 2)):
            for name, x in found.items():
                assert_same_bits(x[entry, :, :row], clean[name][entry, :, :row], name)
            assert not np.isfinite(found["out"][entry, :, row:].astype(np.float32)).any()


@pytest.mark.parametrize("D", [64, 128, 256])
def test_few_queries_in_any_layout_have_the_same_bits(D, rng, gpu):
    case = make_case(rng, DTYPES["bfloat16"], lead=(2,), Hq=8, Hkv=2, Lq=2, Lk=1111, D=D)
    expected = case.forward()._asdict()
    for change in LAYOUTS:
        other = case.with_(q=change(case.q), k=change(case.k), v=change(case.v))
        assert_same_bits(other.forward()._asdict(), expected, change.__name__)


@pytest.mark.parametrize("Lk", [60, 1200])
def test_few_queries_of_large_values_are_finite(Lk, rng, gpu):
    """Sums that overflow though their mean does not."""
    case = make_case(rng, DTYPES["bfloat16"], Hq=4, Hkv=2, Lq=1, Lk=Lk, D=64)
    case = case.with_(v=np.full_like(case.v, 3e38))
    assert_forward(case.q, case.k, case.v, *case.forward())


def test_more_blocks_than_a_grid_is_high(rng, gpu):
    sizes = dict(Lq=2, Lk=3, D=4)
    options = dict(dropout_p=0.3, seed=1)
    make_case(rng, np.float32, lead=(65_537,), Hq=1, **sizes, **options).check()
    make_case(rng, np.float32, Hq=65_540, Hkv=32_770, **sizes, sinks=np.ones(65_540)).check()
    make_case(rng, np.float16, lead=(300,), Hq=300, Hkv=300, **sizes).check()


def test_leading_axes_that_do_not_collapse(rng, gpu):
    """Ten of them, in an order that no two share a stride."""
    lead = (2,) * 10
    spread = tuple(n if axis % 2 else 1 for axis, n in enumerate(lead))
    case = make_case(
        rng, np.float32, lead=lead, Hq=2, Hkv=1, Lq=3, Lk=4, D=4, is_causal=True,
        bias=rng.standard_normal((*lead, 2, 3, 4)), attn_mask=rng.random((*spread, 1, 3, 4)) < 0.8,
        kv_lens=rng.integers(0, 5, spread), q_segment_ids=rng.integers(0, 2, (*lead, 3)),
        kv_segment_ids=rng.integers(0, 2, (*spread, 4)), causal_offset=rng.integers(0, 3, lead),
    )  # fmt: skip
    expected = case.check()

    def scattered(x):
        order = (*range(0, 10, 2), *range(1, 10, 2)[::-1], *range(10, x.ndim))
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))

    options = {
        name: scattered(x) if isinstance(x, np.ndarray) else x for name, x in case.options.items()
    }
    arrays = map(scattered, (case.q, case.k, case.v, case.dout, case.dlse))
    assert_same_bits(Case(*arrays, options=options).run(), expected)


@pytest.mark.slow
def test_more_than_2_31_elements_of_k(memory, rng):
    """Zeros but for a few keys: the others together are one key, with the log of their number."""
    n, D = 2**25 + 3, 80
    needs(memory, 34 * GiB)
    few = make_case(rng, np.float16, lead=(1,), Hq=1, Lq=3, Lk=5, D=D, scale=2.0)
    few.k[..., 4, :] = few.v[..., 4, :] = 0
    places = [5, 2**31 // D - 1, 2**31 // D + 1, n - 1]
    k, v = (cupy.zeros((1, 1, n, D), np.float16) for _ in "kv")
    for row, place in enumerate(places):
        k[0, 0, place], v[0, 0, place] = to_device((few.k[0, 0, row], few.v[0, 0, row]))
    case = on_device(few).with_(k=k, v=v)
    results = case.run()
    few = few.with_(bias=np.array([0, 0, 0, 0, np.log(n - 4)]))
    out, lse = reference_forward(few.q, few.k, few.v, **few.options)
    expected = reference_backward(
        few.dout, few.q, few.k, few.v, out, lse, dlse=few.dlse, **few.options
    )
    np.testing.assert_allclose(to_host(results["lse"]), lse, atol=1e-3)
    for name, x in (("out", out), ("dq", expected.dq)):
        actual = to_host(results[name]).astype(np.float64)
        np.testing.assert_allclose(actual, x, atol=4e-3 * abs(x).max(), err_msg=name)
    for name, x in (("dk", expected.dk), ("dv", expected.dv)):
        for row, place in enumerate(places):
            actual = to_host(results[name][0, 0, place]).astype(np.float64)
            np.testing.assert_allclose(
                actual, x[0, 0, row], atol=4e-3 * abs(x[..., :4, :]).max(), err_msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("axis", [-1, -2, -3, -4], ids=["columns", "rows", "heads", "batch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbours_are_far_apart(axis, step, dtype, memory, rng):
    """2^31 elements and more, in all inputs and in out and lse."""
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=2, Lq=2, Lk=2, D=2, Dv=2,
        attn_mask=rng.random((2, 2, 2, 2)) < 0.8,
        bias=rng.standard_normal((2, 2, 2, 2)).astype(DTYPES[dtype]),
    )  # fmt: skip
    expected = on_gpu(case)
    apart = (2**31 + 9) * 4
    needs(memory, apart + GiB)
    storage = cupy.cuda.alloc(apart + MiB)
    slots = itertools.count(0, 1024)

    def placed(x):
        """x at a place of its own, its axis stretched over the storage."""
        strides = list(np.empty_like(x).strides)
        first = next(slots)
        if x.ndim >= -axis:
            strides[axis] = step * (2**31 + 9) * x.itemsize
            first += (2**31 + 9) * x.itemsize if step < 0 else 0
        there = cupy.ndarray(x.shape, x.dtype, storage + first, tuple(strides))
        for at in np.ndindex(*x.shape[:-1]):
            for column in range(x.shape[-1]):
                one = (*at, slice(column, column + 1))
                cupy.copyto(there[one], to_device(x[one]))
        return there

    arrays = map(placed, (case.q, case.k, case.v, case.dout, case.dlse))
    options = {name: placed(x) for name, x in case.options.items()}
    far = Case(*arrays, options=options)
    out, lse = (placed(np.zeros_like(expected[name])) for name in ("out", "lse"))
    far.forward(out=(out, lse))
    results = dict(out=out, lse=lse, **far.backward(out, lse)._asdict())
    for name, x in expected.items():
        compact = cupy.empty(x.shape, x.dtype)
        for at in np.ndindex(*x.shape[:-1]):
            for column in range(x.shape[-1]):
                one = (*at, slice(column, column + 1))
                cupy.copyto(compact[one], results[name][one])
        assert_same_bits(to_host(compact), x, name)


# ---------------------------------------------------------------- memory


def grown(function):
    """The bytes that a call takes from CUDA, all of its results among them."""
    function()  # and with it, what is kept between calls
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        results = function()
        total = pool.total_bytes()
        del results
    cupy.cuda.Device().synchronize()
    return total


MEMORY = {  # sizes and options
    "prefill": (dict(Hq=4, Lq=8192, Lk=8192, D=64), dict(is_causal=True)),
    "wide": (dict(Hq=2, Lq=8192, Lk=8192, D=256), {}),
    "walked": (dict(Hq=2, Lq=8192, Lk=8192, D=300, Dv=320), {}),
    "gqa": (dict(Hq=8, Hkv=2, Lq=4096, Lk=4096, D=128), {}),
    "decode": (dict(lead=(4,), Hq=16, Hkv=2, Lq=1, Lk=30_000, D=128), {}),
    "few_keys": (dict(Hq=2, Lq=100_000, Lk=64, D=64), {}),
    "few_rows": (dict(Hq=2, Lq=64, Lk=100_000, D=64), {}),
    "lens": (dict(lead=(2,), Hq=2, Lq=4096, Lk=4096, D=64), dict(kv_lens=[5, 4096])),
    "broadcast_masks": (
        dict(Hq=2, Lq=8192, Lk=8192, D=32),
        dict(
            attn_mask=np.ones(8192, bool), bias=np.zeros((1, 8192, 1), np.float16), softcap=5.0,
            alibi_slopes=np.ones(2, np.float32), dropout_p=0.5, seed=3, q_segment_ids=0,
            kv_segment_ids=np.zeros(8192, int), sinks=np.ones(2),
        ),
    ),
    "bias_of_keys": (
        dict(lead=(2,), Hq=4, Lq=8192, Lk=4096, D=32), dict(bias=np.zeros((4, 1, 4096)))
    ),
    "bias_of_all": (dict(lead=(2,), Hq=4, Lq=8192, Lk=4096, D=32), dict(bias=np.zeros(()))),
    "full_bias": (dict(Hq=2, Lq=4096, Lk=4096, D=32), dict(bias=np.zeros((1, 4096, 4096), "f2"))),
}  # fmt: skip


def makes_halves(D, options):
    """Whether the backward in float32 keeps its inputs as halves."""
    from fastattn._gpu import config, device

    here = device.device_of(cupy.cuda.Device().id)
    plain = options.keys() <= {"is_causal", "kv_lens"}
    chosen = config.choose("backward_q", here.arch, here.family, "float32", "", D, D)
    return plain and config.splitter(chosen) is not None


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_linear(dtype, name, memory, rng):
    """Promise 5: one array like dq, like dk and dv under GQA, rows, and partial results of splits;
    and halves of what is given, where a kernel makes them.

    Where Lq and Lk are both large, all scores, in float16, would be more than that.
    """
    sizes, options = MEMORY[name]
    case = on_device(make_case(rng, DTYPES[dtype], **sizes, **options))
    out, lse = case.forward()
    acc = lse.itemsize

    rows = 8 * lse.nbytes + MiB
    splits = 32 * MiB + case.k.nbytes
    used, allowed = grown(case.forward), out.nbytes + lse.nbytes + rows + splits
    assert used <= allowed, f"forward: {used / MiB:.1f} MiB, allowed {allowed / MiB:.1f}"

    results = [x for x in case.backward(out, lse) if x is not None]
    allowed = sum(x.nbytes for x in results) + rows + splits + acc * case.q.size
    if sizes.get("Hkv"):
        allowed += acc * (case.k.size + case.v.size)
    if dtype == "float32" and makes_halves(sizes["D"], options):
        allowed += 2 * (case.q.nbytes + case.k.nbytes)
    del results
    used = grown(lambda: case.backward(out, lse))
    assert used <= allowed, f"backward: {used / MiB:.1f} MiB, allowed {allowed / MiB:.1f}"


class Failing:
    """An allocator that has memory for so many requests."""

    def __init__(self, pool, requests):
        self.pool, self.left = pool, requests

    def __call__(self, size):
        if not self.left:
            raise cupy.cuda.memory.OutOfMemoryError(size, self.pool.total_bytes())
        self.left -= 1
        return self.pool.malloc(size)


@pytest.mark.parametrize("name", ["none", "all_lens", "everything"])
def test_a_failed_allocation_is_cupys_error_and_leaks_nothing(name, rng):
    """Whichever allocation it is."""
    case = on_device(option_case(rng, DTYPES["float16"], name))
    expected = to_host(case.run())
    pool = cupy.cuda.MemoryPool()
    for requests in itertools.count():
        try:
            with cupy.cuda.using_allocator(Failing(pool, requests)):
                results = case.run()
            break
        except cupy.cuda.memory.OutOfMemoryError as error:
            assert isinstance(error, MemoryError) and str(error)
        gc.collect()
        assert pool.used_bytes() == 0, f"after {requests} requests"
    assert requests >= 5  # out, lse, dq, dk, dv
    assert_same_bits(to_host(results), expected)


def test_more_memory_than_there_is(rng):
    case = on_device(make_case(rng, np.float16, Hq=1, Lq=1, Lk=3, D=8))
    q = cupy.broadcast_to(case.q, (2**20, 1, 1, 8))
    k, v = (cupy.broadcast_to(x, (2**20, 1, 3, 8)) for x in (case.k, case.v))
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=MiB)
    with cupy.cuda.using_allocator(pool.malloc):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            attention_forward(q, k, v)
        gc.collect()
        assert pool.used_bytes() == 0
        few = attention_forward(q[:9], k[:9], v[:9]).out
    alone = case.with_(q=q[0], k=k[0], v=v[0]).forward().out
    assert_same_bits(to_host(few[8]), to_host(alone))


# ---------------------------------------------------------------- devices and other libraries


@pytest.fixture
def second_device():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("this machine has one GPU")
    return cupy.cuda.Device(1)


@pytest.mark.parametrize("moved", ["k", "v", "attn_mask", "sinks", "kv_lens", "out"])
def test_arrays_of_two_devices_are_refused(moved, second_device, rng):
    case = on_device(
        option_case(rng, np.float32, "everything").with_(kv_lens=np.array([60, 70]))
    )  # fmt: skip
    given = dict(case.options, q=case.q, k=case.k, v=case.v, out=cupy.empty_like(case.dout))
    with second_device:
        given[moved] = given[moved].copy()
    with pytest.raises(TypeError, match=moved):
        attention_forward(**given)


def test_the_device_of_the_arrays_need_not_be_the_current_one(second_device, rng):
    case = option_case(rng, np.float32, "everything")
    expected = on_gpu(case)
    with second_device:
        elsewhere = on_device(case)
        cupy.cuda.Device().synchronize()
    results = elsewhere.run()
    assert all(x.device == second_device for x in results.values())
    with second_device:
        cupy.cuda.Device().synchronize()
        assert_same_bits(to_host(results), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_pytorch_give_cupy_arrays(dtype, rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA device")
    case = option_case(rng, DTYPES[dtype], "everything")
    expected = on_gpu(case)

    def tensor(x):
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(x.view(np.int16).copy()).cuda().view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(x)).cuda()

    options = {name: tensor(x) for name, x in case.options.items()}
    given = Case(*map(tensor, (case.q, case.k, case.v, case.dout, case.dlse)), options=options)
    torch.cuda.synchronize()
    results = given.run()
    assert all(type(x) is cupy.ndarray for x in results.values())
    assert_same_bits(to_host(results), expected)


# ---------------------------------------------------------------- kernel families


def check_some(family):
    """Problems of every dtype, plain and with all options, in a process with this family."""
    rng = np.random.default_rng(0)
    with computing_on("cupy"):
        for dtype, name in itertools.product(DTYPES.values(), ["lower_right", "everything"]):
            option_case(rng, dtype, name).check()
        make_case(rng, np.float16, Hq=8, Hkv=2, Lq=1, Lk=3000, D=128).check()
        make_case(rng, np.float32, Hq=2, Hkv=1, Lq=70, Lk=90, D=300, Dv=8).check()
        many_rows = dict(Hq=4, Hkv=2, Lq=200, Lk=300, D=72, is_causal=True)
        make_case(rng, DTYPES["bfloat16"], **many_rows).check()
    print(family)


def test_every_family_that_runs_here_keeps_to_the_oracle():
    from fastattn._gpu import config

    capability = int(cupy.cuda.Device().compute_capability)
    runnable = [name for name in config.FAMILIES if config.runs(name, capability)]
    for family in runnable:
        code = f"import test_gpu_device as m; m.check_some({family!r})"
        done = run_python(code, timeout=400, FASTATTN_GPU_ARCH=family)
        assert done.split() == [family]


# ---------------------------------------------------------------- Hopper's own kernels


@pytest.fixture
def ways(gpu, no_plans, monkeypatch):
    """How kernels were launched: "maps", or "loads" where tensor maps could not take an array;
    with `ways.only_loads = True`, all of them by loads."""
    from fastattn._gpu import device, driver

    if device.device_of(cupy.cuda.Device().id).family != "sm_90a":
        pytest.skip("this GPU has no kernels of sm_90a")

    class Ways(list):
        only_loads = False

    ways, make_maps = Ways(), driver._Call.maps

    def maps(self, *args):
        found = None if ways.only_loads else make_maps(self, *args)
        ways.append("loads" if found is None else "maps")
        return found

    monkeypatch.setattr(driver._Call, "maps", maps)
    return ways


HOPPER_OPTIONS = {
    "none": {},
    "causal": dict(is_causal=True),
    "lower_right": dict(is_causal=True, causal_offset="lower_right"),
    "offsets": dict(is_causal=True, causal_offset=np.array([-40, 33])),
    "window": dict(window_size=(10, 20)),
    "left_window": dict(window_size=(150, None), is_causal=True, causal_offset=7),
    "lens": dict(
        q_lens=np.array([60, 300]), kv_lens=np.array([0, 130]), is_causal=True,
        causal_offset="lower_right",
    ),
    "sinks": dict(sinks=np.array([0.5, -1, 3, 30]), window_size=(None, 0)),
    "scale": dict(scale=3.0),
}  # fmt: skip
HOPPER_HEADS = [
    (8, 8), (40, 40), (64, 64), (72, 96), (128, 128), (136, 24), (192, 192), (192, 128), (256, 256)
]  # fmt: skip
HOPPER_HEADS_OF_FLOAT32 = [
    (4, 4), (40, 40), (64, 64), (12, 100), (16, 72), (128, 128), (128, 20),
]  # fmt: skip


def hopper_cases(rng, sizes, name, **heads):
    """A case for each (Lq, Lk, dtype): at each length something else is cut."""
    for Lq, Lk, dtype in sizes:
        options = dict(HOPPER_OPTIONS[name])
        for lens, longest in (("q_lens", Lq), ("kv_lens", Lk)):
            if lens in options:
                options[lens] = np.minimum(options[lens], longest)
        yield make_case(
            rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=Lq, Lk=Lk, **heads, **options
        )


@pytest.mark.parametrize("name", HOPPER_OPTIONS)
@pytest.mark.parametrize(
    ("D", "Dv", "dtypes"),
    [(*head, "bfloat16 float16") for head in HOPPER_HEADS]
    + [(*head, "float32") for head in HOPPER_HEADS_OF_FLOAT32],
)
def test_hopper_forward_keeps_to_the_oracle_either_way(D, Dv, dtypes, name, ways, rng):
    """To the same bits."""
    lengths = ((300, 257), (65, 128), (193, 63))
    sizes = [(*n, dtype) for n, dtype in zip(lengths, itertools.cycle(dtypes.split()))]
    for case in hopper_cases(rng, sizes, name, D=D, Dv=Dv):
        ways.only_loads = False
        result = case.forward()
        assert_forward(case.q, case.k, case.v, *result, **case.options)
        ways.only_loads = True
        assert_same_bits(case.forward()._asdict(), result._asdict())
        assert ways[-2:] == ["maps", "loads"]


@pytest.mark.parametrize("name", HOPPER_OPTIONS)
@pytest.mark.parametrize(
    ("D", "Dv", "dtypes"),
    [(*head, "bfloat16 float16") for head in HOPPER_HEADS]
    + [(*head, "float32") for head in HOPPER_HEADS_OF_FLOAT32 if min(head) >= 16],
)
def test_hopper_backward_keeps_to_the_oracle_either_way(D, Dv, dtypes, name, ways, rng):
    """To the same bits."""
    lengths = ((300, 257), (65, 128), (1, 63))
    sizes = [(*n, dtype) for n, dtype in zip(lengths, itertools.cycle(dtypes.split()))]
    for case in hopper_cases(rng, sizes, name, D=D, Dv=Dv):
        ways.only_loads = False
        results = case.check()
        assert ways[-2:] == ["maps", "maps"]
        ways.only_loads = True
        assert_same_bits(case.run(), results)
        assert ways[-2:] == ["loads", "loads"]


@pytest.mark.parametrize("name", HOPPER_OPTIONS)
@pytest.mark.parametrize(("D", "Dv"), [sizes for sizes in HOPPER_HEADS if max(sizes) <= 128])
def test_hopper_backward_in_any_order_keeps_to_the_oracle(D, Dv, name, ways, rng):
    """Only the order of dq's sums is left to chance."""
    from fastattn._gpu import device

    sizes = ((300, 257, "bfloat16"), (65, 128, "float16"), (1, 63, "bfloat16"))
    for case in hopper_cases(rng, sizes, name, D=D, Dv=Dv):
        out, lse = case.forward()
        grads = case.backward(out, lse, deterministic=False)
        assert ways[-2:] == ["maps", "maps"]
        assert_gradients(
            case.dout, case.q, case.k, case.v, out, lse, grads, wrt=case.wrt, dlse=case.dlse,
            **case.options,
        )  # fmt: skip
        expected = case.backward(out, lse)
        assert_same_bits(grads.dk, expected.dk)
        assert_same_bits(grads.dv, expected.dv)
    assert {"hopper_backward_qkv", "hopper_finish_q"} <= {at[1].kernel for at in device._kernels}


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_backward_in_any_order_keeps_poison_where_it_belongs(dtype, D, ways, rng):
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=400, Lk=400, D=D, is_causal=True,
        kv_lens=np.array([400, 333]), q_lens=np.array([400, 383]),
    )  # fmt: skip
    out, lse = case.forward()
    clean = case.backward(out, lse)
    k, v, q, dout = (x.copy() for x in (case.k, case.v, case.q, case.dout))
    k[1, :, 333:] = v[1, :, 333:] = q[1, :, 383:] = dout[1, :, 383:] = nan
    k[0, :, 200] = nan
    found = case.with_(k=k, v=v, q=q, dout=dout).backward(out, lse, deterministic=False)
    dq, expected = (x.astype(np.float32) for x in (found.dq, clean.dq))
    assert not np.isfinite(dq[0, :, 200:]).any(-1).any()
    for cut in (np.s_[0, :, :200], np.s_[1]):
        np.testing.assert_allclose(dq[cut], expected[cut], rtol=0.02, atol=2e-3)
    assert not dq[1, :, 383:].any()
    assert_same_bits(found.dk[1], clean.dk[1])
    assert_same_bits(found.dv[1], clean.dv[1])


def gradients(case, results):
    """name -> array, of all that there are."""
    found = case.backward(*results)._asdict()
    return {name: x for name, x in found.items() if x is not None}


def unaligned(x):
    y = np.zeros(x.size + 8, x.dtype)[1 : 1 + x.size].reshape(x.shape)
    y[...] = x
    return y


def flipped(x):
    return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]


def swapped(x):
    return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)


def columns(x):
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


# and which way they are loaded
LAYOUTS = {swapped: "maps", unaligned: "loads", flipped: "loads", columns: "loads"}


@pytest.mark.parametrize(
    ("dtype", "D"),
    [*(("bfloat16", D) for D in (64, 128, 192, 256)), ("float32", 64), ("float32", 128)],
)
def test_hopper_forward_in_any_layout_has_the_same_bits(dtype, D, ways, rng):
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=300, Lk=270, D=D, is_causal=True
    )
    expected = case.forward()._asdict()
    for change, way in LAYOUTS.items():
        other = case.with_(q=change(case.q), k=change(case.k), v=change(case.v))
        assert_same_bits(other.forward()._asdict(), expected, change.__name__)
        assert ways[-1] == way


@pytest.mark.parametrize(
    ("dtype", "D"),
    [*(("bfloat16", D) for D in (64, 128, 192, 256)), ("float32", 64), ("float32", 128)],
)
def test_hopper_backward_in_any_layout_has_the_same_bits(dtype, D, ways, rng):
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=300, Lk=270, D=D, is_causal=True
    )
    results = case.forward()
    expected = gradients(case, results)
    for change, way in LAYOUTS.items():
        for names in (("q", "k", "v", "dout"), ("dout",)):
            other = case.with_(**{name: change(getattr(case, name)) for name in names})
            assert_same_bits(gradients(other, results), expected, change.__name__)
            own = "maps" if dtype == "float32" else way  # halves lie as they are wanted
            assert ways[-2:] == [own, own]


@pytest.mark.parametrize("repeated", ["heads", "keys"])
def test_hopper_forward_takes_broadcast_keys(repeated, ways, rng):
    case = make_case(rng, DTYPES["float16"], lead=(2,), Hq=4, Lq=150, Lk=140, D=128)
    one = case.k[:, :1] if repeated == "heads" else case.k[:, :, :1]
    spread = np.broadcast_to(one, case.k.shape)
    expected = case.with_(k=np.ascontiguousarray(spread)).forward()
    assert_same_bits(case.with_(k=spread).forward()._asdict(), expected._asdict())


@pytest.mark.parametrize(
    ("dtype", "D"),
    [
        *itertools.product(("float16", "bfloat16"), (64, 128, 256)),
        ("float32", 64),
        ("float32", 128),
    ],
)
def test_hopper_forward_keeps_poison_where_it_belongs(dtype, D, ways, rng):
    kv_lens = np.array([400, 333])
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=400, Lk=400, D=D, is_causal=True,
        kv_lens=kv_lens,
    )  # fmt: skip
    clean = case.forward()._asdict()
    for poison in (nan, inf):
        k, v = case.k.copy(), case.v.copy()
        k[0, :, 200] = v[0, :, 210] = k[1, :, 333:] = v[1, :, 333:] = poison
        found = case.with_(k=k, v=v).forward()._asdict()
        for name, x in found.items():
            assert_same_bits(x[0, :, :200], clean[name][0, :, :200], name)
            assert_same_bits(x[1], clean[name][1], name)
        assert not np.isfinite(found["out"][0, :, 210:].astype(np.float32)).any()


@pytest.mark.parametrize(
    ("dtype", "D"),
    [
        *itertools.product(("float16", "bfloat16"), (64, 128, 256)),
        ("float32", 64),
        ("float32", 128),
    ],
)
def test_hopper_backward_keeps_poison_where_it_belongs(dtype, D, ways, rng):
    lens = np.array([400, 333])
    case = make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=400, Lk=400, D=D, is_causal=True,
        kv_lens=lens, q_lens=lens + [0, 50],
    )  # fmt: skip
    out, lse = case.forward()
    clean = case.backward(out, lse)
    for poison in (nan, inf):
        k, v, q, dout = (x.copy() for x in (case.k, case.v, case.q, case.dout))
        k[1, :, 333:] = v[1, :, 333:] = q[1, :, 383:] = dout[1, :, 383:] = poison
        k[0, :, 200] = v[0, :, 210] = poison
        keys = case.with_(k=k, v=v, q=q, dout=dout).backward(out, lse)
        assert_same_bits(keys.dq[0, :, :200], clean.dq[0, :, :200])
        assert not np.isfinite(keys.dq[0, :, 200:].astype(np.float32)).all()
        dout[0, :, 100] = poison
        rows = case.with_(q=q, dout=dout).backward(out, lse)
        for name in ("dk", "dv"):
            found, expected = getattr(rows, name), getattr(clean, name)
            assert_same_bits(found[0, :, 101:], expected[0, :, 101:], name)
            assert not np.isfinite(found[0, :, :101].astype(np.float32)).any()
        for name in ("dq", "dk", "dv"):
            assert_same_bits(getattr(keys, name)[1], getattr(clean, name)[1], name)
            assert_same_bits(getattr(rows, name)[1], getattr(clean, name)[1], name)


# Factors of rows (-2) or columns (-1), spread over powers of ten: of k, where q has the inverse of
# columns, or of v. Rows beyond what halves hold, and scores that they leave to be made one by one.
SIZES = {
    "rows of k": ("k", -2, -20, 2), "columns of k": ("k", -1, -6, 6), "rows of v": ("v", -2, -4, 4),
    "any rows of v": ("v", -2, -30, 30), "columns of v": ("v", -1, -4, 4),
    "small v": ("v", -2, -30, -30), "large v": ("v", -2, 37, 37), "large k": ("k", -1, 30, 30),
    "large scores": ("k", -2, 5, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_forward_of_float32_of_any_size(D, name, ways, rng):
    """As accurate as ever, and to the same bits either way."""
    which, axis, low, high = SIZES[name]
    case = make_case(rng, np.float32, Hq=2, Lq=200, Lk=300, D=D, is_causal=True)
    x = getattr(case, which)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    factor = (10.0 ** rng.uniform(low, high, shape)).astype(np.float32)
    with np.errstate(under="ignore"):
        changed = {which: (x * factor).astype(np.float32)}
        if which == "k" and axis == -1:
            changed["q"] = (case.q / factor).astype(np.float32)
    case = case.with_(**changed)
    result = case.forward()
    assert_forward(case.q, case.k, case.v, *result, is_causal=True)
    ways.only_loads = True
    assert_same_bits(case.forward()._asdict(), result._asdict())
    assert ways == ["maps", "loads"]


# Likewise of a backward: what changes, and of which the inverse is another's factor.
GRADIENT_SIZES = {
    "rows of dout": (("dout",), -2, -4, 4), "small rows of dout": (("dout",), -2, -30, -10),
    "rows of q": (("q",), -2, -6, 0), "rows of v": (("v",), -2, -20, 4),
    "columns of k": (("k", "q"), -1, -6, 6), "columns of v": (("v", "dout"), -1, -2, 2),
    "far columns of v": (("v", "dout"), -1, -6, 6), "small v": (("v",), -2, -30, -30),
    "large v": (("v", "dout"), -1, 25, 25), "large q": (("q", "k"), -1, 25, 25),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENT_SIZES)
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_backward_of_float32_of_any_size(D, name, ways, rng):
    """As accurate as ever, and to the same bits either way."""
    which, axis, low, high = GRADIENT_SIZES[name]
    case = make_case(rng, np.float32, Hq=2, Lq=150, Lk=200, D=D, is_causal=True)
    shape = [1] * 3
    shape[axis] = getattr(case, which[0]).shape[axis]
    factor = (10.0 ** rng.uniform(low, high, shape)).astype(np.float32)
    case = case.with_(**{which[0]: getattr(case, which[0]) * factor})
    if len(which) == 2:
        case = case.with_(**{which[1]: getattr(case, which[1]) / factor})
    results = case.check()
    ways.only_loads = True
    assert_same_bits(case.run(), results)
    assert ways[-2:] == ["loads", "loads"]


@pytest.mark.parametrize("D", [64, 128])
def test_hopper_backward_of_float32_leaves_little_to_be_done_again(D, ways, rng, monkeypatch):
    """Nothing of ordinary numbers, causal rows of few keys among them."""
    from fastattn._gpu import driver

    monkeypatch.setattr(driver._Call, "launch_again", lambda call, config, blocks: None)
    case = make_case(rng, np.float32, Hq=4, Lq=1000, Lk=1000, D=D, is_causal=True)
    case.check()
    outlier = np.where(np.arange(D) == 3, 300, 1).astype(np.float32)
    dout = np.where(np.arange(D) < 3, case.dout, 0).astype(np.float32)
    case.with_(v=case.v * outlier, k=case.k * outlier, dout=dout).check()
    out, lse = case.forward()
    far = (10.0 ** rng.uniform(-9, 9, D)).astype(np.float32)
    other = case.with_(v=case.v * far, dout=case.dout / far)
    assert not np.isfinite(other.backward(out, lse).dq).any()


def test_hopper_forward_of_large_values_is_finite(ways, rng):
    """Sums that overflow though their mean does not."""
    case = make_case(rng, DTYPES["bfloat16"], Hq=2, Lq=200, Lk=300, D=64)
    case = case.with_(v=np.full_like(case.v, 3e38))
    assert_forward(case.q, case.k, case.v, *case.forward())


def elementwise_options(rng, name, dtype, Lq, Lk):
    """Of two batch entries and four query heads: one of the options that are read element by
    element, and what goes with it; with tiles that hold all pairs, none, or some."""
    if name == "softcap":
        return dict(softcap=2.0, is_causal=True)
    if name == "alibi":
        return dict(
            alibi_slopes=np.array([0.5, 0.01, 0, 1]), causal_offset=np.array([-40, 33]),
            window_size=(200, None), kv_lens=np.array([Lk, Lk // 2]),
        )  # fmt: skip
    if name == "dropout":
        return dict(dropout_p=0.3, seed=7, sinks=np.array([0.5, -1, 3, 30]))
    if name == "segments":  # some queries have no keys
        ids = np.array([3, 4, 5, -1])
        rows, keys = np.arange(Lq), np.arange(Lk)
        return dict(
            q_segment_ids=np.stack([ids[rows // 80 % 4], ids[rows // 90 % 3]]),
            kv_segment_ids=np.stack([ids[keys // 100 % 4], np.full(Lk, 5)]),
            q_lens=np.array([Lq, Lq - 3]),
        )
    if name == "mixed segments":
        return dict(
            q_segment_ids=rng.integers(0, 3, (2, Lq)), kv_segment_ids=rng.integers(0, 3, (2, Lk)),
            window_size=(150, 150),
        )  # fmt: skip
    some = rng.random((2, 4, Lq, Lk)) < 0.7
    some[:, :, 5] = some[:, 1, 64:192] = some[0, :, :, :40] = False
    numbers = rng.standard_normal(some.shape).astype(dtype)
    below = np.tril(np.ones((Lq, Lk), bool), -20)
    return {
        "bools": dict(attn_mask=some, is_causal=True, causal_offset="lower_right"),
        "causal bools": dict(attn_mask=below, sinks=np.array([0.5, -1, 3, 30])),
        "keys": dict(attn_mask=some[:, :1, 7:8], kv_lens=np.array([Lk, Lk // 3])),
        "queries": dict(attn_mask=some[:, :, :, 60:61]),
        "numbers": dict(
            attn_mask=np.where(some, numbers, -inf).astype(dtype), window_size=(None, 30)
        ),
        "numbers of few tiles": dict(attn_mask=np.where(below, 0, -inf).astype(dtype)),
        "low numbers": dict(bias=np.full((4, 1, Lk), -6e4 if dtype == "f2" else -3e38, dtype)),
        "bias": dict(bias=numbers[0], q_lens=np.array([Lq // 2, Lq])),
        "bias of keys": dict(bias=numbers[:, :, :1], is_causal=True),
    }[name]


HOPPER_ELEMENTWISE = (
    "softcap", "alibi", "dropout", "segments", "mixed segments", "bools", "causal bools", "keys",
    "queries", "numbers", "numbers of few tiles", "low numbers", "bias", "bias of keys",
)  # fmt: skip


def elementwise_case(rng, name, dtype, Lq, Lk, D, Dv=None):
    options = elementwise_options(rng, name, DTYPES[dtype], Lq, Lk)
    return make_case(
        rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=Lq, Lk=Lk, D=D, Dv=Dv, **options
    )


@pytest.mark.parametrize("name", HOPPER_ELEMENTWISE)
@pytest.mark.parametrize(("D", "Dv"), HOPPER_HEADS)
def test_hopper_forward_with_options_keeps_to_the_oracle_either_way(D, Dv, name, ways, rng):
    """To the same bits."""
    for Lq, Lk, dtype in ((300, 260, "bfloat16"), (65, 128, "float16"), (193, 64, "bfloat16")):
        case = elementwise_case(rng, name, dtype, Lq, Lk, D, Dv)
        ways.only_loads = False
        result = case.forward()
        assert_forward(case.q, case.k, case.v, *result, **case.options)
        ways.only_loads = True
        assert_same_bits(case.forward()._asdict(), result._asdict())
        assert ways[-2:] == ["maps", "loads"]


def cut(x):
    whole = np.zeros((*x.shape[:-1], x.shape[-1] + 6), x.dtype)
    whole[..., 4:-2] = x
    return whole[..., 4:-2]


def backwards(x):
    return x[..., ::-1].copy()[..., ::-1]


def spread(x):
    return np.ascontiguousarray(np.broadcast_to(x, (2, 4, 300, x.shape[-1])))


MASK_LAYOUTS = (cut, unaligned, columns, backwards, spread)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", ["bools", "keys", "numbers", "bias", "mixed segments"])
def test_hopper_forward_with_masks_of_any_layout_has_the_same_bits(name, D, ways, rng):
    case = elementwise_case(rng, name, "bfloat16", 300, 260, D)
    expected = case.forward()._asdict()
    changed = {"attn_mask", "bias", "q_segment_ids", "kv_segment_ids"} & {*case.options}

    changes = MASK_LAYOUTS[: 2 if name == "mixed segments" else None]
    for change in changes:
        found = case.with_(**{n: change(case.options[n]) for n in changed}).forward()
        assert_same_bits(found._asdict(), expected)
    assert ways == ["maps"] * (1 + len(changes))  # not those of sm_80


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", ["causal bools", "numbers of few tiles", "segments", "softcap"])
def test_hopper_forward_with_options_keeps_poison_where_it_belongs(name, D, ways, rng):
    case = elementwise_case(rng, name, "bfloat16", 300, 300, D)
    clean = case.forward()._asdict()
    keys = np.s_[0, :, 220:230]
    seen = case.live()[0, :, :, 220:230].any(-1)
    assert seen.any() and not seen.all()
    for poison in (nan, inf):
        k, v = case.k.copy(), case.v.copy()
        k[keys] = v[keys] = poison
        found = case.with_(k=k, v=v).forward()._asdict()
        for what, x in found.items():
            assert_same_bits(x[0][~seen], clean[what][0][~seen], what)
            assert_same_bits(x[1], clean[what][1], what)
        assert not np.isfinite(found["out"][0][seen].astype(np.float32)).any()


def options_of_many_tiles(rng, name, L):
    below = np.tril(rng.random((L, L)) < 0.99, -5)
    below[256:512] = below[:, 300:500] = False
    return {
        "bools": dict(attn_mask=below),
        "numbers": dict(attn_mask=np.where(below, 0.5, -inf).astype(DTYPES["bfloat16"])),
        "segments": dict(q_segment_ids=np.arange(L) // 150, kv_segment_ids=np.arange(L) // 150 * 2),
        # Some warpgroups are left nothing of the blocks that they see, but others are.
        "window": dict(attn_mask=np.arange(L) // 128 % 2 == 0, window_size=(32, 0)),
        "dropout": dict(dropout_p=0.5, seed=3),
    }[name]


@pytest.mark.parametrize(("D", "L", "Hq"), [(64, 1000, 24), (128, 1100, 16), (256, 700, 20)])
@pytest.mark.parametrize("name", ["bools", "numbers", "segments", "window", "dropout"])
def test_hopper_forward_with_options_and_many_tiles(name, D, L, Hq, ways, rng):
    """Several tiles for each block, some of them without any keys; every head is as it is alone,
    but for dropout, which is drawn by heads."""
    options = options_of_many_tiles(rng, name, L)
    shape = dict(lead=(2,), Hq=Hq, Hkv=Hq // 4, Lq=L, Lk=L, D=D)
    case = make_case(rng, DTYPES["bfloat16"], **shape, **options)
    together = case.forward()
    assert_same_bits(case.forward()._asdict(), together._asdict())
    for b, h in ((0, 0), (1, Hq - 1), (1, 5)):
        if name == "dropout" and (b, h) != (0, 0):
            continue
        kv = np.s_[b : b + 1, h // 4 : h // 4 + 1]
        q = case.q[b : b + 1, h : h + 1]
        result = case.with_(q=q, k=case.k[kv], v=case.v[kv]).forward()
        assert_forward(q, case.k[kv], case.v[kv], *result, **options)
        assert_same_bits(together.out[b : b + 1, h : h + 1], result.out)
        assert_same_bits(together.lse[b : b + 1, h : h + 1], result.lse)
    assert set(ways) == {"maps"}


# Those that Hopper's backward serves for heads of any size.
HOPPER_BITS = ("segments", "mixed segments", "bools", "causal bools", "keys", "queries")


@pytest.mark.parametrize(
    ("D", "Dv", "name"),
    [
        (*sizes, name)
        for sizes, name in itertools.product(HOPPER_HEADS, HOPPER_ELEMENTWISE)
        if max(sizes) <= 128 or name in HOPPER_BITS
    ],
)
def test_hopper_backward_with_options_keeps_to_the_oracle_either_way(D, Dv, name, ways, rng):
    """To the same bits."""
    for Lq, Lk, dtype in ((300, 260, "bfloat16"), (65, 128, "float16"), (193, 64, "bfloat16")):
        case = elementwise_case(rng, name, dtype, Lq, Lk, D, Dv)
        ways.only_loads = False
        results = case.check()
        assert ways[-2:] == ["maps", "maps"]
        ways.only_loads = True
        assert_same_bits(case.run(), results)
        assert ways[-2:] == ["loads", "loads"]


@pytest.mark.parametrize(
    ("D", "name"),
    [
        *itertools.product((64, 128), ("bools", "keys", "numbers", "bias", "mixed segments")),
        *itertools.product((256,), ("bools", "mixed segments")),
    ],
)
def test_hopper_backward_with_masks_of_any_layout_has_the_same_bits(name, D, ways, rng):
    case = elementwise_case(rng, name, "bfloat16", 300, 272, D)
    results = case.forward()
    expected = case.backward(*results)[:3]
    ways.clear()
    for change in MASK_LAYOUTS[: 2 if name == "mixed segments" else None]:
        changed = {"attn_mask", "bias", "q_segment_ids", "kv_segment_ids"} & {*case.options}
        found = case.with_(**{n: change(case.options[n]) for n in changed})
        for x, y in zip(found.backward(*results), expected):
            assert_same_bits(x, y, change.__name__)
        assert ways[-2:] == ["maps", "maps"]  # not those of sm_80


@pytest.mark.parametrize(
    ("D", "name"),
    [
        *itertools.product(
            (64, 128), ("causal bools", "numbers of few tiles", "segments", "softcap")
        ),
        *itertools.product((256,), ("causal bools", "segments")),
    ],
)
def test_hopper_backward_with_options_keeps_poison_where_it_belongs(name, D, ways, rng):
    case = elementwise_case(rng, name, "bfloat16", 300, 300, D)
    results = case.forward()
    clean, live = case.backward(*results), case.live()[0]
    keys, rows = np.s_[0, :, 220:230], np.s_[0, :, 200:203]
    sees = live[:, :, 220:230].any(-1)
    seen = live[:, 200:203].any(1).reshape(2, 2, 300).any(1)  # by a group's heads
    assert sees.any() and not sees.all() and seen.any() and not seen.all()
    for poison in (nan, inf):
        k, v, q, dout = (x.copy() for x in (case.k, case.v, case.q, case.dout))
        k[keys] = v[keys] = poison
        found = case.with_(k=k, v=v).backward(*results)
        assert_same_bits(found.dq[0][~sees], clean.dq[0][~sees])
        assert not np.isfinite(found.dq[0][sees].astype(np.float32)).any(-1).any()
        for name in ("dq", "dk", "dv"):
            assert_same_bits(getattr(found, name)[1], getattr(clean, name)[1], name)
        dout[rows] = poison
        q[rows] = poison
        found = case.with_(q=q, dout=dout).backward(*results)
        for name in ("dk", "dv"):
            x, expected = getattr(found, name), getattr(clean, name)
            assert_same_bits(x[0][~seen], expected[0][~seen], name)
            assert not np.isfinite(x[0][seen].astype(np.float32)).any(-1).any()
            assert_same_bits(x[1], expected[1], name)
    dead = ~live.any(-1)
    assert not clean.dq[0][dead].any()


@pytest.mark.parametrize(
    ("D", "L", "Hq", "name"),
    [
        *((64, 1000, 24, name) for name in ("bools", "numbers", "segments", "window", "dropout")),
        *((128, 1100, 16, name) for name in ("bools", "numbers", "segments", "window", "dropout")),
        *((256, 700, 20, name) for name in ("bools", "segments", "window")),
    ],
)
def test_hopper_backward_with_options_and_many_tiles(name, D, L, Hq, ways, rng):
    """Several tiles for each block, some of them without any steps; every head is as it is alone,
    but for dropout, which is drawn by heads."""
    options = options_of_many_tiles(rng, name, L)
    shape = dict(lead=(2,), Hq=Hq, Hkv=Hq // 4, Lq=L, Lk=L, D=D)
    case = make_case(rng, DTYPES["bfloat16"], **shape, **options)
    out, lse = case.forward()
    together = gradients(case, (out, lse))
    assert_same_bits(gradients(case, (out, lse)), together)
    for b, h in ((0, 0), (1, Hq // 4 - 1)):
        if name == "dropout" and (b, h) != (0, 0):
            continue
        kv, q = np.s_[b : b + 1, h : h + 1], np.s_[b : b + 1, 4 * h : 4 * h + 4]
        alone = case.with_(
            q=case.q[q], k=case.k[kv], v=case.v[kv], dout=case.dout[q], dlse=case.dlse[q]
        )
        result = gradients(alone, (out[q], lse[q]))
        for what, cut in (("dq", q), ("dk", kv), ("dv", kv)):
            assert_same_bits(together[what][cut], result[what], what)
        if b == 0:
            arrays = alone.dout, alone.q, alone.k, alone.v, out[q], lse[q]
            found = alone.backward(out[q], lse[q])
            assert_gradients(*arrays, found, wrt=case.wrt, dlse=alone.dlse, **options)
    assert set(ways) == {"maps"}


def bounds_of_many_tiles(name, L):
    """Of two batch entries. Lengths leave nothing of tiles between others."""
    return {
        "none": {},
        "causal": dict(is_causal=True),
        "lens": dict(q_lens=np.array([L, L // 2]), kv_lens=np.array([0, L // 4])),
    }[name]


def bounds_of_entry(bounds, b):
    return {n: x if x is True else x[b : b + 1] for n, x in bounds.items()}


@pytest.mark.parametrize(
    ("dtype", "D", "L", "Hq"),
    [
        ("bfloat16", 64, 1000, 40), ("bfloat16", 128, 1100, 24), ("bfloat16", 256, 700, 36),
        ("float32", 64, 1000, 40), ("float32", 128, 1100, 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["none", "causal", "lens"])
def test_hopper_forward_with_more_tiles_than_multiprocessors(name, dtype, D, L, Hq, ways, rng):
    """Several tiles for each block; every head is as it is alone."""
    bounds = bounds_of_many_tiles(name, L)
    options = dict(lead=(2,), Hq=Hq, Hkv=Hq // 4, Lq=L, Lk=L, D=D, **bounds)
    case = make_case(rng, DTYPES[dtype], **options)
    together = case.forward()
    assert_same_bits(case.forward()._asdict(), together._asdict())
    for b, h in ((0, 0), (1, Hq - 1), (1, 5)):
        kv = np.s_[b : b + 1, h // 4 : h // 4 + 1]
        q, own = case.q[b : b + 1, h : h + 1], bounds_of_entry(bounds, b)
        result = case.with_(q=q, k=case.k[kv], v=case.v[kv], **own).forward()
        assert_forward(q, case.k[kv], case.v[kv], *result, **own)
        assert_same_bits(together.out[b : b + 1, h : h + 1], result.out)
        assert_same_bits(together.lse[b : b + 1, h : h + 1], result.lse)


@pytest.mark.parametrize(
    ("dtype", "D", "L", "Hq"),
    [
        ("bfloat16", 64, 1000, 40), ("bfloat16", 128, 1100, 24), ("bfloat16", 256, 700, 36),
        ("float32", 64, 1000, 40), ("float32", 128, 1100, 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["none", "causal", "lens"])
def test_hopper_backward_with_more_tiles_than_multiprocessors(name, dtype, D, L, Hq, ways, rng):
    """Every head is as it is alone, and every call as another."""
    bounds = bounds_of_many_tiles(name, L)
    options = dict(lead=(2,), Hq=Hq, Hkv=Hq // 4, Lq=L, Lk=L, D=D, **bounds)
    case = make_case(rng, DTYPES[dtype], **options)
    out, lse = case.forward()
    together = gradients(case, (out, lse))
    assert_same_bits(gradients(case, (out, lse)), together)
    for b, h in ((0, 0), (1, Hq // 4 - 1)):
        kv, q = np.s_[b : b + 1, h : h + 1], np.s_[b : b + 1, 4 * h : 4 * h + 4]
        alone = case.with_(
            q=case.q[q], k=case.k[kv], v=case.v[kv], dout=case.dout[q], dlse=case.dlse[q],
            **bounds_of_entry(bounds, b),
        )  # fmt: skip
        result = gradients(alone, (out[q], lse[q]))
        for name, cut in (("dq", q), ("dk", kv), ("dv", kv)):
            assert_same_bits(together[name][cut], result[name], name)


def test_hopper_forward_writes_to_any_out(ways, rng):
    shape = dict(lead=(2,), Hq=2, Lq=200, Lk=150, D=72, Dv=40)
    case = on_device(make_case(rng, np.float32, **shape))
    expected = to_host(case.forward().out)
    for beside in (1, 4):  # number by number, and in pairs
        whole = cupy.full((2, 2, 200, 40 + beside), 7, np.float32)
        attention_forward(case.q, case.k, case.v, out=whole[..., beside:])
        assert_same_bits(to_host(whole[..., beside:]), expected)
        assert (whole[..., :beside] == 7).all()
    case = on_device(make_case(rng, np.float16, **shape))
    expected = to_host(case.forward().out)
    for dtype, shape, cut in (
        (np.float16, (2, 2, 200, 41), np.s_[..., 1:]), (np.float16, (2, 2, 40, 200), "columns"),
        (np.float32, (2, 2, 200, 40), np.s_[...]), (np.float32, (2, 2, 200, 43), np.s_[..., 2:42]),
    ):  # fmt: skip
        whole = cupy.full(shape, 7, dtype)
        out = whole.swapaxes(-1, -2) if cut == "columns" else whole[cut]
        attention_forward(case.q, case.k, case.v, out=out)
        assert (to_host(out).astype(np.float16) == expected).all()
        assert cut == "columns" or (whole == 7).sum() >= whole.size - out.size


def test_an_unknown_family_is_refused_and_the_names_are_listed():
    from fastattn._gpu import config

    code = """
        import cupy
        import fastattn
        q = cupy.zeros((1, 2, 3))
        try:
            fastattn.scaled_dot_product_attention(q, q, q)
        except ValueError as error:
            print(error)
    """
    message = run_python(code, FASTATTN_GPU_ARCH="sm_1")
    assert "FASTATTN_GPU_ARCH" in message and "sm_1" in message
    assert all(name in message for name in config.FAMILIES)


# ---------------------------------------------------------------- the other public functions


@pytest.mark.parametrize("dtype", DTYPES)
def test_safe_softmax(dtype, rng, gpu):
    scores, dprobs = (rng.standard_normal((2, 5, 7, 9)) * 4).astype(DTYPES[dtype])
    scores[1] = scores[2, 3] = scores[:, 0, 2] = -inf
    dprobs[1] = nan
    results = []
    for target in ("numpy", "cupy"):
        with computing_on(target):
            probs = call(safe_softmax, scores, axis=-1)
            results.append((probs, call(safe_softmax_backward, dprobs, probs, axis=-1)))
    for cpu, other in zip(*results):
        assert other.dtype == cpu.dtype and (other[1] == 0).all() and (other[2, 3] == 0).all()
        close = {2: 2e-2, 4: 1e-5, 8: 1e-13}[cpu.itemsize]
        np.testing.assert_allclose(*(x.astype(np.float64) for x in (other, cpu)), atol=close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_attention_states(dtype, rng, gpu):
    """Blocks of keys are the whole; an empty state is neutral and not read."""
    case = make_case(rng, DTYPES[dtype], lead=(2,), Hq=4, Hkv=2, Lq=9, Lk=70, D=16)
    whole = case.forward()
    halves = [
        case.with_(k=case.k[..., keys, :], v=case.v[..., keys, :]).forward()
        for keys in (np.s_[:33], np.s_[33:])
    ]
    merged = call(merge_attention_states, *halves[0], *halves[1])
    for actual, expected in zip(merged, whole):
        close = {2: 2e-2, 4: 1e-5, 8: 1e-13}[actual.itemsize]
        np.testing.assert_allclose(*(x.astype("f8") for x in (actual, expected)), atol=close)
    empty = np.full_like(whole.out, nan), np.full_like(whole.lse, -inf)
    for merged in (
        call(merge_attention_states, *whole, *empty),
        call(merge_attention_states, *empty, *whole),
    ):
        assert_same_bits(merged._asdict(), whole._asdict())
