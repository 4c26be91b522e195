"""The options of a shape file: the arguments that ask for them, and what they do to the pairs.

    kv_lens=4096,1024     keys of each batch entry; 17..64 for lengths evenly apart
    lens=4096,1024        queries and keys of each batch entry
    window=1023,0         keys to the left and to the right
    segments=512,3584     lengths of the texts in a row
    mask=causal|random    a bool matrix; random leaves half of the pairs
    bias, dbias           a matrix per head, without and with its gradient
    bias=shared           one matrix for all heads
    softcap=30, alibi, sinks, dropout=0.1

Arrays are made by NumPy or CuPy, whichever is given as `xp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cases import Case, narrow, widen

DROPOUT_SEED = 20240229
Pairs = Callable[..., Any]  # of (b, h, i, j), i a column and j a row of indices


@dataclass(frozen=True)
class Option:
    """The arguments that ask for an option, and what it does to the pairs of one head."""

    arguments: dict[str, Any] = field(default_factory=dict)
    keeps: Pairs | None = None  # True = the pair is left
    adds: Pairs | None = None  # to the scores
    scales: Pairs | None = None  # the probabilities
    softcap: float | None = None
    sinks: Any | None = None  # a score per head that adds to the denominator only
    wrt: tuple[str, ...] = ("q", "k", "v")


def make_option(case: Case, seed: int, xp: Any = np) -> Option:
    """The option of a case; one that does nothing if it has none."""
    name, _, value = case.option.partition("=")
    rng = xp.random.default_rng(seed + 1)
    if name in ("kv_lens", "lens"):
        numbers = _lengths(value, case.B)
        lens = xp.asarray(numbers)
        if name == "kv_lens":
            return Option({"kv_lens": lens}, keeps=lambda b, h, i, j: j < numbers[b])
        return Option(
            {"q_lens": lens, "kv_lens": lens},
            keeps=lambda b, h, i, j: (i < numbers[b]) & (j < numbers[b]),
        )
    if name == "window":
        left, right = map(int, value.split(","))
        return Option(
            {"window_size": (left, right)},
            keeps=lambda b, h, i, j: (i - left <= j) & (j <= i + right),
        )
    if name == "segments":
        lengths = [int(length) for length in value.split(",")]
        ids = xp.asarray(np.repeat(np.arange(len(lengths)), lengths))
        return Option(
            {"q_segment_ids": ids, "kv_segment_ids": ids},
            keeps=lambda b, h, i, j: ids[i] == ids[j],
        )
    if name == "mask":
        if value == "causal":
            mask = xp.tri(case.Lq, case.Lk, dtype=bool)
        else:
            mask = rng.random((case.Lq, case.Lk), dtype=xp.float32) < 0.5
        return Option({"attn_mask": mask}, keeps=lambda b, h, i, j: mask[i[:, 0]])
    if name in ("bias", "dbias"):
        heads = 1 if value == "shared" else case.Hq
        normal = rng.standard_normal((heads, case.Lq, case.Lk), dtype=xp.float32)
        bias = narrow(normal, case.dtype)
        return Option(
            {"bias": bias},
            adds=lambda b, h, i, j: widen(bias[h % heads])[i[:, 0]],
            wrt=("q", "k", "v", "bias") if name == "dbias" else ("q", "k", "v"),
        )
    if name == "softcap":
        return Option({"softcap": float(value)}, softcap=float(value))
    if name == "alibi":
        slopes = np.exp2(-8.0 * np.arange(1, case.Hq + 1) / case.Hq).astype(np.float32)
        return Option(
            {"alibi_slopes": xp.asarray(slopes)},
            adds=lambda b, h, i, j: -float(slopes[h]) * abs(i - j),
        )
    if name == "sinks":
        sinks = rng.standard_normal(case.Hq, dtype=xp.float32)
        return Option({"sinks": sinks}, sinks=sinks)
    if name == "dropout":
        probability = float(value)
        return Option(
            {"dropout_p": probability, "seed": DROPOUT_SEED},
            scales=lambda b, h, i, j: _dropout_factor(probability, b, h, i, j, xp),
        )
    if name:
        raise SystemExit(f"no option {case.option!r}; options.py lists them")
    return Option({"is_causal": True}, keeps=lambda b, h, i, j: j <= i) if case.causal else Option()


def _lengths(value: str, count: int) -> list[int]:
    first, _, last = value.partition("..")
    if last:
        return np.linspace(int(first), int(last), count).astype(int).tolist()
    return [int(length) for length in value.split(",")]


def _dropout_factor(probability: float, b: int, h: int, i: Any, j: Any, xp: Any) -> Any:
    """1 / (1 - p) for pairs that are kept, else 0; contract of `fastattn.testing.dropout_keep`."""
    from fastattn.testing import philox4x32_7

    rows = i[:, 0] if xp is np else i[:, 0].get()
    blocks = np.arange(j.shape[1] // 4)
    counter = np.empty((rows.size, blocks.size, 4), np.uint32)
    for word, values in enumerate((blocks[None], rows[:, None], h, b)):
        counter[..., word] = values
    words = philox4x32_7(counter, (DROPOUT_SEED & 0xFFFFFFFF, DROPOUT_SEED >> 32))
    keep = words.reshape(rows.size, -1) >= np.ceil(probability * 2**32)
    return xp.asarray(keep).astype(np.float64) / (1 - probability)


def indices(rows: range, Lk: int, xp: Any) -> tuple[Any, Any]:
    """Rows as a column, keys as a row."""
    return xp.arange(rows.start, rows.stop)[:, None], xp.arange(Lk)[None]


def pairs_left(case: Case, option: Option, xp: Any = np) -> float:
    """The share of the case's pairs that its option leaves."""
    if not case.option or option.keeps is None:
        return 1.0
    i, j = indices(range(case.Lq), case.Lk, xp)
    kept = (xp.broadcast_to(option.keeps(b, 0, i, j), (case.Lq, case.Lk)) for b in range(case.B))
    return sum(float(pairs.mean()) for pairs in kept) / case.B


def as_mask(case: Case, option: Option) -> np.ndarray | None:
    """What the option keeps or adds as one NumPy array that broadcasts to (B, H, Lq, Lk)."""
    i, j = indices(range(case.Lq), case.Lk, np)
    if option.keeps is not None:
        mask = np.stack([option.keeps(b, 0, i, j) for b in range(case.B)])[:, None]
    elif option.adds is not None:
        mask = np.stack([option.adds(0, h, i, j) for h in range(case.Hq)])[None]
        mask = narrow(mask.astype(np.float32), case.dtype)
    else:
        return None
    for axis in range(2):  # the axes that need not be there
        if (mask == mask.take([0], axis)).all():
            mask = mask.take([0], axis)
    return mask
