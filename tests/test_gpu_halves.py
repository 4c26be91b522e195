"""The arithmetic of Hopper's float32 forward, kernels/hopper_halves.cuh, in NumPy.

Sums are those of the tensor cores at their worst: 16 products at a time, aligned to the largest and
cut a few bits below a float32, and every sum cut to a float32. What comes of that keeps promise 6.
"""

import re
from importlib import resources

import numpy as np
import pytest

from fastattn._gpu import config
from fastattn.testing import assert_forward

KERNELS = resources.files("fastattn._gpu") / "kernels"
f32 = np.float32
FINEST_CUT = 2  # bits below a float32 that an aligned product keeps


def constant(name):
    found = re.search(rf"\b{name} = ([-\w.+]*)f?[;,]", (KERNELS / "hopper_halves.cuh").read_text())
    text = found[1].rstrip("f")
    return float.fromhex(text) if "x" in text else float(text)


ORDINARY, LOWEST, HIGHEST = map(constant, ("kOrdinary", "kLowest", "kHighest"))


def power(exponents):
    return np.ldexp(f32(1), exponents)


def cut(x, bits=24):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def products(c, a, b):
    """c + a b^T."""
    for k in range(0, a.shape[1], 16):
        terms = a[:, None, k : k + 16] * b[None, :, k : k + 16]
        terms = np.concatenate([terms, c[..., None]], -1)
        top = np.frexp(terms)[1].max(-1, keepdims=True)
        unit = np.ldexp(1.0, np.maximum(top, -900) - 24 - FINEST_CUT)
        c = cut((np.trunc(terms / unit) * unit).sum(-1))
    return c


def split(x):
    hi = x.astype(np.float16)
    lo = (x - hi.astype(f32)).astype(np.float16)
    return hi.astype(np.float64), lo.astype(np.float64)


def exponents(x):
    """Of the powers of two that take rows' largest numbers to [2^14, 2^15)."""
    top = abs(x).max(-1)
    return np.minimum(np.where(top > 0, 15 - np.frexp(top)[1], 125), 125)


def scores(q, k, up_q, up_k):
    """Not more than 64 products of the highest bits in one sum."""
    (q, low_q), (k, low_k) = split(q * power(up_q)[:, None]), split(k * power(up_k)[:, None])
    zero = np.zeros((len(q), len(k)))
    rest = products(products(zero, low_q, k), q, low_k)
    if q.shape[1] == 64:
        s = products(rest, q, k).astype(f32)
    else:
        s = products(zero, q[:, :64], k[:, :64]).astype(f32)
        s += products(rest, q[:, 64:], k[:, 64:]).astype(f32)
    return s * power(-up_k) * power(-up_q)[:, None]


def forward(q, k, v, excluded, Bc):
    scale = q.shape[1] ** -0.5
    log2_unit = f32(scale * np.log2(np.e))
    up_q, up_k, up_v = map(exponents, (q, k, v))
    top = abs(v).max(-1)
    ordinary = (top == 0) | ((top >= LOWEST) & (top < HIGHEST))
    up_v = np.where(ordinary, int(np.log2(ORDINARY)), up_v)
    weights = f32(ORDINARY) * power(-up_v)
    out = np.zeros((len(q), v.shape[1]), f32)
    high, total = np.full(len(q), -np.inf, f32), np.zeros(len(q), f32)
    for at in range((len(k) - 1) // Bc * Bc, -1, -Bc):
        j = np.s_[at : at + Bc]
        s = scores(q, k[j], up_q, up_k[j])
        lost = power(-up_q)[:, None] * power(-up_k[j]) > 2.0**-15 / np.sqrt(q.shape[1]) / scale
        s = np.where(lost, q @ k[j].T, s)  # `repair`
        s = np.where(excluded[:, j], -np.inf, s).astype(f32)
        new = np.maximum(high, s.max(1))
        safe = np.where(np.isinf(new), 0, new)
        rescale = np.exp2((high - safe) * log2_unit)
        p = np.exp2((s - safe[:, None]) * log2_unit)
        total = total * rescale + p.sum(1, dtype=f32)
        high = new
        # Weights of v, where a row sees others than ordinary ones.
        most = np.where(p != 0, weights[j], 0).max(1)
        least = np.where(p != 0, weights[j], np.inf).min(1)
        apart = (most != 0) & ((most != 1) | (least != 1))
        most = np.where(apart, most, 1)
        p = np.where(apart[:, None] & (p != 0), p * (weights[j] / most[:, None]), p)
        up = np.where(apart, np.minimum(exponents(p), 120), 14)
        p, low_p = split(p * power(up)[:, None])
        x, low_x = (part.T for part in split(v[j] * power(up_v[j])[:, None]))
        block = products(products(np.zeros(out.shape), low_p, x), p, low_x)
        block = products(block, p, x).astype(f32) * (power(14 - up) * most)[:, None]
        out = out * rescale[:, None] + block
    lse = high * f32(scale) + np.log(total)
    return (out * (f32(2.0**-14 / ORDINARY) / total)[:, None]).astype(f32), lse.astype(f32)


def spread(rng, low, high, *shape):
    return (10.0 ** rng.uniform(low, high, shape)).astype(f32)


# name -> what becomes of (q, k, v)
INPUTS = {
    "normal": lambda rng, q, k, v: (q, k, v),
    "means": lambda rng, q, k, v: (q + 1, k + 1, v + 1),
    "large scores": lambda rng, q, k, v: (8 * q, 8 * k, v),
    "one key is all": lambda rng, q, k, v: (40 * q, 40 * k, v),
    "equal scores": lambda rng, q, k, v: (0 * q, k, v + 1),
    "growing scores": lambda rng, q, k, v: (q + 1, k + np.arange(len(k), 0, -1)[:, None] / 50, v),
    "outliers": lambda rng, q, k, v: (q, k * np.where(np.arange(q.shape[1]) < 2, 50, 1), v),
    "outliers of both": lambda rng, q, k, v: tuple(
        x * np.where(np.arange(q.shape[1]) < 2, 50, 1) for x in (q, k)
    ) + (v,),
    "small q, large k": lambda rng, q, k, v: (q * f32(1e-30), k * f32(1e30), v),
    "rows of k": lambda rng, q, k, v: (q, k * spread(rng, -20, 1, len(k), 1), v),
    "small v": lambda rng, q, k, v: (q, k, v * f32(1e-30)),
    "large v": lambda rng, q, k, v: (q, k, v * f32(1e30)),
    "rows of v": lambda rng, q, k, v: (q, k, v * spread(rng, -4, 4, len(v), 1)),
    "any rows of v": lambda rng, q, k, v: (q, k, v * spread(rng, -30, 30, len(v), 1)),
    "columns of v": lambda rng, q, k, v: (q, k, v * spread(rng, -4, 4, v.shape[1])),
    "one row of v": lambda rng, q, k, v: (
        q, k, v * np.where(np.arange(len(v))[:, None] == 7, 1e6, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("D", [64, 128])
def test_halves_are_as_accurate_as_float32(D, name, rng):
    """A causal problem, whose first rows see few keys, and a wide one."""
    Bc = config.choose("forward", 90, "sm_90a", "float32", "", D, D).Bc
    for Lq, Lk, is_causal in ((40, 40, True), (12, 200, False)):
        arrays = (rng.standard_normal((n, D), f32) for n in (Lq, Lk, Lk))
        q, k, v = (x.astype(f32) for x in INPUTS[name](rng, *arrays))
        excluded = (np.arange(Lk) > np.arange(Lq)[:, None]) & is_causal
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            out, lse = forward(q, k, v, excluded, Bc)
        as_given = (x[None, None] for x in (q, k, v, out, lse))
        assert_forward(*as_given, is_causal=is_causal)


def test_columns_of_different_sizes_are_left_to_exact_products(rng):
    """What a row's largest number takes from its smallest is what `repair` is for."""
    q, k, v = (rng.standard_normal((70, 64), f32) for _ in range(3))
    size = spread(rng, -6, 6, 64)
    q, k = q / size, k * size
    excluded = np.zeros((70, 70), bool)
    out, lse = forward(q, k, v, excluded, 64)
    assert_forward(*(x[None, None] for x in (q, k, v, out, lse)))
    left = scores(q, k, exponents(q), exponents(k))
    exact = q.astype(np.float64) @ k.astype(np.float64).T
    plain = abs(q @ k.T - exact).max()
    assert abs(left - exact).max() > 100 * plain
