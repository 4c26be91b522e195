"""Builds fastattn._cpu: a Cython driver linked with C kernels, one set of objects for each ISA.

_cpu_kernels/<isa>_<type>.c is compiled with the flags of its ISA, everything else with the baseline
flags: the result runs on any machine of its architecture; dispatch.c chooses at run time.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

KERNELS = Path("fastattn", "_cpu_kernels")

# Never -ffast-math, which breaks the logic of -inf and NaN. No contraction by the compiler either:
# kernels that must round alike say where a multiplication and an addition are one (v_fma).
COMMON = "-std=gnu11 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512dq -mavx512bw -mavx512vl".split()]

CYTHON = dict(language_level=3, boundscheck=False, wraparound=False, initializedcheck=False)
CYTHON |= dict(cdivision=True, freethreading_compatible=True)

NO_COMPILER = """fastattn needs a C compiler, and `{command}` does not work:
{error}
Install GCC or Clang (apt install build-essential; macOS: xcode-select --install), or set CC."""

NO_OPENMP = """fastattn needs OpenMP, and `{command}` cannot compile and link it:
{error}
GCC: install libgomp (Debian and Ubuntu: apt install build-essential; Fedora: dnf install libgomp).
Clang on Linux: apt install libomp-dev, or use GCC with CC=gcc. macOS: brew install libomp.
FASTATTN_NO_OPENMP=1 builds without OpenMP: one thread only."""


def isa_flags(cc: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What the compiler is told for each ISA, and why some can't be built."""
    bf16 = [*AVX512, "-mavx512bf16"]
    amx = [*bf16, "-mamx-tile", "-mamx-bf16"]
    x86 = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": bf16, "amx": amx}
    flags: dict[str, list[str]] = {"portable": [], **x86}
    left_out = {}
    for isa, args in flags.items():
        if isa in x86 and platform.machine() not in ("x86_64", "AMD64"):
            left_out[isa] = "it is for x86-64"
        elif error := probe(cc, args):
            left_out[isa] = f"the compiler refuses {shlex.join(args)}"
            print(f"fastattn: {isa} is left out, {left_out[isa]}:\n{error}")
    return {isa: args for isa, args in flags.items() if isa not in left_out}, left_out


def openmp_flags(cc: list[str]) -> tuple[list[str], list[str]]:
    """What compiling and linking with OpenMP takes; a CompileError that helps if it is missing."""
    if error := probe(cc):
        raise CompileError(NO_COMPILER.format(command=shlex.join(cc), error=error))
    if os.environ.get("FASTATTN_NO_OPENMP") == "1":
        return [], []
    candidates = [(["-fopenmp"], ["-fopenmp"])]
    for prefix in ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp"):  # Apple's Clang
        compile_args = ["-Xpreprocessor", "-fopenmp", f"-I{prefix}/include"]
        candidates.append((compile_args, [f"-L{prefix}/lib", "-lomp"]))
    program = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
    errors = [probe(cc, before, after, program) for before, after in candidates]
    if "" not in errors:
        raise CompileError(NO_OPENMP.format(command=shlex.join([*cc, "-fopenmp"]), error=errors[0]))
    return candidates[errors.index("")]


def extensions() -> list[Extension]:
    """The extension, as far as it is known before the compiler is."""
    extension = Extension(
        "fastattn._cpu",
        sources=["fastattn/_cpu.pyx"],
        include_dirs=["fastattn", np.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        depends=["setup.py", *map(str, sorted(KERNELS.rglob("*.[ch]")))],
    )
    extension.cython_directives = CYTHON
    return [extension]


def probe(cc: list[str], before: Any = (), after: Any = (), text: str = "int main(void) {}") -> str:
    """Compile and link a tiny program: "" or what the compiler has against it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(text)
        command = [*cc, *before, str(source), "-o", str(source.with_suffix("")), *after]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""


class BuildExt(build_ext):
    """Compiles the kernels, each with its own flags, then the driver, and links them."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("fastattn is built with GCC or Clang, on Linux or macOS")
        cc = self.compiler.compiler
        openmp = openmp_flags(cc)
        flags, left_out = isa_flags(cc)
        if not any(openmp):
            ext.include_dirs.insert(0, str(KERNELS / "no_openmp"))  # an omp.h for one thread

        # Rewritten when the compiler or a flag changes; every object depends on it.
        info = Path(self.build_temp, "build_info.h")
        info.parent.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout
        lines = [f"{isa}: {shlex.join([*COMMON, *args])}" for isa, args in flags.items()]
        lines += [f"{isa}: left out, {reason}" for isa, reason in left_out.items()]
        facts = {"COMPILER": version.partition("\n")[0], "FLAGS": "\n".join(lines)}
        facts["OPENMP"] = shlex.join(dict.fromkeys(openmp[0] + openmp[1]))
        text = "".join(f"#define FASTATTN_{k} {json.dumps(v)}\n" for k, v in facts.items())
        if not info.exists() or info.read_text() != text:
            info.write_text(text)
        sources = [path for path in ext.depends if path.endswith(".c")]
        isa_of = {path: Path(path).stem.rpartition("_")[0] for path in sources}
        if unknown := set(isa_of.values()) - {"", *flags, *left_out}:  # "": dispatch.c
            raise CompileError(f"isa_flags in setup.py has no row for {sorted(unknown)}")
        headers = [str(info), *(path for path in ext.depends if path not in isa_of)]

        def compile_kernels(source: str) -> str:
            [target] = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *headers], target):
                have = [(f"FASTATTN_HAVE_{isa.upper()}", None) for isa in flags]
                args = [*COMMON, *flags.get(isa_of[source], [])]
                self.compiler.compile([source], self.build_temp, have, extra_postargs=args)
            return target

        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            sources = [path for path in sources if isa_of[path] not in left_out]
            ext.extra_objects = list(pool.map(compile_kernels, sources))
        ext.depends = [*ext.depends, str(info), *ext.extra_objects]
        ext.include_dirs.append(self.build_temp)
        ext.extra_compile_args, ext.extra_link_args = [*COMMON, *openmp[0]], openmp[1]
        super().build_extension(ext)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
