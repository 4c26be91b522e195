"""The table of GPU kernels: which configurations exist, and which one serves a problem.

A configuration is everything a kernel's source is specialised by. `FAMILIES` names the kernel
families by the oldest architecture they run on; the rules below give the tiles of a family for a
dtype and a head size; `configs` lists all that follows from them. Launcher, tests, compile checks
and `show_config` read this module, which imports no CuPy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Compute capabilities that the sources compile for, and the family that serves each by default.
ARCHS = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
# A family named with an "a" runs on that architecture only, and leaves to _GENERIC what it lacks.
FAMILIES = {"sm_75": 75, "sm_80": 80, "sm_90a": 90}
_GENERIC = "sm_80"
SPECIFIC_NVRTC = (12, 9)  # the oldest where CuPy's own -arch gives way to that of such a family

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # name -> bytes

# Tiles of the head size; sizes beyond the last are walked in pieces.
HEAD_TILES = (32, 64, 96, 128, 192, 256)
PIECE = 64

# Shared memory a block may have, in bytes, by compute capability; others have 99 KiB.
_SHARED_KIB = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}


class Config(NamedTuple):
    """One specialisation of one kernel."""

    kernel: str  # the file in kernels/, and the name of its entry point
    family: str
    dtype: str
    options: str  # the element-wise ones that it is compiled with: none, one of OPTIONS, or "all"
    D: int  # tile of the head size; PIECE where it is walked in pieces
    Dv: int
    walk: bool
    Br: int  # query rows of a tile
    Bc: int  # key columns of a tile
    warps: int
    blocks: int  # per multiprocessor, which bounds the registers

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def fast(self) -> bool:
        """Whether benchmarks run it, so that its numbers have to stay in registers."""
        if self.kernel in HOPPER_KERNELS:
            return self.kernel in _CAREFUL and not (self.options and self.D > 128)
        sizes = (64, 128, 256) if DTYPES[self.tile_dtype] == 2 else (64, 128)
        return (
            self.kernel in ("forward", DECODE, "backward_q", "backward_kv")
            and not (self.options or self.walk)
            and self.D == self.Dv
            and self.D in sizes
            and self.dtype != "float64"
            and (self.family != "sm_75" or self.tile_dtype == "float16")  # others: no instruction
        )

    @property
    def passes_apart(self) -> bool:
        """Whether a forward's usual pass has code of its own. That costs twice the time to compile,
        and registers but where the scores of a tile take most of them."""
        return self.fast and self.kernel == "forward" and self.Bc == 128

    @property
    def stays(self) -> bool:
        """Whether a block takes tile after tile; otherwise each tile has a block of its own."""
        return self.kernel in _CAREFUL and "halves" not in self.kernel

    @property
    def tile_dtype(self) -> str:
        """What shared memory holds: Turing's matrix instructions know no bfloat16, and Hopper's own
        take float32 as two float16 numbers each."""
        if self.kernel in HOPPER_KERNELS and self.dtype == "float32":
            return "float16"
        return "float32" if self.family == "sm_75" and self.dtype == "bfloat16" else self.dtype

    @property
    def halves(self) -> bool:
        """Whether float32 is multiplied as two float16 numbers each; otherwise as tf32 ones."""
        return (
            self.kernel == "forward"
            and self.dtype == "float32"
            and self.family != "sm_75"
            and not self.walk
            and self.D == self.Dv
            and self.D in (32, 64, 128, 256)
        )

    def pitch(self, columns: int) -> int:
        """Bytes from row to row of a tile; `pitch_of` in kernels/arrays.cuh."""
        size = DTYPES[self.tile_dtype]
        return columns * size + (32 if size == 8 else 16)

    @property
    def out_columns(self) -> int:
        """Columns of the results that a block makes; `kOut` in kernels/backward_kv.cu."""
        widest = max(self.D, self.Dv)
        return widest // 2 if self.kernel == "backward_kv" and widest > 128 else widest

    def added_bytes(self, bool_rows: int, number_rows: int, size: int) -> int:
        """Bytes of tiles of a mask and bias: rows of truths, and rows of numbers of `size` bytes.

        `bools_pitch` and `numbers_pitch` in kernels/pairs.cuh.
        """
        return bool_rows * (self.Bc + 16) + number_rows * (self.Bc + 8) * size

    def shared_bytes_with(self, added: int) -> int:
        """Shared memory of a block: its buffers and `added` bytes, or results on their way out."""
        if self.kernel in SMALL_KERNELS:
            return 0
        if self.kernel in HOPPER_KERNELS:
            return self._hopper_bytes
        row, row_v = self.pitch(self.D), self.pitch(self.Dv)
        if self.kernel == DECODE:
            return self.Br * row + self.warps * DECODE_STAGES * self.Bc * (row + row_v)
        acc = 8 if self.dtype == "float64" else 4
        rows, rows_v = {
            "forward": (self.Br + self.Bc * (1 if self.walk else 2), self.Bc),
            "backward_q": (self.Br + self.Bc * (1 if self.walk else 2), self.Br + self.Bc),
            "backward_kv": (self.Bc + self.Br * (1 if self.walk else 2), self.Br + self.Bc),
            "backward_bias": (self.Br + self.Bc, self.Br + self.Bc),
        }[self.kernel]
        buffers = rows * row + rows_v * row_v
        if self.halves:
            buffers += 4 * (self.Br + 2 * self.Bc)  # weights of rows
        if self.kernel == "backward_kv":
            buffers += 4 * self.Br * acc
        results = 16 * self.warps * (self.out_columns + 4) * acc
        if self.kernel == "backward_bias":
            results = self.Br * (self.Bc + 1) * acc
        return max(buffers + added, results)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block to which nothing is added."""
        return self.shared_bytes_with(0)

    @property
    def most_shared_bytes(self) -> int:
        """Shared memory of a block with the widest tiles of a mask and bias that it may meet."""
        bools, numbers = (self.Br * (self.options in (n, "all")) for n in ("bools", "numbers"))
        size = (
            DTYPES[self.dtype] if self.options == "numbers" else 8 if self.dtype == "float64" else 4
        )
        return self.shared_bytes_with(self.added_bytes(bools, numbers, size))

    @property
    def _hopper_bytes(self) -> int:
        """Tiles in panels of 64 columns, as kernels/hopper.cuh has them."""
        halves = DTYPES[self.dtype] // 2  # 16-bit numbers of a number
        row, row_v = (128 * halves * -(-columns // 64) for columns in (self.D, self.Dv))
        barriers = 512 if self.kernel == "hopper_forward" else 256

        def with_results(buffers: int, results: int) -> int:
            """Where they fit, results on their way out have room of their own."""
            fits = buffers + barriers + results <= shared_limit(90)
            return buffers + barriers + (results if fits else 0)

        # Of a backward: a bit for each pair of a tile, or numbers.
        added = self.Br * self.Bc // 8 if self.options in _BITS else 0
        if self.options == "numbers":
            added = self.added_bytes(0, self.Br, 2)
        if self.kernel == "hopper_backward_q":
            stages_v = 1 if self.D > 128 else 2
            buffers = self.Br * (row + row_v) + self.Bc * (2 * row + stages_v * row_v)
            return with_results(buffers + added * (2 if self.D <= 64 else 1), self.Br * row)
        if self.kernel == "hopper_careful_q":
            return (self.Br + self.Bc) * (row + row_v) + added
        if self.kernel == "hopper_finish_q":
            return self.Br * row
        if self.kernel == "hopper_split":
            return 0
        if self.kernel == "hopper_backward_qkv":
            stage = self.Br * (row + row_v + 2 * 4)  # with lse and delta
            shared = 2 * self.Bc * 128 * -(-self.Br // 64)  # dS, twice
            sums = 2 * 64 * 64 * 4
            return self.Bc * (row + row_v) + 2 * stage + shared + sums + barriers
        if self.kernel in ("hopper_halves_q", "hopper_careful_halves_q"):
            fast = self.kernel == "hopper_halves_q"
            stages, weights, rest = (2, 3 * 4, barriers) if fast else (1, 4 * 4, 0)
            return (self.Br + stages * self.Bc) * (row + row_v + weights) + rest
        if self.kernel in ("hopper_halves_kv", "hopper_careful_halves_kv"):
            fast = self.kernel == "hopper_halves_kv"
            stages, weights, rest = (2, 3 * 4, barriers) if fast else (1, 4 * 4, 0)
            own, others, numbers = self.Bc, stages * self.Br, 2 * 4  # lse and delta
            return (own + others) * (row + row_v + weights) + others * numbers + rest
        if self.kernel in ("hopper_backward_kv", "hopper_careful_kv"):
            shared = 2 * self.Bc * 128 * -(-self.Br // 64) if self.D > 128 else 0  # P and dS
            stage = self.Br * (row + row_v + 2 * 4)  # with lse and delta
            kv = self.Bc * (row + row_v)
            if self.kernel == "hopper_careful_kv":
                return kv + shared + stage + added
            slots = 1 if self.options == "numbers" and self.D > 64 else 2
            return with_results(kv + shared + 2 * stage + slots * added, kv)
        stages = 2 if self.kernel == "hopper_forward" else 1
        buffers = self.Br * row + stages * self.Bc * (row + row_v)
        if self.options == "segments":  # bits of rows
            buffers += self.Br * 16
        else:
            bools, numbers = (self.Br * (self.options == n) for n in ("bools", "numbers"))
            buffers += self.added_bytes(bools, numbers, 2)
        if halves == 2:  # weights of rows
            buffers += 4 * (self.Br + 2 * stages * self.Bc)
        if self.kernel == "hopper_careful":
            return buffers
        # Results on their way out: in float32 only those that pass through number by number.
        return with_results(buffers, self.Br * (row_v if halves == 1 else 128))


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a block may have on a compute capability."""
    return _SHARED_KIB.get(arch, 99) * 1024


def head_tile(size: int) -> int:
    """The tile that holds a head size; 0 where it is walked in pieces."""
    return next((tile for tile in HEAD_TILES if size <= tile), 0)


# Options that are read element by element, of which a kernel is compiled with none, one or all. A
# mask or bias is "bools" or "numbers", in the latter case of the dtype of q; what else there is of
# them is left to "all", and so is more than one. Kernels for a single one exist where plain ones
# are fastest: with matrix instructions of 16 bits and whole tiles of rows.
OPTIONS = ("softcap", "alibi", "dropout", "bools", "numbers", "segments")

# Kernels of rows and numbers, which have no tiles.
SMALL_KERNELS = ("backward_rows", "combine", "reduce", "survey")
KERNELS = ("forward", "backward_q", "backward_kv", "backward_bias", *SMALL_KERNELS)
# What sm_90a has in place of others: the fast kernel, and the one that takes what it cannot.
_CAREFUL = {
    "hopper_forward": "hopper_careful",
    "hopper_backward_q": "hopper_careful_q",
    "hopper_backward_kv": "hopper_careful_kv",
    "hopper_backward_qkv": "hopper_careful_kv",
    "hopper_halves_q": "hopper_careful_halves_q",
    "hopper_halves_kv": "hopper_careful_halves_kv",
}
# The last two: what ends dQ after hopper_backward_qkv, and what comes before hopper_halves_*.
HOPPER_KERNELS = (
    *_CAREFUL, *dict.fromkeys(_CAREFUL.values()), "hopper_finish_q", "hopper_split",
)  # fmt: skip

# A forward of few rows without such options; a warp's tiles of K and V that are under way.
DECODE = "decode"
DECODE_STAGES = 3

# Rows that a forward tile may have; a problem with few rows takes the smallest that holds them.
ROW_CLASSES = (16, 64, 128)

# (kernel, bytes of a number in a tile) -> head tile -> tiles (Br, Bc, warps, blocks) in the order
# of preference: the first that fits the device's shared memory is taken. A forward's are by row
# class, and, in the last of them, by what it is compiled with. Where a mask lies decides whether it
# is served as bools or numbers or by "all": all three cut sums into the same parts, (Bc; Br in
# backward_kv), for the same bits. (Hopper's forward takes bools and numbers wherever they lie.)
_TILES: dict[tuple[str, int], dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    ("forward 16", 2): {
        128: ((16, 64, 1, 6),),
        256: ((16, 32, 1, 4),),
    },
    ("decode", 2): {
        64: ((16, 32, 4, 2), (16, 32, 2, 2)),
        128: ((16, 16, 4, 2), (16, 16, 2, 2)),
        256: ((16, 16, 4, 1), (16, 16, 2, 1), (16, 16, 1, 1)),
    },
    ("decode", 4): {
        64: ((16, 16, 4, 2), (16, 16, 2, 2)),
        128: ((16, 16, 4, 1), (16, 16, 2, 1), (16, 16, 1, 1)),
    },
    ("forward 64", 2): {
        128: ((64, 64, 4, 2),),
        256: ((64, 32, 4, 1),),
    },
    ("forward 128", 2): {
        64: ((128, 128, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 64, 4, 2), (64, 64, 4, 2)),
        256: ((128, 64, 8, 1), (64, 32, 4, 1)),
    },
    ("forward option", 2): {
        128: ((128, 64, 4, 2), (64, 64, 4, 2)),
        256: ((128, 64, 8, 1), (64, 32, 4, 1)),
    },
    ("forward all", 2): {
        128: ((64, 64, 4, 2),),
        256: ((128, 64, 8, 1), (64, 32, 4, 1)),
    },
    ("forward all", 4): {128: ((64, 32, 4, 2), (64, 16, 4, 1)), 256: ((64, 16, 4, 1),)},
    ("forward 16", 4): {128: ((16, 32, 1, 4),), 256: ((16, 16, 1, 2),)},
    ("forward 64", 4): {128: ((64, 32, 4, 2), (64, 16, 4, 1)), 256: ((64, 16, 4, 1),)},
    ("forward 128", 4): {
        64: ((128, 32, 4, 2), (64, 32, 4, 2)),
        96: ((64, 32, 4, 2), (64, 16, 4, 1)),
        128: ((128, 32, 8, 1), (64, 32, 4, 2), (64, 16, 4, 1)),
        256: ((64, 16, 4, 1),),
    },
    ("forward 16", 8): {64: ((16, 32, 1, 4),), 128: ((16, 16, 1, 2),)},
    ("forward 64", 8): {64: ((64, 32, 4, 1),)},
    ("backward_q", 2): {
        64: ((128, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 32, 4, 2), (64, 32, 4, 2)),
        256: ((128, 32, 8, 1), (64, 32, 4, 1)),
    },
    ("backward_q", 4): {64: ((64, 32, 4, 2),), 128: ((64, 16, 4, 1),)},
    ("backward_q", 8): {64: ((64, 16, 4, 1),)},
    ("backward_kv", 2): {
        64: ((32, 128, 4, 2), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (32, 64, 4, 2)),
        256: ((32, 128, 8, 1), (32, 64, 4, 1), (16, 64, 4, 1)),
    },
    ("backward_kv", 4): {64: ((32, 64, 4, 2),), 128: ((16, 64, 4, 1),)},
    ("backward_kv", 8): {64: ((16, 64, 4, 1),)},
}  # fmt: skip
# Where no tile holds the head size or fits the device, by bytes of a number; they fit every device.
_WALK = {
    2: {"backward_kv": (16, 64, 4, 1), "other": (64, 32, 4, 1)},
    4: {"backward_kv": (16, 64, 4, 1), "other": (64, 32, 4, 1)},
    8: {"backward_kv": (16, 32, 2, 1), "other": (32, 16, 2, 1)},
}


# sm_90a: bytes of a number -> head tiles (D, Dv) -> (Br, Bc) of a forward with many rows.
_HOPPER_TILES = {
    2: {
        (64, 64): (192, 128), (96, 96): (128, 128), (128, 128): (128, 128),
        (192, 128): (128, 112), (192, 192): (128, 80), (256, 256): (128, 64),
    },
    4: {(64, 64): (128, 96), (128, 128): (128, 64)},
}  # fmt: skip


def _hopper_forward(dtype: str, options: str, D: int, Dv: int, rows: int) -> Config | None:
    """The configuration of sm_90a that serves a forward, if one does: of head sizes in steps of 16
    bytes, which the copy engine takes; in 16 bits also with one element-wise option."""
    size = DTYPES[dtype]
    if size > 4 or rows <= 64 or 0 in (D, Dv) or D * size % 16 or Dv * size % 16:
        return None
    if options and (options == "all" or size > 2):
        return None
    for (tile, tile_v), (Br, Bc) in _HOPPER_TILES[size].items():
        if D <= tile and Dv <= tile_v:
            warps = Br // 16 + 4
            return Config(
                "hopper_forward", "sm_90a", dtype, options, tile, tile_v, False, Br, Bc, warps, 1
            )
    return None


# Likewise of a backward: the widest head tile -> (Br, Bc). In float32 heads have a least size:
# sums of few products feel what two float16 numbers lack.
_LEAST_OF_HALVES = 16
_HOPPER_BACKWARD_TILES = {
    ("backward_q", 2): {64: (128, 128), 96: (128, 128), 128: (128, 128), 256: (128, 64)},
    # Of 96 columns its products would be serialised, for want of registers.
    ("backward_q added", 2): {64: (128, 128), 128: (128, 128), 256: (128, 64)},
    ("backward_kv", 2): {64: (128, 128), 96: (64, 128), 128: (64, 128), 256: (64, 64)},
    ("backward_kv factor", 2): {64: (64, 128), 96: (64, 128), 128: (64, 128)},
    ("backward_q", 4): {64: (128, 64), 128: (128, 32)},
    ("backward_kv", 4): {64: (64, 128), 128: (32, 128)},
}
_BITS = ("bools", "segments")  # options that come to a tile as a bit for each pair
_ADDED = (*_BITS, "numbers")  # that warps bring for others
_FACTORS = ("softcap", "alibi", "dropout")  # that take registers


def _hopper_backward(kernel: str, dtype: str, options: str, D: int, Dv: int) -> Config | None:
    """The configuration of sm_90a that serves a backward, if one does; in 16 bits also with one
    element-wise option, for wide heads only where that takes few registers and little memory."""
    size = DTYPES[dtype]
    if size > 4 or 0 in (D, Dv) or D * size % 16 or Dv * size % 16:
        return None
    if options and (options == "all" or size > 2 or (max(D, Dv) > 128 and options not in _BITS)):
        return None
    if size == 4 and min(D, Dv) < _LEAST_OF_HALVES:
        return None
    of_options = {"backward_q": (_ADDED, " added"), "backward_kv": (_FACTORS, " factor")}
    special, which = of_options[kernel]
    tiles = _HOPPER_BACKWARD_TILES[kernel + (which if options in special else ""), size]
    for tile, (Br, Bc) in tiles.items():
        if max(D, Dv) <= tile:
            own = f"hopper_{kernel}"
            name = own if size == 2 else own.replace("backward", "halves")
            return Config(name, "sm_90a", dtype, options, tile, tile, False, Br, Bc, 12, 1)
    return None


def careful(config: Config) -> Config:
    """The kernel that computes again what a fast one of sm_90a left: without a warpgroup that
    loads."""
    return config._replace(kernel=_CAREFUL[config.kernel], warps=config.warps - 4)


def together(config: Config) -> Config | None:
    """The kernel that makes dK and dV as a configuration's does, and dQ besides, in no fixed order,
    if there is one."""
    if config.kernel != "hopper_backward_kv" or config.options or config.D > 128:
        return None
    return config._replace(kernel="hopper_backward_qkv")


def finisher(config: Config) -> Config:
    """The kernel that makes dQ of the sums of `together`, for the configuration of backward_q."""
    return config._replace(kernel="hopper_finish_q", warps=config.warps - 4)


def splitter(config: Config) -> Config | None:
    """The kernel that makes halves of all rows before a configuration's takes them, if it does."""
    if not config.kernel.startswith("hopper_halves"):
        return None
    return config._replace(kernel="hopper_split", Br=64, Bc=64, warps=8)


@functools.lru_cache(1024)
def choose(
    kernel: str, arch: int, family: str, dtype: str, options: str, D: int, Dv: int, rows: int = 128
) -> Config:
    """The configuration that serves a problem with these element-wise options.

    `rows` is how many query rows share the loads of a forward's keys, or the splits to combine.
    """
    if family == "sm_90a":
        found = None
        if kernel == "forward":
            found = _hopper_forward(dtype, options, D, Dv, rows)
        elif kernel in ("backward_q", "backward_kv"):
            found = _hopper_backward(kernel, dtype, options, D, Dv)
        return found or choose(kernel, arch, _GENERIC, dtype, options, D, Dv, rows)
    if kernel in SMALL_KERNELS:
        options = "all" if kernel == "survey" else ""
        # Many splits wait for each other less; for few, more blocks fit.
        warps = 16 if kernel == "combine" and rows > ROW_CLASSES[0] else 4
        return Config(kernel, family, dtype, options, 32, 32, False, 64, 64, warps, 1)
    size = DTYPES[Config(kernel, family, dtype, *(0,) * 8).tile_dtype]
    if kernel == "backward_bias" or (options and (size > 2 or rows < ROW_CLASSES[-1])):
        options = "all"
    limit = shared_limit(arch)
    if kernel != "backward_bias":
        name = kernel
        tile, tile_v = head_tile(D), head_tile(Dv)
        widest = max(tile, tile_v) if tile and tile_v else 0
        if not (kernel == "forward" and (tile, tile_v) == (192, 128)):
            tile = tile_v = widest
        if kernel == "forward":
            name = f"forward {next((n for n in ROW_CLASSES if rows <= n), ROW_CLASSES[-1])}"
            if options and rows >= ROW_CLASSES[-1]:
                name = f"forward {'all' if options == 'all' else 'option'}"
            elif rows <= ROW_CLASSES[0] and not options:
                if 0 < widest <= max(_TILES.get((DECODE, size), (0,))):
                    name = kernel = DECODE
            if (name, size) not in _TILES:
                name = "forward 64"
        by_head = _TILES[name, size]
        candidates = [
            Config(kernel, family, dtype, options, tile, tile_v, False, *tiles)
            for tiles in next((t for head, t in by_head.items() if widest and widest <= head), ())
        ]
        for together in (True, False):  # the first of which `blocks` fit at a time, else one
            for config in candidates:
                blocks = config.blocks if together else 1
                most = config._replace(options="all") if options in ("bools", "numbers") else config
                if most.most_shared_bytes <= limit and config.shared_bytes * blocks <= limit:
                    return config
    tiles = _WALK[size].get(kernel, _WALK[size]["other"])
    options = "all" if options else ""
    return Config(kernel, family, dtype, options, PIECE, PIECE, True, *tiles)


def configs(arch: int, family: str) -> list[Config]:
    """Every configuration that `choose` can give on a compute capability, and what goes with it."""
    found = {
        choose(kernel, arch, family, dtype, options, D - odd, Dv - odd, rows): None
        for kernel in KERNELS
        for dtype in DTYPES
        for options in ("", *OPTIONS, "all")
        for D, Dv in [*((n, n) for n in HEAD_TILES), (192, 128), (258, 258)]
        for odd in (0, 1)  # sizes that no copy engine takes
        for rows in ROW_CLASSES
    }
    found |= {c: None for c in map(together, [*found]) if c}
    found |= {c: None for c in map(splitter, [*found]) if c}
    after = [careful(c) for c in found if c.kernel in _CAREFUL]
    after += [finisher(c) for c in found if c.kernel == "hopper_backward_q" and c.D <= 128]
    return [*found, *dict.fromkeys(after)]


def _specific(family: str) -> bool:
    return family.endswith("a")


def generic(family: str) -> str:
    """The family that has what a family lacks, or that family itself."""
    return _GENERIC if _specific(family) else family


def runs(family: str, arch: int) -> bool:
    """Whether a family runs on a compute capability."""
    return arch == FAMILIES[family] if _specific(family) else arch >= FAMILIES[family]


def compiles(family: str, nvrtc: tuple[int, int]) -> bool:
    """Whether CuPy with a version of NVRTC compiles for a family."""
    return not _specific(family) or nvrtc >= SPECIFIC_NVRTC


def arch_options(family: str) -> tuple[str, ...]:
    """What NVRTC has to be told beside what CuPy tells it."""
    return (f"-arch={family}",) if _specific(family) else ()


def default_family(arch: int, nvrtc: tuple[int, int] = SPECIFIC_NVRTC) -> str:
    """The newest family that runs on a compute capability and that NVRTC compiles."""
    found = (f for f in FAMILIES if runs(f, arch) and compiles(f, nvrtc))
    return max(found, key=FAMILIES.__getitem__)


def table() -> list[dict[str, object]]:
    """The rows that `show_config` prints: what each family has for a dtype and a head size."""
    rows: list[dict[str, object]] = []
    for family, oldest in FAMILIES.items():
        for config in configs(oldest, family):
            if config.kernel in SMALL_KERNELS or config.family != family:
                continue
            if config.options != ("all" if config.kernel == "backward_bias" else ""):
                continue
            rows.append(
                {
                    "family": family,
                    "kernel": config.kernel,
                    "dtype": config.dtype,
                    "head": f"any, in pieces of {PIECE}" if config.walk else str(config.D),
                    "rows": config.Br,
                    "keys": config.Bc,
                    "warps": config.warps,
                    "shared_kib": round(config.shared_bytes / 1024),
                }
            )
    return rows
