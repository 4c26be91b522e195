"""The number of threads: who says it, what a call takes, and that no bit depends on it."""

import os
import sys
import threading

import numpy as np
import pytest
from helpers import (
    DTYPES,
    RUNNABLE_ISAS,
    assert_same_bits,
    cpu_kernels,
    make_case,
    run_python,
)  # fmt: skip

import fastattn
from fastattn import _cpu

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="threads and affinity are read from Linux's /proc and calls"
)
openmp = pytest.mark.skipif(not _cpu.build_info()["openmp"], reason="built without OpenMP")


@pytest.fixture(autouse=True)
def unset():
    yield
    fastattn.set_num_threads(None)


# ---------------------------------------------------------------- who says it


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 2**31 - 1, 2**31, 10**30, np.int8(3)])
def test_set_num_threads_is_taken_as_it_is(n):
    fastattn.set_num_threads(n)
    assert fastattn.get_num_threads() == min(int(n), 2**31 - 1)


def test_none_goes_back_to_the_default():
    before = fastattn.get_num_threads()
    fastattn.set_num_threads(before + 1)
    fastattn.set_num_threads(None)
    assert fastattn.get_num_threads() == before


def test_a_refused_number_changes_nothing():
    fastattn.set_num_threads(3)
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises((TypeError, ValueError), match="n must be"):
            fastattn.set_num_threads(wrong)
    assert fastattn.get_num_threads() == 3


def test_one_number_for_all_python_threads():
    def child():
        seen.append(fastattn.get_num_threads())
        fastattn.set_num_threads(5)

    seen = []
    fastattn.set_num_threads(3)
    thread = threading.Thread(target=child)
    thread.start()
    thread.join()
    assert (seen, fastattn.get_num_threads()) == ([3], 5)


@openmp
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_omp_num_threads(n):
    code = "import fastattn, os; print(fastattn.get_num_threads(), os.cpu_count())"
    number, cpus = map(int, run_python(code, OMP_NUM_THREADS=str(n)).split())
    assert 1 <= number <= min(n, cpus)
    if n == 2 and _cpu.thread_limits()["affinity"] > 1:
        limit = _cpu.thread_limits()["quota"]
        assert number == min(2, limit)


@openmp
def test_set_num_threads_goes_before_omp_num_threads():
    code = "import fastattn as f; f.set_num_threads(3); print(f.get_num_threads())"
    assert int(run_python(code, OMP_NUM_THREADS="1")) == 3


@openmp
def test_threadpoolctl():
    run_python("""
        import threadpoolctl, fastattn
        from fastattn import _cpu
        assert "openmp" in {pool["user_api"] for pool in threadpoolctl.threadpool_info()}
        before = fastattn.get_num_threads()
        with threadpoolctl.threadpool_limits(1):
            assert fastattn.get_num_threads() == 1
        assert fastattn.get_num_threads() == before
        with threadpoolctl.threadpool_limits(1000, user_api="openmp"):
            assert _cpu.thread_limits()["openmp"] == 1000
            assert fastattn.get_num_threads() == before  # affinity and quota hold
    """)


@linux
@openmp
@pytest.mark.parametrize("when", ["before", "after"])
def test_affinity(when):
    code = ["import fastattn", "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"]
    if when == "before":
        code.reverse()
    code = ["import os", *code, "print(fastattn.get_num_threads())"]
    assert int(run_python("\n".join(code))) == 1


# ---------------------------------------------------------------- what a call takes


def threads_started(before, Lq=640, **kwargs):
    """How many threads this process has gained by a forward and a backward of 5 blocks."""
    make_case(np.random.default_rng(0), np.float32, Hq=1, Lq=Lq, Lk=512, D=32).run(**kwargs)
    return len(os.listdir("/proc/self/task")) - before


@linux
@openmp
@pytest.mark.parametrize(
    ("setup", "kwargs", "environment", "started"),
    [
        ("", "", dict(OMP_NUM_THREADS="1"), 0),
        ("", "num_threads=3", dict(OMP_NUM_THREADS="1"), 2),
        ("fastattn.set_num_threads(4)", "", {}, 3),
        ("fastattn.set_num_threads(4)", "num_threads=2", {}, 1),
        ("", "num_threads=4, Lq=1", {}, 0),
    ],
    ids=["OMP_NUM_THREADS", "beats_OMP", "set", "beats_set", "little_work"],
)
def test_threads_of_a_call(setup, kwargs, environment, started):
    code = f"""
        import os, fastattn, test_threads
        {setup}
        before = len(os.listdir("/proc/self/task"))
        print(test_threads.threads_started(before, {kwargs}))
    """
    assert int(run_python(code, **environment)) == started


@linux
@openmp
def test_default_threads_of_a_call():
    code = """
        import os, fastattn, test_threads
        before = len(os.listdir("/proc/self/task"))
        print(test_threads.threads_started(before) + 1, fastattn.get_num_threads())
    """
    taken, promised = map(int, run_python(code).split())
    assert taken == min(promised, 7)  # 640 rows are 5 blocks forward, 7 backward


@linux
@openmp
def test_an_absurd_number_of_threads_does_not_end_the_process():
    run_python("""
        import resource
        import numpy as np
        from fastattn.attention import attention_forward
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        q = np.zeros((20_000, 1, 64, 16), np.float32)
        try:
            attention_forward(q, q, q, num_threads=100_000)
        except MemoryError:
            pass
    """)


# ---------------------------------------------------------------- no bit depends on it


def many(rng, **kwargs):
    """A case with work for 8 threads and several blocks of rows and tiles of keys."""
    sizes = dict(Hq=4, Lq=201, Lk=270, D=24, Dv=20)
    dtype = kwargs.pop("dtype", np.float32)
    return make_case(rng, dtype, **{**sizes, **kwargs})


# Heads are whole (a thread each) or shared: with n threads, the last `batch * Hkv % n` are shared.
CASES = {
    "one_head": lambda rng: many(rng, Hq=1, Lq=500, Lk=390),
    "one_tile": lambda rng: many(rng, Hq=3, Lq=500, Lk=100, D=40),
    "one_block": lambda rng: many(rng, Hq=3, Lq=90, Lk=800),
    "one_row": lambda rng: many(rng, Hq=6, Hkv=3, Lq=1, Lk=20_000),
    "few_rows": lambda rng: many(rng, lead=(2,), Hq=6, Hkv=3, Lq=5, Lk=3000, is_causal=True,
                                 causal_offset="lower_right", kv_lens=[3000, 1030]),
    "short_rows": lambda rng: many(rng, Hq=1, Lq=90, Lk=1700, window_size=(900, 300)),
    "three_heads": lambda rng: many(rng, Hq=3),
    "seven_heads": lambda rng: many(rng, lead=(7,), Hq=1),
    "mqa": lambda rng: many(rng, Hq=6, Hkv=1),
    "gqa": lambda rng: many(rng, lead=(2,), Hq=6, Hkv=2),
    "causal": lambda rng: many(rng, Hkv=2, is_causal=True),
    "causal_gqa_offsets": lambda rng: many(
        rng, lead=(3,), Hkv=1, is_causal=True, causal_offset=[-150, 0, 170]
    ),
    "window": lambda rng: many(rng, Hkv=2, window_size=(20, 9)),
    "window_past_the_keys": lambda rng: many(rng, Hkv=1, window_size=(9, 9), causal_offset=200),
    "window_before_the_keys": lambda rng: many(
        rng, Hkv=1, window_size=(9, 9), causal_offset=-120
    ),
    "lens": lambda rng: many(
        rng, lead=(3,), Hkv=2, q_lens=[201, 0, 99], kv_lens=[0, 270, 129]
    ),
    "no_live_pair": lambda rng: many(rng, Hkv=1, kv_lens=0),
    "segments": lambda rng: many(
        rng, Hkv=1, q_segment_ids=np.arange(201) // 40, kv_segment_ids=np.arange(270) // 40
    ),
    "mask": lambda rng: many(rng, Hkv=1, attn_mask=rng.random((4, 201, 270)) < 0.02),
    "bias": lambda rng: many(
        rng, lead=(2,), Hkv=2, bias=rng.standard_normal((201, 270)).astype(np.float32)
    ),
    "bias_of_keys": lambda rng: many(rng, Hkv=1, bias=rng.standard_normal((4, 1, 270))),
    "everything": lambda rng: many(
        rng, lead=(2,), Hkv=2, attn_mask=rng.random((2, 1, 1, 270)) < 0.9, is_causal=True,
        bias=rng.standard_normal((4, 1, 270)), causal_offset=90, kv_lens=[250, 270], softcap=3.0,
        alibi_slopes=rng.random(4), sinks=rng.standard_normal(4), dropout_p=0.3, seed=11,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name, rng):
    case = CASES[name](rng)
    expected = case.run(num_threads=1)
    for n in (2, 3, 5, 8):
        assert_same_bits(case.run(num_threads=n), expected, f"{n} threads")


@cpu_kernels
def test_same_bits_for_any_number_of_threads_in_every_kernel(isa, dtype, rng):
    case = many(rng, dtype=dtype, Hq=6, Hkv=3, is_causal=True, causal_offset=30, D=31, Dv=33)
    expected = case.run(num_threads=1)
    for n in (2, 5, 8):
        assert_same_bits(case.run(num_threads=n), expected, f"{n} threads")


@pytest.mark.parametrize("wrt", ["q", "k", "v", "qv"])
def test_same_bits_for_any_number_of_threads_with_some_gradients(wrt, rng):
    case = many(rng, Hkv=1, is_causal=True)
    out, lse = case.forward()
    expected = case.backward(out, lse, num_threads=1)._asdict()
    expected = {name: x if name[1:] in wrt else None for name, x in expected.items()}
    for n in (2, 8):
        actual = case.backward(out, lse, wrt=tuple(wrt), num_threads=n)._asdict()
        for name, x in expected.items():
            if x is None:
                assert actual[name] is None
            else:
                assert_same_bits(actual[name], x, f"{name}, {n} threads")


def test_the_number_set_leaves_no_trace(rng):
    case = many(rng, Hkv=1, is_causal=True)
    expected = case.run(num_threads=1)
    for n in (1, 8):
        fastattn.set_num_threads(n)
        assert_same_bits(case.run(), expected)
        sdpa = fastattn.scaled_dot_product_attention(
            case.q, case.k, case.v, is_causal=True, enable_gqa=True
        )
        assert_same_bits(sdpa, expected["out"])


# The rest runs in another process: what hangs there fails here.


def repeat(isa, dtype, times):
    """Run small cases many times on 8 threads; every time has the bits of one thread."""
    _cpu.use_isa(isa)
    rng = np.random.default_rng(0)
    shared = many(rng, dtype=DTYPES[dtype], Hq=8, Hkv=2, Lq=110, Lk=150, D=8, Dv=8)
    for case in (shared, shared.with_(is_causal=True), shared.with_(window_size=(11, 30))):
        expected = case.run(num_threads=1)
        for _ in range(times):
            assert_same_bits(case.run(num_threads=8), expected)


@pytest.mark.parametrize(
    ("isa", "dtype"), [(RUNNABLE_ISAS[0], "float32"), (RUNNABLE_ISAS[-1], "bfloat16")]
)
def test_no_race_in_200_runs(isa, dtype):
    run_python(f"import test_threads; test_threads.repeat({isa!r}, {dtype!r}, 67)")


@openmp
@pytest.mark.parametrize(
    "environment",
    [
        dict(OMP_THREAD_LIMIT="1"),
        dict(OMP_THREAD_LIMIT="3"),
        dict(OMP_DYNAMIC="true"),
        dict(OMP_NUM_THREADS="1", OMP_DYNAMIC="true"),
        dict(OMP_WAIT_POLICY="active"),
        dict(OMP_WAIT_POLICY="passive", OMP_PROC_BIND="close", OMP_STACKSIZE="128k"),
    ],
    ids=lambda environment: ",".join(map("=".join, environment.items())),
)
def test_any_openmp_that_is_set_up_otherwise(environment):
    """OpenMP may give a call fewer threads than it asks for; blocks wait for one another."""
    isa, dtype = RUNNABLE_ISAS[-1], "float32"
    run_python(f"import test_threads; test_threads.repeat({isa!r}, {dtype!r}, 5)", **environment)
