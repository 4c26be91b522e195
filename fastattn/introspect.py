"""What was built, what was chosen on this machine, and why."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import sysconfig
from typing import Any, Literal, overload

import numpy as np

from fastattn import _cpu
from fastattn._backends import load_cupy

# Every environment variable that the package reads, and what it is for.
ENVIRONMENT = {
    "FASTATTN_CPU_ISA": "the ISA whose kernels run; read at the first use",
    "FASTATTN_GPU_ARCH": "the family of GPU kernels that runs; read at the first use",
    "FASTATTN_NO_OPENMP": "1: build without OpenMP; read by setup.py",
}


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show what was built, what was chosen on this machine, and why.

    ``python -m fastattn`` prints the same.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        "stdout" prints, "dicts" returns the same facts as a dict.

    Returns
    -------
    dict or None
        With mode "dicts", a dict of strings, numbers, lists and dicts (JSON can hold it). Its keys:
        versions, gil, isa, isas, kernels, threads, build, environment, gpu.

    Raises
    ------
    ValueError
        `mode` is anything else.

    See Also
    --------
    fastattn.get_num_threads : The number of threads alone.

    Notes
    -----
    A wrong ``FASTATTN_CPU_ISA`` makes every computation fail; here its message is shown in place
    of the ISA. CuPy is imported where it is installed; what is missing for a GPU is said in place
    of the device.

    Examples
    --------
    >>> import fastattn
    >>> facts = fastattn.show_config("dicts")
    >>> [row["name"] for row in facts["isas"]][0]
    'portable'
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    facts = {
        "versions": versions(),
        "gil": gil(),
        "isa": isa(),
        "isas": isas(),
        "kernels": _cpu.kernel_table(),
        "threads": threads(),
        "build": _cpu.build_info(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "gpu": gpu(),
    }
    if mode == "dicts":
        return facts
    print(as_text(facts))
    return None


def versions() -> dict[str, str]:
    """Versions of the package and of what it runs on."""
    import importlib.metadata  # slow to import

    try:
        fastattn = importlib.metadata.version("fastattn")
    except importlib.metadata.PackageNotFoundError:
        fastattn = "unknown (a source tree that is not installed)"
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    system = f"{platform.system()} {platform.machine()}"
    return {"fastattn": fastattn, "python": python, "numpy": np.__version__, "system": system}


def gil() -> str:
    """Whether this Python has a GIL now."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "on; released while fastattn computes"
    return "on, in a free-threaded Python" if sys._is_gil_enabled() else "off"


def isa() -> dict[str, str | None]:
    """The ISA whose kernels run, and why; its name is None where there is none to run."""
    try:
        name = _cpu.current_isa()
    except (RuntimeError, ValueError) as error:
        return {"name": None, "why": str(error)}
    if name == os.environ.get("FASTATTN_CPU_ISA"):
        return {"name": name, "why": "FASTATTN_CPU_ISA says so"}
    highest = [row["name"] for row in _cpu.isa_table() if not row["missing"] + row["slow"]][-1]
    why = "the highest that runs well here" if name == highest else "chosen by this process"
    return {"name": name, "why": why}


def isas() -> list[dict[str, Any]]:
    """Every ISA, lowest rank first: name, requires, missing and slow: what stands in the way."""
    rows = [
        {
            "name": row["name"],
            "requires": row["requires"],
            "missing": f"this machine lacks {row['missing']}" if row["missing"] else "",
            "slow": row["slow"],
        }
        for row in _cpu.isa_table()
    ]
    built = {row["name"] for row in rows}
    for name, flags in _cpu.build_info()["flags"].items():
        if name not in built:
            rows.append({"name": name, "requires": "", "missing": flags, "slow": ""})
    return rows


def threads() -> dict[str, Any]:
    """The number of threads of a call that does not say, and where it comes from."""
    limits = _cpu.thread_limits()
    quota = None if math.isinf(limits["quota"]) else limits["quota"]
    facts = {
        "number": _cpu.get_num_threads(),
        "set_num_threads": limits["set"] or None,
        "openmp_maximum": limits["openmp"],
        "cpus_of_affinity": limits["affinity"],
        "cpus_of_quota": quota,
        "forked": _cpu.forked(),
    }
    if facts["forked"]:
        why = "this process was forked, and OpenMP's threads did not come along"
    elif not _cpu.build_info()["openmp"]:
        why = "built without OpenMP"
    elif facts["set_num_threads"]:
        why = "set_num_threads"
    else:
        why = (
            f"the least of OpenMP's maximum ({facts['openmp_maximum']}), "
            f"the CPUs of this process ({facts['cpus_of_affinity']}) "
            f"and the container's quota ({'none' if quota is None else quota})"
        )
    return {**facts, "why": why}


def gpu() -> dict[str, Any]:
    """CuPy's version, facts of the device, what is missing for either, and the kernels there are.

    Whatever fails is text here, for a report has to be possible where nothing works.
    """
    facts: dict[str, Any] = {"cupy": None, "missing": "", "device": {}, "kernels": []}
    try:
        facts["cupy"] = load_cupy().__version__
        from fastattn._gpu.device import device_info

        facts["device"] = device_info()
    except Exception as error:
        facts["missing"] = " ".join(str(error).split()) or type(error).__name__
    try:
        from fastattn._gpu import config

        facts["kernels"] = [dict(row) for row in config.table()]
    except Exception as error:
        facts["missing"] = facts["missing"] or f"its kernels: {error}"
    return json.loads(json.dumps(facts, default=str))


def as_text(facts: dict[str, Any]) -> str:
    """The facts of `show_config`, for reading."""
    version = facts["versions"]
    build = facts["build"]
    chosen = facts["isa"]
    runs = [
        [row["name"], row["missing"] or row["slow"] or "runs here", row["requires"]]
        for row in facts["isas"]
    ]
    lines = [
        f"fastattn {version['fastattn']}",
        f"Python {version['python']}, NumPy {version['numpy']}, {version['system']}",
        f"GIL: {facts['gil']}",
        "",
        f"ISA: {chosen['name'] or 'none'} ({chosen['why']})",
        *columns(runs),
        "",
        f"Threads: {facts['threads']['number']} ({facts['threads']['why']})",
        "",
        "Kernels",
        *columns(as_rows(facts["kernels"])),
        "",
        *gpu_as_text(facts["gpu"]),
        "",
        f"Built with {build['compiler'] or 'an unknown compiler'}",
        *columns([["OpenMP", build["openmp"] or "none"], *map(list, build["flags"].items())]),
        "",
        "Environment",
        *columns(
            [
                [name, "not set" if value is None else repr(value), f"({ENVIRONMENT[name]})"]
                for name, value in facts["environment"].items()
            ]
        ),
    ]
    return "\n".join(lines)


def gpu_as_text(facts: dict[str, Any]) -> list[str]:
    """The lines about the GPU; the kernels are those of the family that runs on it."""
    cupy = f"CuPy {facts['cupy']}" if facts["cupy"] else "none"
    lines = [f"GPU: {cupy}" + (f" ({facts['missing']})" if facts["missing"] else "")]
    if facts["device"]:
        lines += columns([[name, fact] for name, fact in facts["device"].items()])
        family = facts["device"].get("kernels")
        kernels = [row for row in facts["kernels"] if row.get("family", family) == family]
        if kernels:
            lines += ["", "Kernels of the GPU", *columns(as_rows(kernels))]
    return lines


def as_rows(table: list[dict[str, Any]]) -> list[list[Any]]:
    """A table's header and rows."""
    header = list(dict.fromkeys(name for row in table for name in row))
    return [header, *([row.get(name, "") for name in header] for row in table)]


def columns(rows: list[list[Any]]) -> list[str]:
    """Indented lines whose cells are aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in cells)
    return [("  " + "  ".join(row)).rstrip() for row in padded]
