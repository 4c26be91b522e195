"""What is measured: attention cases, the files they come from, their inputs and their work.

A shape file holds one case per line::

    B  Hq  Hkv  Lq  Lk  D[/Dv]  full|causal  [option]    # where the case comes from

An option (`options.py` has their list) excludes pairs or changes scores.
Work is counted by the conventions of the FlashAttention papers:

* forward   2 Lq Lk (D + Dv) floating-point operations per head (two matrix products),
* backward  2.5 times the forward (five products, the recomputed scores among them),
* causal    exactly half of full,
* option    only the pairs that it leaves,
* one query (decode) is counted in bytes instead: those of K and V, each read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SHAPES_DIR = Path(__file__).with_name("shapes")
BACKWARD_FACTOR = 2.5
DTYPES = ("float32", "bfloat16", "float16", "float64")
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One attention problem in one dtype and one direction ("forward" or "backward")."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int
    causal: bool
    option: str = ""  # "name" or "name=value"
    source: str = ""
    family: str = ""  # name of the shape file
    dtype: str = "float32"
    direction: str = "forward"
    kept: float = 1.0  # share of the pairs that the option leaves

    @property
    def shape(self) -> str:
        """The case as the tables print it, without dtype and direction."""
        heads = f"{self.Hq}" if self.Hq == self.Hkv else f"{self.Hq}/{self.Hkv}"
        width = f"{self.D}" if self.D == self.Dv else f"{self.D}/{self.Dv}"
        mask = "causal" if self.causal else "full"
        return f"{self.B}, {heads}, {self.Lq}, {self.Lk}, {width} {mask} {self.option}".rstrip()

    @property
    def is_decode(self) -> bool:
        """One query and no gradient: a matter of bandwidth."""
        return self.Lq == 1 and self.direction == "forward"

    @property
    def yardstick(self) -> str:
        """What rates are measured against."""
        if self.option:
            return "plain case"
        return "reading memory" if self.is_decode else "measured peak"

    @property
    def unit(self) -> str:
        return "GB/s" if self.is_decode else "GFLOP/s"

    @property
    def work(self) -> float:
        """FLOP of the case, or bytes of K and V for decode."""
        if self.is_decode:
            return float(self.kv_bytes)
        flops = 2.0 * self.B * self.Hq * self.Lq * self.Lk * (self.D + self.Dv)
        if self.causal:
            flops /= 2
        return flops * self.kept * (BACKWARD_FACTOR if self.direction == "backward" else 1.0)

    @property
    def kv_bytes(self) -> int:
        return self.B * self.Hkv * self.Lk * (self.D + self.Dv) * ITEM_BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        queries = self.B * self.Hq * self.Lq * self.D
        if self.direction == "backward":  # out and dout are read as well
            queries += 2 * self.B * self.Hq * self.Lq * self.Dv
        return self.kv_bytes + queries * ITEM_BYTES[self.dtype]


def load_shapes(names: list[str]) -> list[Case]:
    """The cases of each ``shapes/<name>.txt``, or file given by its path, one after the other."""
    return [case for name in names for case in _read(name)]


def _read(name: str) -> list[Case]:
    path = Path(name) if name.endswith(".txt") else SHAPES_DIR / f"{name}.txt"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in SHAPES_DIR.glob("*.txt")))
        raise SystemExit(f"no shape file {path}; there are: {known}")
    cases = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields, _, source = line.partition("#")
        if fields.strip():
            case = _parse(fields.split(), f"{path}:{number}")
            cases.append(replace(case, source=source.strip(), family=path.stem))
    return cases


def _parse(fields: list[str], where: str) -> Case:
    try:
        B, Hq, Hkv, Lq, Lk = map(int, fields[:5])
        width, mask, *option = fields[5:]
        D, Dv = map(int, width.split("/") if "/" in width else (width, width))
        causal = {"full": False, "causal": True}[mask]
        (option,) = option or ("",)
    except (ValueError, KeyError):
        expected = "'B Hq Hkv Lq Lk D[/Dv] full|causal [option]'"
        raise SystemExit(f"{where}: expected {expected}") from None
    if causal and Lq != Lk:
        raise SystemExit(f"{where}: libraries disagree on what causal means for Lq != Lk")
    if causal and option:
        raise SystemExit(f"{where}: an option goes with full")
    return Case(B, Hq, Hkv, Lq, Lk, D, Dv, causal, option)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of this name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def input_shapes(case: Case) -> list[tuple[int, ...]]:
    """The shapes of q, k, v and, for the backward, dout."""
    shapes = [
        (case.B, case.Hq, case.Lq, case.D),
        (case.B, case.Hkv, case.Lk, case.D),
        (case.B, case.Hkv, case.Lk, case.Dv),
    ]
    if case.direction == "backward":
        shapes.append((case.B, case.Hq, case.Lq, case.Dv))
    return shapes


def make_inputs(case: Case, seed: int = 0, xp: Any = np) -> list[Any]:
    """q, k, v and, for the backward, dout: standard normal, the same for the same seed.

    `xp` is the library that makes them, NumPy or CuPy.
    """
    rng = xp.random.default_rng(seed)
    normal = (rng.standard_normal(shape, dtype=xp.float32) for shape in input_shapes(case))
    return [narrow(array, case.dtype) for array in normal]


def narrow(array: Any, dtype: str) -> Any:
    """A float32 array in another dtype, rounded to nearest even.

    CuPy knows few operations on bfloat16, so here and in `widen` the bits are converted.
    """
    if dtype != "bfloat16":
        return array.astype(dtype, copy=False)
    bits = array.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16).view(numpy_dtype("bfloat16"))


def widen(array: Any) -> Any:
    """The array in float64."""
    if array.dtype == numpy_dtype("bfloat16"):
        array = (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float64)
