"""One process per candidate, and one for the live peak; they take turns, never run together.

Libraries that share a process share its OpenMP settings, thread placement and symbols, and wait
for work by spinning on each other's cores.  So each lives in its own, started with the environment
that serves it; the parent sends one request at a time and everybody else sleeps.

    parent:  Worker(Runner, env, "torch", 2).call("prepare", case)
                 | pipe
    child:   Runner("torch", 2).prepare(case), then waits until its threads sleep
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cases import Case, make_inputs
from options import make_option
from peers import PEERS

MAX_CALLS_PER_SLOT = 64
PEAK_TRIES = 3
REST_SECONDS = 0.01  # a few ticks of the clock that counts CPU time
SETTLE_SECONDS = 0.5
READ_BYTES = 256 << 20


class WorkerError(RuntimeError):
    """The child raised, or died."""


class Worker:
    """A child process that holds one object and calls its methods on request."""

    def __init__(self, factory: type, environment: dict[str, str], *args: Any) -> None:
        self._recipe = factory, environment, args
        self._start()

    def _start(self) -> None:
        factory, environment, args = self._recipe
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, factory, args), daemon=True)
        with _environment(environment):
            self._process.start()
        child.close()

    def call(self, method: str, *args: Any) -> Any:
        """The method's result; a child that dies of the call is replaced by a new one."""
        try:
            self._pipe.send((method, args))
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            died = f"process died, exit code {self._process.exitcode}"
            self._start()
            raise WorkerError(died) from error
        if not succeeded:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def _environment(changes: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(changes)
    os.environ.pop("OMP_WAIT_POLICY", None)  # "active" would never leave the core to the others
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe, factory: type, args: tuple) -> None:
    target, failure = None, ""
    try:
        target = factory(*args)
    except Exception:
        failure = traceback.format_exc()
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if target is None:
                raise RuntimeError(failure)
            answer = True, getattr(target, method)(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        _settle()
        pipe.send(answer)


def _settle() -> None:
    """Wait until this process rests: thread pools spin for a while after their last task."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(REST_SECONDS)
        if time.process_time() - before < REST_SECONDS / 10:
            return


class Runner:
    """Prepares, checks and times one candidate; lives in a worker."""

    def __init__(self, name: str, threads: int) -> None:
        self.peer = PEERS[name](threads)
        self.calls: list = []

    def prepare(self, case: Case, seed: int, copies: int = 1) -> None:
        """Make `copies` sets of inputs and results of everything that is not to be timed."""
        self.case = case
        bind = getattr(self.peer, case.direction)
        option = make_option(case, seed)
        self.calls = [bind(case, *make_inputs(case, seed + n), option) for n in range(copies)]
        self.rotation = itertools.cycle(self.calls)
        self.last_seconds = 0.0

    def sample(self, groups: list[tuple[int, int]]) -> list[list[np.ndarray]]:
        """Results of the first set of inputs, cut to some (batch entry, kv head) groups."""
        results = self.peer.to_numpy(self.calls[0]())
        return [[_group_of(self.case, array, *group) for array in results] for group in groups]

    def time(self, slot_seconds: float) -> list[float]:
        """Seconds of each of the calls that fit into the slot, at least one."""
        if self.last_seconds < slot_seconds:  # wake the threads, fill the caches
            next(self.rotation)()
        seconds: list[float] = []
        while not seconds or (sum(seconds) < slot_seconds and len(seconds) < MAX_CALLS_PER_SLOT):
            run = next(self.rotation)
            start = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - start)
            del result
        self.last_seconds = seconds[-1]
        return seconds

    def peak_memory(self) -> int:
        """Bytes by which one call raises the high-water mark of this process, results included."""
        before = _reset_high_water()
        result = self.calls[0]()
        after = _high_water()
        del result
        return after - before

    def release(self) -> None:
        self.calls = []
        self.rotation = itertools.cycle(())

    def about(self) -> dict[str, Any]:
        """Version and, for ours, what show_config says."""
        return {"version": self.peer.version(), **self.peer.configuration()}


class Meter:
    """Measures what the machine can do right now; lives in a worker."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        try:
            from fastattn import _cpu

            self._peak_flops = _cpu.peak_flops
        except (ImportError, AttributeError):
            self._peak_flops = None
        self._data: np.ndarray | None = None

    def peak(self, kind: str, seconds: float) -> float | None:
        """FLOP/s of a dtype's multiply-adds, or bytes/s of reading ("read"); None = unknown."""
        if kind == "read":
            return self._read(seconds)
        if self._peak_flops is None:
            return None
        # The best of a few: a thread that was interrupted says nothing about the machine.
        short = seconds / PEAK_TRIES
        return max(self._peak_flops(kind, self.threads, short) for _ in range(PEAK_TRIES))

    def _read(self, seconds: float) -> float:
        if self._data is None:
            # Ones: memory of untouched zeros is one page that never leaves the cache.
            self._data = np.ones((self.threads, READ_BYTES // 8 // self.threads), np.int64)
            self._pool = ThreadPoolExecutor(self.threads)
        passes, start = 0, time.perf_counter()
        while passes == 0 or time.perf_counter() - start < seconds:
            list(self._pool.map(np.max, self._data))
            passes += 1
        return passes * self._data.nbytes / (time.perf_counter() - start)


def _group_of(case: Case, array: np.ndarray, b: int, kv_head: int) -> np.ndarray:
    """The heads of `array` that belong to one kv head of one batch entry."""
    heads = array.shape[1] // case.Hkv
    return np.array(array[b : b + 1, kv_head * heads : (kv_head + 1) * heads])


def _reset_high_water() -> int:
    """Lower the high-water mark to the memory in use, where the system can; the mark in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return _high_water()


def _high_water() -> int:
    """Most resident bytes so far.

    Linux lets a child inherit its parent's ru_maxrss, but not this mark.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
