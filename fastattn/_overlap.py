"""Whether two strided arrays have an element in common, decided for the elements, not the bounds.

A result may be a free slot of a packed buffer, `buffer[:, :, 3]` beside q, k and v at 0, 1 and 2:
the bounds of the slots overlap, their elements do not. NumPy's `shares_memory` answers exactly but
may need exponential time; what makes slots disjoint is seen in a few operations.

Only addresses are looked at, never memory: CuPy arrays take part as ndarrays of their addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Steps granted to NumPy's exact search, some 30 ms. Only arrays that are neither apart nor slots of
# one buffer get there, and few of those need more than a handful of steps.
_MAX_WORK = 1_000_000


class _Addresses:
    """What NumPy makes an array of at the addresses of a CuPy array's elements."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{array.itemsize}",
            "shape": array.shape,
            "strides": array.strides,
            "data": (array.data.ptr, True),
        }


def addresses(a: Any) -> np.ndarray:
    """An ndarray of the elements' addresses, for what follows; its memory is not to be touched."""
    return a if isinstance(a, np.ndarray) else np.asarray(_Addresses(a))


def overlap(a: Any, b: Any) -> bool:
    """Whether a byte belongs to an element of both; True too where the search would not end."""
    a, b = addresses(a), addresses(b)
    if not np.may_share_memory(a, b) or _interleaved(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(a: Any) -> bool:
    """Whether two elements of one array have a byte in common, as along an axis of stride 0."""
    a = addresses(a)
    if a.flags.c_contiguous:
        return False
    reach = a.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(a.strides, a.shape) if n > 1):
        if stride < reach:
            break
        reach += stride * (length - 1)
    else:  # each axis steps over all that the axes of smaller strides reach
        return False
    # Two elements that meet differ along some axis, and still meet when both are moved along it
    # until one of them is at index 0.
    fronts = (np.moveaxis(a, axis, 0) for axis in range(a.ndim))
    return any(overlap(front[:1], front[1:]) for front in fronts)


def _interleaved(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the two stay in separate residues of the addresses modulo one of their strides.

    Strides that the modulus divides vanish; the others, with the size of an element, span an
    interval of residues. Two disjoint intervals prove that no byte is common.
    """
    steps_a, steps_b = (
        [(abs(s), n - 1) for s, n in zip(x.strides, x.shape) if n > 1 and s] for x in (a, b)
    )
    distance = _lowest_address(b) - _lowest_address(a)
    for modulus in {stride for stride, _ in steps_a + steps_b}:
        span_a = a.itemsize + sum(s * n for s, n in steps_a if s % modulus)
        span_b = b.itemsize + sum(s * n for s, n in steps_b if s % modulus)
        gap = distance % modulus
        if span_a <= gap and gap + span_b <= modulus:
            return True
    return False


def _lowest_address(a: np.ndarray) -> int:
    first: int = a.__array_interface__["data"][0]
    return first + sum(s * (n - 1) for s, n in zip(a.strides, a.shape) if s < 0)
