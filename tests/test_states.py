"""merge_attention_states: blocks of keys, attended to one by one, are the whole."""

import functools
import itertools

import numpy as np
import pytest
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.attention import AttentionResult, attention_backward, attention_forward

ml_dtypes = pytest.importorskip("ml_dtypes")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
PAIRS = [
    ("float16", "float32"),
    (bfloat16, "float32"),
    ("float32", "float32"),
    ("float64", "float64"),
    ("float32", "float64"),
    ("float64", "float32"),
]


def merge_attention_states(*args, **kwargs):
    return call(fastattn.merge_attention_states, *args, **kwargs)


def state(seed, shape=(2, 3, 5), dtype="float64", lse_dtype=None):
    rng = np.random.default_rng(seed)
    out = rng.standard_normal(shape).astype(dtype)
    lse = 3 * rng.standard_normal(shape[:-1])
    return AttentionResult(out, np.asarray(lse, lse_dtype or dtype))


def plain(out_a, lse_a, out_b, lse_b):
    """The formula itself, in long double."""
    a, b = (np.exp(lse.astype(np.longdouble)) for lse in (lse_a, lse_b))
    out = out_a * a[..., None] + out_b * b[..., None].astype(np.longdouble)
    return out / (a + b)[..., None], np.log(a + b)


def same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(("dtype", "lse_dtype"), PAIRS, ids=str)
def test_is_the_formula(xp, dtype, lse_dtype):
    a, b = (state(seed, (4, 50, 7), dtype, lse_dtype) for seed in (0, 1))
    copies = [x.copy() for x in (*a, *b)]
    out, lse = merge_attention_states(*a, *b)
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype)
    exact_out, exact_lse = plain(*(x.astype(np.longdouble) for x in (*a, *b)))
    # One rounding to the result's dtype, and a few in the arithmetic; absolute, as out may cancel.
    computed_in = "float64" if "float64" in (dtype, lse_dtype) else "float32"
    eps_out = EPS[str(np.dtype(dtype))] + 8 * EPS[computed_in]
    np.testing.assert_allclose(out.astype(np.longdouble), exact_out, rtol=0, atol=4 * eps_out)
    np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=8 * 8 * EPS[lse_dtype])
    same_bits((*a, *b), copies)


@pytest.mark.parametrize("split", [0, 1, 20, 49, 50])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_blocks_of_keys_are_the_whole(split, dtype):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, 8)).astype(dtype) for n in (6, 50, 50))
    parts = [
        attention_forward(q, k[:, keys], v[:, keys], causal_offset=offset, is_causal=True)
        for keys, offset in ((slice(split), 3), (slice(split, None), 3 - split))
    ]
    whole = attention_forward(q, k, v, causal_offset=3, is_causal=True)
    merged = merge_attention_states(*parts[0], *parts[1])
    for actual, expected in zip(merged, whole):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=40 * EPS[dtype])


def test_gradients_of_the_blocks_add_up():
    rng = np.random.default_rng(3)
    q, k, v, dout = rng.standard_normal((4, 2, 9, 8))
    halves = slice(4), slice(4, None)
    parts = [attention_forward(q, k[:, keys], v[:, keys]) for keys in halves]
    merged = merge_attention_states(*parts[0], *parts[1])
    shares = [attention_backward(dout, q, k[:, keys], v[:, keys], *merged) for keys in halves]
    whole = attention_backward(dout, q, k, v, *attention_forward(q, k, v))
    np.testing.assert_allclose(shares[0].dq + shares[1].dq, whole.dq, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([s.dk for s in shares], 1), whole.dk, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([s.dv for s in shares], 1), whole.dv, atol=1e-13)


def test_many_blocks_in_any_order():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, n, 4)) for n in (3, 12, 12))
    blocks = [attention_forward(q, k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)]
    whole = attention_forward(q, k, v)
    for order in itertools.permutations(blocks):
        merged = functools.reduce(lambda a, b: merge_attention_states(*a, *b), order)
        for actual, expected in zip(merged, whole):
            np.testing.assert_allclose(actual, expected, atol=1e-14)


@pytest.mark.parametrize(("dtype", "lse_dtype"), PAIRS, ids=str)
def test_an_empty_state_is_neutral_to_the_last_bit(xp, dtype, lse_dtype):
    a = state(5, dtype=dtype, lse_dtype=lse_dtype)
    a.out[0, 0] = -0.0
    a.lse[0, 1] = -0.0
    a.lse[1, 0] = 1e4
    for rubbish in (0, np.nan, np.inf):
        out = np.full_like(a.out, rubbish)
        lse = np.full_like(a.lse, -np.inf)
        same_bits(merge_attention_states(*a, out, lse), a)
        same_bits(merge_attention_states(out, lse, *a), a)


@pytest.mark.parametrize(("dtype", "lse_dtype"), PAIRS, ids=str)
def test_two_empty_states_are_empty(xp, dtype, lse_dtype):
    out = np.full((2, 5), np.nan, dtype)
    lse = np.full(2, -np.inf, lse_dtype)
    same_bits(merge_attention_states(out, lse, out, lse), (np.zeros_like(out), lse))


def test_rows_are_merged_one_by_one(xp):
    a, b = state(6), state(7)
    a.lse[0, 0] = b.lse[0, 1] = a.lse[1, 2] = b.lse[1, 2] = -np.inf
    a.out[1, 2] = np.nan
    out, lse = merge_attention_states(*a, *b)
    same_bits((out[0, 0], lse[0, 0]), (b.out[0, 0], b.lse[0, 0]))
    same_bits((out[0, 1], lse[0, 1]), (a.out[0, 1], a.lse[0, 1]))
    assert (out[1, 2] == 0).all() and lse[1, 2] == -np.inf
    exact = plain(*(x[1, 0] for x in (*a, *b)))
    np.testing.assert_allclose(out[1, 0], exact[0].astype(float))


def test_order_does_not_matter_to_the_last_bit(xp):
    a, b = state(8, dtype="float32"), state(9, dtype="float32")
    b.lse[0] = a.lse[0]
    same_bits(merge_attention_states(*a, *b), merge_attention_states(*b, *a))


def test_nan_is_not_hidden(xp):
    a, b = state(10), state(11)
    a.lse[0, 0] = np.nan  # not an empty state
    a.out[0, 1, 2] = np.nan
    a.lse[0, 2], b.lse[0, 2] = np.nan, -np.inf
    a.lse[1, 0] = b.lse[1, 0] = np.inf
    for out, lse in (merge_attention_states(*a, *b), merge_attention_states(*b, *a)):
        assert np.isnan(lse[0, 0]) and np.isnan(out[0, 0]).all()
        assert np.isnan(out[0, 1, 2]) and np.isfinite(np.delete(out[0, 1], 2)).all()
        assert np.isnan(lse[0, 2])
        assert not np.isfinite(lse[1, 0]) and np.isnan(out[1, 0]).all()
        assert np.isfinite(out[1, 1:]).all() and np.isfinite(lse[1, 1:]).all()


@pytest.mark.parametrize("far", [1e3, 1e30])
def test_a_state_far_below_leaves_the_other_as_it_is(xp, far):
    a, b = state(12, dtype="float32"), state(13, dtype="float32")
    low = (b.lse - far).astype(np.float32)
    same_bits(merge_attention_states(*a, b.out, low), a)
    for sign in (1, -1):  # exp(lse) itself would overflow, or vanish
        shift = np.float32(sign * 500)
        out, lse = merge_attention_states(a.out, a.lse + shift, b.out, b.lse + shift)
        near = merge_attention_states(*a, *b)
        np.testing.assert_allclose(out, near.out, atol=1e-3)
        np.testing.assert_allclose(lse - shift, near.lse, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 3, 1, 4)])
def test_any_shape_and_layout(xp, shape):
    a, b = state(14, shape), state(15, shape)
    expected = merge_attention_states(*a, *b)
    assert expected.out.shape == shape and expected.lse.shape == shape[:-1]
    a, b = ([x.copy("F") for x in s] for s in (a, b))
    for x in (*a, *b):
        x.flags.writeable = False
    for x, y in zip(merge_attention_states(*a, *b), expected):
        np.testing.assert_array_equal(x, y)


class Subclass(np.ndarray):
    pass


def test_result_is_a_named_tuple_of_new_ndarrays():
    a = [x.view(Subclass) for x in state(16)]
    result = merge_attention_states(*a, *a)
    assert type(result) is AttentionResult
    assert type(result.out) is type(result.lse) is np.ndarray
    empty = np.full_like(a[1], -np.inf)
    for x, y in zip(merge_attention_states(*a, a[0], empty), a):
        assert not np.shares_memory(x, y)


def test_array_api_library_keeps_its_arrays():
    strict = pytest.importorskip("array_api_strict")
    a, b = state(17, dtype="float32"), state(18, dtype="float32")
    a.lse[0], b.lse[0, 1] = -np.inf, -np.inf
    expected = merge_attention_states(*a, *b)
    result = merge_attention_states(*(strict.asarray(x) for x in (*a, *b)))
    for x, y in zip(result, expected):
        assert type(x) is type(strict.asarray(y))
        same_bits([np.asarray(x)], [y])
    with pytest.raises(
        TypeError, match="of one library: out_a is .*strict.*, lse_a is an array of"
    ):
        merge_attention_states(strict.asarray(a.out), a.lse, *b)


def case(**wrong):
    arguments = dict(out_a=np.zeros((2, 3), "f4"), lse_a=np.zeros(2, "f4"))
    arguments |= dict(out_b=arguments["out_a"], lse_b=arguments["lse_a"])
    return arguments | wrong


WRONG = [
    (case(out_a=[[0.0]]), TypeError, "out_a must be a NumPy or CuPy array, .* got a list"),
    (case(lse_b=None), TypeError, "lse_b must be a NumPy or CuPy array, .* got None"),
    (case(out_b=np.ma.zeros((2, 3), "f4")), TypeError, "out_b is a masked array"),
    (case(out_a=np.zeros((2, 3), int)), TypeError, "out_a must be one of float16, .* got int64"),
    (case(lse_a=np.zeros(2, "f2")), TypeError, "lse_a must be one of float32, .* got float16"),
    (case(out_b=np.zeros((2, 3), ">f4")), TypeError, "out_b must be one of .* got >f4"),
    (case(lse_b=np.zeros(2, ">f4")), TypeError, "lse_b must be one of .* got >f4"),
    (case(out_b=np.zeros((2, 3))), TypeError, "out_a and out_b .* got float32 and float64"),
    (case(lse_b=np.zeros(2)), TypeError, "lse_a and lse_b .* got float32 and float64"),
    (case(out_a=np.zeros((), "f4")), ValueError, r"out_a must have shape \(..., Dv\), got \(\)"),
    (case(out_b=np.zeros((2, 4), "f4")), ValueError, r"out_b .* \(2, 3\), .* got \(2, 4\)"),
    (case(lse_a=np.zeros((2, 1), "f4")), ValueError, r"lse_a .* \(2,\), as .* got \(2, 1\)"),
    (case(lse_b=np.zeros((), "f4")), ValueError, r"lse_b must have shape \(2,\), .* got \(\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        merge_attention_states(**arguments)


numbers = st.sampled_from([-np.inf, -1e30, -200.0, -1.5, 0.0, 3.0, 200.0, 1e30])


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_result_lies_between_the_two(lse_a, lse_b):
    one, two = np.ones((1, 1)), np.full((1, 1), 2.0)
    out, lse = merge_attention_states(one, np.full(1, lse_a), two, np.full(1, lse_b))
    if max(lse_a, lse_b) == -np.inf:
        assert out == 0 and lse == -np.inf
    else:
        assert 1 <= out[0, 0] <= 2
        assert max(lse_a, lse_b) <= lse[0] <= max(lse_a, lse_b) + np.log(2) + 1e-12
