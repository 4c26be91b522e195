"""Tensor maps: what Hopper's copy engine is told about an array in memory.

They are encoded by the driver library, which CuPy has loaded, on the host alone, and passed to
kernels by value.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_*, _SWIZZLE_128B, _L2_PROMOTION_L2_128B.
_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}
_SWIZZLE, _PROMOTION = 3, 2
_BYTES, _ALIGNMENT = 128, 64
# Columns of a box, 128 bytes: a panel of kernels/hopper.cuh, or half of one.
_BOX = {"float16": 64, "float32": 32, "bfloat16": 64}
_FARTHEST = 1 << 40  # no stride reaches it


class TensorMap(NamedTuple):
    """A map, and where it lies for a launch to copy it from."""

    address: int
    storage: np.ndarray


@functools.cache
def _encode() -> Any:
    """cuTensorMapEncodeTiled."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    function = library.cuTensorMapEncodeTiled
    u32, pointer = ctypes.c_uint32, ctypes.c_void_p
    function.argtypes = [pointer, u32, u32, *[pointer] * 5, u32, u32, u32, u32]
    function.restype = ctypes.c_int
    return function


@dataclass(frozen=True, eq=False)
class Tiles:
    """How tiles of `box` rows lie in an array (batches, heads, rows, columns) with strides in
    bytes, whose columns lie side by side. One is equal to itself alone, which is quick to see."""

    dtype: str
    columns: int
    rows: int
    heads: int
    batches: int
    row: int
    head: int
    batch: int
    box: int


@functools.lru_cache(4096)
def tensor_map(pointer: int, tiles: Tiles) -> TensorMap | None:
    """The map of an array; None where the copy engine cannot take it."""
    axes = [(tiles.columns, 0), (tiles.rows, tiles.row), (tiles.heads, tiles.head)]
    axes += [(tiles.batches, tiles.batch)]
    strides = [step if n > 1 else 16 for n, step in axes[1:]]
    if pointer % 16 or not all(0 <= step < _FARTHEST and step % 16 == 0 for step in strides):
        return None
    sizes = np.array([n for n, _ in axes], np.uint64)
    steps = np.array(strides, np.uint64)
    boxes = np.array([_BOX[tiles.dtype], tiles.box, 1, 1], np.uint32)
    ones = np.ones(4, np.uint32)
    storage = np.zeros(_BYTES + _ALIGNMENT, np.uint8)
    address = -(-storage.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    error = _encode()(
        address, _TYPES[tiles.dtype], 4, pointer,
        *(x.ctypes.data for x in (sizes, steps, boxes, ones)),
        0, _SWIZZLE, _PROMOTION, 0,
    )  # fmt: skip
    return None if error else TensorMap(address, storage)
