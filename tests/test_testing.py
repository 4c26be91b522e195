"""The oracle is judged by closed forms, by plain Python loops and by finite differences."""

import ast
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import testing
from fastattn.testing import (
    assert_accurate,
    assert_forward,
    assert_gradients,
    assert_lse_accurate,
    dropout_keep,
    excluded_pairs,
    live_pairs,
    philox4x32,
    philox4x32_7,
    random_problem,
    reference_backward,
    reference_forward,
)

ALL = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
inf, nan = np.inf, np.nan


def normal(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def small_problem(seed, **fixed):
    """Draw a problem small enough for loops in Python, of float64 and without NaN."""
    rng = np.random.default_rng(seed)
    sizes = dict(lead=[(), (2,), (2, 1)][seed % 3], Hkv=1 + seed % 2, D=2, Dv=3)
    sizes |= dict(Lq=seed % 5, Lk=(seed + 2) % 6)
    problem = random_problem(rng, dtype=np.float64, **{"poison": False, **sizes, **fixed})
    return problem["q"], problem["k"], problem["v"], problem["options"]


def wrt_of(options):
    return tuple(name for name in ALL if name in "qkv" or options.get(name) is not None)


# ---------------------------------------------------------------- Philox and dropout


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        # kat_vectors of Random123
        (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
         "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(rounds, counter, key, words):
    counter, key = ([int(word, 16) for word in text.split()] for text in (counter, key))
    got = philox4x32(counter, key, rounds)
    assert got.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in got) == words
    if rounds == 7:
        assert_array_equal(philox4x32_7([counter] * 3, key), [got] * 3)


def test_dropout_counter_and_key():
    seed, p = 0x0123456789ABCDEF, 0.3
    keep = dropout_keep(seed, p, 2, 3, 4, 10)
    for b, h, i, j in np.ndindex(keep.shape):
        word = philox4x32_7((j // 4, i, h, b), (0x89ABCDEF, 0x01234567))[j % 4]
        assert keep[b, h, i, j] == (int(word) >= math.ceil(p * 2**32))


def test_dropout_does_not_depend_on_the_size_of_the_call():
    whole = dropout_keep(7, 0.5, 3, 4, 9, 21)
    assert_array_equal(dropout_keep(7, 0.5, 2, 3, 5, 6), whole[:2, :3, :5, :6])


def test_dropout_rate():
    n = 400_000
    for p in (0.0, 2**-32, 0.1, 0.5, 0.9, 1.0):
        kept = dropout_keep(1, p, 1, 1, n // 1000, 1000).sum()
        assert abs(kept - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-3


def test_dropout_scales_what_it_keeps_and_leaves_lse_alone():
    q, k, v = normal(0, (2, 3, 4), (2, 8, 4), (2, 8, 8))
    v[:] = np.eye(8)  # out is P
    p, lse = reference_forward(q, k, v)
    dropped, lse_ = reference_forward(q, k, v, dropout_p=0.25, seed=5)
    keep = dropout_keep(5, 0.25, 1, 2, 3, 8)[0]
    assert 0 < keep.sum() < keep.size
    assert_allclose(dropped, np.where(keep, p / 0.75, 0), rtol=1e-14)
    assert_array_equal(lse, lse_)
    out, lse_ = reference_forward(q, k, v, dropout_p=1.0, seed=5)
    assert_array_equal(out, 0)
    assert_array_equal(lse, lse_)


# ---------------------------------------------------------------- closed forms


def test_equal_scores_give_the_mean():
    (v,) = normal(1, (2, 7, 3))
    out, lse = reference_forward(np.zeros((2, 5, 4)), np.ones((2, 7, 4)), v)
    assert_allclose(out, np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape), rtol=1e-14)
    assert_allclose(lse, math.log(7), rtol=1e-15)


def test_one_large_score_copies_its_row():
    (v,) = normal(2, (1, 6, 3))
    k = 1000 * np.eye(6)[None]
    out, lse = reference_forward(np.eye(6)[None, ::-1], k, v, scale=1.0)
    assert_array_equal(out, v[:, ::-1])
    assert_array_equal(lse, 1000.0)


def test_one_key_is_copied_and_lse_is_its_score():
    q, k, v = normal(3, (2, 5, 4), (2, 1, 4), (2, 1, 3))
    out, lse = reference_forward(q, k, v)
    assert_array_equal(out, np.repeat(v, 5, axis=1))
    assert_allclose(lse, (q * k).sum(axis=-1) / 2, rtol=1e-13, atol=1e-15)


def test_two_keys_are_a_logistic_function():
    q, k, v = normal(4, (1, 50, 1), (1, 2, 1), (1, 2, 1))
    out, _ = reference_forward(q, k, v)
    s = q[0] * k[0, :, 0]
    p = 1 / (1 + np.exp(s[:, 1] - s[:, 0]))
    assert_allclose(out[0, :, 0], p * v[0, 0, 0] + (1 - p) * v[0, 1, 0], rtol=1e-12)


def test_a_sink_is_one_more_key_of_value_zero():
    q, k, v = normal(5, (2, 4, 3), (2, 6, 3), (2, 6, 3))
    sinks = np.array([0.3, -2.0])
    score = np.concatenate([q @ k.swapaxes(1, 2), np.zeros((2, 4, 1)) + sinks[:, None, None]], -1)
    p = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    out, lse = reference_forward(q, k, v, sinks=sinks, scale=1.0)
    assert_allclose(out, p[..., :-1] @ v, rtol=1e-12)
    assert_allclose(lse, np.log(np.exp(score).sum(-1)), rtol=1e-12)


def test_no_head_dimension_means_scores_of_zero():
    (v,) = normal(6, (1, 4, 2))
    out, lse = reference_forward(np.ones((1, 3, 0)), np.ones((1, 4, 0)), v)
    assert_allclose(out, np.repeat(v.mean(axis=1, keepdims=True), 3, axis=1))
    assert_allclose(lse, math.log(4))


@pytest.mark.parametrize("empty", ["lead", "Hkv", "group", "Lq", "Lk", "D", "Dv"])
def test_empty_axes(empty):
    sizes = dict(lead=(2,), Hkv=2, group=2, Lq=3, Lk=4, D=5, Dv=6)
    sizes[empty] = (0,) if empty == "lead" else 0
    Hq, Hkv = sizes["Hkv"] * sizes["group"], sizes["Hkv"]
    lead, Lq, Lk = sizes["lead"], sizes["Lq"], sizes["Lk"]
    q, k, v, bias = normal(
        7, (*lead, Hq, Lq, sizes["D"]), (*lead, Hkv, Lk, sizes["D"]), (*lead, Hkv, Lk, sizes["Dv"]),
        (Hq, Lq, 1),
    )  # fmt: skip
    options = dict(bias=bias, sinks=np.zeros(Hq), alibi_slopes=np.ones(Hq), is_causal=True)
    options |= dict(dropout_p=0.5, seed=0, softcap=2.0, causal_offset="lower_right")
    out, lse = reference_forward(q, k, v, **options)
    assert out.shape == (*lead, Hq, Lq, sizes["Dv"])
    assert lse.shape == (*lead, Hq, Lq)
    grads = reference_backward(out, q, k, v, out, lse, wrt=ALL, **options)
    shapes = [x.shape for x in (q, k, v, bias)] + [(Hq,), (Hq,)]
    assert [x.shape for x in grads] == shapes
    if empty in ("Lk", "Lq", "lead", "group"):
        assert all((x == 0).all() for x in (out, *grads))


# ---------------------------------------------------------------- the formula, pair by pair


def looped_attention(q, k, v, o):
    """Follow steps 1 to 7 of the contract with scalars, one pair at a time."""
    *lead, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[-3:-1]
    out, lse = np.zeros((*lead, Hq, Lq, v.shape[-1])), np.full((*lead, Hq, Lq), -inf)
    for row in np.ndindex(*lead, Hq, Lq):
        *b, h, i = row
        at, kv_head = tuple(b), h // (Hq // Hkv)
        of_b = {
            name: None if o.get(name) is None else int(np.broadcast_to(o[name], lead)[at])
            for name in ("q_lens", "kv_lens")
        }
        q_len = Lq if of_b["q_lens"] is None else of_b["q_lens"]
        kv_len = Lk if of_b["kv_lens"] is None else of_b["kv_lens"]
        if i >= q_len:
            continue
        offset = o.get("causal_offset", 0)
        lower_right = isinstance(offset, str)
        offset = kv_len - q_len if lower_right else int(np.broadcast_to(offset, lead)[at])
        left, right = o.get("window_size") or (None, None)
        scores = {}
        for j in range(kv_len):
            pair = (*row, j)
            s = sum(q[(*row, d)] * k[(*at, kv_head, j, d)] for d in range(D))
            s *= 1 / math.sqrt(D) if o.get("scale") is None else o["scale"]
            if o.get("softcap"):
                s = o["softcap"] * math.tanh(s / o["softcap"])
            masks = []
            for name in ("attn_mask", "bias"):
                if o.get(name) is not None:
                    masks.append(np.broadcast_to(o[name], (*lead, Hq, Lq, Lk))[pair])
            if any(m is np.False_ or m == -inf for m in masks):
                continue
            s += sum(float(m) for m in masks if not isinstance(m, np.bool_))
            if o.get("alibi_slopes") is not None:
                s -= float(o["alibi_slopes"][h]) * abs(i + offset - j)
            if o.get("is_causal") and j > i + offset:
                continue
            if left is not None and j < i + offset - left:
                continue
            if right is not None and j > i + offset + right:
                continue
            if o.get("q_segment_ids") is not None:
                q_id = np.broadcast_to(o["q_segment_ids"], (*lead, Lq))[(*at, i)]
                if q_id != np.broadcast_to(o["kv_segment_ids"], (*lead, Lk))[(*at, j)]:
                    continue
            scores[j] = s
        total = sum(math.exp(s) for s in scores.values())
        if o.get("sinks") is not None:
            total += math.exp(float(o["sinks"][h]))
        if total:
            lse[row] = math.log(total)
        for j, s in scores.items():
            p = math.exp(s) / total
            if o.get("dropout_p"):
                batch = int(np.ravel_multi_index(at, lead)) if lead else 0
                seed = o["seed"]
                word = philox4x32_7((j // 4, i, h, batch), (seed % 2**32, seed // 2**32))[j % 4]
                keep = int(word) >= math.ceil(o["dropout_p"] * 2**32)
                p = p / (1 - o["dropout_p"]) if keep else 0.0
            out[row] += p * v[(*at, kv_head, j)]
    return out, lse


@pytest.mark.parametrize("seed", range(150))
def test_forward_is_the_formula(seed):
    q, k, v, options = small_problem(seed)
    out, lse = reference_forward(q, k, v, **options)
    expected_out, expected_lse = looped_attention(q, k, v, options)
    assert_allclose(out, expected_out, rtol=1e-11, atol=1e-13)
    assert_allclose(lse, expected_lse, rtol=1e-11, atol=1e-13)


def test_excluded_pairs_drawn():
    def drawn(Lq, Lk, **options):
        live = ~np.broadcast_to(excluded_pairs((1, Lq, 1), (1, Lk, 1), **options), (1, Lq, Lk))
        return ["".join("x" if pair else "." for pair in row) for row in live[0]]

    assert drawn(3, 5, is_causal=True) == ["x....", "xx...", "xxx.."]
    assert drawn(3, 5, is_causal=True, causal_offset="lower_right") == ["xxx..", "xxxx.", "xxxxx"]
    assert drawn(4, 2, is_causal=True, causal_offset="lower_right") == ["..", "..", "x.", "xx"]
    assert drawn(3, 5, is_causal=True, causal_offset=-1) == [".....", "x....", "xx..."]
    assert drawn(3, 5, window_size=(0, 1)) == ["xx...", ".xx..", "..xx."]
    assert drawn(3, 5, window_size=(None, 0)) == drawn(3, 5, is_causal=True)
    assert drawn(3, 5, window_size=(1, None), is_causal=True) == ["x....", "xx...", ".xx.."]
    assert drawn(2, 4, q_lens=1, kv_lens=3) == ["xxx.", "...."]
    assert drawn(2, 4, q_lens=1, kv_lens=3, is_causal=True, causal_offset="lower_right") == [
        "xxx.",
        "....",
    ]
    ids = dict(q_segment_ids=[0, 0, 1], kv_segment_ids=[0, 1, 1, 2])
    assert drawn(3, 4, **ids) == ["x...", "x...", ".xx."]
    assert drawn(3, 2, causal_offset=2**63 - 1, is_causal=True) == ["xx", "xx", "xx"]
    assert drawn(3, 2, causal_offset=-(2**63), is_causal=True) == ["..", "..", ".."]
    assert drawn(1, 3, window_size=(2**70, 2**70)) == ["xxx"]


def test_offsets_and_lengths_per_batch_entry():
    excluded = excluded_pairs(
        (2, 2, 1, 1, 1), (2, 2, 1, 4, 1), kv_lens=[[1, 2], [3, 4]], causal_offset=[3, 0],
        is_causal=True,
    )  # fmt: skip
    assert_array_equal((~excluded).sum(axis=(2, 3, 4)), [[1, 1], [3, 1]])


def test_a_mask_counts_in_the_accumulation_dtype():
    lowest = np.full((1, 1, 3), np.finfo(np.float64).min)
    q, k, v = normal(8, (1, 2, 4), (1, 3, 4), (1, 3, 4))
    out, lse = reference_forward(q, k, v, attn_mask=lowest)
    assert_allclose(out, np.broadcast_to(v.mean(axis=1), (1, 2, 4)))  # finite: excludes nothing
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    out, lse = reference_forward(q, k, v, attn_mask=lowest)  # -inf in float32
    assert_array_equal(out, 0)
    assert_array_equal(lse, -inf)


@pytest.mark.parametrize("compute_dtype", [np.float32, np.float64])
def test_the_lowest_finite_mask_gives_the_mean(compute_dtype):
    q, k, v = normal(9, (1, 2, 4), (1, 3, 4), (1, 3, 4), dtype=np.float32)
    mask = np.full((2, 3), np.finfo(np.float32).min)
    out, lse = reference_forward(q, k, v, attn_mask=mask, compute_dtype=compute_dtype)
    assert_allclose(out, np.broadcast_to(v.mean(axis=1), (1, 2, 4)), rtol=1e-5)
    for grad in reference_backward(
        out, q, k, v, out, lse, attn_mask=mask, compute_dtype=compute_dtype
    )[:3]:
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_compute_dtype_and_rounded_products(dtype):
    q, k, v = normal(10, (2, 20, 8), (1, 30, 8), (1, 30, 8), dtype=dtype)
    exact, exact_lse = reference_forward(q, k, v)
    plain, plain_lse = reference_forward(q, k, v, compute_dtype=np.float32)
    rounded, rounded_lse = reference_forward(
        q, k, v, compute_dtype=np.float32, round_products=np.float16
    )
    assert exact.dtype == exact_lse.dtype == np.float64
    assert plain.dtype == plain_lse.dtype == rounded.dtype == np.float32
    assert 0 < abs(plain - exact).max() < 1e-6 < abs(rounded - exact).max() < 1e-3
    assert_array_equal(plain_lse, rounded_lse)
    given = (exact.astype(dtype), q, k, v, exact.astype(dtype), exact_lse)
    exact, plain, rounded = (
        reference_backward(*given, compute_dtype=compute_dtype, round_products=narrow)[:3]
        for compute_dtype, narrow in ((np.float64, None), (np.float32, None), (np.float32, dtype))
    )
    for e, p, r in zip(exact, plain, rounded, strict=True):
        assert (e.dtype, p.dtype, r.dtype) == (np.float64, np.float32, np.float32)
        assert 0 < abs(p - e).max() < 1e-5
        assert (abs(r - e).max() > 1e-5) == (np.dtype(dtype).itemsize == 2)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("compute_dtype", [np.float32, np.float64, np.longdouble])
def test_nothing_is_computed_wider_than_asked(compute_dtype):
    options = options_of("all")  # float64 arrays, and integers
    q, k, v = normal(21, (2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3), dtype=np.float32)
    out, lse = reference_forward(q, k, v, compute_dtype=compute_dtype, **options)
    grads = reference_backward(
        out, q, k, v, out, lse, dlse=lse, wrt=ALL, compute_dtype=compute_dtype, **options
    )
    assert {x.dtype for x in (out, lse, *grads)} == {np.dtype(compute_dtype)}


OPTION_SETS = {
    "plain": {},
    "scale": dict(scale=-0.7),
    "softcap": dict(softcap=0.8),
    "bias": dict(bias=(4, 3, 5)),
    "bias of keys": dict(bias=(5,)),
    "bias of rows": dict(bias=(2, 1, 3, 1)),
    "sinks": dict(sinks=(4,)),
    "alibi": dict(alibi_slopes=(4,), causal_offset=2),
    "dropout": dict(dropout_p=0.4, seed=2**63 + 5),
    "causal": dict(is_causal=True),
    "dead rows": dict(is_causal=True, causal_offset=-2, sinks=(4,)),
    "lengths": dict(q_lens=[2, 0], kv_lens=[4, 5], causal_offset="lower_right", is_causal=True),
    "all": dict(
        attn_mask=(1, 5), bias=(2, 1, 3, 5), sinks=(4,), alibi_slopes=(4,), softcap=1.5, scale=0.9,
        dropout_p=0.3, seed=3, window_size=(2, 3), causal_offset=[1, 2], q_lens=[3, 2],
        kv_lens=[5, 4], q_segment_ids=[0, 0, 1], kv_segment_ids=[0, 0, 0, 1, 1],
    ),
}  # fmt: skip


def options_of(name):
    """Fill in standard normal values where OPTION_SETS gives a shape."""
    rng = np.random.default_rng(11)
    arrays = ("attn_mask", "bias", "sinks", "alibi_slopes")
    return {
        key: rng.standard_normal(value) if key in arrays else value
        for key, value in OPTION_SETS[name].items()
    }


@pytest.mark.parametrize("name", OPTION_SETS)
def test_gradients_are_finite_differences(name):
    options = options_of(name)
    q, k, v, dout, dlse = normal(
        12, (2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3), (2, 4, 3, 3), (2, 4, 3)
    )

    def loss(q, k, v, **options):
        out, lse = reference_forward(q, k, v, **options)
        return (dout * out).sum() + (dlse * np.where(lse == -inf, 0, lse)).sum()

    out, lse = reference_forward(q, k, v, **options)
    wrt = wrt_of(options)
    grads = reference_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=wrt, **options)
    inputs = dict(q=q, k=k, v=v, **options)
    for field, grad in grads._asdict().items():
        if field[1:] not in wrt:
            assert grad is None
            continue
        values = inputs[field[1:]]
        differences = np.empty_like(values)
        for at in np.ndindex(values.shape):
            up, down = values.copy(), values.copy()
            up[at], down[at] = values[at] + 1e-5, values[at] - 1e-5
            losses = [loss(**{**inputs, field[1:]: moved}) for moved in (up, down)]
            differences[at] = (losses[0] - losses[1]) / 2e-5
        assert abs(grad).max() > 1e-3, f"{field} is not tested by zeros"
        assert_allclose(grad, differences, rtol=1e-6, atol=1e-9, err_msg=field)


@pytest.mark.parametrize("seed", range(60))
def test_gradients_of_random_problems_are_directional_derivatives(seed):
    q, k, v, options = small_problem(seed, Lq=1 + seed % 4, Lk=1 + seed % 5)
    rng = np.random.default_rng(seed)
    out, lse = reference_forward(q, k, v, **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    inputs = dict(q=q, k=k, v=v)
    inputs |= {name: options[name].astype(float) for name in wrt_of(options)[3:]}
    options = {**options, **{name: inputs[name] for name in wrt_of(options)[3:]}}
    grads = reference_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=inputs, **options)
    for field, grad in grads._asdict().items():
        if grad is None:
            continue
        values = inputs[field[1:]]
        direction, losses = rng.standard_normal(values.shape), []
        for step in (1e-5, -1e-5):
            moved = {**options, **inputs, field[1:]: values + step * direction}
            out_, lse_ = reference_forward(**moved)
            losses.append((dout * out_).sum() + (dlse * np.where(lse_ == -inf, 0, lse_)).sum())
        difference = (losses[0] - losses[1]) / 2e-5
        assert_allclose((grad * direction).sum(), difference, rtol=1e-5, atol=1e-7)


def test_gradients_of_blocks_of_keys_add_up():
    """out and lse of the whole, handed to each block of keys, give that block's share."""
    q, k, v, dout, dlse, bias = normal(
        13, (2, 4, 6, 3), (2, 2, 9, 3), (2, 2, 9, 3), (2, 4, 6, 3), (2, 4, 6), (2, 4, 6, 9)
    )
    bias[..., 0, :] = bias[..., 2, 4:] = -inf  # a dead row; one that only the first block sees
    slopes = np.array([0.5, 0.25, 0.1, 0.0])
    out, lse = reference_forward(q, k, v, bias=bias, alibi_slopes=slopes)
    given = dict(dlse=dlse, wrt=("q", "k", "v", "bias", "alibi_slopes"), alibi_slopes=slopes)
    whole = reference_backward(dout, q, k, v, out, lse, bias=bias, **given)
    first, second = (
        reference_backward(
            dout, q, k[:, :, keys], v[:, :, keys], out, lse, bias=bias[..., keys],
            causal_offset=-keys.start, **given,
        )
        for keys in (slice(0, 4), slice(4, 9))
    )  # fmt: skip
    assert_allclose(first.dq + second.dq, whole.dq, atol=1e-14)
    assert_allclose(first.dalibi_slopes + second.dalibi_slopes, whole.dalibi_slopes, atol=1e-13)
    for name, axis in (("dk", 2), ("dv", 2), ("dbias", 3)):
        parts = np.concatenate([getattr(first, name), getattr(second, name)], axis)
        assert_allclose(parts, getattr(whole, name), atol=1e-14)


def test_gqa_is_repeated_heads():
    q, k, v, dout = normal(14, (6, 5, 4), (2, 7, 4), (2, 7, 3), (6, 5, 3))
    repeated = np.repeat(k, 3, axis=0), np.repeat(v, 3, axis=0)
    out, lse = reference_forward(q, k, v)
    out_, lse_ = reference_forward(q, *repeated)
    assert_array_equal(out, out_)
    grads = reference_backward(dout, q, k, v, out, lse)
    grads_ = reference_backward(dout, q, *repeated, out, lse)
    assert_array_equal(grads.dq, grads_.dq)
    assert_allclose(grads.dk, grads_.dk.reshape(2, 3, 7, 4).sum(1), rtol=1e-14)
    assert_allclose(grads.dv, grads_.dv.reshape(2, 3, 7, 3).sum(1), rtol=1e-14)


# ---------------------------------------------------------------- dead rows, poison, NaN


def test_dead_rows():
    q, k, v, dout = normal(15, (2, 4, 3), (2, 5, 3), (2, 5, 3), (2, 4, 3))
    mask = np.ones((4, 5), bool)
    mask[1] = False
    sinks = np.array([1.5, -inf])
    dlse = np.ones((2, 4))
    for given in ({}, dict(sinks=sinks)):
        out, lse = reference_forward(q, k, v, attn_mask=mask, q_lens=3, **given)
        assert_array_equal(out[:, [1, 3]], 0)
        assert_array_equal(lse[:, 3], -inf)  # does not exist, sinks or not
        assert_array_equal(lse[:, 1], given.get("sinks", -inf))
        assert np.isfinite(lse[:, [0, 2]]).all()
        wrt = ("q", "k", "v", *given)
        grads = reference_backward(
            dout, q, k, v, out, lse, dlse=dlse, wrt=wrt, attn_mask=mask, q_lens=3, **given
        )
        assert_array_equal(grads.dq[:, [1, 3]], 0)
        rows = [0, 2]
        alone = reference_backward(
            dout[:, rows], q[:, rows], k, v, out[:, rows], lse[:, rows], dlse=dlse[:, rows],
            wrt=wrt, **given,
        )  # fmt: skip
        assert_allclose(grads.dk, alone.dk, rtol=1e-14)
        assert_allclose(grads.dv, alone.dv, rtol=1e-14)
        if given:  # lse of row 1 is the sink, and follows it
            assert_allclose(grads.dsinks, alone.dsinks + [1, 0], rtol=1e-14)


def test_a_score_of_minus_infinity_excludes():
    q, k, v = normal(16, (1, 2, 3), (1, 4, 3), (1, 4, 3))
    q, k[0, 1], v[0, 1] = abs(q), [-inf, 1, 1], nan
    out, lse = reference_forward(q, k, v)
    rest = [0, 2, 3]
    out_, lse_ = reference_forward(q, k[:, rest], v[:, rest])
    assert_allclose(out, out_, rtol=1e-14)
    assert_allclose(lse, lse_, rtol=1e-14)
    k[:] = -inf
    out, lse = reference_forward(q, k, v)
    assert_array_equal(out, 0)
    assert_array_equal(lse, -inf)


POISONS = [nan, inf, -inf]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("seed", range(40))
def test_excluded_pairs_have_no_influence(seed, poison):
    """Row i never sees key j of an excluded pair, nor key j row i, whatever they hold."""
    q, k, v, options = small_problem(seed, Lq=4, Lk=5, lead=(), Hkv=1, group=1)
    (dout,) = normal(seed, (1, 4, 3))
    out, lse = reference_forward(q, k, v, **options)
    grads = reference_backward(dout, q, k, v, out, lse, wrt=wrt_of(options), **options)
    live = live_pairs(q, k, **options)[0]

    for j in range(5):
        k_, v_ = k.copy(), v.copy()
        k_[:, j], v_[:, j] = poison, poison
        out_, lse_ = reference_forward(q, k_, v_, **options)
        grads_ = reference_backward(dout, q, k_, v_, out, lse, **options)
        for before, after in ((out, out_), (lse, lse_), (grads.dq, grads_.dq)):
            assert_array_equal(after[:, ~live[:, j]], before[:, ~live[:, j]])
    for i in range(4):
        q_, dout_ = q.copy(), dout.copy()
        q_[:, i], dout_[:, i] = poison, poison
        grads_ = reference_backward(dout_, q_, k, v, out, lse, **options)
        for before, after in ((grads.dk, grads_.dk), (grads.dv, grads_.dv)):
            assert_array_equal(after[:, ~live[i]], before[:, ~live[i]])


@pytest.mark.parametrize("poison", [nan, inf])
def test_masks_at_excluded_pairs_have_no_influence(poison):
    q, k, v, dout, mask, bias = normal(
        17, (2, 4, 3), (2, 5, 3), (2, 5, 3), (2, 4, 3), (2, 4, 5), (2, 4, 5)
    )
    mask[0, 3, 0], bias[1, 3, 1] = -inf, -inf  # each of them excludes, whatever the other holds
    excluded = np.broadcast_to(
        excluded_pairs(q.shape, k.shape, is_causal=True, kv_lens=3), mask.shape
    )

    def run(mask, bias):
        given = dict(attn_mask=mask, bias=bias, is_causal=True, kv_lens=3)
        out, lse = reference_forward(q, k, v, **given)
        wrt = ("q", "k", "v", "bias")
        return out, lse, *reference_backward(dout, q, k, v, out, lse, wrt=wrt, **given)[:4]

    clean = run(mask, bias)
    mask[excluded], bias[excluded] = poison, poison
    bias[0, 3, 0], mask[1, 3, 1] = poison, poison
    for before, after in zip(clean, run(mask, bias), strict=True):
        assert_array_equal(before, after)


def test_rows_with_lse_minus_infinity_are_not_read():
    q, k, v, dout, dlse = normal(18, (2, 4, 3), (2, 5, 3), (2, 5, 3), (2, 4, 3), (2, 4))
    options = dict(
        is_causal=True, causal_offset=-2, q_lens=3, bias=np.zeros((4, 5)), sinks=np.full(2, -inf),
        alibi_slopes=np.ones(2),
    )  # fmt: skip
    out, lse = reference_forward(q, k, v, **options)
    assert_array_equal(lse == -inf, [[True, True, False, True]] * 2)
    clean = reference_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=ALL, **options)
    for x in (dout, out, dlse, q):
        x[:, [0, 1, 3]] = nan
    lse[:, 3] = 5.0  # a row that does not exist, whatever its lse says
    after = reference_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=ALL, **options)
    for x, y in zip(clean, after, strict=True):
        assert_array_equal(x, y)


def test_nothing_is_laundered():
    q, k, v, dout = normal(19, (1, 8, 3), (1, 8, 3), (1, 8, 2), (1, 8, 2))

    def run(**options):
        out, lse = reference_forward(q, k, v, **options)
        return out, lse, reference_backward(dout, q, k, v, out, lse, **options)

    v[0, 5, 1] = nan
    out, lse, grads = run(is_causal=True)
    assert_array_equal(np.isnan(out[0]), [[False, False]] * 5 + [[False, True]] * 3)
    assert np.isfinite(lse).all()
    assert_array_equal(np.isfinite(grads.dq[0]).all(-1), np.arange(8) < 5)
    v[0, 5, 1] = 0

    q[0, 6, 0] = nan  # a row of NaN scores is NaN, not dead
    out, lse, grads = run(is_causal=True)
    assert_array_equal(np.isnan(lse[0]), np.arange(8) == 6)
    assert_array_equal(np.isnan(out[0]).all(-1), np.arange(8) == 6)
    assert_array_equal(np.isnan(grads.dv[0]).all(-1), np.arange(8) <= 6)
    q[0, 6, 0] = 0

    bias = np.zeros((8, 8))
    bias[2, 3] = inf  # inf - inf in its row
    out, lse, grads = run(bias=bias)
    assert_array_equal(np.isfinite(lse[0]), np.arange(8) != 2)
    assert_array_equal(np.isfinite(out[0]).all(-1), np.arange(8) != 2)
    assert not np.isfinite(grads.dk).any()

    out, lse = reference_forward(q, k, v, sinks=[nan])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


# ---------------------------------------------------------------- the assert helpers


def judged(dtype=np.float32, n=64, **options):
    """Return inputs and results as a good kernel would give them: the plain computation's."""
    q, k, v, dout = normal(20, (2, n, 16), (1, n, 16), (1, n, 16), (2, n, 16), dtype=dtype)
    acc = np.float64 if dtype == np.float64 else np.float32
    out, lse = reference_forward(q, k, v, compute_dtype=acc, **options)
    return q, k, v, dout, out.astype(dtype), lse


def plain_gradients(dout, q, k, v, out, lse, *, wrt=("q", "k", "v"), **options):
    acc = np.float64 if q.dtype == np.float64 else np.float32
    grads = reference_backward(dout, q, k, v, out, lse, wrt=wrt, compute_dtype=acc, **options)
    sources = (q, k, v, *(options.get(name) for name in ("bias", "sinks", "alibi_slopes")))
    return testing.Gradients(
        *(g if g is None else g.astype(x.dtype) for g, x in zip(grads, sources, strict=True))
    )


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("n", [1, 2, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_computation_is_accurate(dtype, n):
    options = dict(bias=np.zeros((n, n), dtype), sinks=np.ones(2), alibi_slopes=np.ones(2))
    options |= dict(is_causal=True, softcap=5.0, dropout_p=0.5, seed=1)
    q, k, v, dout, out, lse = judged(dtype=dtype, n=n, **options)
    assert_forward(q, k, v, out, lse, **options)
    assert_forward(q, k, v, out, None, **options)
    if np.dtype(dtype).itemsize == 2:
        acc_out, _ = reference_forward(q, k, v, compute_dtype=np.float32, **options)
        assert_forward(q, k, v, acc_out, lse, **options)
    grads = plain_gradients(dout, q, k, v, out, lse, wrt=ALL, **options)
    assert_gradients(dout, q, k, v, out, lse, grads, wrt=ALL, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_forward_fails(dtype):
    q, k, v, _, out, lse = judged(dtype=dtype, is_causal=True, causal_offset=-1)
    eps = testing.EPS[np.dtype(dtype).name]

    def fails(match, out=out, lse=lse, **options):
        with pytest.raises(AssertionError, match=match):
            assert_forward(q, k, v, out, lse, is_causal=True, causal_offset=-1, **options)

    def changed(x, at, value):
        x = x.copy()
        x[at] = value
        return x

    fails(r"out: rms error .* allowed .* at \(\d, \d+, \d+\)", out=(out * 1.05).astype(dtype))
    largest = np.unravel_index(abs(out).argmax(), out.shape)
    moved = out[largest] * (1 + (64 if eps > 1e-4 else 1000) * eps)
    fails(r"largest error", out=changed(out, largest, moved))
    fails(r"finite .* first at \(1, 3, 2\): nan", out=changed(out, (1, 3, 2), nan))
    fails(r"finite .* first at \(1, 3, 2\): inf", out=changed(out, (1, 3, 2), inf))
    fails("no live pair|live pair belongs is not zero", out=changed(out, (0, 0, 0), eps * eps))
    fails("out: shape", out=out[:, :-1])
    fails("out: dtype", out=out.astype(np.float32 if dtype == np.float64 else np.float64))
    fails("lse: shape", lse=lse[..., None])
    fails("lse: dtype", lse=lse.astype(np.float16))
    fails("lse: wrong in 1 of 128 rows, first at", lse=changed(lse, (0, 0), nan))
    fails("lse: .*finite", lse=changed(lse, (0, 0), np.finfo(lse.dtype).min))
    fails("lse: wrong in 1 of", lse=changed(lse, (1, 0), inf))
    fails("lse: .*finite", lse=changed(lse, (1, 9), -inf))
    ulp = np.spacing(max(abs(lse[1, 9]), lse.dtype.type(1)))
    assert_forward(q, k, v, out, changed(lse, (1, 9), lse[1, 9] + 2 * ulp), is_causal=True,
                   causal_offset=-1)  # fmt: skip
    off = lse[1, 9] + 30 * ulp
    fails(r"lse: .* first at \(1, 9\): .* error \d+\.\d ulp", lse=changed(lse, (1, 9), off))


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_forward_catches_wrong_semantics(dtype):
    q, k, v, _, out, lse = judged(dtype=dtype, is_causal=True)
    for options in ({}, dict(is_causal=True, scale=0.26), dict(is_causal=True, sinks=[-9, -9])):
        with pytest.raises(AssertionError):
            assert_forward(q, k, v, out, lse, **options)
    assert_forward(q, k, v, out, lse, is_causal=True)


def test_assert_forward_catches_accumulation_in_float16():
    q, k, v, _, out, lse = judged(dtype=np.float16, n=256)
    assert_forward(q, k, v, out, lse)
    s = (q @ k.swapaxes(1, 2)).astype(np.float32) / 4
    p = np.exp(s - s.max(-1, keepdims=True)).astype(np.float16)
    rough = np.zeros_like(out)
    for j in range(256):
        rough += p[..., j, None] * v[:, j, None]
    rough = (rough / p.sum(-1, keepdims=True, dtype=np.float16)).astype(np.float16)
    with pytest.raises(AssertionError, match="out: rms error"):
        assert_forward(q, k, v, rough, lse)


def test_assert_forward_demands_nan():
    q, k, v, _, _, _ = judged()
    v[0, 5, 1] = nan
    out, lse = reference_forward(q, k, v, compute_dtype=np.float32, is_causal=True)
    assert_forward(q, k, v, out, lse, is_causal=True)
    assert_forward(q, k, v, np.where(np.isnan(out), inf, out), lse, is_causal=True)
    with pytest.raises(AssertionError, match=r"first at \(0, 5, 1\): 0.0, expected nan"):
        assert_forward(q, k, v, np.nan_to_num(out), lse, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("field", testing.Gradients._fields)
def test_assert_gradients_fails(dtype, field):
    options = dict(bias=np.zeros((64, 64), dtype), sinks=np.ones(2), alibi_slopes=np.ones(2))
    options |= dict(is_causal=True, causal_offset=-1)
    q, k, v, dout, out, lse = judged(dtype=dtype, **options)
    grads = plain_gradients(dout, q, k, v, out, lse, wrt=ALL, **options)
    value = getattr(grads, field)

    def fails(match, wrt=ALL, **changes):
        with pytest.raises(AssertionError, match=match):
            assert_gradients(dout, q, k, v, out, lse, grads._replace(**changes), wrt=wrt, **options)

    largest = np.unravel_index(abs(value).argmax(), value.shape)
    wrong = value.copy()
    wrong[largest] = nan
    fails(rf"{field}: .*finite", **{field: wrong})
    fails(rf"{field}: rms error", **{field: (value * 1.05).astype(value.dtype)})
    fails(rf"{field}: rms error", **{field: -value})
    fails(rf"{field}: shape", **{field: value[..., :-1]})
    fails(rf"{field}: dtype", **{field: value.astype(np.complex64)})
    fails(rf"{field}: None, but wrt=.* asks for it", **{field: None})
    fails(rf"{field}: computed", wrt=tuple(name for name in ALL if name != field[1:]))
    if field in ("dq", "dk", "dv"):  # row 0 and key 63 are dead
        wrong = value.copy()
        wrong[0, 0 if field == "dq" else 63, 3] = testing.EPS[value.dtype.name] ** 2
        fails(f"{field}: a row to which no live pair belongs", **{field: wrong})


def test_gradients_beyond_1000_need_only_be_finite():
    q, k, v, dout, _, _ = judged()
    bias = np.full((64, 64), 5000.0)
    out, lse = reference_forward(q, k, v, bias=bias, compute_dtype=np.float32)
    grads = plain_gradients(dout, q, k, v, out, lse, bias=bias)
    assert_gradients(
        dout, q, k, v, out, lse, grads._replace(dq=grads.dq * 2, dk=grads.dk + 1), bias=bias
    )
    with pytest.raises(AssertionError, match="dq: .*finite"):
        assert_gradients(dout, q, k, v, out, lse, grads._replace(dq=grads.dq * inf), bias=bias)
    with pytest.raises(AssertionError, match="dq: shape"):
        assert_gradients(dout, q, k, v, out, lse, grads._replace(dq=grads.dq[:, 1:]), bias=bias)


def test_the_bound_of_assert_accurate():
    """rms: 2 plain rms + 2 eps rms(exact); largest: 4 plain max + 2 eps max(exact)."""
    n, eps = 10_000, 2.0**-23
    exact = np.ones(n)
    plain = exact + 8 * eps * np.resize([1, -1], n)
    accepted = dict(exact=exact, plain=plain, dtype=np.float32, acc=np.float32)

    def actual(common, single):
        x = (exact + common * eps).astype(np.float32)
        x[17] = 1 + single * eps
        return x

    assert_accurate(actual(17.0, 17.0), **accepted)
    assert_accurate(actual(0.0, 33.0), **accepted)
    with pytest.raises(AssertionError, match="rms error"):
        assert_accurate(actual(19.0, 19.0), **accepted)
    with pytest.raises(AssertionError, match=r"largest error .* at \(17,\)"):
        assert_accurate(actual(0.0, 35.0), **accepted)
    with pytest.raises(AssertionError):  # eps of the accumulation dtype, if that is coarser
        assert_accurate(exact + 3 * eps, exact, exact, np.float64, np.float64)
    assert_accurate(exact + 1.5 * eps, exact, exact, np.float64, np.float32)
    # a plain error of nought by luck, in a result of one element
    one = np.ones(1)
    lucky = dict(exact=one, plain=one, dtype=np.float32, acc=np.float32)
    value = np.array([1 + 9 * eps], np.float32)
    with pytest.raises(AssertionError):
        assert_accurate(value, **lucky)
    assert_accurate(value, **lucky, siblings=[(one, one), (one, one + 4 * eps)])


def test_overflow_of_one_of_the_two_judges_allows_both():
    exact, plain = np.array([1.0, 65520.0, 1e6]), np.array([1.0, 65500.0, 1e6])
    for value in (inf, 65504):
        actual = np.array([1, value, inf], np.float16)
        assert_accurate(actual, exact, plain, np.float16, np.float32)
    with pytest.raises(AssertionError, match=r"first at \(2,\)"):
        assert_accurate(actual[[0, 1, 0]], exact, plain, np.float16, np.float32)


def test_lse_is_allowed_what_the_plain_computation_needs():
    exact, eps = np.array([0.25, 100.0, -inf]), 2.0**-23
    actual = np.array([0.25 + 4 * eps, 100 + 4 * 64 * eps, -inf], np.float32)
    assert_lse_accurate(actual, exact, exact, np.float32)
    actual[1] += 64 * eps
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        assert_lse_accurate(actual, exact, exact, np.float32)
    plain = exact + np.array([2 * eps, 0, 0])
    assert_lse_accurate(actual, exact, plain, np.float32)
    assert_lse_accurate(actual, exact, exact, np.float32, siblings=[(exact, plain)])


# ---------------------------------------------------------------- random problems, imports


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_are_met_by_the_plain_computation(seed):
    rng = np.random.default_rng(seed)
    dtype = DTYPES[seed % 4]
    problem = random_problem(rng, dtype=dtype, Lq=1 + seed, Lk=2 + seed)
    q, k, v, options = problem["q"], problem["k"], problem["v"], problem["options"]
    acc = np.float64 if dtype == np.float64 else np.float32
    out, lse = reference_forward(q, k, v, compute_dtype=acc, **options)
    assert np.isfinite(out).all(), "poison came through"
    out = out.astype(dtype)
    dout = rng.standard_normal(out.shape).astype(dtype)
    wrt = wrt_of(options)
    grads = plain_gradients(dout, q, k, v, out, lse, wrt=wrt, **options)
    assert all(np.isfinite(g.astype(float)).all() for g in grads if g is not None)
    assert_forward(q, k, v, out, lse, **options)
    assert_gradients(dout, q, k, v, out, lse, grads, wrt=wrt, **options)


def test_random_problems_cover_everything():
    problems = [random_problem(np.random.default_rng(seed)) for seed in range(120)]
    seen = {name for problem in problems for name in problem["options"]}
    assert seen == set(testing.Options.__dataclass_fields__)
    for size in (0, 1):
        assert any(problem["q"].shape[-2] == size for problem in problems)
        assert any(problem["k"].shape[-2] == size for problem in problems)
    assert any(not problem["q"].flags.c_contiguous for problem in problems)
    assert any(np.isnan(problem["v"]).any() for problem in problems)
    assert {problem["q"].ndim for problem in problems} == {3, 4, 5}
    again = random_problem(np.random.default_rng(7))
    assert_array_equal(again["q"], problems[7]["q"])
    assert again["options"].keys() == problems[7]["options"].keys()


def test_random_problems_keep_what_is_fixed():
    fixed = dict(
        dtype=np.float16, lead=(4,), Hkv=2, group=3, Lq=5, Lk=7, D=9, Dv=11, poison=False,
        softcap=None, q_segment_ids=None, sinks=np.ones(6),
    )  # fmt: skip
    for seed in range(20):
        problem = random_problem(np.random.default_rng(seed), **fixed)
        q, k, v, options = problem["q"], problem["k"], problem["v"], problem["options"]
        assert (q.shape, k.shape, v.shape) == ((4, 6, 5, 9), (4, 2, 7, 9), (4, 2, 7, 11))
        assert q.dtype == k.dtype == v.dtype == np.float16
        assert options["softcap"] is None
        assert options["sinks"] is fixed["sinks"]
        assert "kv_segment_ids" not in options
    with pytest.raises(AssertionError, match="unknown: .*colour"):
        random_problem(np.random.default_rng(0), colour="red")


def test_an_unknown_option_is_an_error():
    q = np.zeros((1, 1, 1))
    for call in (reference_forward, live_pairs):
        with pytest.raises(TypeError, match="causal"):
            call(q, q, *([q] if call is reference_forward else []), causal=True)


def test_the_oracle_calls_nothing_of_the_package():
    tree = ast.parse(Path(testing.__file__).read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert modules == {"math", "dataclasses", "typing", "numpy"}
