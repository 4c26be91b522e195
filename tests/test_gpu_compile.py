"""Every GPU kernel compiles, for every architecture, without a GPU and without CuPy.

NVRTC of the wheel nvidia-cuda-nvrtc is called through ctypes, with the options that CuPy gives it.
The default run compiles each kernel for one head size, and the smallest for each architecture; the
slow one compiles every other source text that there is.
"""

import ctypes
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from fastattn._gpu import config, source

# As `OPTIONS` in fastattn/_gpu/device.py, which imports CuPy, and what CuPy adds to them.
OPTIONS = ("--std=c++17", "-default-device", "--fmad=false", "-ftz=true")
# A shared file declares more than each kernel uses; registers and spills go to the log.
CHECKS = ("-diag-suppress=177", "-Xptxas=-v")

# Kernels that fill all 255 registers spill some numbers; an array that left them is hundreds of
# bytes. On Hopper those are numbers of the warps that load.
MOST_SPILLED = 192


class Compiled(NamedTuple):
    """What came of one configuration on one architecture."""

    config: config.Config
    arch: int
    error: int
    log: str

    @property
    def spilled(self):
        """Bytes of a thread that its kernel keeps in memory for want of registers, apart from what
        it calls: that is for blocks that are done again."""
        kernel = self.config.kernel
        found = re.search(rf"properties for {kernel}\n.* (\d+) bytes spill stores", self.log)
        assert found, self.log
        return int(found[1])

    @property
    def complaint(self):
        """What is wrong with it, or nothing."""
        worst = re.search(r"^.*\b(warning|error|Performance Loss|C75\d\d)\b.*$", self.log, re.M)
        if self.error or worst:
            text = self.log if self.error else worst[0]
        elif self.config.fast and self.spilled > MOST_SPILLED:
            text = f"{self.spilled} bytes spilled"
        else:
            return ""
        return f"sm_{self.arch} {self.config}: {text}"


class Nvrtc:
    """NVRTC, as far as it is needed here."""

    def __init__(self, path):
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # else looked for elsewhere
            ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)
        self.nvrtc = ctypes.CDLL(path)
        self.nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        error = getattr(self.nvrtc, f"nvrtc{name}")(*arguments)
        assert not error, f"{name}: {self.nvrtc.nvrtcGetErrorString(error).decode()}"

    def archs(self):
        count = ctypes.c_int()
        self.call("GetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self.call("GetSupportedArchs", archs)
        return set(archs)

    def compile(self, text, arch, family=None):
        """Compile for an architecture: (0 or the error's number, the log)."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        target = config.arch_options(family or "") or (f"-arch=sm_{arch}",)
        options = [option.encode() for option in (*OPTIONS, *CHECKS, *target)]
        given = (ctypes.c_char_p * len(options))(*options)
        self.call(
            "CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
        )
        try:
            error = self.nvrtc.nvrtcCompileProgram(program, len(options), given)
            self.call("GetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self.call("GetProgramLog", program, log)
        finally:
            self.call("DestroyProgram", ctypes.byref(program))
        return error, log.value.decode()


@pytest.fixture(scope="module")
def nvrtc():
    spec = importlib.util.find_spec("nvidia")  # a namespace of NVIDIA's wheels
    folders = map(Path, spec.submodule_search_locations if spec else ())
    found = [path for folder in folders for path in folder.glob("**/lib/libnvrtc.so.*")]
    if not found:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return Nvrtc(max(found, key=lambda path: int(path.suffix[1:])))


def compile_all(nvrtc, jobs):
    """Compile pairs of a configuration and an architecture; fail with what is wrong with them."""

    def compile(job):
        error, log = nvrtc.compile(source.assemble(job[0]), job[1], job[0].family)
        return Compiled(*job, error, log).complaint

    missing = {arch for _, arch in jobs} - nvrtc.archs()
    assert not missing, f"this NVRTC does not know {missing}: a newer one is needed"
    with ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:
        complaints = list(filter(None, pool.map(compile, jobs)))
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def chosen(kernel, arch, dtype, size, options="", rows=128):
    family = config.default_family(arch)
    return config.choose(kernel, arch, family, dtype, options, size, size, rows)


def test_options_are_the_devices():
    pytest.importorskip("cupy")
    from fastattn._gpu import device

    assert OPTIONS[:-1] == device.OPTIONS


def test_errors_and_spills_are_seen(nvrtc):
    sound = chosen("reduce", 80, "float32", 64)
    assert not Compiled(sound, 80, *nvrtc.compile(source.assemble(sound), 80)).complaint
    assert "expected a" in Compiled(sound, 80, *nvrtc.compile("int f( {", 80)).complaint
    text = "__device__ int f() {}"
    assert "missing return" in Compiled(sound, 80, *nvrtc.compile(text, 80)).complaint
    # Far too few registers for its tiles.
    wide = chosen("forward", 80, "float16", 128)
    assert wide.fast
    wide = wide._replace(blocks=8)
    assert (
        "bytes spilled" in Compiled(wide, 80, *nvrtc.compile(source.assemble(wide), 80)).complaint
    )


def jobs_of(kernel):
    """A kernel for one head size: with no element-wise option and with all."""
    found = {
        (chosen(kernel, 80, dtype, 64, options), 80): None
        for dtype in config.DTYPES
        for options in ("", "all")
    }
    return list(found)


def jobs_of_hopper(kernel):
    fast = [chosen(kernel, 90, dtype, 64) for dtype in ("float16", "bfloat16")]
    if kernel == "backward_kv":
        fast += [config.together(c) for c in fast]
    finished = [*fast]
    fast += [chosen(kernel, 90, "bfloat16", 64, options) for options in config.OPTIONS]
    found = [c for f in fast for c in (f, config.careful(f))]
    if kernel == "backward_q":
        found += [config.finisher(f) for f in finished]
    return [(c, 90) for c in dict.fromkeys(found)]


def jobs_of_options():
    return [
        (chosen(kernel, 80, "bfloat16", 64, options), 80)
        for kernel in ("forward", "backward_q", "backward_kv")
        for options in config.OPTIONS
    ]


def jobs_of_architectures():
    return [
        (chosen("forward", arch, dtype, 32, rows=16), arch)
        for arch in config.ARCHS
        for dtype in ("bfloat16", "float32")  # what families have different instructions for
    ]


HOPPER = ("forward", "backward_q", "backward_kv")


@pytest.mark.parametrize("kernel", config.KERNELS)
def test_kernel_compiles(nvrtc, kernel):
    compile_all(nvrtc, jobs_of(kernel))


@pytest.mark.parametrize("kernel", HOPPER)
def test_hopper_kernels_compile(nvrtc, kernel):
    jobs = jobs_of_hopper(kernel)
    assert {c.family for c, _ in jobs} == {"sm_90a"}
    compile_all(nvrtc, jobs)


def jobs_of_halves():
    """float32 on Hopper."""
    fast = [chosen(kernel, 90, "float32", D) for kernel in HOPPER for D in (64, 128)]
    splits = dict.fromkeys(filter(None, map(config.splitter, fast)))
    return [(c, 90) for f in fast for c in (f, config.careful(f))] + [(c, 90) for c in splits]


def test_hopper_kernels_of_halves_compile_and_spill_nothing(nvrtc):
    jobs = jobs_of_halves()
    names = ["forward", "careful", "halves_q", "careful_halves_q", "halves_kv", "careful_halves_kv"]
    names += ["split"]
    assert {c.kernel for c, _ in jobs} == {f"hopper_{name}" for name in names}
    compile_all(nvrtc, jobs)
    for c, arch in jobs[::2]:  # what computes has as many registers as it fills
        log = nvrtc.compile(source.assemble(c), arch, c.family)
        assert Compiled(c, arch, *log).spilled == 0


def test_serialised_products_are_seen(nvrtc):
    """A result that is read while its products run."""
    forward = chosen("forward", 90, "bfloat16", 64)
    text = source.assemble(forward)
    hasty = text.replace("products_wait<0>();", "")
    assert hasty != text
    log = nvrtc.compile(hasty, 90, forward.family)
    assert "C75" in Compiled(forward, 90, *log).complaint


def test_kernels_of_single_options_compile(nvrtc):
    jobs = jobs_of_options()
    assert {job[0].options for job in jobs} == set(config.OPTIONS)
    compile_all(nvrtc, jobs)


def test_architectures_compile(nvrtc):
    compile_all(nvrtc, jobs_of_architectures())


# What these architectures choose is all there is: they differ in family and in shared memory.
SLOW_ARCHS = (75, 80, 90, 120)


def test_slow_architectures_choose_all_there_is():
    def all_of(archs):
        return {c for arch in archs for c in config.configs(arch, config.default_family(arch))}

    assert all_of(SLOW_ARCHS) == all_of(config.ARCHS)


def jobs_of_slow(arch):
    """What the slow run compiles for an architecture: of a text that an earlier one compiles too,
    only what has to be fast; kernels of single options, which differ in what they leave out, for
    two head sizes; and nothing that the default run compiles."""
    earlier = {
        c
        for other in SLOW_ARCHS[: SLOW_ARCHS.index(arch)]
        for c in config.configs(other, config.default_family(other))
    }
    default = {*jobs_of_options(), *jobs_of_architectures(), *jobs_of_halves()}
    default.update(job for kernel in config.KERNELS for job in jobs_of(kernel))
    default.update(job for kernel in HOPPER for job in jobs_of_hopper(kernel))
    return [
        (c, arch)
        for c in config.configs(arch, config.default_family(arch))
        if (c, arch) not in default
        and (
            c.fast
            or c.kernel in ("hopper_forward", "hopper_backward_q", "hopper_backward_kv")
            or (
                c not in earlier
                and (
                    c.options not in config.OPTIONS
                    or (c.dtype, c.D) in (("bfloat16", 64), ("float16", 128))
                )
            )
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SLOW_ARCHS)
def test_every_other_configuration_compiles(nvrtc, arch):
    compile_all(nvrtc, jobs_of_slow(arch))
