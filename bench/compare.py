r"""Compare fastattn with the other attentions that are installed, on this machine.

    pip install .[bench]                       # matplotlib, ml_dtypes, onnx, and the libraries
    python bench/compare.py                    # the shapes of shapes/peers.txt, float32, forward
    python bench/compare.py --shapes peers decode --dtype float32 bfloat16 \
                            --pass forward backward
    python bench/compare.py --accuracy         # error of each result beside the plain computation's
    python bench/compare.py --memory           # memory of one call beside the materialised one's
    python bench/compare.py --gpu              # CuPy arrays beside PyTorch on a GPU: gpu.py
    python bench/compare.py --gpu --shapes gpu_prefill --dtype bfloat16 --pass forward --D 128

Which libraries: NumPy, PyTorch, ONNX Runtime, OpenVINO, each if it can be imported (``peers.py``).

How it is measured.  Every candidate lives in its own process and they take turns (``workers.py``).
For each case, every candidate is first held against float64 (``checks.py``); one that is wrong
prints FAIL and is not timed.  Then come rounds: in each, every candidate in random order has a
slot of `--slot` seconds of calls, warm-up aside, and right after it the machine's live peak is
measured on the same number of bound threads, since clocks and neighbours come and go.  The figures
are medians over the rounds: of the rate, of the share (rate / live peak of that moment) and of the
ratio between two candidates (within a round).  Inputs are prepared before; outputs are allocated by
each library as it usually does, within the call, and freed after.  Inputs are warm in the caches if
they fit; `--cold` rotates copies that do not.  Work is counted as ``cases.py`` says.  Decode is
compared with the rate of plainly reading memory, a case with an option with ours without it: 100%
is then a time in proportion to the pairs left.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import accuracy
import gpu
import machine
import memory
from cases import DTYPES, Case, load_shapes, make_inputs
from checks import BOUNDS, exact_results, sample_groups, worst_error
from gpu_peers import GPU_PEERS
from options import make_option, pairs_left
from peers import PEERS
from report import Measurement, markdown, plot, rate_tables, write_json
from workers import Meter, Runner, Worker, WorkerError

PEAK_SECONDS = 0.03
MAX_COPIES = 64
NOISY = 0.05
# The arithmetic each dtype is computed in: float16 is widened on today's CPUs.
PEAK_KIND = {"float16": "float32"}


def main() -> None:
    options = parse_arguments()
    try:
        import fastattn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"fastattn cannot be imported: {error}") from error
    path = Path(f"{options.output}.json")
    settings = {name: value for name, value in vars(options).items() if name != "output"}

    def save(results: dict[str, object]) -> None:
        write_json(path, machine=machine.describe(), settings=settings, **results)

    if options.gpu:
        results = gpu.run(options, save)
    elif options.memory:
        results = memory.run(options)
    elif options.accuracy:
        results = accuracy.run(options)
    else:
        results = compare(options)
    save(results)
    print(f"\nwritten: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--memory", action="store_true", help="compare peak memory, not time")
    mode.add_argument("--accuracy", action="store_true", help="compare errors, not time")
    mode.add_argument("--gpu", action="store_true", help="compare on a GPU")
    parser.add_argument(
        "--shapes", nargs="+", help="files in shapes/, or paths [peers; with --gpu all of gpu_*]"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="[float32; with --gpu by shape file]"
    )
    parser.add_argument(
        "--pass",
        nargs="+",
        dest="directions",
        choices=("forward", "backward"),
        help="[forward; with --gpu both]",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PEERS | GPU_PEERS), help="candidates [all installed]"
    )
    parser.add_argument("--threads", type=int, default=len(machine.affinity()))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--slot", type=float, help="seconds a turn [0.1; on a GPU 0.005]")
    parser.add_argument("--cold", action="store_true", help="rotate inputs larger than the caches")
    parser.add_argument("--unbound", action="store_true", help="do not bind OpenMP threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="path of results, without suffix [bench/results/...]")
    gpu.add_arguments(parser)
    options = parser.parse_args()
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads are at least 1")
    modes = ("memory", "accuracy", "gpu")
    mode = next((name for name in modes if getattr(options, name)), "compare")
    if unknown := set(options.only or ()) - set(GPU_PEERS if options.gpu else PEERS):
        parser.error(f"--only: not in this mode: {', '.join(sorted(unknown))}")
    options.output = options.output or str(Path(__file__).with_name("results") / mode)
    options.output = options.output.removesuffix(".json")
    options.slot = options.slot or (gpu.SLOT_SECONDS if options.gpu else 0.1)
    if options.gpu:  # its other defaults depend on the shapes
        return options
    defaults = {"memory": memory, "accuracy": accuracy}.get(mode)
    options.shapes = options.shapes or ["peers" if mode == "compare" else mode]
    options.dtype = options.dtype or getattr(defaults, "DTYPES", ["float32"])
    options.directions = options.directions or getattr(defaults, "DIRECTIONS", ["forward"])
    return options


def compare(options: argparse.Namespace) -> dict[str, object]:
    cases = [
        replace(case, dtype=dtype, direction=direction)
        for dtype in options.dtype
        for direction in options.directions
        for case in load_shapes(options.shapes)
    ]
    workers = start_workers(options)
    meter = Worker(Meter, environment("fastattn", options), options.threads)
    plain = Worker(Runner, environment("fastattn", options), "fastattn", options.threads)
    about = {name: _answer(worker, "about") for name, worker in workers.items()}
    print_heading(options, about)

    order = random.Random(options.seed)
    measurements: list[Measurement] = []
    for number, case in enumerate(cases, start=1):
        start = time.perf_counter()
        measurements += measure(case, workers, meter, plain, options, order)
        label = f"{case.direction} {case.dtype} {case.shape}"
        seconds = time.perf_counter() - start
        print(f"[{number}/{len(cases)}] {label}: {seconds:.1f} s", file=sys.stderr)
    for worker in (*workers.values(), meter, plain):
        worker.close()

    print(rate_tables(measurements))
    print_remarks(measurements)
    title = f"{machine.cpu_model()}, {options.threads} threads"
    try:
        plot(Path(f"{options.output}.png"), measurements, title)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return {"candidates": about, "measurements": [m.as_dict() for m in measurements]}


def environment(name: str, options: argparse.Namespace) -> dict[str, str]:
    variables = PEERS[name].environment(options.threads)
    return variables | {"OMP_PROC_BIND": "false"} if options.unbound else variables


def start_workers(options: argparse.Namespace) -> dict[str, Worker]:
    names = [name for name in options.only or PEERS if PEERS[name].available()]
    return {
        name: Worker(Runner, environment(name, options), name, options.threads) for name in names
    }


def measure(
    case: Case,
    workers: dict[str, Worker],
    meter: Worker,
    plain: Worker,
    options: argparse.Namespace,
    order: random.Random,
) -> list[Measurement]:
    """Check and time every candidate that serves the case."""
    wanted = {name: worker for name, worker in workers.items() if PEERS[name].serves(case)}
    option = make_option(case, options.seed)
    exact = exact_results(case, make_inputs(case, options.seed), option)
    case = replace(case, kept=pairs_left(case, option))
    results = {name: Measurement(case, name) for name in wanted}
    for name, worker in wanted.items():
        result = results[name]
        try:
            worker.call("prepare", case, options.seed, copies_of(case, options))
            result.error = worst_error(worker.call("sample", sample_groups(case)), exact)
            if not result.error <= BOUNDS[case.dtype]:
                result.status = "FAIL"
        except WorkerError as error:
            result.status = "ERROR"
            print(f"{name}: {error}", file=sys.stderr)

    yardstick = yardstick_of(case, meter, plain, options)
    running = [name for name in wanted if results[name].status == "ok"]
    for _ in range(options.rounds):
        for name in order.sample(running, len(running)):
            seconds = wanted[name].call("time", options.slot)
            results[name].seconds.append(median(seconds))
            results[name].fastest = min(results[name].fastest, *seconds)
            results[name].peaks.append(yardstick())
    for worker in (*wanted.values(), plain):
        _answer(worker, "release")
    return list(results.values())


def yardstick_of(
    case: Case, meter: Worker, plain: Worker, options: argparse.Namespace
) -> Callable[[], float | None]:
    """Measures what the case's rates are held against."""
    if case.option:
        without = replace(case, option="", kept=1.0)
        plain.call("prepare", without, options.seed, copies_of(case, options))
        return lambda: without.work / median(plain.call("time", options.slot))
    kind = "read" if case.is_decode else PEAK_KIND.get(case.dtype, case.dtype)
    return lambda: meter.call("peak", kind, PEAK_SECONDS)


def copies_of(case: Case, options: argparse.Namespace) -> int:
    """How many sets of inputs the calls rotate through: one, or more than the caches hold."""
    if not options.cold:
        return 1
    return min(MAX_COPIES, 2 + 2 * machine.last_level_cache_bytes() // case.input_bytes)


def _answer(worker: Worker, method: str) -> object:
    try:
        return worker.call(method)
    except WorkerError as error:
        return {"error": str(error)}


def print_heading(options: argparse.Namespace, about: dict) -> None:
    caches = "cold (rotating) inputs" if options.cold else "warm inputs"
    binding = "unbound" if options.unbound else "bound"
    load = machine.load_average()
    print(f"{machine.cpu_model()}; {options.threads} {binding} threads; {caches}; load {load}\n")
    rows = [[name, str(facts.get("version", facts.get("error")))] for name, facts in about.items()]
    print(markdown(["candidate", "version"], rows))
    print()


def print_remarks(measurements: list[Measurement]) -> None:
    """What was wrong, and what was too noisy to be relied on."""
    for m in measurements:
        if m.status == "FAIL":
            bound = BOUNDS[m.case.dtype]
            what = f"error {m.error:.1e} of a row, bound {bound:.0e}"
            print(f"FAIL: {m.candidate}, {m.case.direction} {m.case.dtype} {m.case.shape}: {what}")
    timed = [m for m in measurements if m.seconds]
    noisy = [m for m in timed if m.spread > NOISY]
    if noisy:
        print(
            f"\nUnsteady: in {len(noisy)} of {len(timed)} figures the rounds lie "
            f"{NOISY:.0%} or more apart (median deviation). Is the machine idle?"
        )


if __name__ == "__main__":
    main()
