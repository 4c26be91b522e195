"""What the GPU's candidates are given, and what is right: inputs, options, float64 results.

All of it is made on the device by CuPy: long problems would take minutes on the host.  CuPy knows
few operations on bfloat16, so its conversions are done on the bits.

The options of a shape file::

    kv_lens=4096,1024     keys of each batch entry
    lens=4096,1024        queries and keys of each batch entry
    window=1023,0         keys to the left and to the right
    segments=512,3584     lengths of the texts in a row
    mask=causal|random    a bool matrix; random leaves half of the pairs
    bias, dbias           a matrix per head, without and with its gradient
    softcap=30, alibi, dropout=0.1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cases import Case, input_shapes, numpy_dtype
from checks import sample_groups

BLOCK_SCORES = 1 << 24  # of the float64 blocks that results are computed in
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
    wrt: tuple[str, ...] = ("q", "k", "v")


def make_inputs(case: Case, seed: int) -> list[Any]:
    """q, k, v and, for the backward, dout: standard normal, the same for the same seed."""
    import cupy as cp

    rng = cp.random.default_rng(seed)
    normal = (rng.standard_normal(shape, dtype=cp.float32) for shape in input_shapes(case))
    return [narrow(array, case.dtype) for array in normal]


def narrow(array: Any, dtype: str) -> Any:
    """A float32 array in another dtype, rounded to nearest even."""
    import cupy as cp

    if dtype != "bfloat16":
        return array.astype(dtype, copy=False)
    bits = array.view(cp.uint32)
    bits = bits + cp.uint32(0x7FFF) + ((bits >> cp.uint32(16)) & cp.uint32(1))
    return (bits >> cp.uint32(16)).astype(cp.uint16).view(numpy_dtype("bfloat16"))


def widen(array: Any) -> Any:
    """The array in float64."""
    import cupy as cp

    if array.dtype == numpy_dtype("bfloat16"):
        array = (array.view(cp.uint16).astype(cp.uint32) << cp.uint32(16)).view(cp.float32)
    return array.astype(cp.float64)


def make_option(case: Case, seed: int) -> Option:
    """The option of a case, its arrays on the device; one that does nothing if it has none."""
    import cupy as cp

    name, _, value = case.option.partition("=")
    numbers = [int(number) for number in value.split(",") if number.isdigit()]
    rng = cp.random.default_rng(seed + 1)
    if name == "kv_lens":
        return Option({"kv_lens": cp.asarray(numbers)}, keeps=lambda b, h, i, j: j < numbers[b])
    if name == "lens":
        lens = cp.asarray(numbers)
        return Option(
            {"q_lens": lens, "kv_lens": lens},
            keeps=lambda b, h, i, j: (i < numbers[b]) & (j < numbers[b]),
        )
    if name == "window":
        left, right = numbers
        return Option(
            {"window_size": (left, right)},
            keeps=lambda b, h, i, j: (i - left <= j) & (j <= i + right),
        )
    if name == "segments":
        ids = cp.asarray(np.repeat(np.arange(len(numbers)), numbers))
        return Option(
            {"q_segment_ids": ids, "kv_segment_ids": ids},
            keeps=lambda b, h, i, j: ids[i] == ids[j],
        )
    if name == "mask":
        if value == "causal":
            mask = cp.tri(case.Lq, case.Lk, dtype=bool)
        else:
            mask = rng.random((case.Lq, case.Lk), dtype=cp.float32) < 0.5
        return Option({"attn_mask": mask}, keeps=lambda b, h, i, j: mask[i[:, 0]])
    if name in ("bias", "dbias"):
        normal = rng.standard_normal((case.Hq, case.Lq, case.Lk), dtype=cp.float32)
        bias = narrow(normal, case.dtype)
        return Option(
            {"bias": bias},
            adds=lambda b, h, i, j: widen(bias[h])[i[:, 0]],
            wrt=("q", "k", "v", "bias") if name == "dbias" else ("q", "k", "v"),
        )
    if name == "softcap":
        return Option({"softcap": float(value)}, softcap=float(value))
    if name == "alibi":
        slopes = np.exp2(-8.0 * np.arange(1, case.Hq + 1) / case.Hq).astype(np.float32)
        return Option(
            {"alibi_slopes": cp.asarray(slopes)},
            adds=lambda b, h, i, j: -float(slopes[h]) * abs(i - j),
        )
    if name == "dropout":
        probability = float(value)
        return Option(
            {"dropout_p": probability, "seed": DROPOUT_SEED},
            scales=lambda b, h, i, j: _dropout_factor(probability, b, h, i, j),
        )
    if name:
        raise SystemExit(f"no option {case.option!r}; gpu_exact.py lists them")
    return Option({"is_causal": True}, keeps=lambda b, h, i, j: j <= i) if case.causal else Option()


def _dropout_factor(probability: float, b: int, h: int, i: Any, j: Any) -> Any:
    """1 / (1 - p) for pairs that are kept, else 0; contract of `fastattn.testing.dropout_keep`."""
    import cupy as cp

    from fastattn.testing import philox4x32_7

    rows, blocks = cp.asnumpy(i)[:, 0], np.arange(j.shape[1] // 4)
    counter = np.empty((rows.size, blocks.size, 4), np.uint32)
    for word, values in enumerate((blocks[None], rows[:, None], h, b)):
        counter[..., word] = values
    words = philox4x32_7(counter, (DROPOUT_SEED & 0xFFFFFFFF, DROPOUT_SEED >> 32))
    keep = words.reshape(rows.size, -1) >= np.ceil(probability * 2**32)
    return cp.asarray(keep).astype(cp.float64) / (1 - probability)


def indices(rows: range, Lk: int) -> tuple[Any, Any]:
    """Rows as a column, keys as a row."""
    import cupy as cp

    return cp.arange(rows.start, rows.stop)[:, None], cp.arange(Lk)[None]


def pairs_left(case: Case, option: Option) -> float:
    """The share of the case's pairs that its option leaves."""
    if not case.option or option.keeps is None:
        return 1.0
    i, j = indices(range(case.Lq), case.Lk)
    return sum(float(option.keeps(b, 0, i, j).mean()) for b in range(case.B)) / case.B


def groups_of(case: Case) -> list[tuple[int, int]]:
    """(batch entry, kv head) of the groups that are checked; the host makes dropout's, so one."""
    groups = sample_groups(case)
    return groups[-1:] if case.option.startswith("dropout") else groups


def exact_results(case: Case, inputs: list[Any], option: Option) -> list[list[np.ndarray]]:
    """Float64 (out,) or (dq, dk, dv) of each group."""
    import cupy as cp

    exact = []
    for b, kv_head in groups_of(case):
        group = [widen(heads_of(case, array, b, kv_head)[0]) for array in inputs]
        result = _group_results(case, group, option, b, kv_head)
        exact.append([cp.asnumpy(array)[None] for array in result])
    return exact


def heads_of(case: Case, array: Any, b: int, kv_head: int) -> Any:
    """The heads of `array` that belong to one kv head of one batch entry."""
    heads = array.shape[1] // case.Hkv
    return array[b : b + 1, kv_head * heads : (kv_head + 1) * heads]


def _group_results(
    case: Case, group: list[Any], option: Option, b: int, kv_head: int
) -> tuple[Any, ...]:
    import cupy as cp

    q, k, v, *dout = group
    k, v = k[0], v[0]
    out = cp.empty((*q.shape[:-1], case.Dv))
    dq, dk, dv = cp.empty_like(q), cp.zeros_like(k), cp.zeros_like(v)
    scale = case.D**-0.5
    for head in range(len(q)):
        h = kv_head * len(q) + head
        for rows in _blocks(case):
            part = slice(rows.start, rows.stop)
            q_rows, at = q[head, part], (b, h, *indices(rows, case.Lk))
            scores = (q_rows @ k.T) * scale
            slope = 1.0
            if option.softcap:
                tanh = cp.tanh(scores / option.softcap)
                scores, slope = option.softcap * tanh, 1 - tanh * tanh
            if option.adds:
                scores = scores + option.adds(*at)
            p = _softmax(scores, option.keeps(*at) if option.keeps else None)
            z = option.scales(*at) if option.scales else 1.0
            out[head, part] = (z * p) @ v
            if dout:
                dout_rows = dout[0][head, part]
                delta = (dout_rows * out[head, part]).sum(axis=-1, keepdims=True)
                ds = p * (z * (dout_rows @ v.T) - delta) * slope * scale
                dq[head, part] = ds @ k
                dk += ds.T @ q_rows
                dv += (z * p).T @ dout_rows
    return (dq, dk[None], dv[None]) if dout else (out,)


def _softmax(scores: Any, keeps: Any | None) -> Any:
    """Softmax over the last axis; rows without a pair give zeros."""
    import cupy as cp

    if keeps is not None:
        scores = cp.where(keeps, scores, -cp.inf)
    largest = scores.max(axis=-1, keepdims=True)
    p = cp.exp(scores - cp.where(cp.isfinite(largest), largest, 0.0))
    total = p.sum(axis=-1, keepdims=True)
    return p / cp.where(total > 0, total, 1.0)


def _blocks(case: Case) -> Iterator[range]:
    """The rows, as many at a time as memory likes."""
    step = max(1, BLOCK_SCORES // case.Lk)
    for start in range(0, case.Lq, step):
        yield range(start, min(start + step, case.Lq))
