"""show_config tells the truth, as values and as text."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn import _cpu, introspect


@pytest.fixture
def facts():
    return fastattn.show_config("dicts")


def run_python(*arguments, **environment):
    """A new interpreter's outcome, with this package and no FASTATTN_ variable but those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    inherited["PYTHONPATH"] = str(Path(fastattn.__file__).parents[1])
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60
    )


def test_prints_and_returns_nothing(capsys):
    assert fastattn.show_config() is None
    printed = capsys.readouterr().out
    assert printed.startswith("fastattn ")
    assert printed.endswith("\n")


def test_dicts_mode_prints_nothing_and_is_plain(facts, capsys):
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(facts)) == facts


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'yaml'"):
        fastattn.show_config("yaml")


def test_versions(facts):
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["python"].split()[0] == sys.version.split()[0]
    try:
        installed = importlib.metadata.version("fastattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this source tree is not installed: it has no version")
    assert facts["versions"]["fastattn"] == installed


def test_version_without_metadata(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    assert "not installed" in introspect.versions()["fastattn"]


def test_gil():
    assert introspect.gil().split(",")[0].split(";")[0] in ("on", "off")


def test_build_information(facts):
    build = facts["build"]
    assert build["compiler"]
    assert build["openmp"]
    assert all("-O3" in flags or "left out" in flags for flags in build["flags"].values())
    assert not any("fast-math" in flags or "native" in flags for flags in build["flags"].values())


def highest_isa():
    return [row["name"] for row in _cpu.isa_table() if not row["missing"] and not row["slow"]][-1]


def test_isa_is_the_highest_that_runs_well():
    done = run_python("-c", "from fastattn import introspect; print(introspect.isa())")
    expected = {"name": highest_isa(), "why": "the highest that runs well here"}
    assert done.stdout.strip() == str(expected)


def test_isas_are_those_of_the_table(facts):
    assert [row["name"] for row in facts["isas"]][: len(_cpu.isa_table())] == [
        row["name"] for row in _cpu.isa_table()
    ]
    assert {row["isa"] for row in facts["kernels"]} == {row["name"] for row in _cpu.isa_table()}


def test_isa_that_cannot_run_or_is_slow_says_why(monkeypatch, facts):
    table = [
        {"name": "portable", "requires": "nothing", "missing": "", "slow": ""},
        {"name": "odd", "requires": "AVX-1024", "missing": "", "slow": "slower than portable"},
        {"name": "future", "requires": "AVX-2048", "missing": "AVX-2048", "slow": ""},
    ]
    monkeypatch.setattr(_cpu, "isa_table", lambda: table)
    rows = introspect.isas()[:3]
    assert [row["missing"] for row in rows] == ["", "", "this machine lacks AVX-2048"]
    assert [row["slow"] for row in rows] == ["", "slower than portable", ""]
    text = introspect.as_text({**facts, "isas": rows})
    for words in ("portable  runs here", "odd       slower than portable", "lacks AVX-2048"):
        assert words in text


def test_isa_that_was_not_built_is_listed_with_the_reason(monkeypatch):
    info = _cpu.build_info()
    reason = "left out, the compiler refuses -mfuture"
    info = {**info, "flags": {**info["flags"], "future": reason}}
    monkeypatch.setattr(_cpu, "build_info", lambda: info)
    row = introspect.isas()[-1]
    assert row == {"name": "future", "requires": "", "missing": reason, "slow": ""}


def test_forced_isa_is_shown_as_forced():
    done = run_python("-m", "fastattn", FASTATTN_CPU_ISA="portable")
    assert "ISA: portable (FASTATTN_CPU_ISA says so)" in done.stdout
    assert "FASTATTN_CPU_ISA    'portable'" in done.stdout


def test_wrong_forced_isa_is_explained():
    done = run_python("-m", "fastattn", FASTATTN_CPU_ISA="sse9")
    assert done.returncode == 0
    assert "ISA: none (FASTATTN_CPU_ISA is 'sse9'" in done.stdout


def test_isa_chosen_by_the_process(monkeypatch):
    before = _cpu.use_isa("portable")
    monkeypatch.delenv("FASTATTN_CPU_ISA", raising=False)
    try:
        facts = introspect.isa()
    finally:
        _cpu.use_isa(before)
    why = "the highest that runs well here"
    if highest_isa() != "portable":
        why = "chosen by this process"
    assert facts == {"name": "portable", "why": why}


def test_threads_by_default():
    code = "import fastattn, os; print(fastattn.introspect.threads())"
    done = run_python("-c", code, OMP_NUM_THREADS="1")
    facts = eval(done.stdout)
    assert facts["number"] == 1
    assert facts["openmp_maximum"] == 1
    assert facts["why"].startswith("the least of OpenMP's maximum (1)")


def test_threads_set():
    fastattn.set_num_threads(1)
    try:
        facts = introspect.threads()
    finally:
        fastattn.set_num_threads(None)
    assert facts["number"] == facts["set_num_threads"] == 1
    assert facts["why"] == "set_num_threads"
    assert introspect.threads()["set_num_threads"] is None


@pytest.mark.parametrize(
    ("quota", "shown", "text"), [(float("inf"), None, "none"), (3.0, 3.0, "3.0")]
)
def test_threads_name_the_quota(monkeypatch, quota, shown, text):
    limits = {"set": 0, "openmp": 8, "affinity": 4, "quota": quota}
    monkeypatch.setattr(_cpu, "thread_limits", lambda: limits)
    facts = introspect.threads()
    assert facts["cpus_of_quota"] == shown
    assert facts["why"] == (
        "the least of OpenMP's maximum (8), the CPUs of this process (4) "
        f"and the container's quota ({text})"
    )


def test_threads_after_a_fork(monkeypatch):
    monkeypatch.setattr(_cpu, "forked", lambda: True)
    assert "forked" in introspect.threads()["why"]


def test_threads_without_openmp(monkeypatch):
    info = {**_cpu.build_info(), "openmp": ""}
    monkeypatch.setattr(_cpu, "build_info", lambda: info)
    assert introspect.threads()["why"] == "built without OpenMP"


def test_main_prints_the_same():
    done = run_python("-m", "fastattn")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    same = run_python("-c", "import fastattn; fastattn.show_config()")
    assert done.stdout == same.stdout


def test_text_shows_everything(facts):
    text = introspect.as_text(facts)
    for row in facts["isas"] + facts["kernels"]:
        assert str(next(iter(row.values()))) in text
    for name in introspect.ENVIRONMENT:
        assert name in text
    assert facts["build"]["compiler"] in text
    assert "\nGPU: " in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_environment_table_is_complete():
    """The variables that the code reads are those that show_config lists."""
    root = Path(__file__).resolve().parent.parent
    files = [*root.glob("fastattn/*"), *root.glob("fastattn/_gpu/*")]
    package = [path for path in files if path.suffix in (".py", ".pyx", ".pxi", ".pxd")]
    read = set()
    for path in [root / "setup.py", *package]:
        read |= set(re.findall(r"environ\S*\(?[\"'](FASTATTN_\w+)", path.read_text()))
    assert read == set(introspect.ENVIRONMENT)


class TestGpu:
    """What is said of a GPU, by stand-ins: every failure is text."""

    @pytest.fixture
    def without_cupy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails

    @pytest.fixture
    def backend(self, monkeypatch):
        backend = types.ModuleType("fastattn._gpu")
        backend.device = types.ModuleType("fastattn._gpu.device")
        facts = {"name": "Some GPU", "capability": (9, 0), "kernels": "new"}
        backend.device.device_info = lambda: facts
        backend.config = types.ModuleType("fastattn._gpu.config")
        backend.config.table = lambda: [
            {"family": "old", "kernel": "forward", "D": 32},
            {"family": "new", "kernel": "forward", "D": 64},
            {"family": "new", "kernel": "odd", "Br": 16},
        ]
        monkeypatch.setattr(introspect, "load_cupy", lambda: SimpleNamespace(__version__="99.1"))
        monkeypatch.setattr(fastattn, "_gpu", backend, raising=False)
        monkeypatch.setitem(sys.modules, "fastattn._gpu", backend)
        monkeypatch.setitem(sys.modules, "fastattn._gpu.config", backend.config)
        monkeypatch.setitem(sys.modules, "fastattn._gpu.device", backend.device)
        return backend

    def text(self, facts):
        gpu = introspect.gpu()
        assert json.loads(json.dumps(gpu)) == gpu
        return introspect.as_text({**facts, "gpu": gpu})

    def test_without_cupy(self, facts, without_cupy):
        assert introspect.gpu()["cupy"] is None
        text = self.text(facts)
        assert re.search(r'\nGPU: none \(.* pip install "fastattn\[cuda12\]" or', text)

    def test_with_cupy(self, facts, backend):
        text = self.text(facts)
        for words in ("GPU: CuPy 99.1\n", "  name        Some GPU\n", "  kernels     new\n"):
            assert words in text
        for words in ("  family  kernel   D   Br\n", "  new     forward  64\n"):
            assert words in text
        assert "  new     odd          16\n" in text and "  old  " not in text
        assert len(introspect.gpu()["kernels"]) == 3

    @pytest.mark.parametrize("wrong", ["device_info", "table"])
    def test_what_fails_is_text(self, facts, backend, monkeypatch, wrong):
        def fail():
            raise RuntimeError("no\n  luck")

        monkeypatch.setattr(
            backend.device if wrong == "device_info" else backend.config, wrong, fail
        )
        text = self.text(facts)
        assert "luck)\n" in text and "GPU: CuPy 99.1 (" in text

    def test_cupy_is_not_imported_before_it_is_asked_for(self):
        done = run_python("-c", "import fastattn, sys; print('cupy' in sys.modules)")
        assert done.stdout == "False\n"
