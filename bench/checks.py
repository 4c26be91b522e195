"""Are a candidate's results right?  Asked before anything is timed.

A few kv heads with their query heads are computed in float64 by the project's oracle, and every
row of the candidate's results is held against them.  The bounds are wide enough for any sane order
of summation and rounding in the dtype, and too narrow for a wrong mask, scale, row or precision
(float32 inputs multiplied as bfloat16 do not pass).
"""

from __future__ import annotations

import numpy as np

from cases import Case, make_inputs

# Largest error of a row: rms over the row, relative to the rms of the row and of the array.
BOUNDS = {"float64": 1e-11, "float32": 3e-5, "float16": 5e-3, "bfloat16": 3e-2}
SAMPLES = 3
SCORES_IN_ALL = 1 << 26  # of the samples; long problems are held against one group


def sample_groups(case: Case) -> list[tuple[int, int]]:
    """(batch entry, kv head) of the groups that are checked: last, first, middle."""
    affordable = SCORES_IN_ALL // (case.Hq // case.Hkv * case.Lq * case.Lk)
    last = case.B * case.Hkv - 1
    flat = [last, 0, last // 2][: max(1, min(SAMPLES, affordable))]
    return [divmod(index, case.Hkv) for index in sorted(set(flat))]


def exact_results(case: Case, seed: int) -> list[list[np.ndarray]]:
    """Float64 (out,) or (dq, dk, dv) of each sampled group."""
    from fastattn.testing import reference_backward, reference_forward

    inputs = make_inputs(case, seed)
    exact = []
    for b, kv_head in sample_groups(case):
        group = [_heads_of(array, b, kv_head, case.Hkv) for array in inputs]
        out, lse = reference_forward(*group[:3], is_causal=case.causal)
        if case.direction == "forward":
            exact.append([out])
        else:
            q, k, v, dout = group
            gradients = reference_backward(dout, q, k, v, out, lse, is_causal=case.causal)
            exact.append([gradients.dq, gradients.dk, gradients.dv])
    return exact


def _heads_of(array: np.ndarray, b: int, kv_head: int, Hkv: int) -> np.ndarray:
    heads = array.shape[1] // Hkv
    return array[b : b + 1, kv_head * heads : (kv_head + 1) * heads]


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
