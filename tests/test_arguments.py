"""Every wrong argument is an error that names it, raised before anything is computed or written."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import _backends, _overlap, _problem, attention
from fastattn._problem import Problem, make_problem

ml_dtypes = pytest.importorskip("ml_dtypes")
bfloat16 = np.dtype(ml_dtypes.bfloat16)

B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 3
DTYPES = ["float16", bfloat16, "float32", "float64"]


def attention_forward(*args, **kwargs):
    return call(attention.attention_forward, *args, **kwargs)


def attention_backward(*args, **kwargs):
    return call(attention.attention_backward, *args, **kwargs)


def scaled_dot_product_attention(*args, **kwargs):
    return call(fastattn.scaled_dot_product_attention, *args, **kwargs)


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = dict(q=(B, HQ, LQ, D), k=(B, HKV, LK, D), v=(B, HKV, LK, DV))
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def forward(**options):
    return attention_forward(**(arrays() | options))


def backward(**options):
    results = dict(
        dout=np.ones((B, HQ, LQ, DV), np.float32),
        out=np.ones((B, HQ, LQ, DV), np.float32),
        lse=np.ones((B, HQ, LQ), np.float32),
    )
    return attention_backward(**(arrays() | results | options))


NAMES = {"q": "query", "k": "key", "v": "value"}


def sdpa(**options):
    given = {NAMES.get(name, name): x for name, x in (arrays() | options).items()}
    return scaled_dot_product_attention(**({"enable_gqa": True} | given))


class NoBackend:
    """Stands for the backend where a call must not come so far."""

    def __getattr__(self, name):
        raise AssertionError(f"the backend's {name} was called with a wrong argument")


@pytest.fixture
def no_backend(monkeypatch):
    monkeypatch.setitem(_backends._BACKENDS, np.ndarray, NoBackend())


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def big_endian(*shape):
    return np.zeros(shape, ">f4")


# Wrong in every function that takes the argument: name, value, error, what the message says.
# A `{q}` in a message is what the function calls q.
COMMON = [
    # arrays: kind
    ("q", [[0.0]], TypeError, "{q} must be a NumPy or .* got a list"),
    ("k", None, TypeError, "{k} must be a NumPy or CuPy array, .* got None"),
    ("v", 1.5, TypeError, r"{v} must be a NumPy or CuPy array, .* got 1.5 \(float\)"),
    ("q", np.ma.zeros((B, HQ, LQ, D)), TypeError, "{q} is a masked array"),
    ("k", zeros(7, 8).view(np.matrix), TypeError, "{k} is an np.matrix"),
    # arrays: dtype
    ("q", zeros(B, HQ, LQ, D, dtype=object), TypeError, "{q} must be one of float16.*got object"),
    ("k", zeros(B, HKV, LK, D, dtype="int64"), TypeError, "{k} must be one of .* got int64"),
    ("v", zeros(B, HKV, LK, DV, dtype="complex64"), TypeError, "{v} must .* got complex64"),
    ("q", big_endian(B, HQ, LQ, D), TypeError, "{q} .* float32 in the other byte order .*>f4"),
    ("v", big_endian(B, HKV, LK, DV), TypeError, "{v} .* float32 in the other byte order"),
    ("q", zeros(B, HQ, LQ, D, dtype=bfloat16.newbyteorder()), TypeError, "{q} .* byte order"),
    (
        "k",
        zeros(B, HKV, LK, D, dtype="float16"),
        TypeError,
        "{q}, {k}, {v} must share one dtype: {q} is float32, {k} is float16, {v} is float32",
    ),
    ("v", zeros(B, HKV, LK, DV, dtype=bfloat16), TypeError, "must share .*{v} is bfloat16"),
    # arrays: shape
    ("q", zeros(), ValueError, r"{q} must have shape \(..., Hq, Lq, D\), .* got \(\)"),
    ("k", zeros(LK, D), ValueError, r"{k} must have shape \(..., Hkv, Lk, D\), .* got \(7, 8\)"),
    ("q", zeros(3, HQ, LQ, D), ValueError, r"leading .*: {q} \(3, 4, 5, 8\), {k} \(2, 2, 7, 8\)"),
    ("q", zeros(HQ, LQ, D), ValueError, r"leading \(batch\) axes must be equal"),
    ("v", zeros(1, HKV, LK, D), ValueError, r"leading .* {v} \(1, 2, 7, 8\)"),
    ("q", zeros(B, HQ, LQ, 9), ValueError, r"{q} and {k} must have the same last axis \(D\)"),
    ("v", zeros(B, 4, LK, DV), ValueError, "{k} and {v} must have the same number of heads"),
    ("v", zeros(B, HKV, 6, DV), ValueError, r"{k} and {v} must have the same length \(axis -2\)"),
    ("q", zeros(B, 3, LQ, D), ValueError, r"{q} has 3 heads and {k} has 2 .* multiple"),
    # masks
    (
        "attn_mask",
        zeros(LQ, LK, dtype="int32"),
        TypeError,
        "attn_mask must be bool, where True means attend, or of a float dtype .* got int32",
    ),
    ("attn_mask", zeros(LQ, LK, dtype="uint8"), TypeError, "True means attend.* got uint8"),
    ("attn_mask", [[True] * LK] * LQ, TypeError, "attn_mask must be a NumPy or .* got a list"),
    ("attn_mask", big_endian(LQ, LK), TypeError, "attn_mask .* in the other byte order"),
    ("attn_mask", np.ma.zeros((LQ, LK)), TypeError, "attn_mask is a masked array"),
    (
        "attn_mask",
        zeros(LQ, LK + 1),
        ValueError,
        r"attn_mask must broadcast to shape \(2, 4, 5, 7\), got \(5, 8\)",
    ),
    ("attn_mask", zeros(1, B, HQ, LQ, LK), ValueError, r"got \(1, 2, 4, 5, 7\)"),
    ("attn_mask", zeros(3, HQ, LQ, LK, dtype=bool), ValueError, r"got \(3, 4, 5, 7\)"),
    ("bias", zeros(LQ, LK, dtype=bool), TypeError, "bias must be of a float dtype .* got bool"),
    ("bias", zeros(LQ, LK, dtype="int8"), TypeError, "bias must be of a float dtype .* got int8"),
    ("bias", zeros(HKV, LQ, LK), ValueError, r"bias must broadcast to .* got \(2, 5, 7\)"),
    ("bias", 0.0, TypeError, "bias must be a NumPy or CuPy array"),
    # causal and window
    ("is_causal", 1, TypeError, r"is_causal must be True or False, got 1 \(int\)"),
    ("is_causal", None, TypeError, "is_causal must be True or False, got None"),
    ("causal_offset", True, TypeError, "causal_offset must be an int, .* got True"),
    ("causal_offset", 1.0, TypeError, r"causal_offset must be an int, .* got 1.0 \(float\)"),
    ("causal_offset", "upper_left", ValueError, "causal_offset .*'lower_right', got 'upper_left'"),
    ("causal_offset", [1, 2, 3], ValueError, r"causal_offset must broadcast to shape \(2,\)"),
    ("causal_offset", [0, 2**62], ValueError, r"causal_offset\[1\] is 4611686018427387904"),
    ("causal_offset", -(10**30), ValueError, "causal_offset must fit 64-bit integers, got -1000"),
    ("window_size", 3, TypeError, r"window_size must be a pair \(left, right\) .* got 3"),
    ("window_size", (1, 2, 3), TypeError, r"window_size must be a pair .* got \(1, 2, 3\)"),
    ("window_size", (1.0, 2), TypeError, r"window_size\[0\] must be an int or None, got 1.0"),
    ("window_size", (2, True), TypeError, r"window_size\[1\] must be an int or None, got True"),
    ("window_size", (-1, 0), ValueError, r"window_size .* None for unbounded, got \(-1, 0\)"),
    # lengths and segments
    ("kv_lens", -1, ValueError, "kv_lens is -1, expected 0 to 7, the length of {k}'s axis -2"),
    ("kv_lens", [3, LK + 1], ValueError, r"kv_lens\[1\] is 8, expected 0 to 7"),
    ("q_lens", [-2, 3], ValueError, r"q_lens\[0\] is -2, expected 0 to 5, the length of {q}'s"),
    ("q_lens", np.array([5, 6], np.uint8), ValueError, r"q_lens\[1\] is 6, expected 0 to 5"),
    ("q_lens", np.array([2**63, 1], np.uint64), ValueError, r"q_lens\[0\] is 9223372036854775808"),
    ("kv_lens", [1, 2, 3], ValueError, r"kv_lens must broadcast to shape \(2,\), got \(3,\)"),
    ("kv_lens", [[1, 2]], ValueError, r"kv_lens must broadcast to shape \(2,\), got \(1, 2\)"),
    ("kv_lens", [[1, 2], [1]], ValueError, "kv_lens must be .*, got a ragged sequence"),
    ("kv_lens", 1.0, TypeError, r"kv_lens must be an int, .* got 1.0 \(float\)"),
    ("kv_lens", True, TypeError, r"kv_lens must be an int, .* got True \(bool\)"),
    ("kv_lens", [True, False], TypeError, "kv_lens must be an int, .* got bool"),
    ("kv_lens", [1.0, 2.0], TypeError, "kv_lens .* got float64"),
    ("kv_lens", [1, None], TypeError, "kv_lens .* got object"),
    ("kv_lens", [1, 2**63], ValueError, "kv_lens must fit 64-bit integers, got 92233720"),
    ("kv_lens", [-(10**30), 2**63], ValueError, "kv_lens must fit 64-bit integers, got -1000"),
    ("kv_lens", [2**63, 1.0], TypeError, "kv_lens must be .* got float64"),
    ("kv_lens", "12", TypeError, "kv_lens .* got '12'"),
    ("kv_lens", np.array([1, 2], ">i4"), TypeError, "kv_lens .* other byte order"),
    ("kv_lens", np.array([1, 2], object), TypeError, "kv_lens .* got object"),
    ("q_lens", np.ma.array([1, 2]), TypeError, "q_lens is a masked array"),
    ("q_segment_ids", 0, ValueError, "q_segment_ids was given without kv_segment_ids"),
    ("kv_segment_ids", 0, ValueError, "kv_segment_ids was given without q_segment_ids"),
    # numbers
    ("scale", np.nan, ValueError, "scale must be finite, got nan"),
    ("scale", -np.inf, ValueError, "scale must be finite, got -inf"),
    ("scale", 10**400, ValueError, "scale must fit a float"),
    ("scale", "1", TypeError, r"scale must be a real number, got '1' \(str\)"),
    ("scale", True, TypeError, "scale must be a real number, got True"),
    ("scale", 1j, TypeError, "scale must be a real number, got 1j"),
    ("scale", zeros(1), TypeError, "scale must be a real number, got an array of float32"),
    ("softcap", -1.0, ValueError, "softcap must be positive, .* got -1.0"),
    ("softcap", np.nan, ValueError, "softcap must be finite, got nan"),
    ("softcap", np.inf, ValueError, "softcap must be finite, got inf"),
    ("softcap", "30", TypeError, "softcap must be a real number"),
    ("dropout_p", 1.5, ValueError, "dropout_p must be a probability, 0 to 1, got 1.5"),
    ("dropout_p", -0.1, ValueError, "dropout_p must be .* got -0.1"),
    ("dropout_p", np.nan, ValueError, "dropout_p must be .* got nan"),
    ("dropout_p", None, TypeError, "dropout_p must be a real number, got None"),
    ("dropout_p", 0.1, ValueError, r"seed must be given when dropout_p > 0 \(dropout_p is 0.1\)"),
    ("seed", -1, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ("seed", 2**64, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
    ("seed", 1.0, TypeError, r"seed must be an int, got 1.0 \(float\)"),
    ("seed", False, TypeError, "seed must be an int, got False"),
    ("alibi_slopes", zeros(HKV), ValueError, r"alibi_slopes must have shape \(4,\), .* got \(2,\)"),
    ("alibi_slopes", zeros(1, HQ), ValueError, r"alibi_slopes must .* got \(1, 4\)"),
    ("alibi_slopes", [0.0] * HQ, TypeError, "alibi_slopes must be a NumPy or .* got a list"),
    ("sinks", zeros(), ValueError, r"sinks must have shape \(4,\), .* got \(\)"),
    ("sinks", zeros(HQ, dtype="int64"), TypeError, "sinks must be one of float16, .* got int64"),
    ("sinks", big_endian(HQ), TypeError, "sinks .* in the other byte order"),
]
THREADS = [
    ("num_threads", 0, ValueError, "num_threads must be 1 or more, or None, got 0"),
    ("num_threads", -2, ValueError, "num_threads must be 1 or more, or None, got -2"),
    ("num_threads", 1.0, TypeError, "num_threads must be an int, got 1.0"),
    ("num_threads", True, TypeError, "num_threads must be an int, got True"),
]
ROWS, RESULT = (B, HQ, LQ), (B, HQ, LQ, DV)
BACKWARD = [
    ("dout", zeros(*RESULT, dtype="float64"), TypeError, "dout must be float32, got float64"),
    ("dout", zeros(B, HQ, LQ, D), ValueError, r"dout must have shape \(2, 4, 5, 3\), got"),
    ("dout", [0.0], TypeError, "dout must be a NumPy or CuPy array"),
    ("out", zeros(*RESULT, dtype="float16"), TypeError, "out must be float32, got float16"),
    ("out", zeros(*RESULT[1:]), ValueError, r"out must have shape \(2, 4, 5, 3\), got \(4, 5, 3\)"),
    ("lse", zeros(*ROWS, dtype="float64"), TypeError, "lse must be float32, got float64"),
    ("lse", zeros(*ROWS, 1), ValueError, r"lse must have shape \(2, 4, 5\), got \(2, 4, 5, 1\)"),
    ("lse", None, TypeError, "lse must be a NumPy or CuPy array, .* got None"),
    ("dlse", zeros(*ROWS, dtype="int32"), TypeError, "dlse must be one of float16.* got int32"),
    ("dlse", zeros(LQ), ValueError, r"dlse must have shape \(2, 4, 5\), got \(5,\)"),
    ("wrt", None, TypeError, r"wrt must hold names out of .* got None"),
    ("wrt", ("q", 1), TypeError, r"wrt must hold names out of .* got 1 \(int\)"),
    ("wrt", ("q", "dq"), ValueError, "wrt must hold names out of .* got 'dq'"),
    ("wrt", "qk", ValueError, "wrt must hold names out of .* got 'qk'"),
    ("wrt", ("bias",), ValueError, "wrt asks for the gradient of bias, which was not given"),
    ("wrt", ["q", "sinks"], ValueError, "wrt asks for the gradient of sinks"),
    ("wrt", "alibi_slopes", ValueError, "wrt asks for the gradient of alibi_slopes"),
    ("deterministic", 0, TypeError, r"deterministic must be True or False, got 0 \(int\)"),
]
OUT = [
    ("out", zeros(B, HQ, LQ, D), ValueError, r"out must have shape \(2, 4, 5, 3\), got"),
    ("out", zeros(*RESULT, dtype="float64"), TypeError, "out must be float32, got float64"),
    ("out", zeros(*RESULT, dtype="float16"), TypeError, "out must be float32, got float16"),
    ("out", big_endian(*RESULT), TypeError, "out must be float32, .* other byte order"),
    ("out", "out", TypeError, "out must be a NumPy or CuPy array"),
    ("out", np.ma.zeros(RESULT, np.float32), TypeError, "out is a masked array"),
    ("out", [zeros(*RESULT), zeros(*ROWS)], TypeError, r"tuple \(out, lse\), got a list of 2"),
    ("out", (zeros(*RESULT),) * 3, TypeError, r"out must be .* \(out, lse\), got a tuple of 3"),
    ("out", np.broadcast_to(zeros(), RESULT), ValueError, "out is read-only"),
    (
        "out",
        (zeros(*RESULT), zeros(*RESULT)),
        ValueError,
        r"out\[1\] \(lse\) must have shape \(2, 4, 5\), got \(2, 4, 5, 3\)",
    ),
    (
        "out",
        (zeros(*RESULT), zeros(*ROWS, dtype="float64")),
        TypeError,
        r"out\[1\] \(lse\) must be float32, got float64",
    ),
]
CASES = (
    [(call, *case) for call in (forward, backward, sdpa) for case in COMMON]
    + [(call, *case) for call in (forward, backward) for case in THREADS]
    + [(backward, *case) for case in BACKWARD]
    + [(forward, *case) for case in OUT]
)


def expected_message(call, message):
    names = NAMES if call is sdpa else {name: name for name in NAMES}
    return re.sub(r"\{([qkv])\}", lambda found: names[found[1]], message)


@pytest.mark.parametrize(
    ("call", "name", "value", "error", "message"),
    CASES,
    ids=[f"{call.__name__}-{name}-{i}" for i, (call, name, *_) in enumerate(CASES)],
)
def test_wrong_argument(no_backend, call, name, value, error, message):
    # Two axes in one array alone are no head without a head axis, so sdpa takes the same cases.
    with pytest.raises(error, match=expected_message(call, message)):
        call(**{name: value})


@pytest.mark.parametrize("case", COMMON + THREADS, ids=lambda case: case[0])
def test_out_is_not_touched_by_a_call_that_fails(no_backend, case):
    name, value, error, _ = case
    out, lse = np.full(RESULT, 7.0, np.float32), np.full(ROWS, 7.0, np.float32)
    with pytest.raises(error):
        forward(out=(out, lse), **{name: value})
    assert (out == 7.0).all() and (lse == 7.0).all()


def test_right_out_is_not_touched_when_lse_is_wrong(no_backend):
    out = np.full(RESULT, 7.0, np.float32)
    with pytest.raises(ValueError, match="lse"):
        forward(out=(out, zeros(3)))
    assert (out == 7.0).all()


@pytest.mark.parametrize("call", [forward, backward, sdpa])
@pytest.mark.parametrize("name", ["causal", "dropout", "mask", "window"])
def test_unknown_option_is_named(no_backend, call, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        call(**{name: None})


def test_segments_must_fit(no_backend):
    with pytest.raises(ValueError, match=r"q_segment_ids must broadcast to shape \(2, 5\), got"):
        forward(q_segment_ids=[0] * LK, kv_segment_ids=[0] * LK)
    with pytest.raises(ValueError, match=r"kv_segment_ids must broadcast to shape \(2, 7\), got"):
        forward(q_segment_ids=[0] * LQ, kv_segment_ids=[0] * LQ)
    with pytest.raises(TypeError, match="kv_segment_ids must be .* got float64"):
        forward(q_segment_ids=[0] * LQ, kv_segment_ids=np.zeros(LK))


def test_no_key_heads(no_backend):
    with pytest.raises(ValueError, match="q has 4 heads and k has 0"):
        forward(k=zeros(B, 0, LK, D), v=zeros(B, 0, LK, DV))


def test_gqa_must_be_said_in_sdpa(no_backend):
    with pytest.raises(ValueError, match="query has 4 heads and key has 2: pass enable_gqa=True"):
        sdpa(enable_gqa=False)
    with pytest.raises(TypeError, match="enable_gqa must be True or False, got None"):
        sdpa(enable_gqa=None)


@pytest.mark.parametrize("n", [0, -1])
def test_set_num_threads_below_one(n):
    with pytest.raises(ValueError, match=f"n must be 1 or more, or None, got {n}"):
        fastattn.set_num_threads(n)


@pytest.mark.parametrize("n", [1.0, "1", True])
def test_set_num_threads_not_an_int(n):
    with pytest.raises(TypeError, match="n must be an int, got"):
        fastattn.set_num_threads(n)


class TestOverlap:
    """`out=` may be anywhere, so long as no element of it is another's."""

    @pytest.mark.parametrize("name", ["q", "k", "v", "attn_mask", "bias", "sinks", "alibi_slopes"])
    def test_with_an_input(self, no_backend, name):
        memory = np.zeros(1000, np.float32)
        shapes = dict(
            q=(B, HQ, LQ, D), k=(B, HKV, LK, D), v=(B, HKV, LK, DV), attn_mask=(LQ, LK),
            bias=(LQ, LK), sinks=(HQ,), alibi_slopes=(HQ,),
        )  # fmt: skip
        size = np.prod(shapes[name])
        value = memory[:size].reshape(shapes[name])
        out = memory[size - 1 : size - 1 + np.prod(RESULT)].reshape(RESULT)
        with pytest.raises(ValueError, match=f"out shares an element with {name}: it needs"):
            forward(out=out, **{name: value})

    def test_with_lengths(self, no_backend):
        lens = np.zeros(60, np.int64)
        out = lens.view(np.float32).reshape(RESULT)
        with pytest.raises(ValueError, match="out shares an element with kv_lens"):
            forward(out=out, kv_lens=lens[5:7])

    def test_of_lse_with_an_input(self, no_backend):
        q = arrays()["q"]
        lse = q[..., 0]
        with pytest.raises(ValueError, match=r"out\[1\] \(lse\) shares an element with q"):
            forward(q=q, out=(zeros(*RESULT), lse))

    def test_of_out_and_lse(self, no_backend):
        out = zeros(*RESULT)
        with pytest.raises(ValueError, match=r"out\[1\] \(lse\) shares an element with out"):
            forward(out=(out, out[..., 2]))

    def test_of_out_with_itself(self, no_backend):
        out = np.lib.stride_tricks.as_strided(zeros(DV), RESULT, (0, 0, 0, 4))
        with pytest.raises(ValueError, match="out has elements that share memory with one another"):
            forward(out=out)

    def test_slots_of_a_packed_buffer_do_not_overlap(self, xp):
        rng = np.random.default_rng(1)
        packed = rng.standard_normal((B, 16, 4, HQ, D), dtype=np.float32)
        q, k, v, slot = packed.transpose(2, 0, 3, 1, 4)
        expected, before = attention_forward(q, k, v), packed[:, :, :3].copy()
        result = attention_forward(q, k, v, out=slot)
        assert result.out is slot
        np.testing.assert_array_equal(slot, expected.out)
        np.testing.assert_array_equal(packed[:, :, :3], before)

    def test_interleaved_elements_do_not_overlap(self, xp):
        pairs = np.random.default_rng(2).standard_normal((B, HQ, LQ, 2 * D)).astype(np.float32)
        q, out = pairs[..., ::2], pairs[..., 1::2]
        expected = attention_forward(q, q, q).out
        attention_forward(q, q, q, out=out)
        np.testing.assert_array_equal(out, expected)
        with pytest.raises(ValueError, match="out shares an element with q"):
            attention_forward(q, q, q, out=q)


def test_overlap_is_decided_by_elements():
    """Against the sets of bytes themselves, for strides of every kind."""
    rng = np.random.default_rng(3)
    memory = np.zeros(4096, np.uint8)
    strides = [0, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 48, 64, -4, -8, -16]

    def random_array():
        ndim = rng.integers(0, 5)
        return np.ndarray(
            rng.integers(1 if rng.random() < 0.95 else 0, 5, ndim),
            rng.choice(["f2", "f4", "f8"]),
            memory,
            rng.integers(1000, 1100),
            rng.choice(strides, ndim),
        )

    def addresses(a):
        index = np.indices(a.shape).reshape(a.ndim, a.size)
        first = a.__array_interface__["data"][0] + np.array(a.strides, int) @ index
        return (first[:, None] + np.arange(a.itemsize)).ravel()

    seen = set()
    for _ in range(2000):
        a, b = random_array(), random_array()
        bytes_a, bytes_b = addresses(a), addresses(b)
        common = bool(np.intersect1d(bytes_a, bytes_b).size)
        assert _overlap.overlap(a, b) == common
        twice = np.unique(bytes_a).size < bytes_a.size
        assert _overlap.overlaps_itself(a) == twice
        seen.add((common, twice))
    assert len(seen) == 4


def test_overlap_that_is_not_decided_counts(monkeypatch):
    memory = np.zeros(100, np.int8)
    # 0, 6, 12, ... and 1, 10, 19, ...: apart, but by no modulus among the strides.
    a, b = memory[0:60:6], memory[1:90:9]
    assert not _overlap.overlap(a, b)

    def too_hard(*_, **__):
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    assert _overlap.overlap(a, b)


# CuPy arrays, of which nothing is read: the checks need no GPU, for they do not touch memory.


@pytest.fixture
def cupy(monkeypatch):
    """CuPy, with a backend that must not be called."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setitem(_backends._BACKENDS, cupy.ndarray, NoBackend())
    return cupy


def device_array(shape, dtype="float32", device=0, address=1 << 40, strides=None):
    """A CuPy array where no memory is."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, 1 << 30, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def device_arrays(**like):
    """What an argument's checks can see of NumPy arrays, of CuPy arrays on device 0."""
    return {name: device_array(x.shape, x.dtype, strides=x.strides) for name, x in like.items()}


ON_DEVICE = ("q k v attn_mask bias sinks alibi_slopes dout out lse dlse").split()


def can_be_on_device(name, value, error, message):
    """CuPy has no such dtypes, no subclasses like these, and nothing that is read-only."""
    if type(value) is tuple and name == "out":
        return all(can_be_on_device("out", x, error, message) for x in value)
    if not isinstance(value, np.ndarray) or name not in ON_DEVICE:
        return True
    plain = type(value) is np.ndarray and value.dtype.isnative and value.dtype != object
    return plain and "read-only" not in message


def on_device(value):
    if type(value) is tuple:
        return tuple(map(on_device, value))
    return device_arrays(x=value)["x"] if isinstance(value, np.ndarray) else value


DEVICE_CASES = [case for case in CASES if can_be_on_device(*case[1:])]


@pytest.mark.parametrize(
    ("call", "name", "value", "error", "message"),
    DEVICE_CASES,
    ids=[f"{call.__name__}-{name}-{i}" for i, (call, name, *_) in enumerate(DEVICE_CASES)],
)
def test_wrong_argument_on_a_device(cupy, call, name, value, error, message):
    given = device_arrays(**arrays())
    if call is backward:
        given |= device_arrays(dout=zeros(*RESULT), out=zeros(*RESULT), lse=zeros(*ROWS))
    given[name] = on_device(value) if name in ON_DEVICE else value
    with pytest.raises(error, match=expected_message(call, message)):
        call(**given)


class TestPlace:
    """The library and device of q are those of every array."""

    shapes = dict(
        k=(B, HKV, LK, D), v=(B, HKV, LK, DV), attn_mask=(LQ, LK), bias=(LQ, LK), sinks=(HQ,),
        alibi_slopes=(HQ,), dout=(B, HQ, LQ, DV), out=(B, HQ, LQ, DV), lse=(B, HQ, LQ),
        dlse=(B, HQ, LQ),
    )  # fmt: skip
    in_forward = "k v attn_mask bias sinks alibi_slopes out".split()
    both = [(forward, name) for name in in_forward] + [(backward, name) for name in shapes]
    every = pytest.mark.parametrize(("call", "name"), both)

    def given(self, call, convert):
        given = dict(arrays())
        if call is backward:
            given |= {name: zeros(*self.shapes[name]) for name in ("dout", "out", "lse")}
        return {name: convert(x) for name, x in given.items()}

    @every
    def test_numpy_among_cupy(self, cupy, call, name):
        given = self.given(call, on_device) | {name: zeros(*self.shapes[name])}
        message = (
            f"{name} is a NumPy array, but q is a CuPy array on device 0: "
            rf"pass cupy.asarray\({name}\)"
        )
        with pytest.raises(TypeError, match=message):
            call(**given)

    @every
    def test_cupy_among_numpy(self, cupy, no_backend, call, name):
        given = self.given(call, lambda x: x) | {name: device_array(self.shapes[name])}
        message = (
            f"{name} is a CuPy array on device 0, but q is a NumPy array: "
            rf"pass cupy.asnumpy\({name}\)"
        )
        with pytest.raises(TypeError, match=message):
            call(**given)

    @every
    def test_two_devices(self, cupy, call, name):
        given = self.given(call, on_device) | {name: device_array(self.shapes[name], device=1)}
        message = f"{name} is a CuPy array on device 1, but q is a CuPy array on device 0: .* one"
        with pytest.raises(TypeError, match=message):
            call(**given)

    def test_of_lse_to_be_written(self, cupy):
        out = device_array(RESULT), zeros(*ROWS)
        with pytest.raises(TypeError, match=r"out\[1\] \(lse\) is a NumPy array, but q is a CuPy"):
            forward(**device_arrays(**arrays()), out=out)

    @pytest.mark.parametrize(
        ("name", "shape"),
        dict(
            q_lens=(B,), kv_lens=(B,), causal_offset=(B,), q_segment_ids=(LQ,),
            kv_segment_ids=(LK,), seed=(1,),
        ).items(),
    )  # fmt: skip
    def test_integers(self, cupy, no_backend, name, shape):
        options = dict(q_segment_ids=0, kv_segment_ids=0, dropout_p=0.5, seed=0)
        options[name] = device_array(shape, "uint64" if name == "seed" else "int64", device=1)
        with pytest.raises(TypeError, match=rf"{name} is .*, but q is a NumPy array: .*asnumpy"):
            forward(**options)
        with pytest.raises(TypeError, match=f"{name} is a CuPy array on device 1, but q is .* 0"):
            forward(**device_arrays(**arrays()), **options)

    def test_sdpa_says_query(self, cupy):
        with pytest.raises(TypeError, match="value is a NumPy array, but query is a CuPy array"):
            sdpa(**device_arrays(q=arrays()["q"], k=arrays()["k"]))
        with pytest.raises(TypeError, match="attn_mask is a NumPy array, but query is a CuPy"):
            sdpa(**device_arrays(**arrays()), attn_mask=np.True_)

    def test_other_functions(self, cupy):
        x, y = zeros(3, 4), device_array((3, 4))
        with pytest.raises(TypeError, match="dprobs is a NumPy array, but probs is a CuPy array"):
            fastattn.safe_softmax_backward(x, y)
        lse = zeros(3)
        with pytest.raises(TypeError, match="out_b is a CuPy array on device 0, but out_a is a Nu"):
            fastattn.merge_attention_states(x, lse, y, lse)
        with pytest.raises(TypeError, match="lse_a is a CuPy array on device 1, but out_a is a Cu"):
            fastattn.merge_attention_states(y, device_array((3,), device=1), y, lse)


class TestDeviceProblem:
    """What a backend for CuPy gets, as far as it takes no work of the device."""

    @pytest.fixture(autouse=True)
    def cupy(self, cupy):
        self.cupy = cupy

    def problem(self, **options):
        return problem(**device_arrays(**arrays()), **options)

    def test_arrays_are_as_they_were_given(self):
        given = device_arrays(**arrays("float16"))
        p = problem(**given)
        assert p.q is given["q"] and p.k is given["k"] and p.v is given["v"]
        assert (p.dtype, p.acc) == ("float16", np.float32)
        assert problem(**device_arrays(**arrays(bfloat16))).dtype == "bfloat16"

    def test_subclass_becomes_plain(self):
        class Subclass(self.cupy.ndarray):
            pass

        q = device_array((B, HQ, LQ, D), address=1 << 41).view(type=Subclass)
        p = problem(**device_arrays(**arrays()) | {"q": q})
        assert type(p.q) is self.cupy.ndarray and p.q.data.ptr == 1 << 41

    def test_masks_are_views(self):
        p = self.problem(attn_mask=device_array((LQ, 1), bool), bias=device_array((HQ, 1, LK)))
        assert p.attn_mask.shape == p.bias.shape == (B, HQ, LQ, LK)
        assert (p.attn_mask.strides, p.bias.strides) == ((0, 0, 1, 0), (0, 4 * LK, 0, 4))

    def test_one_offset_is_a_number(self):
        assert self.problem(causal_offset=-3).causal_offset == -3
        assert self.problem(causal_offset="lower_right").causal_offset == LK - LQ
        assert self.problem(causal_offset=0).causal_offset is None

    @pytest.mark.parametrize("name", ["q_lens", "kv_lens", "causal_offset"])
    def test_numbers_of_the_device_are_taken_as_they_lie(self, name):
        numbers = device_array((B,), "int64", address=1 << 41)
        taken = getattr(self.problem(**{name: numbers}), name)
        assert taken.data.ptr == 1 << 41 and taken.shape == (B,)

    def test_segment_ids_of_the_device_are_views(self):
        ids = dict(q_segment_ids=device_array((LQ,), "int64"))
        ids["kv_segment_ids"] = device_array((B, 1), "int64")
        p = self.problem(**ids)
        assert (p.q_segment_ids.shape, p.q_segment_ids.strides) == ((B, LQ), (0, 8))
        assert (p.kv_segment_ids.shape, p.kv_segment_ids.strides) == ((B, LK), (8, 0))

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_seed_of_the_device(self, shape):
        seed = self.problem(dropout_p=0.5, seed=device_array(shape, "uint64")).seed
        assert (type(seed), seed.shape) == (self.cupy.ndarray, (1,))
        assert self.problem(seed=device_array(shape, "uint64")).seed == 0  # without dropout

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("kv_lens", ((B,), "float32"), TypeError, "kv_lens must be an int, .* got float32"),
            ("q_lens", ((B,), "bool"), TypeError, "q_lens must be an int, .* got bool"),
            ("kv_lens", ((3,), "int32"), ValueError, r"kv_lens must broadcast to .* got \(3,\)"),
            ("causal_offset", ((1, B), "int64"), ValueError, "causal_offset must broadcast to"),
            ("seed", ((1,), "int64"), TypeError, "seed must be an int or uint64, got int64"),
            ("seed", ((2,), "uint64"), ValueError, r"seed must have one element, .* \(2,\)"),
            ("seed", ((0,), "uint64"), ValueError, r"seed must have one element, .* \(0,\)"),
            # Numbers that the host would have to wait for.
            ("scale", ((), "float32"), TypeError, "scale must be a real number, got a cupy"),
            ("softcap", ((), "float64"), TypeError, "softcap must be a real number"),
            ("dropout_p", ((), "float64"), TypeError, "dropout_p must be a real number"),
            ("num_threads", ((), "int64"), TypeError, "num_threads must be an int, got a cupy"),
            ("is_causal", ((), "bool"), TypeError, "is_causal must be True or False, got a cupy"),
            ("window_size", ((2,), "int64"), TypeError, "window_size must be a pair"),
        ],
    )
    def test_wrong_numbers_of_the_device(self, name, value, error, message):
        with pytest.raises(error, match=message):
            self.problem(**{name: device_array(*value)})

    def test_sequences_of_numbers_of_the_device(self):
        one = device_array((), "int64")
        with pytest.raises(TypeError, match="kv_lens must be an int, .* a sequence of something"):
            self.problem(kv_lens=[one, one])
        with pytest.raises(TypeError, match=r"window_size\[0\] must be an int .* a cupy.ndarray"):
            self.problem(window_size=(one, None))

    def test_overlap_is_that_of_addresses(self, monkeypatch):
        monkeypatch.setattr(attention, "is_elsewhere", lambda array: False)
        packed = device_array((B, 16, 4, HQ, D), address=1 << 41)
        q, k, v, slot = packed.transpose(2, 0, 3, 1, 4)
        lse = device_array((B, HQ, 16), address=1 << 42)
        given = dict(q=q, k=k, v=v)
        with pytest.raises(AssertionError, match="the backend's forward was called"):
            forward(**given, out=(slot, lse))
        with pytest.raises(ValueError, match="out shares an element with k"):
            forward(**given, out=(k, lse))
        last = device_array((B, HQ, 16), address=(1 << 41) + packed.nbytes - 1)
        with pytest.raises(ValueError, match=r"out\[1\] \(lse\) shares an element with out"):
            forward(**given, out=(slot, last))
        one = self.cupy.broadcast_to(slot[:1], slot.shape)
        with pytest.raises(ValueError, match="out has elements that share memory with one another"):
            forward(**given, out=(one, lse))
        lens = device_array((B,), "int64", address=slot.data.ptr)
        with pytest.raises(ValueError, match="out shares an element with kv_lens"):
            forward(**given, out=(slot, lse), kv_lens=lens)


class CuPyArray:
    """What CuPy's arrays look like to a test by type."""


CuPyArray.__module__ = "cupy._core.core"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"cupy": None}, "importing it failed"),
        ({"cupy": SimpleNamespace(__version__="13.6.0")}, "this is 13.6.0"),
        (
            {
                "cupy": SimpleNamespace(__version__="14.0.0", ndarray=CuPyArray),
                "fastattn._gpu": None,
            },
            "14.0.0 lacks something",
        ),
    ],
    ids=["none", "old", "broken"],
)
def test_cupy_that_does_not_serve_is_explained(monkeypatch, modules, message):
    monkeypatch.delattr(fastattn, "_gpu", raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    hint = r'pip install "fastattn\[cuda12\]" or "fastattn\[cuda13\]"'
    with pytest.raises(ImportError, match=f"CuPy 14 or newer, and {message}.*{hint}"):
        forward(q=CuPyArray())
    assert CuPyArray not in _backends._BACKENDS


ANYTHING = [
    None, True, -1, 0, 1, 7, 2**70, 0.5, np.nan, 1j, "q", "lower_right", (), (1, 2), [1, None], {},
    range(2), np.zeros(2, int), np.zeros((2, 5), np.uint64), np.zeros(4), np.ones((5, 7), bool),
    np.zeros((), "f2"), np.zeros((0, 3)), np.zeros(2, ">i8"), np.array([{}]),
    np.datetime64("NaT", "s"), np.ma.zeros(2), b"", print, slice(3), np.dtype("f4"), np.str_("x"),
    np.zeros(2, "U1"),
]  # fmt: skip
OPTIONS = [
    "q", "k", "v", "attn_mask", "bias", "is_causal", "causal_offset", "window_size", "q_lens",
    "kv_lens", "q_segment_ids", "kv_segment_ids", "scale", "softcap", "alibi_slopes", "sinks",
    "dropout_p", "seed", "deterministic", "num_threads",
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(ANYTHING), max_size=3))
def test_anything_is_a_problem_or_an_error_that_names_an_argument(options):
    try:
        problem(**options)
    except (TypeError, ValueError) as error:
        assert re.search("|".join(rf"\b{name}\b" for name in options), str(error))


# What is right.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_as_array_and_as_pair(xp, dtype):
    given = arrays(dtype)
    expected = attention_forward(**given)
    assert expected.out.dtype == dtype
    assert expected.lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    out, lse = np.full_like(expected.out, np.nan), np.full_like(expected.lse, np.nan)
    result = attention_forward(**given, out=out)
    assert result.out is out
    np.testing.assert_array_equal(out, expected.out)
    out = np.full(RESULT, np.nan, dtype)[:, ::-1, :, ::-1]
    result = attention_forward(**given, out=(out, lse))
    assert result.out is out and result.lse is lse
    np.testing.assert_array_equal(out, expected.out)
    np.testing.assert_array_equal(lse, expected.lse)


@pytest.mark.parametrize("dtype", ["float16", bfloat16], ids=str)
def test_out_of_float32_for_16_bit(xp, dtype):
    given = arrays(dtype)
    expected = attention_forward(**given)
    result = attention_forward(**given, out=np.empty(RESULT, np.float32))
    assert result.out.dtype == np.float32
    np.testing.assert_array_equal(result.out.astype(dtype), expected.out)
    dout = np.ones(RESULT, dtype)
    attention_backward(dout, **given, out=result.out, lse=result.lse)


def test_memmap_read_only_and_broadcast_inputs(tmp_path):
    given = arrays()
    expected = attention_forward(**given)
    given["q"].tofile(tmp_path / "q")
    q = np.memmap(tmp_path / "q", np.float32, "r", shape=given["q"].shape)
    k, v = (np.broadcast_to(given[name], given[name].shape) for name in "kv")
    assert not (q.flags.writeable or k.flags.writeable)
    result = attention_forward(q, k, v)
    assert type(result.out) is type(result.lse) is np.ndarray
    np.testing.assert_array_equal(result.out, expected.out)
    grads = attention_backward(result.out, q, k, v, *result)
    assert type(grads.dq) is np.ndarray

    one = given["k"][:1, :1]
    whole = np.broadcast_to(one, (B, HKV, LK, D))
    copied = np.ascontiguousarray(whole)
    np.testing.assert_array_equal(
        attention_forward(q, whole, whole).out, attention_forward(q, copied, copied).out
    )


def test_memmap_as_out(tmp_path):
    given = arrays()
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=RESULT)
    result = attention_forward(**given, out=out)
    assert type(result.out) is np.ndarray and np.shares_memory(result.out, out)
    np.testing.assert_array_equal(out, attention_forward(**given).out)


class Subclass(np.ndarray):
    pass


def test_subclass_becomes_an_ndarray():
    given = {name: x.view(Subclass) for name, x in arrays().items()}
    bias = np.zeros((LQ, LK), np.float32).view(Subclass)
    result = attention_forward(**given, bias=bias)
    grads = attention_backward(result.out, *given.values(), *result, bias=bias, wrt=("k", "bias"))
    results = [*result, grads.dk, grads.dbias]
    assert [type(x) for x in results] == [np.ndarray] * 4


ORDERS = {
    "C": lambda x: x.copy(),
    "F": lambda x: x.copy("F"),
    "BLHD": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "HBDL": lambda x: x.transpose(1, 0, 3, 2).copy().transpose(1, 0, 3, 2),
    "reversed": lambda x: x[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    "every other": lambda x: x.repeat(2, axis=-1)[..., ::2],
}


def order_of_axes(x):
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


@pytest.mark.parametrize("order", ORDERS)
def test_results_keep_the_memory_order(xp, order):
    rng = np.random.default_rng(4)
    arrange = ORDERS[order]
    q, k = (arrange(rng.standard_normal((2, 3, 4, 5))) for _ in range(2))
    v, dout = (arrange(rng.standard_normal((2, 3, 4, 6))) for _ in range(2))
    bias = arrange(rng.standard_normal((2, 3, 4, 4)))
    options = dict(bias=bias, wrt=("q", "k", "v", "bias"))
    out, lse = attention_forward(q, k, v, bias=bias)
    grads = attention_backward(dout, q, k, v, out, lse, **options)
    assert scaled_dot_product_attention(q, k, v, bias=bias).strides == out.strides
    assert order_of_axes(out) == order_of_axes(q)
    for result, like in zip(grads, (q, k, v, bias)):
        assert result.strides == np.empty_like(like).strides and result.shape == like.shape


def test_wrt(xp):
    result = forward()
    given = arrays() | dict(dout=result.out, out=result.out, lse=result.lse)
    bias = np.zeros((HQ, 1, LK), "float16")
    per_head = np.zeros(HQ, bfloat16)
    options = dict(bias=bias, sinks=per_head, alibi_slopes=per_head.astype("float64"))
    for wrt, expected in {
        ("q", "k", "v"): "111000",
        (): "000000",
        "v": "001000",
        "sinks": "000010",
        frozenset({"bias", "alibi_slopes"}): "000101",
    }.items():
        grads = attention_backward(**given, **options, wrt=wrt)
        assert "".join("01"[g is not None] for g in grads) == expected
    grads = attention_backward(**given, **options, wrt=iter(("bias", "sinks", "alibi_slopes")))
    assert (grads.dbias.shape, grads.dbias.dtype) == (bias.shape, bias.dtype)
    assert (grads.dsinks.shape, grads.dsinks.dtype) == ((HQ,), bfloat16)
    assert (grads.dalibi_slopes.shape, grads.dalibi_slopes.dtype) == ((HQ,), np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dlse_of_any_float_dtype(xp, dtype):
    result = forward()
    given = arrays() | dict(dout=result.out, out=result.out, lse=result.lse)
    dlse = np.random.default_rng(6).standard_normal(ROWS).astype(dtype)
    grads = attention_backward(**given, dlse=dlse)
    expected = attention_backward(**given, dlse=dlse.astype(np.float32))
    for actual, other in zip(grads[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(actual, other)


def test_bfloat16_is_known_when_first_seen(monkeypatch):
    monkeypatch.delitem(_problem._FLOAT_NAMES, bfloat16, raising=False)
    assert problem(**arrays(bfloat16)).dtype == "bfloat16"
    assert _problem._FLOAT_NAMES[bfloat16] == "bfloat16"


def test_gradient_of_a_bias_that_nothing_reads_is_zero(xp):
    q = np.zeros((0, HQ, LQ, D))
    bias = np.ones((LQ, LK))
    k = np.zeros((0, HQ, LK, D))
    out, lse = attention_forward(q, k, k, bias=bias)
    dbias = attention_backward(out, q, k, k, out, lse, bias=bias, wrt="bias").dbias
    np.testing.assert_array_equal(dbias, np.zeros((LQ, LK)))


def test_sdpa_without_a_head_axis(xp):
    x = arrays()
    q, k, v = x["q"][0, 0], x["k"][0, 0], x["v"][0, 0]
    mask = np.random.default_rng(5).random((LQ, LK)) < 0.5
    expected = attention_forward(q[None], k[None], v[None], attn_mask=mask).out[0]
    out = scaled_dot_product_attention(q, k, v, mask)
    assert out.shape == (LQ, DV)
    np.testing.assert_array_equal(out, expected)


def test_sdpa_shares_one_key_head_unasked(xp):
    x = arrays()
    k, v = x["k"][:, :1], x["v"][:, :1]
    out = scaled_dot_product_attention(x["q"], k, v)
    np.testing.assert_array_equal(out, attention_forward(x["q"], k, v).out)


def problem(**options):
    defaults = dict(
        attn_mask=None, bias=None, is_causal=False, causal_offset=0, window_size=None,
        q_lens=None, kv_lens=None, q_segment_ids=None, kv_segment_ids=None, scale=None,
        softcap=None, alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None,
        deterministic=True, num_threads=None,
    )  # fmt: skip
    return make_problem(**(arrays() | defaults | options))


class TestProblem:
    def test_every_field_is_in_its_place(self):
        x = arrays("float16")
        mask, bias = np.ones((LQ, LK), bool), np.zeros((HQ, 1, 1))
        p = problem(
            **x, attn_mask=mask, bias=bias, causal_offset=[3, -4], window_size=(1, 2),
            q_lens=[4, 5], kv_lens=6, q_segment_ids=range(LQ), kv_segment_ids=[[1], [2]],
            scale=0.5, softcap=30, alibi_slopes=np.arange(4.0), sinks=np.arange(4, 8.0),
            dropout_p=0.25, seed=2**64 - 1, deterministic=np.False_, num_threads=3,
        )  # fmt: skip
        assert type(p) is Problem and len(p) == len(Problem._fields)
        assert (p.lead, p.batch, p.Hq, p.Hkv, p.group) == ((B,), B, HQ, HKV, 2)
        assert (p.Lq, p.Lk, p.D, p.Dv, p.dtype, p.acc) == (LQ, LK, D, DV, "float16", np.float32)
        assert p.q is x["q"] and p.k is x["k"] and p.v is x["v"]
        assert p.attn_mask.shape == p.bias.shape == (B, HQ, LQ, LK)
        assert np.shares_memory(p.attn_mask, mask) and np.shares_memory(p.bias, bias)
        assert (p.window_left, p.window_right) == (1, 2)
        for array, expected in (
            (p.causal_offset, [3, -4]), (p.q_lens, [4, 5]), (p.kv_lens, [6, 6]),
        ):  # fmt: skip
            assert array.dtype == np.int64 and array.flags.c_contiguous
            assert array.tolist() == expected
        assert p.q_segment_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
        assert p.kv_segment_ids.tolist() == [[1] * LK, [2] * LK]
        assert (p.scale, p.softcap) == (0.5, 30.0)
        assert p.alibi_slopes.tolist() == [0, 1, 2, 3] and p.sinks.tolist() == [4, 5, 6, 7]
        assert p.alibi_slopes.dtype == p.sinks.dtype == np.float32
        assert (p.dropout_p, p.seed) == (0.25, 2**64 - 1)
        assert p.deterministic is False and p.num_threads == 3

    def test_absent_options(self):
        p = problem()
        absent = (
            "attn_mask bias window_left window_right causal_offset q_lens kv_lens q_segment_ids "
            "kv_segment_ids alibi_slopes sinks num_threads"
        )
        assert all(getattr(p, name) is None for name in absent.split())
        assert (p.scale, p.softcap, p.dropout_p, p.seed) == (1 / np.sqrt(D), 0.0, 0.0, 0)
        assert p.deterministic is True

    def test_is_immutable(self):
        with pytest.raises(AttributeError):
            problem().scale = 1.0

    def test_causal_is_a_window(self):
        assert problem(is_causal=True).window_right == 0
        assert problem(is_causal=np.True_).window_left is None
        p = problem(is_causal=True, window_size=(None, 5))
        assert (p.window_left, p.window_right) == (None, 0)
        p = problem(is_causal=True, window_size=[np.int8(3), None])
        assert (p.window_left, p.window_right) == (3, 0)
        assert problem(window_size=(10**30, 0)).window_left == 2**62

    def test_lower_right_is_of_the_lengths(self):
        def offset(**options):
            return problem(causal_offset="lower_right", **options).causal_offset.tolist()

        assert offset() == [LK - LQ] * 2
        assert offset(kv_lens=[3, 7]) == [3 - LQ, 7 - LQ]
        assert offset(q_lens=[1, 2]) == [LK - 1, LK - 2]
        assert offset(q_lens=[1, 2], kv_lens=[0, 7]) == [-1, 5]

    def test_offset_zero_and_none_are_absent(self):
        assert problem(causal_offset=0).causal_offset is None
        assert problem(causal_offset=None).causal_offset is None

    def test_lengths_are_copied(self):
        lens = np.array([1, 2])
        p = problem(kv_lens=lens)
        lens[:] = 99
        assert p.kv_lens.tolist() == [1, 2]

    def test_lengths_of_any_mixture_of_ints(self):  # which NumPy itself makes float64
        assert problem(kv_lens=[np.uint64(1), np.int64(2)]).kv_lens.tolist() == [1, 2]
        assert problem(kv_lens=(np.uint64(1), 2)).kv_lens.tolist() == [1, 2]

    def test_lengths_broadcast_to_several_leading_axes(self):
        x = {name: np.zeros((2, 3, 1, 4, 5)) for name in "qkv"}
        assert problem(**x, kv_lens=[[1], [2]]).kv_lens.tolist() == [1, 1, 1, 2, 2, 2]
        assert problem(**x, kv_lens=[1, 2, 3]).kv_lens.tolist() == [1, 2, 3, 1, 2, 3]
        with pytest.raises(ValueError, match=r"kv_lens\[1, 0\] is 5, expected 0 to 4"):
            problem(**x, kv_lens=[[1], [5]])

    def test_no_leading_axes_take_one_length(self):
        x = {name: np.zeros((1, 4, 5)) for name in "qkv"}
        p = problem(**x, kv_lens=3, q_lens=np.array(2))
        assert (p.lead, p.batch) == ((), 1)
        assert (p.kv_lens.tolist(), p.q_lens.tolist()) == ([3], [2])

    def test_empty_batch_takes_empty_lengths(self):
        x = {name: np.zeros((0, 1, 4, 5)) for name in "qkv"}
        assert problem(**x, kv_lens=[]).kv_lens.shape == (0,)

    def test_no_heads(self):
        x = {name: np.zeros((2, 0, 4, 5)) for name in "qkv"}
        assert problem(**x).group == 0
        x |= {name: np.zeros((2, 3, 4, 5)) for name in "kv"}
        assert problem(**x).group == 0

    def test_scale_of_no_dimensions_is_one(self):
        assert problem(q=zeros(B, HQ, LQ, 0), k=zeros(B, HKV, LK, 0)).scale == 1.0

    @pytest.mark.parametrize("scale", [2, np.float16(2), np.int8(2), bfloat16.type(2), True + 1])
    def test_numbers_of_any_real_type(self, scale):
        p = problem(scale=scale, softcap=scale)
        assert type(p.scale) is float and p.scale == p.softcap == 2.0

    def test_numpy_scalar_as_a_mask(self):
        assert problem(attn_mask=np.True_, bias=np.float32(2)).bias.shape == (B, HQ, LQ, LK)

    def test_unused_seed_does_not_matter(self):
        assert problem(seed=5).seed == 0
        assert problem(seed=np.uint64(5), dropout_p=1).seed == 5

    def test_slopes_that_overflow_do_so_silently(self):
        assert problem(sinks=np.full(HQ, 1e300)).sinks.tolist() == [np.inf] * HQ


def test_import_reads_numpy_only():
    code = (
        "import sys, fastattn; "
        "print([m for m in ('ml_dtypes', 'cupy', 'torch', 'scipy') if m in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
