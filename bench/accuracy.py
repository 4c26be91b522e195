"""Error of our results against float64, beside the plain computation's.

Plain is what `fastattn.testing` computes in the accumulation dtype: materialised, two-pass softmax,
results rounded once; for 16-bit inputs it rounds P and dS to the input dtype before the products,
as ours may.  Ratios below 2 (rms) and 4 (largest) are what the project promises, rounding of the
result itself aside.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from cases import Case, load_shapes, make_inputs, numpy_dtype
from report import markdown

DTYPES = ["float32", "float64", "bfloat16", "float16"]
DIRECTIONS = ["forward", "backward"]


def run(options: argparse.Namespace) -> dict[str, object]:
    records = []
    for dtype in options.dtype:
        for case in load_shapes(options.shapes):
            # One problem serves both directions: dout is made last, q, k, v are the same.
            case = replace(case, dtype=dtype, direction="backward")
            for name, ours, plain, exact in results_of(case, options):
                record = {"case": f"{dtype} {case.shape}", "result": name}
                record |= {"ours": errors(ours, exact), "plain": errors(plain, exact)}
                records.append(record)
    print("Errors of fastattn (and how many times the plain computation's)")
    for kind, title in (("rms", "rms error / rms of the result"), ("max", "largest / largest")):
        print(f"\n### {title}; lse: the error itself\n\n{error_table(records, kind)}")
    return {"errors": records}


def error_table(records: list[dict], kind: str) -> str:
    """A row per case, a column per result."""
    names = list(dict.fromkeys(record["result"] for record in records))
    rows: dict[str, list[str]] = {}
    for record in records:
        ours, plain = record["ours"][kind], record["plain"][kind]
        ratio = f"{ours / plain:.2f}" if plain else "-"
        rows.setdefault(record["case"], []).append(f"{ours:.1e} ({ratio})")
    return markdown(["B, H, Lq, Lk, D", *names], [[case, *row] for case, row in rows.items()])


def results_of(case: Case, options: argparse.Namespace):
    """(name, ours, plain, exact) of each result."""
    import fastattn
    from fastattn.attention import attention_backward, attention_forward
    from fastattn.testing import reference_backward, reference_forward

    fastattn.set_num_threads(options.threads)
    q, k, v, dout = make_inputs(case, options.seed)
    dtype, mask = numpy_dtype(case.dtype), {"is_causal": case.causal}
    accumulate = np.float64 if case.dtype == "float64" else np.float32
    is_short = dtype.itemsize == 2
    plainly = {"compute_dtype": accumulate, "round_products": dtype if is_short else None} | mask

    exact_out, exact_lse = reference_forward(q, k, v, **_wide(dtype), **mask)
    plain_out, plain_lse = reference_forward(q, k, v, **plainly)
    out, lse = attention_forward(q, k, v, **mask)
    if "forward" in options.directions:
        yield "out", out, plain_out.astype(dtype), exact_out
        yield "lse", lse, plain_lse, exact_lse
    if "backward" in options.directions:
        # All three start from the same out and lse, as callers have them.
        exact = reference_backward(dout, q, k, v, out, lse, **_wide(dtype), **mask)
        plain = reference_backward(dout, q, k, v, out, lse, **plainly)
        ours = attention_backward(dout, q, k, v, out, lse, **mask)
        for name in ("dq", "dk", "dv"):
            plain_result = getattr(plain, name).astype(dtype)
            yield name, getattr(ours, name), plain_result, getattr(exact, name)


def _wide(dtype: np.dtype) -> dict[str, type]:
    """What "exact" is computed in: float64, and long double where float64 is what is judged."""
    return {"compute_dtype": np.longdouble if dtype == np.float64 else np.float64}


def errors(actual: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Rms error relative to the result's rms, largest error relative to its largest element."""
    difference = actual.astype(exact.dtype) - exact
    rms, largest = np.sqrt(np.mean(exact**2)), np.max(np.abs(exact))
    if exact.ndim == 3:  # lse is a logarithm: its error is one as it stands
        rms = largest = 1.0
    return {
        "rms": float(np.sqrt(np.mean(difference**2)) / rms),
        "max": float(np.max(np.abs(difference)) / largest),
    }
