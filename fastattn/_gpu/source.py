"""CUDA source text, assembled for one configuration.

NVRTC gets one string without includes: definitions of what the configuration chooses, then the
shared files in their order, then the kernel. `kernels/` is read once.
"""

from __future__ import annotations

import functools
from importlib import resources

from fastattn._gpu import wgmma
from fastattn._gpu.config import DECODE_STAGES, OPTIONS, Config
from fastattn._gpu.params import DECLARATION

# In the order of use: each file reads what the ones before it declare.
_SHARED = (
    "types.cuh", "mma.cuh", "arrays.cuh", "PARAMS", "pairs.cuh", "blocks.cuh", "gradient.cuh",
)  # fmt: skip
_HALVES = "halves.cuh"  # where float32 is multiplied as float16 numbers
# What kernels of one family alone have besides.
_HOPPER = ("WGMMA", "hopper.cuh", "hopper_added.cuh")
_FORWARD = (*_HOPPER, "hopper_halves.cuh", "hopper_forward.cuh")
_BACKWARD_Q = (*_HOPPER, "hopper_backward.cuh", "hopper_backward_q.cuh")
_BACKWARD_KV = (*_HOPPER, "hopper_backward.cuh", "hopper_backward_kv.cuh")
_SPLIT = ("hopper_halves.cuh", "hopper_split.cuh")
_BACKWARD_OF_HALVES = (*_SPLIT, "hopper_halves_backward.cuh")
_OF_KERNEL: dict[str, tuple[str, ...]] = {
    "hopper_forward": _FORWARD,
    "hopper_careful": _FORWARD,
    "hopper_backward_q": _BACKWARD_Q,
    "hopper_careful_q": _BACKWARD_Q,
    "hopper_finish_q": _BACKWARD_Q,
    "hopper_backward_kv": _BACKWARD_KV,
    "hopper_careful_kv": _BACKWARD_KV,
    "hopper_backward_qkv": _BACKWARD_KV,
    "hopper_split": (*_HOPPER, *_SPLIT),
    "hopper_halves_q": (*_BACKWARD_Q, *_BACKWARD_OF_HALVES),
    "hopper_careful_halves_q": (*_BACKWARD_Q, *_BACKWARD_OF_HALVES),
    "hopper_halves_kv": (*_BACKWARD_KV, *_BACKWARD_OF_HALVES),
    "hopper_careful_halves_kv": (*_BACKWARD_KV, *_BACKWARD_OF_HALVES),
}
# `Option` in kernels/pairs.cuh.
_OPTIONS = {"": 0, "all": (1 << len(OPTIONS)) - 1}
_OPTIONS |= {name: 1 << i for i, name in enumerate(OPTIONS)}
_C_TYPES = {
    "float16": "f16", "bfloat16": "bf16", "float32": "float", "float64": "double",
    "halves": "halves",
}  # fmt: skip


@functools.cache
def _text(name: str, dtype: str) -> str:
    if name == "PARAMS":
        return DECLARATION
    if name == "WGMMA":
        return wgmma.declare(dtype)
    return (resources.files(__package__) / "kernels" / name).read_text(encoding="utf-8")


def assemble(config: Config) -> str:
    """The source of one configuration: a translation unit with one kernel, `config.kernel`."""
    acc = "double" if config.dtype == "float64" else "float"
    values = {
        "kArch": config.family.removeprefix("sm_").removesuffix("a"),
        "kOptions": _OPTIONS[config.options],
        "kWalk": int(config.walk),
        "kInHalves": int(config.halves),
    }
    constants = {
        "kD": config.D, "kDv": config.Dv, "kBr": config.Br, "kBc": config.Bc,
        "kWarps": config.warps, "kThreads": config.threads, "kBlocks": config.blocks,
        "kRing": DECODE_STAGES, "kPassesApart": int(config.passes_apart),
    }  # fmt: skip
    types = {"Elem": config.dtype, "Tile": "halves" if config.halves else config.tile_dtype}
    head = [f"#define {name} {value}" for name, value in values.items()]
    choice = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    choice += [f"using {name} = {_C_TYPES[dtype]};" for name, dtype in types.items()]
    choice += [f"using Acc = {acc};"]
    more = (_HALVES,) if config.halves else _OF_KERNEL.get(config.kernel, ())
    names = (*_SHARED, *more, f"{config.kernel}.cu")
    files = [_text(name, config.tile_dtype) for name in names]
    return "\n".join([*head, files[0], *choice, *files[1:]])
