"""`compare.py --gpu`: the public functions on CuPy arrays beside PyTorch's backends.

How it is measured.  All candidates live in this process, on one stream, and read the same memory.
Each is first held against float64 (``checks.py``); one that is wrong prints FAIL and is not
timed.  After a warm-up come rounds: in each, every candidate in random order has a sample of
`--slot` seconds of calls back to back between two CUDA events, and so has the yardstick, for the
power limit moves the clock with whatever else is running.  The figures are medians over the rounds:
of the rate, of the share (rate / yardstick of that round) and of the ratio between two candidates
(within a round).  Results are allocated within the calls.  Inputs that would fit into the L2 cache
are rotated.  The yardstick is

* a bfloat16 matrix product, 8192 cubed; the share is the rate's,
* for decode a kernel that does nothing but read K and V, the fastest of a few; here calls are
  recorded into a CUDA graph, else the host's time would be measured: that is "fastattn_call",
* for an option the plain case in its place: 100% is a time in proportion to the pairs left.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import gpu_host
import machine
from cases import Case, load_shapes, make_inputs, narrow
from checks import BOUNDS, exact_results, heads_of, sample_groups, worst_error
from gpu_peers import GPU_PEERS, Fastattn, as_tensor, capture, torch_with_cuda
from options import Option, make_option, pairs_left
from peers import Peer
from report import OURS, Measurement, compact_tables, duration

# Families, in the order they are measured in, and their dtypes.
SHAPES = {
    "gpu_decode": ("bfloat16",),
    "gpu_options": ("bfloat16",),
    "gpu_gqa": ("bfloat16",),
    "gpu_float32": ("float32",),
    "gpu_prefill": ("bfloat16", "float16"),
}
SLOT_SECONDS = 0.005
WARM_SECONDS = 0.3
HANG_SECONDS = 150  # of one case, the compilation of its kernels included
# dq's first causal rows: few keys, and dout . out takes most of dout . v away.
LEEWAY = 2
REMARKS, REMARK_WIDTH = 10, 140  # printed
GEMM_SIZE = 8192
GEMM_WORK = 2.0 * GEMM_SIZE**3
YARDSTICK = "yardstick"
READ_BLOCKS = (8, 16, 32)  # per multiprocessor
READ_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(256)
read(const uint4 *k, const uint4 *v, long long count, unsigned *out)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned sum = 0;
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const uint4 a = k[i], b = v[i];
        sum += a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
    }
    if (sum == 0x9E3779B9u) // as good as never, but the compiler cannot know
        *out = sum;
}
"""
Call = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --gpu")
    group.add_argument("--D", nargs="+", type=int, help="only cases of these head sizes")
    group.add_argument("--L", nargs="+", type=int, help="only cases of these key lengths")
    group.add_argument("--mask", choices=("full", "causal"), help="only such cases")
    group.add_argument("--host", action="store_true", help="host and first-call times, too")
    group.add_argument(
        "--minutes", type=float, default=8.0, help="start no case after this time [8]"
    )


def select_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the shape files, each in the dtypes and directions asked for."""
    cases = []
    for name in options.shapes or SHAPES:
        dtypes = options.dtype or SHAPES.get(name, ("bfloat16",))
        directions = options.directions or ("forward", "backward")
        for dtype, direction in itertools.product(dtypes, directions):
            cases += [
                replace(case, dtype=dtype, direction=direction)
                for case in load_shapes([name])
                if _is_wanted(case, direction, options)
            ]
    return cases


def _is_wanted(case: Case, direction: str, options: argparse.Namespace) -> bool:
    # Decode has no gradient, and the forward of dbias is that of bias.
    is_void = case.Lq == 1 if direction == "backward" else case.option == "dbias"
    return not (
        is_void
        or (options.D and case.D not in options.D)
        or (options.L and case.Lk not in options.L)
        or (options.mask and options.mask != ("causal" if case.causal else "full"))
    )


def run(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure what was asked for; `save` gets the results so far after every case."""
    torch = torch_with_cuda()  # before CuPy: both find the same libraries then
    try:
        import cupy as cp

        cp.cuda.Device().synchronize()
    except Exception as error:
        raise SystemExit(f"--gpu needs CuPy and a CUDA device: {_brief(error)}") from error
    start = time.perf_counter()
    names = [name for name in options.only or GPU_PEERS if GPU_PEERS[name].available()]
    peers = {name: GPU_PEERS[name](options.threads) for name in names}
    clock = Clock()
    results: dict[str, Any] = {"gpu": device_facts(), "candidates": about(peers)}
    results |= {"measurements": [], "clocks": [], "remarks": []}
    print_heading(results)
    cases = select_cases(options)
    order = random.Random(options.seed)
    measured: list[Measurement] = []
    failed = False
    for number, case in enumerate(cases, start=1):
        label = f"{case.family} {case.direction} {case.dtype} {case.shape}"
        if failed or time.perf_counter() - start > 60 * options.minutes:
            results["remarks"].append(f"left out: the last {len(cases) - number + 1} cases")
            break
        case_start = time.perf_counter()
        with Watchdog(label, measured, results, options):
            arguments = (case, peers, options, order, clock, results["remarks"])
            more, clocks = _try(label, results, measure, *arguments) or ([], {})
            failed = _try(f"the device, after {label}", results, device_works) is None
        measured += more
        results["clocks"].append({"case": label, **clocks})
        results["measurements"] = [m.as_dict() for m in measured]
        save(results)
        seconds = time.perf_counter() - case_start
        print(f"[{number}/{len(cases)}] {label}: {seconds:.1f} s", file=sys.stderr, flush=True)
    if not failed and (options.host or not options.shapes):
        with Watchdog("host", measured, results, options):
            results["host"] = _try("host", results, gpu_host.host_times, torch)
        with Watchdog("first call", measured, results, options):
            results["first_call"] = _try("first call", results, gpu_host.first_call_times)
    print_results(measured, results, options)
    return results


def measure(
    case: Case,
    peers: dict[str, Peer],
    options: argparse.Namespace,
    order: random.Random,
    clock: Clock,
    remarks: list[str],
) -> tuple[list[Measurement], dict[str, Any]]:
    """Check and time every candidate that serves the case."""
    import cupy as cp

    copies = [make_inputs(case, options.seed + n, cp) for n in range(copies_of(case))]
    option = make_option(case, options.seed, cp)
    exact = exact_results(case, copies[0], option, cp)
    case = replace(case, kept=pairs_left(case, option, cp))
    results = {name: Measurement(case, name) for name, peer in peers.items() if peer.serves(case)}
    calls: dict[str, Call] = {}
    weights: dict[str, int] = {}  # problems that one call solves
    for name, result in results.items():
        try:
            bind = getattr(peers[name], case.direction)
            bound = [bind(case, *inputs, option) for inputs in copies]
            check(case, peers[name], bound[0], exact, result, remarks)
            if result.status != "ok":
                continue
            calls[name] = rotating(bound)
            if case.is_decode:
                calls[f"{name}_call"] = calls[name]
                calls[name], weights[name] = peers[name].graph(bound), len(bound)
        except Exception as error:
            result.status = "ERROR" if name not in calls else "ok"
            remarks.append(f"{name}, {case.direction} {case.dtype} {case.shape}: {_brief(error)}")
    results |= {name: Measurement(case, name) for name in calls if name not in results}

    yardsticks = _yardsticks(case, copies)
    work = GEMM_WORK if not (case.is_decode or case.option) else replace(case, kept=1.0).work
    weights |= dict.fromkeys(yardsticks, len(copies) if case.is_decode else 1)
    del exact
    seconds, clocks = time_rounds(calls | yardsticks, weights, options, order, clock)
    peaks = [work / min(times) for times in zip(*(seconds[name] for name in yardsticks))]
    for name in calls:
        results[name].seconds, results[name].peaks = seconds[name], peaks
        results[name].fastest = min(seconds[name])

    del calls, yardsticks, copies, option
    gc.collect()
    cp.get_default_memory_pool().free_all_blocks()
    if torch := torch_with_cuda():
        torch.cuda.empty_cache()
    return list(results.values()), clocks


def check(
    case: Case, peer: Peer, call: Call, exact: list, result: Measurement, remarks: list[str]
) -> None:
    """Hold a candidate's results against float64, and ours against themselves."""
    first = as_tuple(call())
    groups = [
        [
            peer.to_numpy(heads_of(case, array, *group))
            for array in first[: 3 if case.direction == "backward" else 1]
        ]
        for group in sample_groups(case)
    ]
    result.error = worst_error(groups, exact)
    label = f"{result.candidate}, {case.direction} {case.dtype} {case.shape}"
    bound = LEEWAY * BOUNDS[case.dtype]
    if not result.error <= bound:
        result.status = "FAIL"
        remarks.append(f"FAIL: {label}: error {result.error:.1e} of a row, bound {bound:.0e}")
    elif result.candidate == OURS and not same_bits(first, as_tuple(call())):
        remarks.append(f"other bits in a second call: {label}")


def as_tuple(result: Any) -> tuple:
    return tuple(result) if isinstance(result, tuple) else (result,)


def same_bits(first: tuple, second: tuple) -> bool:
    """Whether two results of CuPy are the same to the last bit."""
    import cupy as cp

    pairs = [(a, b) for a, b in zip(first, second) if a is not None]
    bits = [np_bits(a.dtype.itemsize) for a, _ in pairs]
    return all(bool(cp.all(a.view(t) == b.view(t))) for (a, b), t in zip(pairs, bits))


def np_bits(itemsize: int) -> str:
    return f"uint{8 * itemsize}"


def rotating(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copies_of(case: Case) -> int:
    """How many sets of inputs the calls rotate through, so that the L2 cache holds none."""
    import cupy as cp

    cache = cp.cuda.Device().attributes["L2CacheSize"]
    return 1 if case.input_bytes >= 3 * cache else 1 + -(-3 * cache // case.input_bytes)


def _yardsticks(case: Case, copies: list[list[Any]]) -> dict[str, Call]:
    """What the candidates are measured against; the fastest of each round counts."""
    if case.option:
        plain = replace(case, option="", kept=1.0)
        return {YARDSTICK: getattr(Fastattn(1), case.direction)(plain, *copies[0], Option())}
    if case.is_decode:
        return dict(_reads(copies))
    return {YARDSTICK: gemm()}


def _reads(copies: list[list[Any]]) -> Iterator[tuple[str, Call]]:
    import cupy as cp

    kernel = cp.RawKernel(READ_SOURCE, "read")
    processors = cp.cuda.Device().attributes["MultiProcessorCount"]
    out = cp.zeros(1, cp.uint32)
    arguments = [(k.view(cp.uint32), v.view(cp.uint32), k.nbytes // 16, out) for _, k, v in copies]
    for blocks in READ_BLOCKS:
        grid = (blocks * processors,)
        launches = [lambda grid=grid, a=each: kernel(grid, (256,), a) for each in arguments]
        yield f"{YARDSTICK}_{blocks}", capture(launches)


@functools.cache
def gemm() -> Call:
    """A large matrix product of PyTorch in bfloat16, else one of CuPy in float16."""
    import cupy as cp

    rng = cp.random.default_rng(0)
    shape = (GEMM_SIZE, GEMM_SIZE)
    a, b = (rng.standard_normal(shape, dtype=cp.float32) for _ in range(2))
    torch = torch_with_cuda()
    if torch is None:
        a, b = a.astype(cp.float16), b.astype(cp.float16)
        product, out = cp.matmul, cp.empty_like(a)
    else:
        a, b = (as_tensor(narrow(x, "bfloat16")) for x in (a, b))
        product, out = torch.mm, a.new_empty(shape)
    return lambda: product(a, b, out=out)


def time_rounds(
    calls: dict[str, Call],
    weights: dict[str, int],
    options: argparse.Namespace,
    order: random.Random,
    clock: Clock,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of a call in each round, and what the clock did meanwhile."""
    import cupy as cp

    stream = cp.cuda.get_current_stream()

    def sample(call: Call, count: int) -> tuple[Any, Any, int]:
        before, after = cp.cuda.Event(), cp.cuda.Event()
        before.record()
        for _ in range(count):
            call()
        after.record()
        return before, after, count

    def seconds_of(before: Any, after: Any, count: int) -> float:
        return cp.cuda.get_elapsed_time(before, after) / 1e3 / count

    counts = {}
    for name, call in calls.items():
        call()
        events = sample(call, 2)
        stream.synchronize()
        counts[name] = max(1, round(options.slot / max(seconds_of(*events), 1e-6)))
    deadline = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < deadline:
        for name, call in calls.items():
            sample(call, counts[name])
        stream.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    clock.start()
    for _ in range(options.rounds):
        samples = {}
        for name in order.sample(list(calls), len(calls)):
            if counts[name] > 1:
                calls[name]()  # wakes whatever sleeps
            samples[name] = sample(calls[name], counts[name])
        clock.read()  # while the device still works on what it was given
        stream.synchronize()
        for name, events in samples.items():
            seconds[name].append(seconds_of(*events) / weights.get(name, 1))
    return seconds, clock.stop()


class Clock:
    """Clock and power of the device, as the driver tells; nothing is ever set."""

    def __init__(self) -> None:
        self._readings: list[tuple[float, float]] = []
        try:
            import cupy as cp
            import pynvml

            pynvml.nvmlInit()
            bus = cp.cuda.runtime.deviceGetPCIBusId(cp.cuda.Device().id)
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
            self._nvml = pynvml
            self._read()
        except Exception as error:
            self._nvml = None
            print(f"no clocks: {_brief(error)}", file=sys.stderr)

    def _read(self) -> tuple[float, float]:
        mhz = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        return mhz, self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3

    def start(self) -> None:
        self._readings = []

    def read(self) -> None:
        if self._nvml:
            self._readings.append(self._read())

    def stop(self) -> dict[str, float]:
        """Medians and range of what was read since the start."""
        if not self._readings:
            return {}
        mhz, watts = zip(*self._readings)
        return {"mhz": median(mhz), "least": min(mhz), "most": max(mhz), "watts": median(watts)}


class Watchdog:
    """Ends the process, its results printed, if a case does not end: kernels may hang."""

    def __init__(self, label: str, *results: Any) -> None:
        self._timer = threading.Timer(HANG_SECONDS, self._give_up, (label, *results))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    @staticmethod
    def _give_up(
        label: str,
        measured: list[Measurement],
        results: dict[str, Any],
        options: argparse.Namespace,
    ) -> None:
        results["remarks"].append(f"gave up: {label} has not ended within {HANG_SECONDS} s")
        print_results(measured, results, options)
        sys.stdout.flush()
        os._exit(1)


def device_facts() -> dict[str, Any]:
    """The device and the software under it."""
    import cupy as cp

    device = cp.cuda.Device()
    properties = cp.cuda.runtime.getDeviceProperties(device.id)
    return {
        "name": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "multiprocessors": device.attributes["MultiProcessorCount"],
        "l2_bytes": device.attributes["L2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
        "driver": cp.cuda.runtime.driverGetVersion(),
        "runtime": cp.cuda.runtime.runtimeGetVersion(),
        "cupy": cp.__version__,
    }


def device_works() -> bool:
    """True, or the error of an earlier kernel, after which nothing runs any more."""
    import cupy as cp

    cp.cuda.Device().synchronize()
    return True


def about(peers: dict[str, Peer]) -> dict[str, dict[str, Any]]:
    facts = {}
    for name, peer in peers.items():
        try:
            facts[name] = {"version": peer.version(), **peer.configuration()}
        except Exception as error:
            facts[name] = {"error": _brief(error)}
    return facts


def print_heading(results: dict[str, Any]) -> None:
    gpu = results["gpu"]
    versions = [f"{n} {f.get('version', f.get('error'))}" for n, f in results["candidates"].items()]
    print(f"{gpu['name']}, CuPy {gpu['cupy']}, driver {gpu['driver']}; {machine.cpu_model()}")
    print(", ".join(versions), flush=True)


def print_results(
    measured: list[Measurement], results: dict[str, Any], options: argparse.Namespace
) -> None:
    """Last of all, since a caller may see the end of the output only; and to a text file."""
    lines = summary(measured, results)
    remarks = [f"! {remark}" for remark in results["remarks"]]
    path = Path(f"{options.output}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *remarks, ""]))
    if len(remarks) > REMARKS:
        remarks[REMARKS:] = [f"! and {len(remarks) - REMARKS} more: {path}"]
    print("\n".join([*lines, *(remark[:REMARK_WIDTH] for remark in remarks)]))


def summary(measured: list[Measurement], results: dict[str, Any]) -> list[str]:
    lines = [
        "peak: a bf16 matrix product; for decode plain reading; for an option the plain case",
        f"others: how many times faster {OURS} is; _free: deterministic=False; _call: no graph",
        "",
        compact_tables(measured),
        "",
        "largest error of a row, relative:",
    ]
    for (dtype, direction), group in by_dtype_and_direction(measured).items():
        errors: dict[str, float] = {}
        for m in group:
            errors[m.candidate] = max(m.error, errors.get(m.candidate, 0.0))
        cells = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        lines.append(f"  {dtype} {direction}: {cells}")
    readings = [c for c in results["clocks"] if "mhz" in c]
    if readings:
        least, most = min(c["least"] for c in readings), max(c["most"] for c in readings)
        middle, watts = (median(c[what] for c in readings) for what in ("mhz", "watts"))
        lines.append(f"SM clock {middle:.0f} MHz ({least:.0f} to {most:.0f}), {watts:.0f} W")
    for title in ("host", "first_call"):
        times = (results.get(title) or {}).items()
        lines += [f"{title}: {name} {duration(seconds)}" for name, seconds in times]
    return lines


def by_dtype_and_direction(measured: list[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Those that have been held against float64."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measured:
        if m.error is not None:
            groups.setdefault((m.case.dtype, m.case.direction), []).append(m)
    return groups


def _try(label: str, results: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; None, and a remark, if it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        results["remarks"].append(f"{label}: {_brief(error)}")
        return None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
