"""safe_softmax and its gradient: the plain formula, but for what is excluded."""

import numpy as np
import pytest
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn

ml_dtypes = pytest.importorskip("ml_dtypes")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", bfloat16, "float32", "float64"]
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def safe_softmax(*args):
    return call(fastattn.safe_softmax, *args)


def safe_softmax_backward(*args):
    return call(fastattn.safe_softmax_backward, *args)


def plain(scores, axis):
    """The formula itself, in long double."""
    s = scores.astype(np.longdouble)
    e = np.exp(s - s.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1, np.int8(-2)])
def test_is_the_formula(xp, dtype, axis):
    rng = np.random.default_rng(0)
    scores = (10 * rng.standard_normal((3, 4, 50))).astype(dtype)
    before = scores.copy()
    probs = safe_softmax(scores, axis)
    assert probs.dtype == dtype and probs.shape == scores.shape
    eps = EPS[str(probs.dtype)]
    # One rounding of the result, and an argument of exp that is off by its own half ulp.
    bound = eps if eps > 1e-6 else 64 * eps
    np.testing.assert_allclose(
        probs.astype(np.longdouble), plain(scores, axis), rtol=float(bound), atol=6e-8
    )
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_is_the_formula(xp, dtype):
    rng = np.random.default_rng(1)
    scores, dprobs = rng.standard_normal((2, 5, 40)).astype(dtype)
    probs = safe_softmax(scores)
    p, dp = probs.astype(np.longdouble), dprobs.astype(np.longdouble)
    expected = p * (dp - (p * dp).sum(-1, keepdims=True))
    actual = safe_softmax_backward(dprobs, probs)
    np.testing.assert_allclose(actual, expected.astype(dtype), rtol=0, atol=8 * EPS[dtype])


def test_gradient_is_the_derivative(xp):
    rng = np.random.default_rng(2)
    scores, dprobs, direction = rng.standard_normal((3, 4, 7))
    scores[0, 2] = scores[1] = -np.inf
    step = 1e-6
    change = safe_softmax(scores + step * direction) - safe_softmax(scores - step * direction)
    gradient = safe_softmax_backward(dprobs, safe_softmax(scores))
    np.testing.assert_allclose((gradient * direction).sum(), (change * dprobs).sum() / (2 * step))


@pytest.mark.parametrize("dtype", ["float16", bfloat16], ids=str)
def test_16_bit_is_rounded_once(xp, dtype):
    rng = np.random.default_rng(3)
    scores, dprobs = rng.standard_normal((2, 6, 33)).astype(dtype)
    wide = safe_softmax(scores.astype(np.float32))
    probs = safe_softmax(scores)
    np.testing.assert_array_equal(probs, wide.astype(dtype))
    gradient = safe_softmax_backward(dprobs, probs)
    wide = safe_softmax_backward(dprobs.astype(np.float32), probs.astype(np.float32))
    np.testing.assert_array_equal(gradient, wide.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_excluded_slice_is_zero(xp, dtype, axis):
    scores = np.zeros((4, 4), dtype)
    scores[1, :] = -np.inf
    probs = safe_softmax(scores if axis else scores.T, axis)
    probs = probs if axis else probs.T
    np.testing.assert_array_equal(probs[1], np.zeros(4, dtype))
    np.testing.assert_array_equal(probs[[0, 2, 3]], np.full((3, 4), 0.25, dtype))


def test_low_scores_are_not_excluded(xp):
    lowest = np.finfo(np.float32).min
    np.testing.assert_array_equal(safe_softmax(np.full(4, lowest)), np.full(4, 0.25))
    np.testing.assert_array_equal(
        safe_softmax(np.array([lowest, -np.inf, lowest], np.float32)), np.float32([0.5, 0, 0.5])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rest", [0.0, -np.inf])
def test_nothing_is_laundered(xp, dtype, bad, rest):
    scores = np.full((2, 4), rest, dtype)
    scores[1, 2] = bad
    assert np.isnan(safe_softmax(scores)[1].astype(np.float32)).all()
    assert np.isfinite(safe_softmax(scores)[0].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_does_not_read_where_probs_are_zero(xp, dtype):
    probs = np.array([[0.5, 0, 0.5, -0.0], [0, 0, 0, 0]], dtype)
    clean = np.array([[1, 5, 3, 5], [5, 5, 5, 5]], dtype)
    expected = safe_softmax_backward(clean, probs)
    for bad in (np.nan, np.inf, -np.inf):
        dprobs = np.where(probs == 0, np.array(bad, dtype), clean)
        actual = safe_softmax_backward(dprobs, probs)
        assert actual.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(expected, np.array([[-0.5, 0, 0.5, 0], [0] * 4], dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradient_shows_what_is_not_finite(xp, bad):
    probs = np.array([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]])
    dprobs = np.array([[1.0, 0, bad], [1, 0, 1]])
    gradient = safe_softmax_backward(dprobs, probs)
    assert not np.isfinite(gradient[0, [0, 2]]).any()
    assert gradient[0, 1] == 0 and (gradient[1] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_axes(xp, shape, dtype):
    x = np.zeros(shape, dtype)
    for axis in range(-len(shape), len(shape)):
        for result in (safe_softmax(x, axis), safe_softmax_backward(x, x, axis)):
            assert result.shape == shape and result.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_is_kept_and_read_only_taken(xp, dtype):
    x = np.random.default_rng(4).standard_normal((3, 4, 5)).astype(dtype).transpose(2, 0, 1)
    x.flags.writeable = False
    probs, gradient = safe_softmax(x), safe_softmax_backward(x, safe_softmax(x))
    assert probs.strides == gradient.strides == x.strides
    assert probs.flags.writeable and not np.shares_memory(probs, x)
    np.testing.assert_array_equal(
        safe_softmax(x[::-1, :, ::2]), safe_softmax(x[::-1, :, ::2].copy())
    )


def test_a_result_is_never_its_argument(xp):
    one = xp.ones((1, 1), np.float32)
    assert not xp.shares_memory(fastattn.safe_softmax(one), one)
    assert not xp.shares_memory(fastattn.safe_softmax_backward(one, one), one)


@pytest.mark.parametrize(
    ("scores", "axis", "error", "message"),
    [
        ([0.0], -1, TypeError, "scores must be a NumPy or CuPy array, .* got a list"),
        (np.zeros(3, int), -1, TypeError, "scores must be one of float16, .* got int64"),
        (np.zeros(3, ">f4"), -1, TypeError, "scores .* in the other byte order"),
        (np.zeros(3, object), -1, TypeError, "scores .* got object"),
        (np.ma.zeros(3), -1, TypeError, "scores is a masked array"),
        (np.zeros((3, 3)), 2, ValueError, r"axis must be in \[-2, 2\) for 2 axes, got 2"),
        (np.zeros((3, 3)), -3, ValueError, r"axis must be in \[-2, 2\) for 2 axes, got -3"),
        (np.zeros(()), -1, ValueError, r"scores must have one axis or more, got shape \(\)"),
        (np.zeros(3), 0.0, TypeError, r"axis must be an int, got 0.0 \(float\)"),
        (np.zeros(3), None, TypeError, "axis must be an int, got None"),
        (np.zeros(3), False, TypeError, "axis must be an int, got False"),
    ],
)
def test_wrong_arguments(scores, axis, error, message):
    with pytest.raises(error, match=message):
        safe_softmax(scores, axis)
    with pytest.raises(error, match=message.replace("scores", "probs")):
        safe_softmax_backward(np.zeros(np.shape(scores)), scores, axis)


def test_wrong_gradients():
    probs = np.zeros((2, 3))
    with pytest.raises(TypeError, match="dprobs must be a NumPy or CuPy array"):
        safe_softmax_backward(None, probs)
    with pytest.raises(
        TypeError, match="must share one dtype: dprobs is float32, probs is float64"
    ):
        safe_softmax_backward(probs.astype(np.float32), probs)
    with pytest.raises(
        ValueError, match=r"dprobs must have the shape of probs, \(2, 3\), got \(3,"
    ):
        safe_softmax_backward(probs.T, probs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -3e38, -1.0, 0.0, 88.0, 3e38]), min_size=1, max_size=9))
def test_sums_to_one_or_to_nothing(row):
    probs = safe_softmax(np.array(row, np.float32))
    empty = all(s == -np.inf for s in row)
    assert np.isclose(probs.sum(), 0 if empty else 1)
    assert (probs[np.array(row) == -np.inf] == 0).all()
