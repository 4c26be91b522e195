"""What is built, shipped and said in the README."""

import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
HERE = str(Path(fastattn.__file__).parents[1])  # where this fastattn is imported from
BUILD = [sys.executable, "setup.py"]
PYTHON = [sys.executable, "-P", "-c"]  # -P: not the fastattn/ that lies in the current folder


def run(command, cwd=ROOT, check=True, timeout=600, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": HERE, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


# ---- metadata and contents -------------------------------------------------------------------


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("fastattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this source tree is not installed: it has no version")
    assert installed == project["version"]


def test_typed():
    assert importlib.resources.files(fastattn).joinpath("py.typed").is_file()


def test_import_brings_in_numpy_only():
    loaded = {}
    for package in ("numpy", "fastattn"):
        names = run([*PYTHON, f"import sys, {package}; print(*sys.modules)"]).stdout.split()
        loaded[package] = {name.partition(".")[0] for name in names}
    new = loaded["fastattn"] - loaded["numpy"] - set(sys.stdlib_module_names) - {"fastattn"}
    assert not [name for name in new if "cython" not in name]  # Cython's own helpers


def test_source_tree_that_is_not_built_says_so(tmp_path):
    tree = tmp_path / "fastattn"
    tree.mkdir()
    for source in Path(fastattn.__file__).parent.glob("*.py"):
        shutil.copy(source, tree)
    # -S: nothing that is installed, whose import hook (of an editable install) would find _cpu
    python = [sys.executable, "-S", "-P", "-c"]
    done = run([*python, "import fastattn"], cwd=tmp_path, check=False, PYTHONPATH=tmp_path)
    assert f"ImportError: fastattn is not built in {tree}. " in done.stderr
    assert "pip install -e ." in done.stderr


# ---- the README ------------------------------------------------------------------------------


def blocks(language, page="README.md"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_readme_has_two_commands_for_newcomers():
    assert [block.count("\n") for block in blocks("bash")] == [1, 1]
    example, tests = blocks("bash")
    assert "examples/semantic_search.py" in example
    assert "pytest" in tests
    for script in re.findall(r"\S+\.py", example):
        assert (ROOT / script).is_file()


def test_readme_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for extra in re.findall(r'"\.\[(\w+)\]"', path.read_text()):
            assert extra in extras["optional-dependencies"]


def test_readme_code_runs(tmp_path):
    calls = blocks("python")
    assert len(calls) == 2
    assert len(calls[1].splitlines()) <= 12
    run([*PYTHON[:-1], "-W", "error", "-c", calls[1]], cwd=tmp_path)
    setup = "import numpy as np; query = key = value = np.ones((1, 2, 3, 4), np.float32)\n"
    run([*PYTHON[:-1], "-W", "error", "-c", setup + calls[0]], cwd=tmp_path)


def test_recipes_run(tmp_path):
    recipes = blocks("python", "docs/recipes.md")
    assert len(recipes) > 5
    run([*PYTHON[:-1], "-W", "error", "-c", "\n".join(recipes)], cwd=tmp_path)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_links_lead_somewhere(page):
    pages = sorted((ROOT / page).glob("*.md")) if (ROOT / page).is_dir() else [ROOT / page]
    assert pages
    for path in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


# ---- compilers that lack something -----------------------------------------------------------


@pytest.fixture
def compiler_without(tmp_path):
    """Makes a compiler that refuses some of its flags."""

    def make(*flags):
        path = tmp_path / "cc"
        cases = "\n".join(f'    {flag}) echo "cc: unknown {flag}" >&2; exit 1;;' for flag in flags)
        real = os.environ.get("CC", "cc")
        path.write_text(
            f'#!/bin/sh\nfor argument; do case "$argument" in\n{cases}\n    --none) ;;\n'
            f'esac; done\nexec {real} "$@"\n'
        )
        path.chmod(0o755)
        return path

    return make


def build_into(folder, **environment):
    command = [*BUILD, "build", "--build-base", folder / "build"]
    return run(command, check=False, **environment)


def test_missing_openmp_is_explained(compiler_without, tmp_path):
    cc = compiler_without("-fopenmp")
    done = build_into(tmp_path, CC=cc, FASTATTN_NO_OPENMP="")
    assert done.returncode != 0
    assert f"fastattn needs OpenMP, and `{cc} " in done.stderr
    assert "cc: unknown -fopenmp" in done.stderr
    for hint in ("libgomp", "brew install libomp", "build-essential", "FASTATTN_NO_OPENMP=1"):
        assert hint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("cc", ["false", "/nowhere/cc"])
def test_missing_compiler_is_explained(cc, tmp_path):
    done = build_into(tmp_path, CC=cc)
    assert done.returncode != 0
    assert f"fastattn needs a C compiler, and `{cc} " in done.stderr
    assert "build-essential" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_build_without_openmp_by_a_compiler_without_bfloat16(compiler_without, tmp_path):
    flags = ["-mavx512bf16", "-mavx2", "-fopenmp"]
    done = build_into(tmp_path, CC=compiler_without(*flags), FASTATTN_NO_OPENMP="1")
    assert done.returncode == 0, done.stderr
    [lib] = (tmp_path / "build").glob("lib*")
    code = """
import json
import numpy as np
import fastattn
x = np.random.default_rng(0).standard_normal((3, 4, 300, 16), dtype=np.float32)
forward, backward = fastattn.attention.attention_forward, fastattn.attention.attention_backward
out, lse = forward(x, x, x, is_causal=True, num_threads=4)
gradients = backward(out, x, x, x, out, lse, is_causal=True, num_threads=4)
assert np.isfinite(out).all() and np.isfinite(gradients.dk).all()
print(json.dumps(fastattn.show_config("dicts")))
"""
    facts = json.loads(run([*PYTHON, code], cwd="/", PYTHONPATH=lib).stdout)
    assert facts["build"]["openmp"] == ""
    assert facts["threads"]["number"] == 1
    if "avx2" in facts["build"]["flags"]:
        for row in facts["isas"]:
            assert ("refuses" in row["missing"]) == (row["name"] != "portable")
        assert "avx512_bf16 is left out, the compiler refuses" in done.stdout


# ---- distributions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run([*BUILD, "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder])
    [path] = folder.glob("*.tar.gz")
    return path


@pytest.mark.slow
def test_sdist_has_everything(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py"]
    for pattern in (
        "fastattn/*.py", "fastattn/*.py[xi]", "fastattn/*.px[id]", "fastattn/py.typed",
        "fastattn/_cpu_kernels/**/*.[ch]", "fastattn/_gpu/*.py", "fastattn/_gpu/kernels/*.cu*",
        "tests/*.py", "examples/*.py", "bench/*.py", "docs/*.md",
    ):  # fmt: skip
        found = [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
        wanted += found
    assert not set(wanted) - names
    unwanted = [name for name in names if name.endswith((".so", ".o", ".pyc", "fastattn/_cpu.c"))]
    assert not unwanted


@pytest.mark.slow
def test_wheel_from_sdist_works_on_its_own(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.glob("fastattn-*")
    run([*BUILD, "bdist_wheel", "--dist-dir", tmp_path], cwd=source)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastattn/py.typed" in names
    for pattern in ("fastattn/_gpu/*.py", "fastattn/_gpu/kernels/*.cu*"):
        assert not {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)} - set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".c", ".h", ".pyx", ".pxi"))]
    assert not [name for name in names if name.startswith(("tests", "examples", "bench"))]

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import fastattn; print(fastattn.__file__); fastattn.show_config()"
    done = run([*PYTHON, code], cwd="/", PYTHONPATH=tmp_path / "site")
    assert done.stdout.startswith(str(tmp_path / "site"))
