"""Python threads and forked processes (promise 8). All in other processes: what hangs fails."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import DTYPES, RUNNABLE_ISAS, assert_same_bits, make_case, run_python

import fastattn
from fastattn import _cpu, introspect

can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")


def run_here(call, **environment):
    return run_python(f"import test_processes as m; m.{call}", timeout=120, **environment)


def shared_heads(number, dtype="float32", **options):
    """A case whose backward has several threads work on one head."""
    rng = np.random.default_rng(number)
    sizes = dict(Hq=4, Hkv=1, Lq=200 + number, Lk=260, D=24)
    return make_case(rng, DTYPES[dtype], **sizes, **options)


# ---------------------------------------------------------------- Python threads


@contextlib.contextmanager
def ticking():
    """A list that another thread lengthens whenever it gets the GIL, which no one takes away."""
    before, ticks, done = sys.getswitchinterval(), [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(1)
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    sys.setswitchinterval(1e3)
    thread.start()
    try:
        while not ticks:
            time.sleep(1e-4)
        yield ticks
    finally:
        done.set()
        sys.setswitchinterval(before)
        thread.join()


def other_threads_advance(num_threads):
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((1, 1, 2500)).astype(np.float32)
    case = make_case(rng, np.float32, Hq=1, Lq=2500, Lk=2500, D=64, bias=bias)
    out, lse = case.forward()
    calls = {
        "nothing": lambda: sum(range(100_000)),
        "forward": lambda: case.forward(num_threads=num_threads),
        "backward": lambda: case.backward(out, lse, ("q", "k", "v"), num_threads=num_threads),
        "dbias": lambda: case.backward(out, lse, ("bias",), num_threads=num_threads),
    }
    with ticking() as ticks:
        for name, call in calls.items():
            before = len(ticks)
            call()
            advanced = len(ticks) - before
            assert (advanced > 0) == (name != "nothing"), f"{name}: {advanced} ticks"


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no GIL"
)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_gil_is_released(num_threads):
    run_here(f"other_threads_advance({num_threads})")


def many_python_threads(isa, num_threads):
    _cpu.use_isa(isa)
    options = dict(is_causal=True), dict(dropout_p=0.2, seed=7), dict(kv_lens=100)
    cases = [shared_heads(n, dtype, **options[n % 3]) for n, dtype in enumerate([*DTYPES, *DTYPES])]
    expected = [case.run(num_threads=1) for case in cases]
    barrier = threading.Barrier(len(cases))

    def work(n):
        barrier.wait()
        for count in range(12):
            fastattn.set_num_threads(1 + (n + count) % 5)  # for all, at any time
            assert_same_bits(cases[n].run(num_threads=num_threads), expected[n])

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(work, range(len(cases))))


@pytest.mark.parametrize(
    ("isa", "num_threads"),
    [(RUNNABLE_ISAS[0], 4), (RUNNABLE_ISAS[-1], 1), (RUNNABLE_ISAS[-1], None)],
)
def test_calls_of_many_python_threads(isa, num_threads):
    run_here(f"many_python_threads({isa!r}, {num_threads})")


# ---------------------------------------------------------------- fork


def in_a_fork(function, *args):
    """Call a function in a forked child and wait for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork.* may lead to deadlocks in the child")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"


def check_child(case, expected, generations=1):
    """A forked child says so, gets the same bits for any number of threads, and forks as well."""
    facts = introspect.show_config("dicts")["threads"]
    assert facts["forked"] == _cpu.forked()
    if _cpu.forked():
        assert facts["number"] == fastattn.get_num_threads() == 1
        assert "forked" in facts["why"]
    else:  # LLVM's OpenMP starts new threads in the child
        assert "clang" in _cpu.build_info()["compiler"].lower()
    for n in (None, 1, 8):
        assert_same_bits(case.run(num_threads=n), expected)
    fastattn.set_num_threads(4)
    assert_same_bits(case.run(), expected)
    if _cpu.forked() and sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1
    if generations > 1:
        in_a_fork(check_child, case, expected, generations - 1)


def fork_after_a_call(first_threads, fork_threads):
    """`fork_threads`: how many Python threads compute while this one forks."""
    case = shared_heads(1, bias=np.ones((1, 1, 260)))
    expected = case.run(num_threads=first_threads)
    done = threading.Event()

    def keep_busy():
        while not done.is_set():
            case.run(num_threads=3)

    others = [threading.Thread(target=keep_busy) for _ in range(fork_threads)]
    for thread in others:
        thread.start()
    try:
        for _ in range(3):
            in_a_fork(check_child, case, expected, 2)
            assert not _cpu.forked()
            assert not introspect.show_config("dicts")["threads"]["forked"]
            assert_same_bits(case.run(num_threads=4), expected)
    finally:
        done.set()
        for thread in others:
            thread.join()


@can_fork
@pytest.mark.parametrize(
    ("first_threads", "fork_threads"),
    [(1, 0), (4, 0), (4, 2)],
    ids=["after_one_thread", "after_many", "during_calls"],
)
def test_fork(first_threads, fork_threads):
    run_here(f"fork_after_a_call({first_threads}, {fork_threads})")


def fork_before_any_call():
    case = shared_heads(2)
    in_a_fork(case.run)
    in_a_fork(check_child, case, case.run(num_threads=3))


@can_fork
def test_fork_before_any_call():
    run_here("fork_before_any_call()")


def computed_by_a_worker(number):
    return _cpu.forked(), shared_heads(number).run()


def pool_of_processes(method):
    expected = [shared_heads(number).run(num_threads=4) for number in range(3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork.* may lead to deadlocks in the child")
        pool = multiprocessing.get_context(method).Pool(2)
    with pool:
        results = pool.map_async(computed_by_a_worker, range(3)).get(timeout=60)
        for (forked, actual), one in zip(results, expected, strict=True):
            assert_same_bits(actual, one)
            assert not forked or method == "fork"
    assert_same_bits(shared_heads(0).run(num_threads=4), expected[0])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system's multiprocessing cannot {method}")
    run_here(f"pool_of_processes({method!r})")
