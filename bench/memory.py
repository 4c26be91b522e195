"""Peak memory of one call, ours beside the materialised computation's.

Each figure comes from a fresh process: inputs are made, a tiny call of the same kind loads what is
loaded once, then the high-water mark of resident memory is taken before and after the call.  The
allocator is told to return what is freed, so that results cannot hide in memory used before.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from cases import Case, load_shapes
from peers import PEERS
from report import markdown
from workers import Runner, Worker, WorkerError

DTYPES = ["float32"]
DIRECTIONS = ["forward", "backward"]
CANDIDATES = ["fastattn", "numpy"]
# glibc's own variables; setting one also stops it from raising the thresholds as it goes.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(options: argparse.Namespace) -> dict[str, object]:
    names = [name for name in options.only or CANDIDATES if PEERS[name].available()]
    records, rows = [], []
    for dtype in options.dtype:
        for direction in options.directions:
            for case in load_shapes(options.shapes):
                case = replace(case, dtype=dtype, direction=direction)
                used = {n: peak_of(n, case, options) for n in names if PEERS[n].serves(case)}
                records.append({"case": case.shape, "dtype": dtype, "pass": direction, **used})
                sizes = [case.input_bytes, *(used.get(name) for name in names)]
                rows.append([f"{direction} {dtype} {case.shape}", *map(_mebibytes, sizes)])
    header = ["B, H, Lq, Lk, D", "inputs", *names]
    print("Peak memory of one call beyond its inputs, its results included (MiB)\n")
    print(markdown(header, rows))
    return {"peak_bytes": records}


def peak_of(name: str, case: Case, options: argparse.Namespace) -> int | None:
    """Bytes, or None where the call does not succeed."""
    environment = PEERS[name].environment(options.threads) | RETURN_FREED_MEMORY
    worker = Worker(Runner, environment, name, options.threads)
    try:
        tiny = replace(case, B=1, Hq=case.Hq // case.Hkv, Hkv=1, Lq=32, Lk=32)
        for each in (tiny, case):
            worker.call("prepare", each, options.seed)
            peak = worker.call("peak_memory")
        return peak
    except WorkerError as error:
        print(f"{name}: {error}")
        return None
    finally:
        worker.close()


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"
