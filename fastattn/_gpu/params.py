"""The one argument of every kernel: a struct, declared once here for both sides.

Each field is 8 bytes, so that C lays the struct out as Python packs it. `DECLARATION` is its C text,
which the source is assembled with; `pack` writes values in the order of the fields.
"""

from __future__ import annotations

import struct
from typing import Any

# An array's own fields are those of `Array` in kernels/arrays.cuh.
ARRAY_FIELDS = ("data", "batches", "batch", "head", "row", "column", "access")
NO_ARRAY = (0,) * len(ARRAY_FIELDS)

ARRAYS = (
    "q", "k", "v", "out", "lse", "attn_mask", "bias", "q_segment_ids", "kv_segment_ids",
    "dout", "dlse", "dq", "dk", "dv", "dbias",
)  # fmt: skip

# name -> C type; a struct format letter follows from it.
SCALARS = {
    # sizes
    "batch": "i64", "Hq": "i64", "Hkv": "i64", "group": "i64", "Lq": "i64", "Lk": "i64",
    "D": "i64", "Dv": "i64",
    # options
    "scale": "double", "softcap": "double", "window_left": "i64", "window_right": "i64",
    "causal_offset": "i64", "causal_offsets": "const i64*", "q_lens": "const i64*",
    "kv_lens": "const i64*", "alibi_slopes": "const void*", "sinks": "const void*",
    "attn_mask_kind": "i64", "bias_kind": "i64", "dbias_kind": "i64", "out_kind": "i64",
    "seed": "u64", "seed_at": "const void*", "dropout_threshold": "i64", "keep_scale": "double",
    # how the work is cut
    "packed": "i64", "tiles": "i64", "splits": "i64", "split_keys": "i64", "pieces": "i64",
    # workspace
    "partial_out": "void*", "partial_lse": "void*", "row_lse": "void*", "row_delta": "void*",
    "row_sum": "void*", "sums": "void*", "slices": "i64", "batch_sums": "i64",
    "own_batches": "const i64*", "sum_batches": "const i64*",
    "head_sums": "i64", "row_sums": "i64", "column_sums": "i64", "row_tiles": "i64",
    "column_tiles": "i64",
}  # fmt: skip

_LETTERS = {"i64": "q", "double": "d"}  # every other type: an unsigned number

DECLARATION = "\n".join(
    [
        "struct Params {",
        *(f"  Array {name};" for name in ARRAYS),
        *(f"  {kind} {name};" for name, kind in SCALARS.items()),
        "};",
    ]
)

_PACKER = struct.Struct(
    f"={len(ARRAYS) * len(ARRAY_FIELDS)}q" + "".join(_LETTERS.get(k, "Q") for k in SCALARS.values())
)
SIZE = _PACKER.size


def pack(block: Any, arrays: dict[str, tuple[int, ...]], scalars: dict[str, Any]) -> None:
    """Write an argument to a buffer of SIZE bytes; what is not named is 0."""
    values = [x for name in ARRAYS for x in arrays.get(name, NO_ARRAY)]
    _PACKER.pack_into(block, 0, *values, *[scalars.get(name, 0) for name in SCALARS])
