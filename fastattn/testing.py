"""The oracle: attention and all its gradients, computed plainly, and the bound others must keep.

Nothing here is fast and nothing is clever: every score is written down in an array of shape
``(..., Hq, Lq, Lk)``, step by step as the contract has it, in float64 unless told otherwise.
No backend is called, for an oracle must not call what it judges. To learn what an option means,
read `Options`, then `excluded_pairs`, `_score_pairs`, `reference_forward`, `reference_backward`;
to learn how exact a result must be, read `assert_accurate`.

Names: ``i`` counts query rows, ``j`` keys, ``h`` query heads, ``b`` batch entries (the leading
axes in C order); ``s`` are scores, ``p`` probabilities, ``z`` dropout's factors, ``delta`` is the
row sum ``D_i = dout_i . out_i``. A pair (i, j) is *live* when nothing excludes it.

What an excluded pair holds must not matter, and 0 * NaN is NaN. So excluded pairs are never
multiplied away here: they are left out with `numpy.where`, and `_live_matmul` sums over live pairs
only.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = [
    "Gradients", "Options", "assert_accurate", "assert_forward", "assert_gradients",
    "assert_lse_accurate", "dropout_keep", "excluded_pairs", "live_pairs", "philox4x32",
    "philox4x32_7", "random_problem", "reference_backward", "reference_forward",
]  # fmt: skip

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True)
class Options:
    """The options of attention, with their defaults; any of them go together.

    Lengths, offsets and segment ids are ints, sequences or integer arrays that broadcast to the
    leading axes of q (segment ids: to those and L). Masks and biases broadcast to
    ``(..., Hq, Lq, Lk)``. The float arrays are used in the accumulation dtype.
    """

    attn_mask: object = None  # bool, True = attend; or float, added to the scores
    bias: object = None  # float, added to the scores; has a gradient
    is_causal: bool = False  # exclude j > i + offset
    causal_offset: object = 0  # int, one per batch entry, or "lower_right"
    window_size: object = None  # (left, right), inclusive; None = unbounded
    q_lens: object = None  # rows i >= q_lens[b] do not exist
    kv_lens: object = None  # keys j >= kv_lens[b] are excluded
    q_segment_ids: object = None  # (..., Lq): only equal ids attend to one another
    kv_segment_ids: object = None  # (..., Lk)
    scale: object = None  # None: 1 / sqrt(D), and 1 for D = 0
    softcap: object = None  # None or 0: off
    alibi_slopes: object = None  # (Hq,)
    sinks: object = None  # (Hq,): exp(sinks[h]) joins the denominator
    dropout_p: float = 0.0  # the probability that a pair is dropped
    seed: object = None  # the 64-bit key of dropout's random numbers


class Gradients(NamedTuple):
    """What `reference_backward` returns, None for what was not asked for."""

    dq: object = None
    dk: object = None
    dv: object = None
    dbias: object = None
    dsinks: object = None
    dalibi_slopes: object = None


# ---------------------------------------------------------------- which pairs are left


def _accumulation_dtype(dtype):
    """Return float64 for float64 and float32 for everything narrower."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _per_batch(values, lead):
    """Return one int64 per batch entry, shaped to broadcast against (..., Hq, Lq, Lk)."""
    return np.broadcast_to(np.asarray(values, np.int64), lead)[..., None, None, None]


def _distances(q_shape, k_shape, o):
    """Return i + offset - j: how far key j lies behind the diagonal of row i."""
    lead, Lq, Lk = q_shape[:-3], q_shape[-2], k_shape[-2]
    offset = o.causal_offset
    if isinstance(offset, str):
        assert offset == "lower_right", offset
        q_len = _per_batch(Lq if o.q_lens is None else o.q_lens, lead)
        kv_len = _per_batch(Lk if o.kv_lens is None else o.kv_lens, lead)
        offset = kv_len - q_len
    else:  # clipped, for the sum below must not wrap around
        offset = np.clip(_per_batch(offset, lead), -(2**62), 2**62)
    return np.arange(Lq)[:, None] + offset - np.arange(Lk)


def _rows_exist(q_shape, o):
    """Return i < q_lens[b], shaped to broadcast against (..., Hq, Lq)."""
    lead, Lq = q_shape[:-3], q_shape[-2]
    return np.arange(Lq) < _per_batch(Lq if o.q_lens is None else o.q_lens, lead)[..., 0]


def excluded_pairs(q_shape, k_shape, *, acc=np.float64, **options):
    """Say which pairs are excluded before any score is known.

    Parameters
    ----------
    q_shape, k_shape : tuple of int
        ``(..., Hq, Lq, D)`` and ``(..., Hkv, Lk, D)``.
    acc : dtype
        Accumulation dtype of the problem. A mask of another dtype is converted to it first, so
        the lowest float64 is -inf, and excludes, where float32 accumulates.
    **options
        See `Options`.

    Returns
    -------
    excluded : bool array that broadcasts to ``(..., Hq, Lq, Lk)``
        True for pairs that options exclude and for all pairs of a row that does not exist.
        A pair whose score turns out to be -inf is excluded too; see `live_pairs`.
    """
    o = Options(**options)
    lead, Lq, Lk = q_shape[:-3], q_shape[-2], k_shape[-2]
    distance = _distances(q_shape, k_shape, o)
    excluded = np.zeros((*lead, 1, Lq, Lk), bool)
    for mask in (o.attn_mask, o.bias):
        if mask is not None:
            mask = np.asarray(mask)
            with np.errstate(over="ignore"):
                holds = ~mask if mask.dtype == bool else mask.astype(acc) == -np.inf
            excluded = excluded | holds
    if o.is_causal:
        excluded = excluded | (distance < 0)
    left, right = o.window_size or (None, None)
    if left is not None:
        excluded = excluded | (distance > left)
    if right is not None:
        excluded = excluded | (-distance > right)
    if o.kv_lens is not None:
        excluded = excluded | (np.arange(Lk) >= _per_batch(o.kv_lens, lead))
    if o.q_segment_ids is not None:
        q_ids = np.broadcast_to(o.q_segment_ids, (*lead, Lq))[..., None, :, None]
        kv_ids = np.broadcast_to(o.kv_segment_ids, (*lead, Lk))[..., None, None, :]
        excluded = excluded | (q_ids != kv_ids)
    return excluded | ~_rows_exist(q_shape, o)[..., None]


class _Pairs(NamedTuple):
    """Everything that is known of each pair before the softmax."""

    s: object  # scores (..., Hq, Lq, Lk); meaningless where not live
    live: object  # bool, same shape
    slope: object  # ds/d(scale q.k) of the softcap, 1 - tanh^2; the number 1 without one
    distance: object  # i + offset - j


def _query_heads(x, Hq):
    """Repeat the kv heads: query head h reads kv head h // (Hq // Hkv)."""
    Hkv = x.shape[-3]
    return np.repeat(x, Hq // Hkv if Hkv else 1, axis=-3)


def _to_kv_heads(x, k):
    """Sum over the query heads that read the same kv head: the transpose of `_query_heads`."""
    *lead, Hq, Lk, width = x.shape
    Hkv = k.shape[-3]
    return x.reshape(*lead, Hkv, Hq // Hkv if Hkv else 1, Lk, width).sum(axis=-3)


def _any_of_group(live, k):
    """Say which rows of k, shape (..., Hkv, Lk), some live pair belongs to."""
    return _to_kv_heads(live.any(axis=-2)[..., None], k)[..., 0] > 0


def _scale(o, D):
    """Return the factor of q . k."""
    return float(o.scale) if o.scale is not None else 1 / math.sqrt(D) if D else 1.0


def _row_sinks(q, o, dtype):
    """Return the sink of each row, shaped (Hq, 1)."""
    return np.asarray(o.sinks).astype(_accumulation_dtype(q.dtype)).astype(dtype)[:, None]


def _score_pairs(q, k, o, dtype):
    """Compute scores and exclusion in the contract's order, steps 1 to 4."""
    acc, (Hq, _, D) = _accumulation_dtype(q.dtype), q.shape[-3:]
    s = q.astype(dtype) @ np.swapaxes(_query_heads(k, Hq).astype(dtype), -1, -2) * _scale(o, D)
    slope = 1
    if o.softcap:
        tanh = np.tanh(s / float(o.softcap))
        s, slope = float(o.softcap) * tanh, 1 - tanh * tanh
    for added in (o.attn_mask, o.bias):
        if added is not None and np.asarray(added).dtype != bool:
            s = s + np.asarray(added).astype(acc).astype(dtype)
    distance = _distances(q.shape, k.shape, o)
    if o.alibi_slopes is not None:
        slopes = np.asarray(o.alibi_slopes).astype(acc).astype(dtype)
        s = s - slopes[:, None, None] * np.abs(distance).astype(dtype)
    excluded = excluded_pairs(q.shape, k.shape, acc=acc, **vars(o))
    return _Pairs(s, ~excluded & (s != -np.inf), slope, distance)


def live_pairs(q, k, *, compute_dtype=np.float64, **options):
    """Say which pairs are left: not excluded by an option, and of a score that is not -inf.

    Parameters
    ----------
    q, k : array, shape (..., Hq, Lq, D), (..., Hkv, Lk, D)
        float16, bfloat16, float32 or float64.
    compute_dtype : dtype
        Scores are computed in it; it decides which of them overflow to -inf.
    **options
        See `Options`.

    Returns
    -------
    live : bool array, shape (..., Hq, Lq, Lk)
        True for pairs that take part.
    """
    with np.errstate(all="ignore"):
        return _score_pairs(np.asarray(q), np.asarray(k), Options(**options), compute_dtype).live


# ---------------------------------------------------------------- dropout


def philox4x32(counter, key, rounds):
    """Philox4x32, the counter-based random numbers of Salmon et al., 2011 ("As easy as 1, 2, 3").

    Parameters
    ----------
    counter : array of 32-bit values, shape (..., 4)
        Counters, word by word.
    key : two 32-bit values
        The same for all counters.
    rounds : int
        How often they are mixed; 10 in the paper's standard.

    Returns
    -------
    words : uint32 array, shape (..., 4)
        Four random words for each counter.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> shift) ^ c1 ^ np.uint64(k0), product1 & low
        c2, c3 = (product0 >> shift) ^ c3 ^ np.uint64(k1), product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def philox4x32_7(counter, key):
    """Philox4x32 with the seven rounds that dropout uses; see `philox4x32`."""
    return philox4x32(counter, key, rounds=7)


def dropout_keep(seed, dropout_p, batch, Hq, Lq, Lk):
    """Say which pairs dropout keeps.

    The key is the 64-bit seed, low word first; the counter is ``(j // 4, i, h, b)`` and word
    ``j % 4`` of what Philox makes of it belongs to pair (i, j): kept when the word is at least
    ``ceil(dropout_p * 2**32)``.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    dropout_p : float
        The probability that a pair is dropped.
    batch, Hq, Lq, Lk : int
        The sizes of the problem; batch is the product of the leading axes.

    Returns
    -------
    keep : bool array, shape (batch, Hq, Lq, Lk)
        True for pairs that are kept.
    """
    blocks = -(-Lk // 4)
    b, h, i, block = np.ogrid[:batch, :Hq, :Lq, :blocks]
    counter = np.stack(np.broadcast_arrays(block, i, h, b), axis=-1)
    words = philox4x32_7(counter, (int(seed) & 0xFFFFFFFF, int(seed) >> 32))
    keep = words.astype(np.uint64) >= np.uint64(math.ceil(dropout_p * 2**32))
    return keep.reshape(batch, Hq, Lq, 4 * blocks)[..., :Lk]


def _dropout_factor(shape, o, dtype):
    """Return z: 1 / (1 - dropout_p) for a kept pair, 0 for a dropped one; 1 without dropout."""
    if not o.dropout_p:
        return 1
    *lead, Hq, Lq, Lk = shape
    keep = dropout_keep(o.seed, float(o.dropout_p), math.prod(lead), Hq, Lq, Lk)
    factor = 1 / (1 - float(o.dropout_p)) if o.dropout_p < 1 else 0.0
    return np.where(keep, factor, 0.0).astype(dtype).reshape(shape)


# ---------------------------------------------------------------- attention and its gradients


def _live_matmul(a, x, live):
    """Compute a @ x, each sum over live pairs only.

    `a` is zero at pairs that are not live. That is enough where x is finite; the rows of x that
    are not are held back from the product and added pair by pair.
    """
    finite = np.isfinite(x).all(axis=-1)
    total = a @ np.where(finite[..., None], x, 0)
    for *head, j in np.argwhere(~finite & live.any(axis=-2)):
        at = tuple(head)
        contribution = a[at][:, j, None] * x[at][j]
        total[at] += np.where(live[at][:, j, None], contribution, 0)
    return total


def _rounded(x, dtype):
    """Round to a narrower dtype and come back; None leaves x alone."""
    return x if dtype is None else x.astype(dtype).astype(x.dtype)


def _sum_to_shape(x, shape):
    """Sum over the axes along which an array of this shape was broadcast to x's."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(np.flatnonzero(np.array(shape) != x.shape)), keepdims=True)


def reference_forward(q, k, v, *, compute_dtype=np.float64, round_products=None, **options):
    """Compute attention and the logarithm of its denominators.

    ``out = p @ v`` with ``p = z softmax(s)`` over the live pairs of a row, and
    ``lse = log(sum exp s [+ exp sink])``, by a two-pass softmax (maximum first).

    Parameters
    ----------
    q, k, v : array, shape (..., Hq, Lq, D), (..., Hkv, Lk, D), (..., Hkv, Lk, Dv)
        float16, bfloat16, float32 or float64.
    compute_dtype : dtype
        Used throughout. float32 (for float64 inputs: float64) is the *plain computation* that
        `assert_accurate` compares with.
    round_products : dtype or None
        Round P to this dtype before the matrix product, as kernels for 16-bit inputs may.
    **options
        See `Options`.

    Returns
    -------
    out : array of compute_dtype, shape (..., Hq, Lq, Dv)
        Not rounded to q's dtype.
    lse : array of compute_dtype, shape (..., Hq, Lq)

    Notes
    -----
    A row with no live pair has out 0 and lse -inf (``sinks[h]`` if given); a row
    ``i >= q_lens[b]`` has out 0 and lse -inf. NaN and inf at live pairs go where IEEE arithmetic
    takes them.
    """
    q, k, v, o = np.asarray(q), np.asarray(k), np.asarray(v), Options(**options)
    with np.errstate(all="ignore"):
        s, live, _, _ = _score_pairs(q, k, o, compute_dtype)
        s = np.where(live, s, -np.inf)
        row_max = s.max(axis=-1, initial=-np.inf)
        if o.sinks is not None:
            sinks = _row_sinks(q, o, compute_dtype)
            row_max = np.maximum(row_max, sinks)
        shift = np.where(row_max == -np.inf, 0, row_max)  # nothing to shift where nothing is left
        p = np.where(live, np.exp(s - shift[..., None]), 0)
        row_sum = p.sum(axis=-1)
        if o.sinks is not None:
            row_sum = row_sum + np.exp(sinks - shift)
        lse = np.where(_rows_exist(q.shape, o), shift + np.log(row_sum), -np.inf)
        p = np.where(live, p / row_sum[..., None], 0) * _dropout_factor(s.shape, o, compute_dtype)
        v = _query_heads(v, q.shape[-3]).astype(compute_dtype)
        return _live_matmul(_rounded(p, round_products), v, live), lse


def reference_backward(
    dout, q, k, v, out, lse, *, dlse=None, wrt=("q", "k", "v"),
    compute_dtype=np.float64, round_products=None, **options,
):  # fmt: skip
    """Compute the gradients of ``sum(dout * out) + sum(dlse * lse)``.

    With ``p = exp(s - lse)``, ``z`` dropout's factor, ``D_i = dout_i . out_i`` and
    ``t = p (z (dout_i . v_j) - D_i + dlse_i)`` at live pairs, 0 at all others::

        dv_j = sum_i z p dout_i
        dbias = sum t                              over its broadcast axes
        dalibi_slopes[h] = - sum t |i + offset - j|
        dsinks[h] = sum_i exp(sinks[h] - lse_i) (dlse_i - D_i)
        ds = t (1 - tanh^2)                        with softcap, else t
        dq_i = scale sum_j ds k_j
        dk_j = scale sum_i ds q_i

    Parameters
    ----------
    dout : array, shape (..., Hq, Lq, Dv)
        The gradient with respect to out.
    q, k, v : array
        As for `reference_forward`.
    out, lse : array
        Given, not computed: they may come from a merge with more keys than are here, and the
        gradients are then this block's share. dout, out and dlse of a row with lse -inf are not
        read.
    dlse : array, shape (..., Hq, Lq), or None
        The gradient with respect to lse.
    wrt : sequence of str
        Any of "q", "k", "v", "bias", "sinks", "alibi_slopes".
    compute_dtype : dtype
        As for `reference_forward`.
    round_products : dtype or None
        Round P and dS to this dtype before the matrix products.
    **options
        See `Options`.

    Returns
    -------
    Gradients
        Arrays of compute_dtype, not rounded; None for what is not in wrt.
    """
    q, k, v, o = np.asarray(q), np.asarray(k), np.asarray(v), Options(**options)
    Hq, scale = q.shape[-3], _scale(o, q.shape[-1])
    rows_read = (np.asarray(lse) != -np.inf) & _rows_exist(q.shape, o)

    def per_row(x):
        x = np.asarray(x).astype(_accumulation_dtype(q.dtype)).astype(compute_dtype)
        return np.where(rows_read, x, 0)

    with np.errstate(all="ignore"):
        lse, dlse = per_row(lse), per_row(0 if dlse is None else dlse)
        dout, out = np.asarray(dout).astype(compute_dtype), np.asarray(out).astype(compute_dtype)
        delta = np.where(rows_read, (dout * out).sum(axis=-1), 0)

        s, live, slope, distance = _score_pairs(q, k, o, compute_dtype)
        live = live & rows_read[..., None]
        z = _dropout_factor(s.shape, o, compute_dtype)
        q_, k_, v_ = (_query_heads(x, Hq).astype(compute_dtype) for x in (q, k, v))
        p = np.where(live, np.exp(s - lse[..., None]), 0)
        dp = z * (dout @ np.swapaxes(v_, -1, -2))
        t = np.where(live, p * (dp - delta[..., None] + dlse[..., None]), 0)
        ds = np.where(live, t * slope, 0)

        grads = {}
        ds, zp = _rounded(ds, round_products), _rounded(z * p, round_products)
        if "q" in wrt:
            grads["dq"] = scale * _live_matmul(ds, k_, live)
        live, ds, zp = (np.swapaxes(x, -1, -2) for x in (live, ds, zp))
        if "k" in wrt:
            grads["dk"] = _to_kv_heads(scale * _live_matmul(ds, q_, live), k)
        if "v" in wrt:
            grads["dv"] = _to_kv_heads(_live_matmul(zp, dout, live), k)
        if "bias" in wrt:
            grads["dbias"] = _sum_to_shape(t, np.shape(o.bias))
        if "sinks" in wrt:
            into_sink = np.exp(_row_sinks(q, o, compute_dtype) - lse) * (dlse - delta)
            grads["dsinks"] = _sum_to_shape(np.where(rows_read, into_sink, 0), (Hq, 1))[:, 0]
        if "alibi_slopes" in wrt:
            t = t * np.abs(distance).astype(compute_dtype)
            grads["dalibi_slopes"] = -_sum_to_shape(t, (Hq, 1, 1))[:, 0, 0]
        return Gradients(**grads)


# ---------------------------------------------------------------- how exact a result must be


def _as_longdouble(x):
    """Widen so far that no square overflows; ml_dtypes knows the way as far as float64."""
    return (x if x.dtype == np.longdouble else x.astype(np.float64)).astype(np.longdouble)


def _rms(x):
    return np.sqrt(np.mean(x * x))


def _plain_error(exact, plain, dtype, compared):
    """Return the error of the plain computation, rounded once to dtype; 0 where not compared."""
    with np.errstate(all="ignore"):
        error = abs(_as_longdouble(plain.astype(dtype)) - _as_longdouble(exact))
    return np.where(compared & np.isfinite(error), error, 0)


def _assert_finite_alike(actual, exact, plain, dtype, name):
    """Assert that values are finite where they should be; return where they can be compared.

    NaN and inf are not told apart. Where exact and plain, both rounded to dtype, disagree about
    what is finite (an overflow of the narrower one), either is right.
    """
    with np.errstate(all="ignore"):
        finite, exact_finite, plain_finite = (
            np.isfinite(x.astype(dtype)) for x in (actual, exact, plain)
        )
    wrong = (finite != exact_finite) & (exact_finite == plain_finite)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} values are finite and should not be, or should"
            f" be and are not; first at {at}: {actual[at]}, expected {exact[at]}"
        )
    return finite & exact_finite & plain_finite


def _assert_like(actual, shape, dtype, name):
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {np.dtype(dtype)}"
    assert actual.shape == shape, f"{name}: shape {actual.shape}, expected {shape}"


def assert_accurate(actual, exact, plain, dtype, acc, *, siblings=(), name="result"):
    """Assert promise 6: an error close to that of the plain computation.

    Over the whole array, against exact: the rms error is at most 2 times the plain computation's
    + 2 eps times the rms of exact; the largest error is at most 4 times the plain computation's
    + 2 eps times the largest element of exact.

    Parameters
    ----------
    actual : array of dtype
        The result to be judged.
    exact, plain : array
        Of `reference_forward` or `reference_backward`, not rounded; plain is rounded here, once.
    dtype, acc : dtype
        The result's and the accumulation's; eps is that of the coarser one.
    siblings : sequence of (exact, plain)
        The same of inputs that differ in their last digits. The plain error that counts is the
        largest of all: in a result of few elements a single one may be zero by luck.
    name : str
        What the message calls the result.

    Raises
    ------
    AssertionError
        If the bound is broken, dtype or shape differ, or a value is finite where it should not be
        or the other way round.
    """
    _assert_like(actual, exact.shape, dtype, name)
    compared = _assert_finite_alike(actual, exact, plain, dtype, name)
    if not compared.any():
        return
    exact = np.where(compared, _as_longdouble(exact), 0)
    error = abs(np.where(compared, _as_longdouble(actual), 0) - exact)
    plain_errors = [_plain_error(*both, dtype, compared) for both in ((exact, plain), *siblings)]
    plain_rms, plain_max = max(map(_rms, plain_errors)), max(map(np.max, plain_errors))
    eps = max(EPS[np.dtype(dtype).name], EPS[np.dtype(acc).name])
    rms_bound = 2 * plain_rms + 2 * eps * _rms(exact)
    max_bound = 4 * plain_max + 2 * eps * abs(exact).max()
    if _rms(error) <= rms_bound and error.max() <= max_bound:
        return
    at = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
    raise AssertionError(
        f"{name}: rms error {_rms(error):.3e}, allowed {rms_bound:.3e}"
        f" ({_rms(error) / rms_bound:.2f} times), plain {plain_rms:.3e};"
        f" largest error {error.max():.3e}, allowed {max_bound:.3e}"
        f" ({error.max() / max_bound:.2f} times), plain {plain_max:.3e};"
        f" the largest at {at}: {actual[at]}, expected {float(exact[at])!r}"
    )


def assert_lse_accurate(actual, exact, plain, acc, *, siblings=(), name="lse"):
    """Assert promise 6 of lse: an error of at most 4 ulp of max(1, abs(lse)).

    -inf must be where exact has it and nowhere else; other non-finite values as in
    `assert_accurate`. Where scores cancel (a large ALiBi term, say), no float32 computation keeps
    to that: 4 times the largest error of the plain computation is allowed as well.

    Parameters
    ----------
    actual, exact, plain : array
        As in `assert_accurate`; the dtype of lse is acc.
    acc : dtype
        The accumulation's.
    siblings : sequence of (exact, plain)
        As in `assert_accurate`.
    name : str
        What the message calls the result.

    Raises
    ------
    AssertionError
        As in `assert_accurate`.
    """
    _assert_like(actual, exact.shape, acc, name)
    compared = _assert_finite_alike(actual, exact, plain, acc, name)
    with np.errstate(over="ignore"):  # above the largest number there is no next one
        ulp = np.spacing(np.where(compared, np.maximum(1, abs(exact)), 1).astype(acc))
    plain_errors = (_plain_error(*both, acc, compared) for both in ((exact, plain), *siblings))
    bound = max(4, *(4 * (error / ulp).max(initial=0) for error in plain_errors))
    error = abs(np.where(compared, actual, 0) - np.where(compared, exact, 0)) / ulp
    wrong = ((actual == -np.inf) != (exact == -np.inf)) | (error > bound)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(
            f"{name}: wrong in {wrong.sum()} of {wrong.size} rows, first at {at}: {actual[at]},"
            f" expected {float(exact[at])!r}; error {float(error[at]):.1f} ulp, allowed {bound:.1f}"
        )


def _exact_and_plain(reference, arrays, q, pairs, **given):
    """Return [(exact, plain), ...] of these inputs, and then of siblings if the problem is small.

    Float64 inputs are judged by longdouble. Siblings differ from the inputs in the last digits,
    options among them: a score that is mostly bias or slope would be rounded alike in all.
    """
    acc = _accumulation_dtype(q.dtype)
    exact = dict(compute_dtype=np.longdouble if acc == np.float64 else np.float64)
    plain = dict(compute_dtype=acc, round_products=q.dtype if q.dtype.itemsize == 2 else None)

    def both(arrays, given):
        return reference(*arrays, **exact, **given), reference(*arrays, **plain, **given)

    results = [both(arrays, given)]
    few_elements = any(0 < x.size < 64 for x in results[0][0] if x is not None)
    siblings = min(max(2**18 // max(pairs, 1), 3 if few_elements else 0), 16)
    rng = np.random.default_rng(0)
    for _ in range(siblings):
        others = [_with_other_last_digits(rng, x) for x in arrays]
        options = {name: _with_other_last_digits(rng, x) for name, x in given.items()}
        results.append(both(others, options))
    return results


def _with_other_last_digits(rng, x):
    if not isinstance(x, np.ndarray) or x.dtype.name not in EPS:
        return x
    # Less would be lost where terms of a score are of different size: siblings would be rounded alike.
    most = EPS[x.dtype.name] * (2 if x.dtype.itemsize == 2 else 2**10)
    with np.errstate(over="ignore"):
        return (x * (1 + rng.uniform(-most, most, x.shape))).astype(x.dtype)


def _assert_zero_where(dead, actual, name):
    assert not actual[dead].any(), f"{name}: a row to which no live pair belongs is not zero"


def assert_forward(q, k, v, actual_out, actual_lse, **options):
    """Assert that out and lse are what the contract promises for these inputs and options.

    Accuracy as in `assert_accurate` and `assert_lse_accurate`; rows with no live pair are exactly
    zero.

    Parameters
    ----------
    q, k, v : array, shape (..., Hq, Lq, D), (..., Hkv, Lk, D), (..., Hkv, Lk, Dv)
        What attention was computed of.
    actual_out : array, shape (..., Hq, Lq, Dv)
        The result; of q's dtype, or float32 for 16-bit inputs.
    actual_lse : array, shape (..., Hq, Lq), or None
        Its log-sum-exp; None is not looked at.
    **options
        See `Options`.

    Raises
    ------
    AssertionError
        If one of them is not what it should be; the message says by how much.
    """
    acc, live = _accumulation_dtype(q.dtype), live_pairs(q, k, **options)
    dtype = acc if actual_out.dtype == acc else q.dtype
    results = _exact_and_plain(reference_forward, (q, k, v), q, live.size, **options)
    (out, *out_siblings), (lse, *lse_siblings) = (
        [(exact[n], plain[n]) for exact, plain in results] for n in (0, 1)
    )
    assert_accurate(actual_out, *out, dtype, acc, siblings=out_siblings, name="out")
    _assert_zero_where(~live.any(axis=-1), actual_out, "out")
    if actual_lse is not None:
        assert_lse_accurate(actual_lse, *lse, acc, siblings=lse_siblings)


def assert_gradients(dout, q, k, v, out, lse, actual, *, dlse=None, wrt=("q", "k", "v"), **options):
    """Assert that gradients are what the contract promises for these inputs and options.

    Accuracy as in `assert_accurate`; where a finite lse lies beyond 1000 in magnitude, gradients
    must be finite in the right places, and no more is promised. Rows of dq, dk, dv to which no live
    pair belongs are exactly zero.

    Parameters
    ----------
    dout, q, k, v, out, lse : array
        What the gradients were computed of, as for `reference_backward`.
    actual : sequence of array or None
        dq, dk, dv, dbias, dsinks and dalibi_slopes in this order, None where wrt does not ask.
    dlse : array or None
        As for `reference_backward`, and so is wrt.
    wrt : sequence of str
        The gradients that were asked for.
    **options
        See `Options`.

    Raises
    ------
    AssertionError
        If one of them is not what it should be; the message says by how much.
    """
    acc, live = _accumulation_dtype(q.dtype), live_pairs(q, k, **options)
    live &= (lse != -np.inf)[..., None]
    key_live = _any_of_group(live, k)
    sources = {"dq": (q, live.any(axis=-1)), "dk": (k, key_live), "dv": (v, key_live)}
    results = _exact_and_plain(
        reference_backward, (dout, q, k, v, out, lse), q, live.size, dlse=dlse, wrt=wrt, **options
    )
    in_range = not (np.isfinite(lse) & (abs(lse) > 1000)).any()
    for n, (name, values) in enumerate(zip(Gradients._fields, actual, strict=True)):
        (exact, plain), *siblings = [(exact[n], plain[n]) for exact, plain in results]
        if exact is None:
            assert values is None, f"{name}: computed, but wrt={wrt!r} does not ask for it"
            continue
        assert values is not None, f"{name}: None, but wrt={wrt!r} asks for it"
        source, rows_live = sources.get(name) or (np.asarray(options[name[1:]]), None)
        if in_range:
            assert_accurate(values, exact, plain, source.dtype, acc, siblings=siblings, name=name)
        else:
            _assert_like(values, source.shape, source.dtype, name)
            _assert_finite_alike(values, exact, plain, source.dtype, name)
        if rows_live is not None:
            _assert_zero_where(~rows_live, values, name)


# ---------------------------------------------------------------- problems to try


def _in_some_layout(rng, x):
    """Copy x into some memory layout: axes in any order, any of them walked backwards."""
    order = rng.permutation(x.ndim)
    backwards = tuple(np.flatnonzero(rng.random(x.ndim) < 0.2))
    memory = np.flip(x, backwards).transpose(order).copy()
    return np.asarray(np.flip(memory.transpose(np.argsort(order)), backwards))


def random_problem(rng, **fixed):
    """Draw a small legal problem, hostile where the contract allows it.

    Zero-length axes, any leading axes, GQA, odd memory layouts, each option alone or with others,
    and NaN and inf wherever nothing may read them.

    Parameters
    ----------
    rng : numpy.random.Generator
        What the draws come from.
    **fixed
        What is not to be drawn: ``dtype``, ``lead``, ``Hkv``, ``group`` (Hq // Hkv), ``Lq``,
        ``Lk``, ``D``, ``Dv``, ``poison`` (bool), or any of `Options` (None: left off).

    Returns
    -------
    problem : dict
        q, k, v and options, the last a dict to pass on as keyword arguments.
    """

    def pick(name, *choices):
        return fixed.pop(name) if name in fixed else choices[rng.integers(len(choices))]

    dtype = np.dtype(pick("dtype", "float16", "float32", "float32", "float64"))
    lead = tuple(pick("lead", (), (1,), (2,), (3,), (2, 2), (1, 3)))
    Hkv, group = pick("Hkv", 1, 2, 3), pick("group", 1, 1, 2, 3)
    Hq = Hkv * group
    Lq, Lk = (pick(name, 0, 1, 2, 5, 16, 17, 33, 64, 65, 100, 130) for name in ("Lq", "Lk"))
    D, Dv = (pick(name, 0, 1, 3, 8, 16, 17, 40, 64) for name in ("D", "Dv"))
    poison = pick("poison", True, False)

    def normal(*shape, dtype=dtype):
        return _in_some_layout(rng, np.asarray(rng.standard_normal(shape)).astype(dtype))

    def lengths(longest):
        return rng.integers(0, longest + 1, lead)

    def offset():
        per_batch = rng.integers(-Lq, Lk + 1, lead)
        return ("lower_right", int(rng.integers(-Lq, Lk + 1)), per_batch)[rng.integers(3)]

    def mask_shape():
        shape = [n if rng.random() < 0.7 else 1 for n in (*lead, Hq, Lq, Lk)]
        while shape and shape[0] == 1 and rng.random() < 0.5:
            del shape[0]
        return shape

    def float_mask():
        mask = normal(*mask_shape(), dtype=(dtype, "float32", "float64")[rng.integers(3)])
        mask[rng.random(mask.shape) < 0.2] = -np.inf
        return mask

    def bool_mask():
        return np.asarray(rng.random(mask_shape()) < 0.7)

    def window():
        return tuple(None if rng.random() < 0.3 else int(rng.integers(0, 1 + n)) for n in (Lq, Lk))

    draws = dict(
        attn_mask=lambda: bool_mask() if rng.random() < 0.5 else float_mask(),
        bias=float_mask,
        is_causal=lambda: True,
        causal_offset=offset,
        window_size=window,
        q_lens=lambda: lengths(Lq),
        kv_lens=lambda: lengths(Lk),
        q_segment_ids=lambda: np.sort(rng.integers(0, 4, (*lead, Lq))),
        kv_segment_ids=lambda: np.sort(rng.integers(0, 4, (*lead, Lk))),
        scale=lambda: (0.0, -0.3, 1.0)[rng.integers(3)],
        softcap=lambda: (0.5, 2.0, 30.0)[rng.integers(3)],
        alibi_slopes=lambda: normal(Hq, dtype="float32"),
        sinks=lambda: normal(Hq, dtype="float32"),
        dropout_p=lambda: (0.1, 0.5, 1.0)[rng.integers(3)],
        seed=lambda: int(rng.integers(2**64, dtype=np.uint64)),
    )
    needs = {"kv_segment_ids": "q_segment_ids", "seed": "dropout_p"}
    options = {}
    for name, draw in draws.items():
        if name in fixed:
            options[name] = fixed.pop(name)
        elif options.get(needs[name]) is not None if name in needs else rng.random() < 0.2:
            options[name] = draw()
    assert not fixed, f"unknown: {sorted(fixed)}"

    q, k, v = normal(*lead, Hq, Lq, D), normal(*lead, Hkv, Lk, D), normal(*lead, Hkv, Lk, Dv)
    if poison:
        live = live_pairs(q, k, **options)
        dead_keys = ~_any_of_group(live, k)
        q[~live.any(axis=-1)] = np.nan
        k[dead_keys], v[dead_keys] = np.inf, np.nan
        bias = options.get("bias")
        if bias is not None and bias.shape == live.shape:
            others = excluded_pairs(q.shape, k.shape, **{**options, "bias": None})
            bias[np.broadcast_to(others, bias.shape)] = np.nan
    return dict(q=q, k=k, v=v, options=options)
