"""Softmax whose rows may be empty: what the attention kernels fuse, as two functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn._backends import arithmetic_on, namespace_of
from fastattn._problem import accumulation_dtype, as_array, as_int, beside

Array = Any


def safe_softmax(scores: Array, axis: int = -1) -> Array:
    r"""Compute the softmax along an axis, with zeros where every score is -inf.

    .. math:: p_j = \exp(s_j - m) / \sum_l \exp(s_l - m), \quad m = \max_l s_l

    Parameters
    ----------
    scores : array of one axis or more, dtype float16, bfloat16, float32 or float64
        NumPy's, CuPy's, or any that exports ``__dlpack__``. Read only; any strides, read-only
        memory included. -inf excludes an element.
    axis : int, default -1
        The axis whose elements sum to one.

    Returns
    -------
    array, shape and dtype of `scores`
        A new array in the memory order of `scores`, never a view; of CuPy on the device of
        `scores` where that is on a GPU, else of NumPy.

    Raises
    ------
    TypeError
        `scores` is not an array of one of the four dtypes in native byte order (a masked array,
        a list), or `axis` is not an int.
    ValueError
        `axis` is not an axis of `scores`, or there is none.

    See Also
    --------
    safe_softmax_backward : The gradient.
    fastattn.attention.attention_forward : Attention without the matrix of probabilities.

    Notes
    -----
    A slice that is all -inf gives exact zeros, as PyTorch's fully masked attention rows do
    (pull request 133882) and the ONNX `Attention` operator demands. Nothing else is made finite:
    a NaN or a +inf makes its slice NaN, as in the plain formula. Zero-length axes are legal.

    16-bit scores are computed in float32 and rounded once. On a GPU, subnormal float32 numbers
    count as zero, and nothing waits: the work goes to CuPy's current stream.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018,
       arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> scores = np.array([[0.0, 0.0, -np.inf, 0.0], [-np.inf] * 4], dtype=np.float16)
    >>> fastattn.safe_softmax(scores)
    array([[0.3333, 0.3333, 0.    , 0.3333],
           [0.    , 0.    , 0.    , 0.    ]], dtype=float16)
    """
    scores = as_array("scores", scores)
    acc = accumulation_dtype("scores", scores)
    axis = _axis(axis, "scores", scores)
    xp = namespace_of(scores)
    with arithmetic_on(scores):  # inf - inf is the NaN that the formula has there
        if scores.size == 0:
            return xp.empty_like(scores)
        s = scores.astype(acc, copy=False)
        row_max = s.max(axis=axis, keepdims=True)
        # The maximum is -inf only where every score is: a NaN would be the maximum.
        empty = row_max == -np.inf
        p = xp.exp(s - xp.where(empty, 0, row_max))
        p /= xp.where(empty, 1, p.sum(axis=axis, keepdims=True))
        return _like(scores, p)


def safe_softmax_backward(dprobs: Array, probs: Array, axis: int = -1) -> Array:
    r"""Compute the gradient of `safe_softmax` with respect to its scores.

    .. math:: ds_j = p_j \, (dp_j - \sum_l p_l \, dp_l)

    Parameters
    ----------
    dprobs : array of one axis or more, dtype float16, bfloat16, float32 or float64
        The gradient with respect to the probabilities. Read only; any strides; where `probs` is.
    probs : array, shape and dtype of `dprobs`
        What `safe_softmax` returned. Read only; any strides.
    axis : int, default -1
        The axis that `safe_softmax` was given.

    Returns
    -------
    array, shape and dtype of `probs`
        A new array in the memory order of `probs`, of the library that `safe_softmax` gives.

    Raises
    ------
    TypeError
        An argument is not an array of one of the four dtypes in native byte order, the two
        dtypes differ, one is of NumPy and one of CuPy, they are on different devices, or `axis` is
        not an int.
    ValueError
        The shapes differ, or `axis` is not one of their axes, or there is none.

    See Also
    --------
    safe_softmax : The forward.

    Notes
    -----
    Where `probs` is exactly zero the gradient is exactly zero and `dprobs` is not read: it is
    selected, not multiplied, so NaN or uninitialised memory there changes nothing. A slice of
    zeros has a gradient of zeros. Any other NaN shows, as in the plain formula.

    16-bit arrays are computed in float32 and rounded once. Zero-length axes are legal.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> probs = np.array([0.5, 0.5, 0.0], dtype=np.float32)
    >>> fastattn.safe_softmax_backward(np.array([1, 3, np.nan], dtype=np.float32), probs)
    array([-0.5,  0.5,  0. ], dtype=float32)
    """
    probs = as_array("probs", probs)
    dprobs = beside("dprobs", dprobs, "probs", probs)
    accumulation_dtype("dprobs", dprobs)
    acc = accumulation_dtype("probs", probs)
    if dprobs.dtype != probs.dtype:
        raise TypeError(
            f"dprobs and probs must share one dtype: dprobs is {dprobs.dtype.name}, "
            f"probs is {probs.dtype.name}"
        )
    if dprobs.shape != probs.shape:
        raise ValueError(f"dprobs must have the shape of probs, {probs.shape}, got {dprobs.shape}")
    axis = _axis(axis, "probs", probs)
    xp = namespace_of(probs)
    with arithmetic_on(probs):
        p = probs.astype(acc, copy=False)
        live = p != 0
        dp = xp.where(live, dprobs.astype(acc, copy=False), 0)
        ds = p * (dp - (p * dp).sum(axis=axis, keepdims=True))
        return _like(probs, xp.where(live, ds, 0))


def _like(argument: Array, result: Array) -> Array:
    """The result in the dtype and memory order of the argument."""
    if type(result) is np.ndarray:  # whose order NumPy has kept
        return result.astype(argument.dtype, copy=False)
    cast = namespace_of(argument).empty_like(argument)  # CuPy makes everything in C order
    cast[...] = result
    return cast


def _axis(axis: Any, name: str, array: Array) -> int:
    """The axis counted from the front."""
    index, ndim = as_int("axis", axis), array.ndim
    if ndim == 0:
        raise ValueError(f"{name} must have one axis or more, got shape ()")
    if not -ndim <= index < ndim:
        raise ValueError(f"axis must be in [{-ndim}, {ndim}) for {ndim} axes, got {index}")
    return index % ndim
