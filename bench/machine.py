"""The machine, the software and the source that a result was measured with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def describe() -> dict[str, object]:
    """Everything a reader needs to judge or repeat the figures of this run."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/compare.py", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores_online": os.cpu_count(),
        "affinity": affinity(),
        "cache_bytes": last_level_cache_bytes(),
        "load_average": load_average(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "source": source_state(),
    }


def cpu_model() -> str:
    """Model name, with family, model and stepping where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    numbers = "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{fields.get('model name', platform.machine())} (family/model/stepping {numbers})"


def load_average() -> float | None:
    """Processes at work on average over the last minute; near 0 on a machine fit to measure on."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def affinity() -> list[int]:
    """The CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def last_level_cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not tell."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    try:
        return int(levels[-1].read_text().strip().removesuffix("K")) << 10
    except (IndexError, OSError, ValueError):
        return 32 << 20


def source_state() -> dict[str, object]:
    """Commit of the source tree, and whether it had changes; empty outside of a repository."""
    try:
        sha = _git("rev-parse", "HEAD")
        return {"sha": sha, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
