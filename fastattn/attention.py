"""The public functions: check the arguments, pick the backend, call it, wrap what it filled.

No arithmetic is done here. What is computed is the contract written down in the Notes of
`attention_forward`; the checks are in `_problem`, the computation is the backend's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fastattn._backends import (
    arithmetic_on,
    backend_of,
    empty_like,
    forward_again,
    is_elsewhere,
    namespace_of,
    remember_forward,
)
from fastattn._problem import (
    Problem,
    as_array,
    broadcast,
    cast,
    check_backward,
    check_gqa,
    check_outputs,
    check_wrt,
    make_problem,
)

# Arrays are NumPy's, CuPy's, or any that export __dlpack__: no type names them all.
Array = Any
Integers = Any  # an int, a sequence of ints or an integer array


class AttentionResult(NamedTuple):
    """What a forward gives: out (..., Hq, Lq, Dv), and its rows' log-sum-exp, lse (..., Hq, Lq)."""

    out: Array
    lse: Array


class AttentionGradients(NamedTuple):
    """What a backward gives: a gradient per name in `wrt`, None for the others."""

    dq: Array | None
    dk: Array | None
    dv: Array | None
    dbias: Array | None
    dsinks: Array | None
    dalibi_slopes: Array | None


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: Array | None = None,
    causal_offset: Integers | str = 0,
    window_size: tuple[int | None, int | None] | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    q_segment_ids: Integers | None = None,
    kv_segment_ids: Integers | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    seed: int | Array | None = None,
) -> Array:
    r"""Compute scaled dot product attention, as PyTorch's function of this name does.

    .. math:: out = \mathrm{softmax}(scale \; query \, key^T + attn\_mask) \, value

    PyTorch's parameters have PyTorch's names, order, defaults and meaning; the others are those of
    `fastattn.attention.attention_forward`, and every combination is allowed.

    Parameters
    ----------
    query : array, shape (..., Hq, Lq, D), dtype float16, bfloat16, float32 or float64
        Two axes (Lq, D) in all three arrays are one head without a head axis. With three axes, the
        first is the head axis (to PyTorch a batch axis, which makes no difference to the result).
        NumPy's, CuPy's, or any that exports ``__dlpack__``. Read only; any strides, read-only
        memory and broadcast views included.
    key : array, shape (..., Hkv, Lk, D), dtype of `query`
        Its leading axes are those of `query` (PyTorch would broadcast them; here `np.broadcast_to`
        does, without a copy), and so is its library, and its device on a GPU.
    value : array, shape (..., Hkv, Lk, Dv), dtype of `query`
        Its leading axes, heads and length are those of `key`.
    attn_mask : array, bool or a float dtype, optional
        Broadcasts to (..., Hq, Lq, Lk), or (Lq, Lk) without a head axis. Bool: True = attend. Float
        (any of the four dtypes): added to the scores, -inf = excluded.
    dropout_p : float in [0, 1], default 0.0
        The probability that a pair is dropped. Unlike in PyTorch, it needs `seed`.
    is_causal : bool, default False
        Exclude keys ``j > i``, counted from the upper left, see `causal_offset`. Unlike in PyTorch,
        `attn_mask` may be given too.
    scale : float, optional
        Finite, of any sign; default ``1 / sqrt(D)``.
    enable_gqa : bool, default False
        Let Hkv be any divisor of Hq. Needed unless Hkv is Hq or 1.
    bias, causal_offset, window_size, q_lens, kv_lens : optional
        As in `fastattn.attention.attention_forward`, and so are those that follow.
    q_segment_ids, kv_segment_ids, softcap, alibi_slopes, sinks, seed : optional
        Options that PyTorch's function does not have.

    Returns
    -------
    array, shape (..., Hq, Lq, Dv), dtype of `query`
        New, laid out in memory as `query` is; (Lq, Dv) without a head axis. A CuPy array where
        `query` is in the memory of a GPU, else an ndarray.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention.attention_forward`, with the names of this function; TypeError also
        where `enable_gqa` is not a bool, ValueError where Hkv is neither Hq nor 1 and `enable_gqa`
        is False.
    MemoryError
        The result or a workspace cannot be allocated.

    See Also
    --------
    fastattn.attention.attention_forward : Gives the log-sum-exp as well, and takes `out`.
    fastattn.attention.attention_backward : The gradients.

    Notes
    -----
    A query with no key left gives exact zeros, in PyTorch since its pull request 133882. NaN and
    infinity show wherever the plain formula has them, and never through an excluded pair. All of
    the Notes of `fastattn.attention.attention_forward` hold.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((2, 4, 5, 8), dtype=np.float32)
    >>> key, value = rng.standard_normal((2, 2, 4, 7, 8), dtype=np.float32)
    >>> fastattn.scaled_dot_product_attention(query, key, value).shape
    (2, 4, 5, 8)

    Each key head may serve several query heads, and padded keys be cut off by their lengths:

    >>> few = key[:, :2], value[:, :2]
    >>> out = fastattn.scaled_dot_product_attention(query, *few, enable_gqa=True, kv_lens=[7, 3])
    >>> out.shape
    (2, 4, 5, 8)
    """
    names = ("query", "key", "value")
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    headless = query.ndim == key.ndim == value.ndim == 2
    if headless:
        query, key, value = query[None], key[None], value[None]
    options = (
        attn_mask, bias, is_causal, causal_offset, window_size, q_lens, kv_lens, q_segment_ids,
        kv_segment_ids, scale, softcap, alibi_slopes, sinks, dropout_p, seed, True, None,
    )  # fmt: skip
    out = _attend(query, key, value, options, enable_gqa, names).out
    return out[0] if headless else out


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    causal_offset: Integers | str = 0,
    window_size: tuple[int | None, int | None] | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    q_segment_ids: Integers | None = None,
    kv_segment_ids: Integers | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    out: Array | tuple[Array, Array] | None = None,
    num_threads: int | None = None,
) -> AttentionResult:
    r"""Compute exact attention, and the log-sum-exp of its scores.

    .. math::

        s_{ij} &= softcap \, \tanh(scale \, q_i \cdot k_j / softcap) + mask_{ij} + bias_{ij}
                 - slope_h \, |i + offset - j| \\
        lse_i &= \log(\textstyle\sum_j e^{s_{ij}} + e^{sink_h}), \qquad
        out_i = \textstyle\sum_j z_{ij} \, e^{s_{ij} - lse_i} \, v_j

    The sums run over the pairs (i, j) that no option excludes; each term is there if its option is
    (without softcap, the score is ``scale * q_i . k_j``), and z is the factor of dropout. The
    scores are never held as a matrix.

    Parameters
    ----------
    q : array, shape (..., Hq, Lq, D), dtype float16, bfloat16, float32 or float64
        Three axes or more. A NumPy or CuPy array of any strides, unaligned, zero and negative ones
        included (a (B, L, H, D) array comes in as ``swapaxes(1, 2)``); read-only arrays,
        `numpy.memmap` and other subclasses are taken as plain arrays, and any other array that
        exports ``__dlpack__`` without a copy (PyTorch, JAX; bfloat16 too), on the CPU as NumPy's
        and on a CUDA device as CuPy's. bfloat16 is that of ml_dtypes. Inputs are never written, and
        may overlap one another.
    k : array, shape (..., Hkv, Lk, D), dtype of `q`
        Its leading axes are those of `q`. Hq is a multiple of Hkv, and query head h reads key head
        ``h // (Hq // Hkv)``. All arrays are of the library of `q`, and on its device.
    v : array, shape (..., Hkv, Lk, Dv), dtype of `q`
        Any axis of the three may have length 0.
    attn_mask : array, bool or one of the four float dtypes, optional
        Broadcasts to (..., Hq, Lq, Lk) and is never expanded in memory. Bool: True = attend. Float:
        added to the scores in float32 (float64 for float64 inputs), where -inf excludes the pair
        and any finite number does not. Bool or -inf is the better way to exclude.
    bias : array, one of the four float dtypes, optional
        Added like a float `attn_mask`; `attention_backward` gives its gradient. -inf excludes here
        as well, whatever `attn_mask` holds.
    is_causal : bool, default False
        Exclude keys ``j > i + causal_offset``.
    causal_offset : int, one per batch entry, or "lower_right", default 0
        The key that faces query 0, for `is_causal`, `window_size` and `alibi_slopes`, at most 2**61
        either way. 0 is the upper left corner, as in PyTorch, JAX and ONNX; "lower_right" puts the
        last query on the last key: key length - query length, of `kv_lens` and `q_lens` where
        given. With Lq = 3, Lk = 5 the causal mask is::

            causal_offset=0      "lower_right" (2)
               1 0 0 0 0             1 1 1 0 0
               1 1 0 0 0             1 1 1 1 0
               1 1 1 0 0             1 1 1 1 1

    window_size : (left, right) of ints >= 0 or None, optional
        Exclude keys ``j < i + causal_offset - left`` and ``j > i + causal_offset + right``; None =
        unbounded on that side.
    q_lens : int, sequence of ints or integer array that broadcasts to the leading axes, optional
        Queries ``i >= q_lens[b]`` do not exist: their out is 0, their lse -inf. In [0, Lq]. With
        CuPy arrays, this and the other integers may be on the host or on the device, see the Notes.
    kv_lens : int, sequence of ints or integer array that broadcasts to the leading axes, optional
        Exclude keys ``j >= kv_lens[b]``. In [0, Lk].
    q_segment_ids, kv_segment_ids : integers that broadcast to (..., Lq) and (..., Lk), optional
        Exclude pairs whose ids differ. Both or neither.
    scale : float, optional
        Finite, of any sign; default ``1 / sqrt(D)``, and 1 for D = 0.
    softcap : float, optional
        Finite and positive; None or 0 = off.
    alibi_slopes : array, shape (Hq,), one of the four float dtypes, optional
        Subtract ``alibi_slopes[h] * |i + causal_offset - j|`` from the scores.
    sinks : array, shape (Hq,), one of the four float dtypes, optional
        A score per head of a key without a value: it adds to the denominator only.
    dropout_p : float in [0, 1], default 0.0
        The probability that a pair is dropped; those kept are scaled by ``1 / (1 - dropout_p)``.
        `lse` is that before dropout.
    seed : int in [0, 2**64), optional
        Required when ``dropout_p > 0``. The same seed drops the same pairs, in `attention_backward`
        too, on any machine, CPU or GPU, and for any number of threads. With CuPy arrays, it may be
        one of uint64 with one element.
    out : array, or tuple (out, lse) of arrays, optional
        Where to put the results: of the shapes below, writeable, of any strides, such as a free
        slot of a packed buffer; no element may belong to an input or to the other. `out` has the
        dtype of `q`, or is float32 for 16-bit inputs (then nothing is rounded to 16 bits); `lse`
        has the dtype below.
    num_threads : int >= 1, optional
        The most threads to use; default: as `fastattn.set_num_threads` said, else OpenMP's number.
        Without a meaning on a GPU.

    Returns
    -------
    AttentionResult
        A named tuple of ``out (..., Hq, Lq, Dv)``, dtype of `q`, laid out in memory as `q` is, and
        ``lse (..., Hq, Lq)``, the natural logarithm, float32 (float64 for float64). New arrays of
        NumPy, or of CuPy where `q` is in the memory of a GPU, unless `out` was given: then that
        array itself, or the view by which NumPy or CuPy shows it if it is of another library.

    Raises
    ------
    TypeError
        An array is not a NumPy or CuPy array or one that exports ``__dlpack__``; is a masked array,
        a `numpy.matrix`, or of another dtype (object and big-endian included); a producer refuses
        to export it (one that requires a gradient needs ``.detach()``). One array is of NumPy and
        another of CuPy, or they are on different devices; an array is on a CUDA device, and CuPy
        or, for bfloat16, ml_dtypes is missing. `q`, `k`, `v` differ in dtype. `attn_mask` holds
        integers. Lengths, offsets, segment ids, `seed`, `num_threads` or a side of `window_size`
        are not ints (a bool is none), `is_causal` is not a bool, `scale`, `softcap`, `dropout_p`
        not a real number, `window_size` not a pair. `out` has a wrong dtype.
    ValueError
        Shapes do not fit, Hq is not a multiple of Hkv, a mask or lengths do not broadcast to (but
        would enlarge) their shape, `alibi_slopes` or `sinks` are not (Hq,). A length is negative or
        beyond its axis, `causal_offset` another word or beyond 2**61, a window side negative, one
        of the segment ids missing, an integer beyond 64 bits. `scale` or `softcap` is not finite,
        `softcap` negative, `dropout_p` outside [0, 1] or NaN, `seed` missing or out of range,
        `num_threads` below 1. `out` or `lse` has a wrong shape, is read-only, or shares an element
        with an input, with the other or with itself.
    ImportError
        CuPy arrays are given, and CuPy is older than this package needs.
    MemoryError
        A result or a workspace cannot be allocated.

    See Also
    --------
    attention_backward : The gradients.
    fastattn.merge_attention_states : Joins results over several blocks of keys.
    fastattn.scaled_dot_product_attention : PyTorch's interface.

    Notes
    -----
    *Masked rows.* A query with no key left gives ``out`` 0 and ``lse`` -inf (``sinks[h]`` where
    given), exactly, and zero in every gradient. It is dead because its pairs are excluded, never
    because of the values of its scores; a row masked by a large negative number is not dead.

    *NaN.* An excluded pair has no influence, to the last bit: whatever ``k[j]``, ``v[j]`` hold, NaN
    and uninitialised memory included, row i does not change when (i, j) is excluded. Anything else
    that is not finite in the plain formula is not finite here.

    *Numerics.* Accumulation in float32, in float64 for float64; results are rounded once. The same
    bits come out for any number of threads, for any layout of the arrays, whatever else is in the
    batch, and in every run on one instruction set.

    *Memory.* A small workspace per thread beside the results, whatever Lq and Lk.

    *GPU.* CuPy arrays are computed with on their own device, on the stream that is CuPy's current
    one there, and nothing waits: the call returns before the work is done. Kernels are compiled at
    the first call of their kind; after it, such a call can be captured in a CUDA graph. Integers on
    the host are checked as ever and moved, and a graph holds their values. Integers on the device
    have their shape and dtype checked and are never read by the host, so a graph reads what is in
    them at each replay: a length outside its axis counts as the nearest that is inside. Subnormal
    float32 numbers count as zero.

    References
    ----------
    .. [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re, "FlashAttention: Fast and Memory-Efficient
       Exact Attention with IO-Awareness", 2022, arXiv:2205.14135.
    .. [2] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, arXiv:2307.08691.
    .. [3] J. Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
       Low-precision", 2024, arXiv:2407.08608.
    .. [4] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018,
       arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.attention import attention_forward
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 16, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 4, 32, 64), dtype=np.float32)
    >>> out, lse = attention_forward(q, k, v, is_causal=True, causal_offset="lower_right")
    >>> out.shape, lse.shape
    ((2, 8, 16, 64), (2, 8, 16))

    The result may go to a free slot of a packed buffer:

    >>> packed = rng.standard_normal((2, 16, 4, 8, 64), dtype=np.float32).transpose(2, 0, 3, 1, 4)
    >>> q, k, v, slot = packed
    >>> result = attention_forward(q, k, v, out=slot)
    >>> result.out is slot
    True
    """
    options = (
        attn_mask, bias, is_causal, causal_offset, window_size, q_lens, kv_lens, q_segment_ids,
        kv_segment_ids, scale, softcap, alibi_slopes, sinks, dropout_p, seed, True, num_threads,
    )  # fmt: skip
    if out is None:
        return _attend(q, k, v, options)
    problem = make_problem(q, k, v, *options)
    inputs = {
        "q": q, "k": k, "v": v, "attn_mask": attn_mask, "bias": bias,
        "causal_offset": causal_offset, "q_lens": q_lens, "kv_lens": kv_lens,
        "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "seed": seed,
    }  # fmt: skip
    return _forward(problem, *check_outputs(problem, out, inputs))


def _attend(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], enable_gqa: Any = True,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> AttentionResult:  # fmt: skip
    """A forward without `out`; `options` are as `make_problem` takes them."""
    kind = None
    if type(q) is not np.ndarray:
        kind, results = forward_again(q, k, v, (*options, enable_gqa))
        if results is not None:
            return AttentionResult(*results)
    problem = make_problem(q, k, v, *options, names)
    check_gqa(problem, enable_gqa, names)
    result = _forward(problem)
    if kind is not None:
        remember_forward(kind, problem, *result)
    return result


def _forward(
    problem: Problem, out: Array | None = None, lse: Array | None = None
) -> AttentionResult:
    """Allocate what was not given, and have it filled; out is laid out in memory as q is."""
    q = problem.q
    if type(q) is not np.ndarray and is_elsewhere(q):  # CuPy allocates on the current device
        with arithmetic_on(q):
            return _forward(problem, out, lse)
    try:
        rows = q.shape[:-1]
        if out is None:
            out = empty_like(q, (*rows, problem.Dv))
        if lse is None:
            lse = type(q)(rows, problem.acc)
    except ValueError as error:  # what NumPy says to more bytes than there are addresses
        shape = (*q.shape[:-1], problem.Dv)
        raise MemoryError(f"no memory for results of shape {shape}: {error}") from error
    backend_of(q).forward(problem, out, lse)
    return AttentionResult(out, lse)


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    causal_offset: Integers | str = 0,
    window_size: tuple[int | None, int | None] | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    q_segment_ids: Integers | None = None,
    kv_segment_ids: Integers | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    dlse: Array | None = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    deterministic: bool = True,
    num_threads: int | None = None,
) -> AttentionGradients:
    r"""Compute the gradients of attention, from what the forward gave.

    With :math:`p_{ij} = e^{s_{ij} - lse_i}` (0 where excluded), z the factor of dropout and
    :math:`D_i = dout_i \cdot out_i`:

    .. math::

        t_{ij} &= p_{ij} \, (z_{ij} \, dout_i \cdot v_j - D_i + dlse_i), \qquad
        ds_{ij} = t_{ij} \, (1 - \tanh^2) \text{ with softcap, else } t_{ij} \\
        dq_i &= scale \textstyle\sum_j ds_{ij} k_j, \qquad
        dk_j = scale \textstyle\sum_i ds_{ij} q_i, \qquad
        dv_j = \textstyle\sum_i z_{ij} p_{ij} \, dout_i \\
        dbias &= \textstyle\sum t_{ij} \text{ over its broadcast axes}, \quad
        dsinks_h = \textstyle\sum_i e^{sinks_h - lse_i} (dlse_i - D_i), \quad
        dalibi\_slopes_h = - \textstyle\sum_{ij} t_{ij} \, |i + offset - j|

    Parameters
    ----------
    dout : array, shape (..., Hq, Lq, Dv), dtype of `q`
        The gradient with respect to `out`.
    q, k, v : array
        As given to `attention_forward`.
    out : array, shape (..., Hq, Lq, Dv), dtype of `q`, or float32 for 16-bit inputs
        The result of `attention_forward`, or of `fastattn.merge_attention_states` over several
        blocks of keys: the gradients are then this block's share, and those of `q` add up.
    lse : array, shape (..., Hq, Lq), float32 (float64 for float64 inputs)
        As `out`.
    attn_mask, bias, is_causal, causal_offset, window_size, q_lens, kv_lens : optional
        As given to `attention_forward`, and so are those that follow.
    q_segment_ids, kv_segment_ids, scale, softcap, alibi_slopes, sinks, dropout_p, seed : optional
        The gradients are those of that computation only with the same options.
    dlse : array, shape (..., Hq, Lq), one of the four float dtypes, optional
        The gradient with respect to `lse`, where the loss depends on it.
    wrt : iterable of str, default ("q", "k", "v")
        The wanted gradients, any of "q", "k", "v", "bias", "sinks", "alibi_slopes"; a lone name may
        be given as a str. The others are not computed.
    deterministic : bool, default True
        The gradients have the same bits in every run. False lets a GPU give that up for speed.
    num_threads : int >= 1, optional
        The most threads to use; default: as `fastattn.set_num_threads` said, else OpenMP's number.

    Returns
    -------
    AttentionGradients
        A named tuple of dq, dk, dv, dbias, dsinks, dalibi_slopes: new arrays, each of the library,
        shape and dtype of its argument and laid out in memory as it is, or None if not in `wrt`.

    Raises
    ------
    TypeError
        As `attention_forward`; also where `dout`, `out`, `lse` or `dlse` has a wrong dtype, `wrt`
        does not hold names, or `deterministic` is not a bool.
    ValueError
        As `attention_forward`; also where `dout`, `out`, `lse` or `dlse` has a wrong shape, `wrt`
        holds an unknown name or that of an argument that was not given.
    ImportError
        As `attention_forward`.
    MemoryError
        A result or a workspace cannot be allocated.

    See Also
    --------
    attention_forward : The forward, with all options described.

    Notes
    -----
    A query with no key left has a ``dq`` of exact zeros and adds nothing to any other gradient: its
    `dout`, `out` and `dlse` are not read (rows whose `lse` is -inf). An excluded pair has no
    influence, to the last bit: whatever ``q[i]``, ``dout[i]`` hold, ``dk[j]`` and ``dv[j]`` do not
    change when (i, j) is excluded. Anything else that is not finite in the plain formula is not
    finite here.

    Sums are accumulated in float32, in float64 for float64, and rounded once. The same bits come
    out for any number of threads, layout and batch, as in the forward. The scores are computed
    again, so no memory of size Lq x Lk is used, but for a ``dbias`` of that size. What
    `attention_forward` says of GPUs holds here.

    References
    ----------
    .. [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re, "FlashAttention: Fast and Memory-Efficient
       Exact Attention with IO-Awareness", 2022, arXiv:2205.14135.
    .. [2] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, arXiv:2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.attention import attention_backward, attention_forward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 2, 8, 16, 64), dtype=np.float32)
    >>> bias = np.zeros((8, 1, 16), dtype=np.float32)
    >>> out, lse = attention_forward(q, k, v, bias=bias)
    >>> grads = attention_backward(dout, q, k, v, out, lse, bias=bias, wrt=("q", "bias"))
    >>> grads.dq.shape, grads.dbias.shape, grads.dk
    ((2, 8, 16, 64), (8, 1, 16), None)
    """
    problem = make_problem(
        q, k, v, attn_mask, bias, is_causal, causal_offset, window_size,
        q_lens, kv_lens, q_segment_ids, kv_segment_ids, scale, softcap, alibi_slopes, sinks,
        dropout_p, seed, deterministic, num_threads,
    )  # fmt: skip
    dout, out, lse, dlse = check_backward(problem, dout, out, lse, dlse)
    wanted = check_wrt(wrt, bias, sinks, alibi_slopes)

    return _backward(problem, dout, out, lse, dlse, wanted, bias, sinks, alibi_slopes)


def _backward(
    problem: Problem, dout: Array, out: Array, lse: Array, dlse: Array | None,
    wanted: frozenset[str], bias: Any, sinks: Any, alibi_slopes: Any,
) -> AttentionGradients:  # fmt: skip
    """Allocate what is wanted, have it filled, and give it the dtypes of its arguments."""
    q = problem.q
    if type(q) is not np.ndarray and is_elsewhere(q):  # CuPy allocates on the current device
        with arithmetic_on(q):
            return _backward(problem, dout, out, lse, dlse, wanted, bias, sinks, alibi_slopes)
    xp = namespace_of(q)
    dq = empty_like(q, q.shape) if "q" in wanted else None
    dk = empty_like(problem.k, problem.k.shape) if "k" in wanted else None
    dv = empty_like(problem.v, problem.v.shape) if "v" in wanted else None
    dbias = dbias_of_scores = None
    if "bias" in wanted:
        dbias = xp.empty_like(as_array("bias", bias))
        dbias_of_scores = _broadcast_writable(dbias, (*q.shape[:-1], problem.Lk))
        if dbias_of_scores.size == 0:  # a sum over nothing, which no backend gets to see
            dbias.view(f"u{dbias.itemsize}").fill(0)  # which CuPy knows for every dtype
    dsinks = xp.empty(problem.Hq, problem.acc) if "sinks" in wanted else None
    dalibi_slopes = xp.empty(problem.Hq, problem.acc) if "alibi_slopes" in wanted else None

    backend_of(q).backward(
        problem, dout, out, lse, dlse, dq, dk, dv, dbias_of_scores, dsinks, dalibi_slopes
    )
    if dsinks is not None:
        dsinks = cast(dsinks, as_array("sinks", sinks).dtype)
    if dalibi_slopes is not None:
        dalibi_slopes = cast(dalibi_slopes, as_array("alibi_slopes", alibi_slopes).dtype)
    return AttentionGradients(dq, dk, dv, dbias, dsinks, dalibi_slopes)


def _broadcast_writable(array: Array, shape: tuple[int, ...]) -> Array:
    """The array as `broadcast` shows it, but to be written: axes it lacks have stride 0."""
    view = broadcast("bias", array, shape)
    if type(array) is not np.ndarray:  # CuPy's views may be written
        return view
    return np.lib.stride_tricks.as_strided(array, view.shape, view.strides, writeable=True)
