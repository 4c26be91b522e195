"""The one argument of every kernel: a struct, declared once here for both sides.

Each field is 8 bytes, so that C lays the struct out as Python packs it. `DECLARATION` is its C
text, which the source is assembled with; `pack` writes values in the order of the fields.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

# An array's own fields are those of `Array` in kernels/arrays.cuh.
ARRAY_FIELDS = ("data", "batches", "batch", "head", "row", "column", "access")
NO_ARRAY = (0,) * len(ARRAY_FIELDS)

ARRAYS = (
    "q", "k", "v", "out", "lse", "attn_mask", "bias", "q_segment_ids", "kv_segment_ids",
    "dout", "dlse", "dq", "dk", "dv", "dbias",
)  # fmt: skip

# name -> C type. What a call's options say, in this order, and what each launch adds.
OPTIONS = {
    "batch": "i64", "Hq": "i64", "Hkv": "i64", "group": "i64", "Lq": "i64", "Lk": "i64",
    "D": "i64", "Dv": "i64", "scale": "double", "softcap": "double",
    "window_left": "i64", "window_right": "i64", "causal_offset": "i64",
    "causal_offsets": "const i64*", "q_lens": "const i64*", "kv_lens": "const i64*",
    "alibi_slopes": "const void*", "sinks": "const void*",
    "attn_mask_kind": "i64", "bias_kind": "i64",
    "natural": "i64", "cap_scale": "double",
    "seed": "u64", "seed_at": "const void*", "dropout_threshold": "i64", "keep_scale": "double",
}  # fmt: skip
LAUNCH = {
    # kinds of results
    "out_kind": "i64", "dbias_kind": "i64",
    # how the work is cut
    "packed": "i64", "tiles": "i64", "splits": "i64", "split_keys": "i64", "pieces": "i64",
    # how tiles of a mask and bias come, and what tiles of scores ask for; see kernels/pairs.cuh
    "bools": "i64", "bools_one_row": "i64",
    "numbers_size": "i64", "numbers_kind": "i64", "numbers_copied": "i64", "numbers_one_row": "i64",
    "tile_needs": "void*", "needs_batch": "i64", "needs_head": "i64", "needs_row": "i64",
    "needs_key": "i64", "row_ids": "void*", "key_ids": "void*", "mask_tiles": "i64",
    "tile_rows": "i64", "tile_keys": "i64",
    # workspace, and how the gradient of bias is summed
    "partial_out": "void*", "partial_lse": "void*", "row_lse": "void*", "row_delta": "void*",
    "row_sum": "void*", "sums": "void*", "slices": "i64", "batch_sums": "i64",
    "own_batches": "const i64*", "sum_batches": "const i64*",
    "head_sums": "i64", "row_sums": "i64", "column_sums": "i64", "row_tiles": "i64",
    "column_tiles": "i64",
    # Hopper: warps whose results are not all finite, and the forward's next tile to take
    "flags": "void*", "next": "void*",
    # Hopper: sums of dS K
    "dq_sums": "float*",
    # Hopper: rows of float32 in halves, and their weights
    "halves": "void*", "weights": "float*",
}  # fmt: skip

DECLARATION = "\n".join(
    [
        "struct Params {",
        *(f"  Array {name};" for name in ARRAYS),
        *(f"  {kind} {name};" for name, kind in (OPTIONS | LAUNCH).items()),
        "};",
    ]
)

_LETTERS = {"i64": "q", "double": "d"}  # every other type: an unsigned number
_ARRAY = struct.Struct(f"={len(ARRAY_FIELDS)}q")
_OPTIONS = struct.Struct("=" + "".join(_LETTERS.get(kind, "Q") for kind in OPTIONS.values()))
_LAUNCH = struct.Struct(f"={len(LAUNCH)}q")  # addresses too: no pointer has the highest bit
_OF_OPTIONS = len(ARRAYS) * _ARRAY.size
_OF_LAUNCH = _OF_OPTIONS + _OPTIONS.size
SIZE = _OF_LAUNCH + _LAUNCH.size

_ARRAY_OFFSETS = {name: i * _ARRAY.size for i, name in enumerate(ARRAYS)}
_LAUNCH_INDEX = {name: i for i, name in enumerate(LAUNCH)}

# The words that hold addresses, and the one of `seed`, which differs from call to call like them.
_FIELDS = [*(("char*", "const i64*") + ("i64",) * (len(ARRAY_FIELDS) - 2)) * len(ARRAYS)]
_FIELDS += [kind if name != "seed" else "u64*" for name, kind in (OPTIONS | LAUNCH).items()]
ADDRESSES = tuple(word for word, kind in enumerate(_FIELDS) if kind.endswith("*"))


def pack(
    block: np.ndarray, arrays: dict[str, tuple[int, ...]], options: tuple[Any, ...],
    launch: dict[str, int],
) -> None:  # fmt: skip
    """Write an argument to SIZE bytes of int64; what is not named is 0."""
    block.fill(0)
    for name, fields in arrays.items():
        _ARRAY.pack_into(block, _ARRAY_OFFSETS[name], *fields)
    _OPTIONS.pack_into(block, _OF_OPTIONS, *options)
    numbers = [0] * len(LAUNCH)
    for name, value in launch.items():
        numbers[_LAUNCH_INDEX[name]] = value
    _LAUNCH.pack_into(block, _OF_LAUNCH, *numbers)
