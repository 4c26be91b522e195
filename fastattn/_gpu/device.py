"""One GPU: what it is, its kernels, and how they are launched.

A kernel is compiled by NVRTC at its first use on a device; CuPy keeps the result on disk, in
`CUPY_CACHE_DIR`, and this module keeps the loaded function.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy_backends.cuda.api import driver

from fastattn._gpu import config as table
from fastattn._gpu.config import Config
from fastattn._gpu.params import SIZE
from fastattn._gpu.source import assemble
from fastattn._gpu.tensor_maps import TensorMap

OLDEST_CUDA = 12000  # of the runtime that CuPy was built with, as cudaRuntimeGetVersion counts


class Device(NamedTuple):
    """What the choice of kernels depends on."""

    id: int
    arch: int  # compute capability, 90 for 9.0
    family: str
    multiprocessors: int


@functools.cache
def device_of(number: int) -> Device:
    """The device with a number, once; raises where kernels can't run on it."""
    cuda = cupy.cuda.runtime.runtimeGetVersion()
    if cuda < OLDEST_CUDA:
        raise RuntimeError(
            f"fastattn needs CUDA {OLDEST_CUDA // 1000} or newer, and CuPy is using CUDA "
            f"{cuda // 1000}.{cuda % 1000 // 10}: install cupy-cuda12x or cupy-cuda13x"
        )
    arch = int(cupy.cuda.Device(number).compute_capability)
    oldest = min(table.FAMILIES.values())
    if arch < oldest:
        raise RuntimeError(
            f"fastattn needs a GPU of compute capability {oldest / 10} or newer, and device "
            f"{number} has {arch / 10}"
        )
    multiprocessors = cupy.cuda.Device(number).attributes["MultiProcessorCount"]
    return Device(number, arch, _family(arch), multiprocessors)


def _family(arch: int) -> str:
    """The kernel family: FASTATTN_GPU_ARCH, or the newest that runs here."""
    name = os.environ.get("FASTATTN_GPU_ARCH")
    nvrtc = cupy.cuda.nvrtc.getVersion()
    if not name:
        return table.default_family(arch, nvrtc)
    if name not in table.FAMILIES:
        raise ValueError(
            f"FASTATTN_GPU_ARCH is {name!r}; expected one of: {', '.join(table.FAMILIES)}"
        )
    if not table.runs(name, arch):
        raise RuntimeError(
            f"FASTATTN_GPU_ARCH is {name}, which needs compute capability "
            f"{table.FAMILIES[name] / 10}; this device has {arch / 10}"
        )
    if not table.compiles(name, nvrtc):
        raise RuntimeError(
            f"FASTATTN_GPU_ARCH is {name}, which needs NVRTC {_dotted(table.SPECIFIC_NVRTC)} or "
            f"newer; CuPy is using {_dotted(nvrtc)}"
        )
    return name


# ---------------------------------------------------------------- launching


class Kernel(NamedTuple):
    """A loaded kernel."""

    function: int  # CUfunction
    threads: int
    shared_bytes: int
    raw: Any  # the RawKernel, which keeps the function loaded


# No contraction by the compiler: what must round alike in two places says where it is fused.
OPTIONS = ("--std=c++17", "-default-device", "--fmad=false")
_kernels: dict[tuple[int, Config], Kernel] = {}
_loading = threading.Lock()


def load(device: Device, config: Config) -> Kernel:
    """The kernel of a configuration, compiled where that was not done before."""
    kernel = _kernels.get((device.id, config))
    if kernel is None:
        with _loading:
            options = (*OPTIONS, *table.arch_options(config.family))
            module = cupy.RawModule(code=assemble(config), options=options, backend="nvrtc")
            raw = module.get_function(config.kernel)
            shared = config.shared_bytes
            if config.most_shared_bytes > 48 * 1024:
                raw.max_dynamic_shared_size_bytes = config.most_shared_bytes
            kernel = Kernel(raw.kernel.ptr, config.threads, shared, raw)
            _kernels[device.id, config] = kernel
    return kernel


class _Arguments(threading.local):
    """A thread's copy of the kernels' one argument, which a launch copies, and its address."""

    def __init__(self) -> None:
        self.bound = False  # whether the driver has a context in this thread
        self.block = np.zeros(SIZE // 8, np.int64)
        self.words = memoryview(self.block)
        # of the block, and of the tensor maps that follow it in some kernels
        self._pointers = np.array([self.block.ctypes.data, 0, 0, 0, 0], np.uint64)
        self.pointers = memoryview(self._pointers)
        self.address = self._pointers.ctypes.data


arguments = _Arguments()


def launch(
    kernel: Kernel, blocks: int, shared: int, stream: int, maps: list[TensorMap] | None = None
) -> None:
    """Start a kernel with the thread's `arguments`, and tensor maps if it takes any."""
    if maps:
        pointers = arguments.pointers
        for place, found in enumerate(maps, 1):
            pointers[place] = found.address
    if not arguments.bound:
        cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
        arguments.bound = True
    driver.launchKernel(
        kernel.function, blocks, 1, 1, kernel.threads, 1, 1, shared, stream, arguments.address, 0
    )


def device_info() -> dict[str, Any]:
    """What `show_config` says of the current device."""
    runtime = cupy.cuda.runtime
    number = runtime.getDevice()
    properties = runtime.getDeviceProperties(number)
    device = device_of(number)
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{device.arch // 10}.{device.arch % 10}",
        "kernels": device.family,
        "memory_gib": round(properties["totalGlobalMem"] / 2**30),
        "cuda_runtime": _version(runtime.runtimeGetVersion()),
        "cuda_driver": _version(runtime.driverGetVersion()),
        "nvrtc": _dotted(cupy.cuda.nvrtc.getVersion()),
    }


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
