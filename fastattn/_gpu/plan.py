"""What the calls of a kind have in common, worked out once: a Plan.

Calls are of one kind where their options, device, shapes, strides, alignments and dtypes are equal.
The first is planned with stand-ins: a Layout for each array, and for each address the number of a
slot and an offset. A call then looks its plan up, allocates the workspace, and starts the launches
with what its slots hold. A plan holds no array and no address, but those of kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from fastattn._gpu.device import Kernel, arguments, launch
from fastattn._gpu.params import ADDRESSES
from fastattn._gpu.tensor_maps import Tiles, tensor_map

ALIGNMENT = 16  # what is known of an address: the rest of its division by this

_STAND_IN = 1 << 62  # which no address reaches
_OFFSET_BITS = 48
_ADDRESSES = np.array(ADDRESSES)
_PIECE = 512  # workspace is cut in multiples of this many bytes


def stand_in(slot: int, offset: int = 0) -> int:
    """What a plan has in place of an address."""
    return _STAND_IN | slot << _OFFSET_BITS | offset


class Layout(NamedTuple):
    """An array as a plan knows it."""

    address: int  # a stand-in; 0 where there is no memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


class Clear(NamedTuple):
    """Zeros, as many bytes, at a slot's offset."""

    slot: int
    offset: int
    size: int

    def start(self, slots: list[int], stream: int) -> None:
        cupy.cuda.runtime.memsetAsync(slots[self.slot] + self.offset, 0, self.size, stream)


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Kernel
    blocks: int
    shared: int
    # The argument without its addresses, and (its word, slot, offset) of each of them; None for
    # that of the launch before.
    argument: memoryview | None
    addresses: tuple[tuple[int, int, int], ...]
    maps: tuple[tuple[int, int, Tiles], ...]  # slots and offsets

    def start(self, slots: list[int], stream: int) -> None:
        if self.argument is not None:
            words = arguments.words
            words[:] = self.argument
            for word, slot, offset in self.addresses:
                words[word] = slots[slot] + offset
        maps = None
        if self.maps:
            maps = [tensor_map(slots[slot] + offset, tiles) for slot, offset, tiles in self.maps]
        launch(self.kernel, self.blocks, self.shared, stream, maps)


class Table(NamedTuple):
    """Byte offsets of batch entries, made at each call: sums of index x step, in C order."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def make(self) -> Any:
        table = cupy.zeros(self.shape, np.int64)
        for axis, (n, step) in enumerate(zip(self.shape, self.steps)):
            along = [1] * axis + [n] + [1] * (len(self.shape) - axis - 1)
            table += (cupy.arange(n, dtype=np.int64) * step).reshape(along)
        return table


class Plan(NamedTuple):
    """The slots of a call are those of its arrays, then the workspace, then the tables."""

    steps: tuple[Clear | Launch, ...]
    workspace: int  # bytes
    tables: tuple[Table, ...]

    def start(self, slots: list[int], stream: int) -> None:
        """`slots` are those of the arrays: addresses, down to a multiple of ALIGNMENT."""
        if self.workspace or self.tables:
            workspace = cupy.cuda.alloc(self.workspace)
            tables = [table.make() for table in self.tables]
            slots += [workspace.ptr, *(table.data.ptr for table in tables)]
        for step in self.steps:
            step.start(slots, stream)


class Planner:
    """Writes down what a call would do."""

    def __init__(self, slots: list[int]) -> None:
        self._slots = slots  # of the arrays of the first call
        self._workspace = 0
        self._steps: list[Clear | Launch] = []
        self._written = b""  # of the launch before: its argument with stand-ins
        self._tables: list[Table] = []

    def plan(self) -> Plan:
        return Plan(tuple(self._steps), self._workspace, tuple(self._tables))

    def workspace(self, count: int, dtype: Any) -> int:
        """The address of memory for `count` numbers that is the call's own."""
        at = self._workspace
        self._workspace += -(-count * np.dtype(dtype).itemsize // _PIECE) * _PIECE
        return stand_in(len(self._slots), at)

    def table(self, shape: tuple[int, ...], steps: tuple[int, ...]) -> int:
        self._tables.append(Table(shape, steps))
        return stand_in(len(self._slots) + len(self._tables))

    def actual(self, address: int) -> int:
        """Where something of an array lies in the first call."""
        slot, offset = _place(address)
        return self._slots[slot] + offset

    def clear(self, address: int, size: int) -> None:
        self._steps.append(Clear(*_place(address), size))

    def add(
        self, kernel: Kernel, blocks: int, shared: int, block: np.ndarray | None,
        maps: tuple[tuple[int, Tiles], ...] = (),
    ) -> None:  # fmt: skip
        """A launch with an argument of stand-ins, or that of the launch before."""
        argument, addresses = None, ()
        if block is not None and (written := block.tobytes()) != self._written:
            self._written = written
            words = _ADDRESSES[block[_ADDRESSES] != 0]
            places = map(_place, block[words].tolist())
            addresses = tuple((word, *place) for word, place in zip(words.tolist(), places))
            constant = block.copy()
            constant[words] = 0
            argument = memoryview(constant)
        placed = tuple((*_place(address), tiles) for address, tiles in maps)
        self._steps.append(Launch(kernel, blocks, shared, argument, addresses, placed))


def _place(address: int) -> tuple[int, int]:
    """The slot and offset that a stand-in stands for."""
    slot, offset = divmod(address - _STAND_IN, 1 << _OFFSET_BITS)
    assert slot >= 0, "an address of one call in the plan of many"
    return slot, offset
