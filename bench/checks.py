"""Are a candidate's results right?  Asked before anything is timed.

A few kv heads with their query heads are computed in float64, by NumPy or CuPy as the inputs are,
and every row of the candidate's results is held against them.  The bounds are wide enough for any
sane order of summation and rounding in the dtype, and too narrow for a wrong mask, scale, row or
precision (float32 inputs multiplied as bfloat16 do not pass).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cases import Case, widen
from options import Option, indices

# Largest error of a row: rms over the row, relative to the rms of the row and of the array.
BOUNDS = {"float64": 1e-11, "float32": 3e-5, "float16": 5e-3, "bfloat16": 3e-2}
SAMPLES = 3
SCORES_IN_ALL = 1 << 26  # of the samples; long problems are held against one group
BLOCK_SCORES = 1 << 24  # of the float64 blocks that results are computed in


def sample_groups(case: Case) -> list[tuple[int, int]]:
    """(batch entry, kv head) of the groups that are checked: last, first, middle."""
    affordable = SCORES_IN_ALL // (case.Hq // case.Hkv * case.Lq * case.Lk)
    if case.option.startswith("dropout"):  # its decisions take long
        affordable = 1
    last = case.B * case.Hkv - 1
    flat = [last, 0, last // 2][: max(1, min(SAMPLES, affordable))]
    return [divmod(index, case.Hkv) for index in sorted(set(flat))]


def exact_results(
    case: Case, inputs: list[Any], option: Option, xp: Any = np
) -> list[list[np.ndarray]]:
    """Float64 (out,) or (dq, dk, dv) of each sampled group."""
    exact = []
    for b, kv_head in sample_groups(case):
        group = [widen(heads_of(case, array, b, kv_head)[0]) for array in inputs]
        results = _group_results(case, group, option, b, kv_head, xp)
        exact.append([array[None] if xp is np else array[None].get() for array in results])
    return exact


def heads_of(case: Case, array: Any, b: int, kv_head: int) -> Any:
    """The heads of `array` that belong to one kv head of one batch entry."""
    heads = array.shape[1] // case.Hkv
    return array[b : b + 1, kv_head * heads : (kv_head + 1) * heads]


def _group_results(
    case: Case, group: list[Any], option: Option, b: int, kv_head: int, xp: Any
) -> tuple[Any, ...]:
    q, k, v, *dout = group
    k, v = k[0], v[0]
    out = xp.empty((*q.shape[:-1], case.Dv))
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    scale = case.D**-0.5
    for head in range(len(q)):
        h = kv_head * len(q) + head
        for rows in _blocks(case):
            part = slice(rows.start, rows.stop)
            q_rows, at = q[head, part], (b, h, *indices(rows, case.Lk, xp))
            scores = (q_rows @ k.T) * scale
            slope = 1.0
            if option.softcap:
                tanh = xp.tanh(scores / option.softcap)
                scores, slope = option.softcap * tanh, 1 - tanh * tanh
            if option.adds:
                scores = scores + option.adds(*at)
            if option.keeps:
                scores = xp.where(option.keeps(*at), scores, -np.inf)
            p = _softmax(scores, -np.inf if option.sinks is None else float(option.sinks[h]), xp)
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


def _softmax(scores: Any, sink: float, xp: Any) -> Any:
    """Softmax over the last axis, the sink in the denominator; rows without a pair give zeros."""
    largest = xp.maximum(scores.max(axis=-1, keepdims=True), sink)
    largest = xp.where(xp.isfinite(largest), largest, 0.0)
    p = xp.exp(scores - largest)
    total = p.sum(axis=-1, keepdims=True) + xp.exp(sink - largest)
    return p / xp.where(total > 0, total, 1.0)


def _blocks(case: Case) -> Iterator[range]:
    """The rows, as many at a time as memory likes."""
    step = max(1, BLOCK_SCORES // case.Lk)
    for start in range(0, case.Lq, step):
        yield range(start, min(start + step, case.Lq))


def worst_error(actual: list[list[np.ndarray]], exact: list[list[np.ndarray]]) -> float:
    """The largest row error over all groups and results; infinite for a wrong shape or NaN."""
    worst = 0.0
    for group, exact_group in zip(actual, exact, strict=True):
        for result, wanted in zip(group, exact_group, strict=True):
            if result.shape != wanted.shape:
                return np.inf
            error = _row_rms(result.astype(np.float64) - wanted)
            size = np.hypot(_row_rms(wanted), np.sqrt(np.mean(wanted**2)))
            largest = float(np.max(error / size))
            worst = max(worst, largest if np.isfinite(largest) else np.inf)
    return worst


def _row_rms(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(array**2, axis=-1))
