"""The GPU backend: a checked Problem becomes kernel launches on the current stream.

forward:  forward [, combine where keys are split]
backward: backward_rows, backward_q, backward_kv, backward_bias [, reduce], reduce

With masks or segments, survey tells each of the kernels that walk over tiles which are empty.

Calls are planned, and a plan is used again for calls of its kind: see `plan`.

Nothing is read from the device and nothing waits for it. Results that are asked for are filled by
the kernels; workspace comes from CuPy's allocator and is given back as its stream gets there.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from fastattn._gpu.config import (
    DECODE,
    HOPPER_KERNELS,
    SMALL_KERNELS,
    Config,
    careful,
    choose,
    finisher,
    generic,
    splitter,
    together,
)
from fastattn._gpu.device import Device, arguments, device_of, load
from fastattn._gpu.params import ARRAY_FIELDS, NO_ARRAY, pack
from fastattn._gpu.plan import ALIGNMENT, Layout, Plan, Planner, stand_in
from fastattn._gpu.tensor_maps import Tiles, tensor_map
from fastattn._problem import Problem

LONGEST = 1 << 29  # rows or keys: positions are 32-bit in kernels, and twice that is "far"
_ROW_PAD = 128  # kRowPad in kernels/gradient.cuh
_SPLIT_KEYS = 512  # keys of a split, and at most so many splits:
_MOST_SPLITS = 256
_FEW_ROWS = 64  # query rows of a whole group up to which they share a tile, and split their keys

_BYTES, _ELEMENTS, _VECTORS = range(3)  # enum Access
_HEAD, _ROW, _ACCESS = map(ARRAY_FIELDS.index, ("head", "row", "access"))
_KINDS: dict[Any, int] = {}  # enum Kind, by dtype; filled as dtypes are met
_KIND_NAMES = ("bool", "float16", "bfloat16", "float32", "float64")


def forward(problem: Problem, out: Any, lse: Any) -> None:
    """Fill `out` and `lse`."""
    if out.size or lse.size:
        _start(_forward, problem, out, lse)


def backward(
    problem: Problem, dout: Any, out: Any, lse: Any, dlse: Any,
    dq: Any, dk: Any, dv: Any, dbias: Any, dsinks: Any, dalibi_slopes: Any,
) -> None:  # fmt: skip
    """Fill the gradients that are not None."""
    p = problem
    if p.batch * p.Hq * p.Lq:
        _start(_backward, problem, dout, out, lse, dlse, dq, dk, dv, dbias, dsinks, dalibi_slopes)
        return
    for gradient in (dk, dv, dsinks, dalibi_slopes):
        if gradient is not None and gradient.size:
            gradient.view(f"u{gradient.itemsize}").fill(0)  # all dtypes know that


# ---------------------------------------------------------------- plans

# The seed first: where it is on the host, it is no part of the kind, but what its slot holds.
_ARRAYS = (
    "seed", "q", "k", "v", "attn_mask", "bias", "q_segment_ids", "kv_segment_ids", "q_lens",
    "kv_lens", "causal_offset", "alibi_slopes", "sinks",
)  # fmt: skip
_PLACES = tuple(map(Problem._fields.index, _ARRAYS))
_arrays_of = operator.itemgetter(*_PLACES)
_numbers_of = operator.itemgetter(
    *(at for at, name in enumerate(Problem._fields) if name not in (*_ARRAYS, "acc"))
)
_MOST_KINDS = 1024
_plans: dict[tuple[Any, ...], Plan] = {}
_remembering = threading.Lock()


def _start(plan: Callable[..., None], problem: Problem, *results: Any) -> None:
    """Do what `plan` plans for such calls; `results` are what it takes beside the problem."""
    kind, slots = _kind_and_slots(plan, problem, results)
    found = _plans.get(kind)
    if found is None:
        found = _planned(plan, problem, results, slots)
        _remember(_plans, kind, found)
    found.start(slots, cupy.cuda.get_current_stream().ptr)


def _kind_and_slots(
    plan: Callable[..., None], problem: Problem, results: tuple[Any, ...]
) -> tuple[tuple[Any, ...], list[int]]:
    """All that a plan depends on, and what fills its slots."""
    arrays = (*_arrays_of(problem), *results)
    slots = [0] * len(arrays)
    kind = [plan, problem.q.data.device_id, _numbers_of(problem)]
    for slot, array in enumerate(arrays):
        if array is None:
            continue
        if type(array) is int:
            kind += slot, array
            continue
        address = array.data.ptr
        slots[slot] = address & -ALIGNMENT
        kind += slot, array.strides, array.dtype.num, address % ALIGNMENT if address else -1
    if problem.dropout_p and type(problem.seed) is int:
        slots[0], kind[4] = problem.seed - (problem.seed >> 63 << 64), "on the host"
    return tuple(kind), slots


def _remember(memory: dict[tuple[Any, ...], Any], kind: tuple[Any, ...], value: Any) -> None:
    with _remembering:
        if len(memory) >= _MOST_KINDS:
            del memory[next(iter(memory))]
        memory[kind] = value


def _planned(
    plan: Callable[..., None], problem: Problem, results: tuple[Any, ...], slots: list[int]
) -> Plan:
    """The plan of calls of which this is the first."""
    layouts = [*_arrays_of(problem), *results]
    for slot, array in enumerate(layouts):
        if type(array) is cupy.ndarray:
            address = array.data.ptr and stand_in(slot, array.data.ptr % ALIGNMENT)
            layouts[slot] = Layout(address, array.shape, array.strides, array.dtype)
    if problem.dropout_p and type(problem.seed) is int:
        layouts[0] = stand_in(0)
    fields = list(problem)
    for place, layout in zip(_PLACES, layouts):
        fields[place] = layout
    given = Problem._make(fields)
    call = _Call(given, device_of(problem.q.data.device_id), slots)
    plan(call, *layouts[len(_ARRAYS) :])
    return call.plan()


class _Known(NamedTuple):
    """A forward that was done: its plan, and what `cupy.ndarray` takes for results like its own."""

    plan: Plan
    out: tuple[Any, ...]
    lse: tuple[Any, ...]


_known: dict[tuple[Any, ...], _Known | None] = {}  # None where one was done, but not looked at
_VALUES = {type(None), bool, int, float, str}  # whose equal ones are alike, and stay as they are
_OTHERS = (0,) * (len(_ARRAYS) - 4)  # slots of arrays beside q, k and v, and of the seed


def forward_again(
    q: Any, k: Any, v: Any, options: tuple[Any, ...]
) -> tuple[tuple[Any, ...] | None, tuple[Any, Any] | None]:
    """A forward's kind if it is to be remembered, as the second one is, and the results where that
    was done: then nothing is left to be checked. Options are as the caller has them."""
    types = tuple(map(type, options))
    if not (type(q) is type(k) is type(v) is cupy.ndarray and _VALUES.issuperset(types)):
        return None, None
    of_q, of_k, of_v = q.data, k.data, v.data
    device = of_q.device_id
    if not device == of_k.device_id == of_v.device_id:
        return None, None
    at_q, at_k, at_v = of_q.ptr, of_k.ptr, of_v.ptr
    kind = (
        options, types, device, q.dtype.num, k.dtype.num, v.dtype.num,
        q.shape, k.shape, v.shape, q.strides, k.strides, v.strides,
        at_q % ALIGNMENT, at_k % ALIGNMENT, at_v % ALIGNMENT,
    )  # fmt: skip
    known = _known.get(kind)
    if known is None:
        if kind in _known:
            return kind, None
        _remember(_known, kind, None)
        return None, None
    if device != cupy.cuda.runtime.getDevice():
        return None, None
    out, lse = cupy.ndarray(*known.out), cupy.ndarray(*known.lse)
    at_out, at_lse = out.data.ptr, lse.data.ptr
    if (at_out | at_lse) % ALIGNMENT:  # a caller's allocator may do so
        return None, None
    slots = [
        0, at_q & -ALIGNMENT, at_k & -ALIGNMENT, at_v & -ALIGNMENT, *_OTHERS, at_out, at_lse,
    ]  # fmt: skip
    known.plan.start(slots, cupy.cuda.get_current_stream().ptr)
    return kind, (out, lse)


def remember_forward(kind: tuple[Any, ...], problem: Problem, out: Any, lse: Any) -> None:
    """Let `forward_again` know a forward that was done, if it serves all of its kind."""
    others = _arrays_of(problem)[4:]
    if problem.dropout_p or any(type(x) is cupy.ndarray for x in others):
        return
    of_plan, _ = _kind_and_slots(_forward, problem, (out, lse))
    plan = _plans.get(of_plan)
    if plan and (out.data.ptr | lse.data.ptr) % ALIGNMENT == 0:
        like = [
            (x.shape, x.dtype) if x.flags.c_contiguous else (x.shape, x.dtype, None, x.strides)
            for x in (out, lse)
        ]
        _remember(_known, kind, _Known(plan, *like))


def _forward(call: _Call, out: Layout, lse: Layout) -> None:
    p = call.problem
    few = p.group * p.Lq <= _FEW_ROWS
    call.packed = packed = few and p.group > 1
    rows = p.group * p.Lq if packed else p.Lq
    arrays = call.inputs() | {"out": call.array(out), "lse": call.rows(lse)}
    config = call.config("forward", rows)
    tiles = -(-rows // config.Br)
    if config.kernel == "hopper_forward":
        return _hopper_forward(call, config, tiles, arrays, _kind(out))
    pieces = max(1, -(-p.Dv // config.Dv)) if config.walk else 1
    splits, split_keys = _split(p.Lk, config) if few else (1, 0)
    scalars: dict[str, Any] = {
        "out_kind": _kind(out), "packed": int(packed), "tiles": tiles,
        "pieces": pieces, "splits": splits, "split_keys": split_keys,
    }  # fmt: skip
    if splits > 1:
        all_rows = p.batch * p.Hq * p.Lq * splits
        scalars["partial_out"] = call.workspace(all_rows * (-(-p.Dv // 4) * 4), p.acc)
        scalars["partial_lse"] = call.workspace(all_rows, p.acc)
    if not few:
        scalars |= call.survey(config, arrays)
    heads = p.batch * (p.Hkv if packed else p.Hq)
    call.launch(config, heads * tiles * pieces * splits, arrays, scalars)
    if splits > 1:
        call.launch(call.config("combine", splits), p.batch * p.Hq * p.Lq, arrays, scalars)


def _hopper_forward(
    call: _Call, config: Config, tiles: int, arrays: dict[str, Any], out_kind: int
) -> None:
    """All tiles by the fast kernel, and again by the careful one what did not end finite; or all by
    the careful one, where tensor maps cannot take an array."""
    p = call.problem
    scalars: dict[str, Any] = {"out_kind": out_kind, "tiles": tiles, "splits": 1}
    scalars |= call.survey(config, arrays)
    total = tiles * p.batch * p.Hq
    maps = call.maps(config, arrays, ("q", "k", "v"))
    if maps is None:
        call.launch(careful(config), total, arrays, scalars)
        return
    scalars["flags"] = call.workspace(total * config.Br // 16, np.uint8)
    _launch_hopper(call, config, total, arrays, scalars, maps)


def _launch_hopper(
    call: _Call, config: Config, total: int, arrays: dict[str, Any], scalars: dict[str, Any],
    maps: tuple[tuple[int, Tiles], ...],
) -> None:  # fmt: skip
    """A fast kernel, whose blocks may stay and take tiles from a counter, and the careful one."""
    few = min(total, call.device.multiprocessors)
    blocks = few if config.stays else total
    if total > blocks:
        scalars = scalars | {"next": call.workspace(1, np.int32)}
        call.clear(scalars["next"], 4)
    call.launch(config, blocks, arrays, scalars, maps)
    call.launch_again(careful(config), few)


def _split(Lk: int, config: Config) -> tuple[int, int]:
    """How many parts the keys are cut in, and their length, for few queries: of Lk alone."""
    keys = max(_SPLIT_KEYS, -(-Lk // _MOST_SPLITS))
    tile = config.Bc * (config.warps if config.kernel == DECODE else 1)
    keys = -(-keys // tile) * tile
    return max(1, -(-Lk // keys)), keys


def _backward(
    call: _Call, dout: Layout, out: Layout, lse: Layout, dlse: Layout | None,
    dq: Layout | None, dk: Layout | None, dv: Layout | None, dbias: Layout | None,
    dsinks: Layout | None, dalibi_slopes: Layout | None,
) -> None:  # fmt: skip
    p = call.problem
    rows = p.batch * p.Hq * _padded(p.Lq)
    arrays = call.inputs() | {
        "dout": call.array(dout), "out": call.array(out), "lse": call.rows(lse),
        "dlse": NO_ARRAY if dlse is None else call.rows(dlse),
    }  # fmt: skip
    scalars: dict[str, Any] = {
        "out_kind": _kind(out),
        "row_lse": call.workspace(rows, p.acc), "row_delta": call.workspace(rows, p.acc),
        "splits": 1, "pieces": 1,
    }  # fmt: skip
    config = call.config("backward_rows")
    call.launch(config, -(-rows // config.warps), arrays, scalars)

    if not p.deterministic and _together(call, arrays, dq, dk, dv, scalars):
        dq = dk = dv = None
    config = splitter(call.config("backward_q"))
    if config and (dq is not None or dk is not None or dv is not None):
        scalars |= _halves(call, config, arrays)
    if dalibi_slopes is not None:
        row_sum = call.workspace(rows, p.acc)
    if dq is not None or dalibi_slopes is not None:
        given = {} if dq is None else {"dq": call.array(dq)}
        more: dict[str, Any] = {}
        if dalibi_slopes is not None:
            # Sums without the softcap's slope, and of products that are rounded.
            if given and (p.softcap or p.dtype != "float64"):
                _rows_of_dq(call, call.config("backward_q"), arrays | given, scalars)
                given = {}
            more["row_sum"] = row_sum
        config = call.config("backward_q", of_hopper=not more)  # whose kernels make no such sums
        _rows_of_dq(call, config, arrays | given, scalars | more)
    if (dk is not None or dv is not None) and p.Lk:
        config = call.config("backward_kv")
        more = {"tiles": -(-p.Lk // config.Bc)}
        if config.kernel == "backward_kv":
            widest = max(p.D, p.Dv) if config.walk else config.D
            more["pieces"] = max(1, -(-widest // config.out_columns))
        given = {n: call.array(x) for n, x in (("dk", dk), ("dv", dv)) if x is not None}
        more |= call.survey(config, arrays)
        blocks = p.batch * p.Hkv * more["tiles"] * more.get("pieces", 1)
        _launch_backward(call, config, blocks, arrays | given, scalars | more)
    if dbias is not None and dbias.size:
        _bias(call, dbias, arrays, scalars)
    if dsinks is not None:
        more = {"sums": dsinks.address, "slices": 0}
        call.launch(call.config("reduce"), p.Hq, arrays, scalars | more)
    if dalibi_slopes is not None:
        more = {"sums": dalibi_slopes.address, "slices": 0, "row_sum": row_sum}
        call.launch(call.config("reduce"), p.Hq, arrays, scalars | more)


def _rows_of_dq(
    call: _Call, config: Config, arrays: dict[str, Any], scalars: dict[str, Any]
) -> None:
    """What backward_q makes: dQ, or rows' sums."""
    p = call.problem
    more: dict[str, Any] = {"tiles": -(-p.Lq // config.Br)}
    more["pieces"] = max(1, -(-p.D // config.D)) if config.walk else 1
    blocks = p.batch * p.Hq * more["tiles"] * more["pieces"]
    more |= call.survey(config, arrays)
    _launch_backward(call, config, blocks, arrays, scalars | more)


def _halves(call: _Call, config: Config, arrays: dict[str, Any]) -> dict[str, Any]:
    """Where all rows of the inputs are in halves, by kernels/hopper_split.cu."""
    p = call.problem
    rows = 2 * p.batch * (p.Hq * _padded(p.Lq) + p.Hkv * _padded(p.Lk))
    found = {
        "halves": call.workspace(rows * config.D, np.float32),
        "weights": call.workspace(2 * rows, np.float32),
    }
    call.launch(config, -(-rows * (config.D // 8) // config.threads), arrays, found)
    return found


def _padded(length: int) -> int:
    return -(-length // _ROW_PAD) * _ROW_PAD


def _launch_backward(
    call: _Call, config: Config, blocks: int, arrays: dict[str, Any], scalars: dict[str, Any]
) -> None:
    """A kernel of tiles; on Hopper as `_hopper_forward` has it."""
    if config.kernel not in HOPPER_KERNELS:
        call.launch(config, blocks, arrays, scalars)
        return
    maps = call.maps(config, arrays, ("q", "dout", "k", "v"), scalars.get("halves", 0))
    if maps is None:
        call.launch(careful(config), blocks, arrays, scalars)
        return
    flags = call.workspace(blocks * careful(config).warps, np.uint8)
    _launch_hopper(call, config, blocks, arrays, scalars | {"flags": flags}, maps)


def _together(
    call: _Call, arrays: dict[str, Any], dq: Layout | None, dk: Layout | None, dv: Layout | None,
    scalars: dict[str, Any],
) -> bool:  # fmt: skip
    """dQ, dK and dV by a kernel that adds to sums of dQ in any order, and one that ends these;
    False where there is none."""
    p = call.problem
    config = together(call.config("backward_kv"))
    if config is None or p.Lk == 0 or dq is None or (dk is None and dv is None):
        return False
    if call.maps(config, arrays, ("q", "dout", "k", "v")) is None:
        return False
    count = p.batch * p.Hq * -(-p.Lq // 64) * 64 * p.D
    scalars = scalars | {"dq_sums": call.workspace(count, np.float32)}
    call.clear(scalars["dq_sums"], 4 * count)
    given = {n: call.array(x) for n, x in (("dk", dk), ("dv", dv)) if x is not None}
    tiles = -(-p.Lk // config.Bc)
    blocks = p.batch * p.Hkv * tiles
    _launch_backward(call, config, blocks, arrays | given, scalars | {"tiles": tiles})

    config = call.config("backward_q")
    tiles = -(-p.Lq // config.Br)
    blocks = p.batch * p.Hq * tiles
    flags = call.workspace(blocks * finisher(config).warps, np.uint8)
    more = {"tiles": tiles, "flags": flags}
    call.launch(finisher(config), blocks, arrays | {"dq": call.array(dq)}, scalars | more)
    call.launch_again(careful(config), min(blocks, call.device.multiprocessors))
    return True


def _bias(call: _Call, dbias: Layout, arrays: dict[str, Any], scalars: dict[str, Any]) -> None:
    """Sum the gradient of bias over the axes that it lacks: those of stride 0."""
    p = call.problem
    config = call.config("backward_bias")
    row_tiles, column_tiles = -(-p.Lq // config.Br), -(-p.Lk // config.Bc)
    *lead, head, row, column = (
        stride == 0 and size > 1 for stride, size in zip(dbias.strides, dbias.shape)
    )
    more: dict[str, Any] = {
        "dbias_kind": _kind(dbias),
        "head_sums": head, "row_sums": row, "column_sums": column,
        "batch_sums": math.prod(n for n, summed in zip(p.lead, lead) if summed),
    } | call.survey(config, arrays)  # fmt: skip
    own_batches = p.batch // more["batch_sums"]
    if 1 < more["batch_sums"] < p.batch:  # entries of C order, in steps of C order
        steps = [math.prod(p.lead[axis + 1 :]) for axis in range(len(p.lead))]
        own = call.offsets(p.lead, [0 if summed else s for s, summed in zip(steps, lead)], lead)
        summed_axes = [not summed for summed in lead]
        sums = call.offsets(p.lead, [s if x else 0 for s, x in zip(steps, lead)], summed_axes)
        more |= {"own_batches": own, "sum_batches": sums}
    plane = (1 if row else row_tiles) * (1 if column else column_tiles)
    summed_tiles = (
        (row_tiles if row else 1) * (column_tiles if column else 1) * (p.Hq if head else 1)
    ) * more["batch_sums"]
    # Only where rows or columns are summed is a slice's share small beside what it is made from.
    slices = max(1, min(summed_tiles, _BIAS_BLOCKS // plane)) if row or column else 1
    more["slices"] = slices
    own_heads = 1 if head else p.Hq
    elements = own_batches * own_heads * (1 if row else p.Lq) * (1 if column else p.Lk)
    if slices > 1:
        more["sums"] = call.workspace(elements * slices, np.float64)
    arrays = arrays | {"dbias": call.array(dbias)}
    call.launch(config, own_batches * own_heads * plane * slices, arrays, scalars | more)
    if slices > 1:
        call.launch(call.config("reduce"), elements, arrays, scalars | more)


_BIAS_BLOCKS = 64  # that share the sums of one plane of dbias


def _kind(array: Any) -> int:
    """The Kind of an array's dtype; 0 where there is no array."""
    if array is None:
        return 0
    kind = _KINDS.get(array.dtype)
    if kind is None:
        kind = _KINDS[array.dtype] = _KIND_NAMES.index(array.dtype.name)
    return kind


def _pointer(array: Layout | None) -> int:
    return 0 if array is None else array.address


@functools.lru_cache(1024)
def _describe(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int, axes: int
) -> tuple[Any, ...]:
    """The fields of `Array`, whose last `axes` axes are no batch axes; where batch entries have no
    one stride, that is None."""
    lead = strides[:-axes]
    head, row, column = (*strides[-axes:], 0)[:3]
    batch: int | None = 0
    steps = [(n, stride) for n, stride in zip(shape, lead) if n != 1]
    if steps:
        batch = steps[-1][1]
        if any(outer[1] != inner[0] * inner[1] for outer, inner in zip(steps[:-1], steps[1:])):
            batch = None
    together = pointer | head | row
    for stride in lead if batch is None else (batch,):
        together |= stride
    if (
        axes == 3 and column == size and together % 16 == 0
        and shape[-1] * size % 16 == 0 and pointer
    ):  # fmt: skip
        access = _VECTORS
    else:
        access = _BYTES if (together | column) % size else _ELEMENTS
    return pointer, 0, batch, head, row, column, access


def _of_all_heads(ids: Layout) -> Layout:
    """Segment ids (..., L) as (..., 1, L)."""
    shape, strides = ids.shape, ids.strides
    return ids._replace(shape=(*shape[:-1], 1, shape[-1]), strides=(*strides[:-1], 0, strides[-1]))


class _Asked(NamedTuple):
    """What a kernel with element-wise options is chosen by, and how tiles of a mask and bias come to
    its shared memory."""

    options: str
    added: dict[str, int]


class _Call(Planner):
    """A call that is planned: its arrays as kernels see them, its launches. The arrays of its
    problem are Layouts."""

    def __init__(self, problem: Problem, device: Device, slots: list[int]) -> None:
        super().__init__(slots)
        self.problem = p = problem
        for name, length in (("q", p.Lq), ("k", p.Lk)):
            if length > LONGEST:
                raise ValueError(
                    f"{name} has {length} rows (axis -2), and a GPU takes at most {LONGEST}"
                )
        # Whether scores have to be in natural units, in kernels with element-wise options.
        odd_scale = not 1e-30 < p.scale < 1e30  # its product with log2(e) may leave float32
        of_numbers = p.bias is not None or (p.attn_mask is not None and p.attn_mask.dtype != bool)
        self.natural = bool(p.softcap or p.alibi_slopes is not None or of_numbers or odd_scale)
        self.packed = False
        self.device = device
        self.options = self._options()

    def config(self, kernel: str, rows: int = 0, of_hopper: bool = True) -> Config:
        """What serves the call; one of Hopper's own, if there is one, where `of_hopper` allows it."""
        p, device = self.problem, self.device
        rows = 16 if rows <= 16 else 64 if rows <= 64 else 128

        def chosen(family: str, options: str) -> Config:
            return choose(kernel, device.arch, family, p.dtype, options, p.D, p.Dv, rows)

        if of_hopper:
            found = chosen(device.family, self.asked[True].options)
            if found.kernel in HOPPER_KERNELS:
                return found
        return chosen(generic(device.family), self.asked[False].options)

    def launch(
        self, config: Config, blocks: int, arrays: dict[str, Any], scalars: dict[str, Any],
        maps: tuple[tuple[int, Tiles], ...] = (), reader: Config | None = None,
    ) -> None:  # fmt: skip
        """A launch of a kernel, or of what looks at tiles for another, its `reader`."""
        shared = config.shared_bytes
        if config.options:
            scalars = scalars | self.asked[(reader or config).kernel in HOPPER_KERNELS].added
            shared = config.shared_bytes_with(self._added_bytes(config))
        pack(arguments.block, arrays, self.options, scalars)
        self.add(load(self.device, config), blocks, shared, arguments.block, maps)

    def launch_again(self, config: Config, blocks: int) -> None:
        """Another kernel with the arguments of the launch before."""
        self.add(load(self.device, config), blocks, config.shared_bytes, None)

    def maps(
        self, config: Config, arrays: dict[str, Any], names: tuple[str, ...], halves: int = 0
    ) -> tuple[tuple[int, Tiles], ...] | None:
        """Where some inputs are, or their `halves`, and their tiles for a configuration, of which
        there are to be tensor maps; None where one has none."""
        p, found = self.problem, []
        if halves:
            return self._maps_of_halves(config, names, halves) if p.Lk else None
        for name in names:
            rows, heads, box = (
                (p.Lq, p.Hq, config.Br) if name in ("q", "dout") else (p.Lk, p.Hkv, config.Bc)
            )
            columns = p.D if name in ("q", "k") else p.Dv
            pointer, batches, batch, head, row, _, access = arrays[name]
            if batches or access != _VECTORS:
                return None
            tiles = Tiles(p.dtype, columns, rows, heads, p.batch, row, head, batch, box)
            if tensor_map(self.actual(pointer), tiles) is None:
                return None
            found.append((pointer, tiles))
        return tuple(found)

    def _maps_of_halves(
        self, config: Config, names: tuple[str, ...], address: int
    ) -> tuple[tuple[int, Tiles], ...]:
        """They lie one behind the other; see kernels/hopper_split.cuh."""
        p, found, pitch = self.problem, [], 4 * config.D
        for name in names:
            L, heads, box = (
                (p.Lq, p.Hq, config.Br) if name in ("q", "dout") else (p.Lk, p.Hkv, config.Bc)
            )
            head = _padded(L) * pitch
            steps = (pitch, head, heads * head)
            tiles = Tiles(p.dtype, config.D, _padded(L), heads, p.batch, *steps, box)
            found.append((address, tiles))
            address += p.batch * heads * head
        return tuple(found)

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The arrays of the problem itself."""
        p = self.problem
        arrays = {"q": self.array(p.q), "k": self.array(p.k), "v": self.array(p.v)}
        if p.attn_mask is not None:
            arrays["attn_mask"] = self.array(p.attn_mask)
        if p.bias is not None:
            arrays["bias"] = self.array(p.bias)
        if p.q_segment_ids is not None:
            arrays["q_segment_ids"] = self.rows(_of_all_heads(p.q_segment_ids))
            arrays["kv_segment_ids"] = self.rows(_of_all_heads(p.kv_segment_ids))
        # Hopper's kernels, True, take a mask or bias of any layout.
        self.asked = {of_hopper: self._asked(arrays, of_hopper) for of_hopper in (False, True)}
        return arrays

    def _asked(self, arrays: dict[str, tuple[int, ...]], any_layout: bool) -> _Asked:
        p = self.problem
        asked = [
            name for name, given in (
                ("softcap", p.softcap), ("alibi", p.alibi_slopes is not None),
                ("dropout", p.dropout_p), ("segments", p.q_segment_ids is not None),
            ) if given
        ]  # fmt: skip
        added: dict[str, int] = {}
        numbers = [name for name in ("attn_mask", "bias") if name in arrays]

        def one_row(names: list[str]) -> bool:
            same = (_ROW, _HEAD) if self.packed else (_ROW,)
            return not any(arrays[name][field] for name in names for field in same)

        def copied(names: list[str], size: int) -> bool:
            if len(names) > 1 or self.packed:
                return False
            if any_layout:  # where rows may lie in whole 4 bytes
                return p.Lk * size % 4 == 0
            return arrays[names[0]][_ACCESS] == _VECTORS

        if p.attn_mask is not None and p.attn_mask.dtype == bool and copied(["attn_mask"], 1):
            numbers.remove("attn_mask")
            added |= {"bools": 1, "bools_one_row": one_row(["attn_mask"])}
            asked.append("bools")
        if numbers:
            array = p.attn_mask if numbers[0] == "attn_mask" else p.bias
            acc, size = np.dtype(p.acc), array.itemsize
            is_copied = copied(numbers, size) and (size == 2 or array.dtype == acc)
            added |= {
                "numbers_size": size if is_copied else acc.itemsize, "numbers_kind": _kind(array),
                "numbers_copied": is_copied, "numbers_one_row": one_row(numbers),
            }  # fmt: skip
            asked.append("numbers")
            if not is_copied or array.dtype.name != p.dtype:
                asked.append("")  # for "all"
        if self.natural and not {"softcap", "alibi", "numbers"}.intersection(asked):
            asked.append("")
        return _Asked("all" if len(asked) > 1 or asked == [""] else "".join(asked), added)

    def _added_bytes(self, config: Config) -> int:
        if config.kernel in SMALL_KERNELS:
            return 0
        get = self.asked[False].added.get
        bools = get("bools", 0) and (1 if get("bools_one_row") else config.Br)
        size = get("numbers_size", 0)
        return config.added_bytes(bools, 1 if get("numbers_one_row") else config.Br, size)

    def survey(self, config: Config, arrays: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """What the tiles of a kernel ask for, where masks or segments have a say in it."""
        p = self.problem
        if p.Lk == 0:  # no tiles, and nothing that might be read
            return {}
        row_tiles, column_tiles = -(-p.Lq // config.Br), -(-p.Lk // config.Bc)
        found = {"row_tiles": row_tiles, "column_tiles": column_tiles}
        blocks = mask_tiles = 0
        if p.attn_mask is not None:
            _, batches, batch, head, row, column, _ = arrays["attn_mask"]
            keys = column_tiles if column else 1
            rows = row_tiles if row else 1
            heads = p.Hq if head else 1
            mask_tiles = (p.batch if batch or batches else 1) * heads * rows * keys
            found |= {
                "tile_needs": self.workspace(mask_tiles, np.uint8), "mask_tiles": mask_tiles,
                "needs_key": int(bool(column)), "needs_row": keys if row else 0,
                "needs_head": rows * keys if head else 0,
                "needs_batch": heads * rows * keys if batch or batches else 0,
            }  # fmt: skip
            blocks = mask_tiles
        if p.q_segment_ids is not None:
            found["row_ids"] = self.workspace(2 * p.batch * row_tiles, np.int64)
            found["key_ids"] = self.workspace(2 * p.batch * column_tiles, np.int64)
            blocks += p.batch * (row_tiles + column_tiles)
        if blocks:
            tile = {"tile_rows": config.Br, "tile_keys": config.Bc}
            self.launch(self.config("survey"), blocks, arrays, found | tile, reader=config)
        return found

    def _options(self) -> tuple[Any, ...]:
        """The values of OPTIONS in params.py."""
        p = self.problem
        offset, offsets = p.causal_offset, 0
        if offset is None:
            offset = 0
        elif type(offset) is not int:
            offset, offsets = 0, offset.address
        seed, seed_at, threshold, keep_scale = 0, 0, 0, 1.0
        if p.dropout_p:
            threshold = math.ceil(p.dropout_p * 2**32)
            keep_scale = 1 / (1 - p.dropout_p) if p.dropout_p < 1 else 0.0
            if type(p.seed) is int:
                seed = p.seed
            else:
                seed_at = p.seed.address
        return (
            p.batch, p.Hq, p.Hkv, p.group, p.Lq, p.Lk, p.D, p.Dv, p.scale, p.softcap,
            -1 if p.window_left is None else p.window_left,
            -1 if p.window_right is None else p.window_right,
            offset, offsets, _pointer(p.q_lens), _pointer(p.kv_lens),
            _pointer(p.alibi_slopes), _pointer(p.sinks),
            _kind(p.attn_mask), _kind(p.bias),
            self.natural, p.scale / p.softcap if p.softcap else 0.0,
            seed, seed_at, threshold, keep_scale,
        )  # fmt: skip

    def array(self, array: Layout) -> tuple[int, ...]:
        """An array (..., heads, rows, columns) as `Array` in kernels/arrays.cuh has it."""
        return self._described(array, 3)

    def rows(self, array: Layout) -> tuple[int, ...]:
        """An array (..., heads, rows), likewise."""
        return self._described(array, 2)

    def _described(self, array: Layout, axes: int) -> tuple[int, ...]:
        shape, strides = array.shape, array.strides
        found = _describe(array.address, shape, strides, array.itemsize, axes)
        if found[2] is not None:
            return found
        lead = shape[:-axes]
        table = self.offsets(lead, strides[:-axes], [False] * len(lead))
        return found[0], table, 0, *found[3:]

    def offsets(self, shape: tuple[int, ...], steps: Sequence[int], drop: Sequence[bool]) -> int:
        """The address of a table: sums of index x step over the axes not dropped, in C order."""
        axes = [(n, step) for n, step, dropped in zip(shape, steps, drop) if not dropped]
        return self.table(tuple(n for n, _ in axes), tuple(step for _, step in axes))
