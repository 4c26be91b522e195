"""Merging of partial results, each over some of the keys, into the result over all of them.

Keys larger than memory, keys that arrive in blocks and keys on several machines are attended to
block by block: `merge_attention_states` joins the blocks' (out, lse). It is written on the array
API standard, so that arrays stay in the library they are in; where a library has something else in
its place, a function at the end of this page knows.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from fastattn._backends import PLAIN_ARRAYS, arithmetic_on, namespace_of
from fastattn._problem import as_array, check_place, describe
from fastattn.attention import AttentionResult

Array = Any

_OUT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LSE_DTYPES = ("float32", "float64")


def merge_attention_states(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array
) -> AttentionResult:
    r"""Merge the attention of the same queries over two disjoint sets of keys.

    .. math::

        lse = \log(e^{lse_a} + e^{lse_b}), \quad
        out = e^{lse_a - lse} \, out_a + e^{lse_b - lse} \, out_b

    Parameters
    ----------
    out_a : array, shape (..., Dv), dtype float16, bfloat16, float32 or float64
        A result of attention. All four arrays are only read, and may have any strides.
    lse_a : array, shape (...), dtype float32 or float64
        Its rows' log-sum-exp (natural logarithm).
    out_b : array, shape and dtype of `out_a`
        The result over other keys.
    lse_b : array, shape and dtype of `lse_a`
        Its rows' log-sum-exp.

    Returns
    -------
    AttentionResult
        New arrays ``out (..., Dv)`` in the dtype of `out_a` and ``lse (...)`` in that of `lse_a`,
        of the arguments' own library where that is NumPy, CuPy or another that follows the array
        API standard (JAX); else of NumPy, or of CuPy for arrays on a GPU (PyTorch, by DLPack).

    Raises
    ------
    TypeError
        An argument is not an array, the arguments are of several libraries or on several devices,
        or a dtype is not one of those above or differs between the two states.
    ValueError
        The shapes of `out_a` and `out_b` differ, or those of `lse_a` and `lse_b` are not theirs
        without the last axis.

    See Also
    --------
    fastattn.attention.attention_forward : Gives the states.
    fastattn.attention.attention_backward : Takes the merged state, and gives each block's share
        of the gradients.

    Notes
    -----
    A state whose lse is -inf is empty: its `out` is not read, whatever it holds, and the other
    state comes back bit for bit. Two empty states give zeros and -inf. A NaN is never hidden: a
    lse of NaN is not an empty state. The order of the two does not matter, to the last bit.

    `sinks` add to the denominator once: give them to the attention over one block only.

    The computation is done in float64 if an argument is, else in float32; each result is rounded
    once. CuPy arrays are merged on their device and the current stream, and nothing waits.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018,
       arXiv:1805.02867.
    .. [2] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, arXiv:2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.attention import attention_forward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, n, 8)) for n in (3, 50, 50))
    >>> a = attention_forward(q, k[:, :20], v[:, :20])
    >>> b = attention_forward(q, k[:, 20:], v[:, 20:])
    >>> out, lse = fastattn.merge_attention_states(*a, *b)
    >>> whole = attention_forward(q, k, v)
    >>> bool(np.allclose(out, whole.out)), bool(np.allclose(lse, whole.lse))
    (True, True)
    """
    xp, (out_a, lse_a, out_b, lse_b) = _common_library(
        out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b
    )
    out_dtype, lse_dtype = _check_states(out_a, lse_a, out_b, lse_b)
    double = "float64" in (_dtype_name(out_dtype), _dtype_name(lse_dtype))
    acc = xp.float64 if double else xp.float32

    with arithmetic_on(out_a):  # two empty states: their NaN is not selected
        a, b = _cast(xp, lse_a, acc), _cast(xp, lse_b, acc)
        difference = a - b
        # exp(smaller - larger): relative to the larger state, which has the weight 1.
        ratio = xp.exp(-xp.abs(difference))
        one = xp.ones_like(ratio)
        a_larger = difference >= 0
        total = one + ratio
        weight_a = xp.expand_dims(xp.where(a_larger, one, ratio) / total, axis=-1)
        weight_b = xp.expand_dims(xp.where(a_larger, ratio, one) / total, axis=-1)
        lse = _cast(xp, xp.where(a_larger, a, b) + xp.log1p(ratio), lse_dtype)
        out = weight_a * _cast(xp, out_a, acc) + weight_b * _cast(xp, out_b, acc)
        out = _cast(xp, out, out_dtype)

        empty_a, empty_b = lse_a == -xp.inf, lse_b == -xp.inf
        lse = _where(xp, empty_b, lse_a, _where(xp, empty_a, lse_b, lse))
        empty_a, empty_b = (xp.expand_dims(empty, axis=-1) for empty in (empty_a, empty_b))
        out = _where(xp, empty_b, out_a, _where(xp, empty_a, out_b, out))
        out = _where(xp, empty_a & empty_b, xp.zeros_like(out), out)
    return AttentionResult(out, lse)


def _common_library(**arrays: Any) -> tuple[ModuleType, list[Any]]:
    """The one namespace that all arrays follow, and the arrays as its own.

    What has no namespace of the array API standard becomes NumPy's, or CuPy's where it is on a GPU,
    as does every subclass of theirs.
    """
    taken, libraries = {}, []
    for name, array in arrays.items():
        if isinstance(array, np.ndarray) or not hasattr(array, "__array_namespace__"):
            array = as_array(name, array)
            libraries.append(namespace_of(array))
        else:
            libraries.append(array.__array_namespace__())
        taken[name] = array
    first, *others = taken
    if all(type(array) in PLAIN_ARRAYS for array in taken.values()):
        for name in others:
            check_place(name, taken[name], first, taken[first])
    elif any(library is not libraries[0] for library in libraries):
        given = ", ".join(f"{name} is {describe(array)}" for name, array in arrays.items())
        raise TypeError(f"the arrays must be of one library: {given}")
    return libraries[0], list(taken.values())


def _check_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """The dtypes of out and of lse, once dtypes and shapes are known to fit."""
    for names, pair, allowed in (
        (("out_a", "out_b"), (out_a, out_b), _OUT_DTYPES),
        (("lse_a", "lse_b"), (lse_a, lse_b), _LSE_DTYPES),
    ):
        for name, array in zip(names, pair):
            if _dtype_name(array.dtype) not in allowed:
                raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {array.dtype}")
        if pair[0].dtype != pair[1].dtype:
            raise TypeError(
                f"{names[0]} and {names[1]} must share one dtype, got {pair[0].dtype} and "
                f"{pair[1].dtype}"
            )
    if out_a.ndim < 1:
        raise ValueError("out_a must have shape (..., Dv), got ()")
    shape = tuple(out_a.shape)
    for name, array, expected in (
        ("out_b", out_b, shape),
        ("lse_a", lse_a, shape[:-1]),
        ("lse_b", lse_b, shape[:-1]),
    ):
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected}, as out_a has {shape}, got {tuple(array.shape)}"
            )
    return out_a.dtype, lse_a.dtype


def _dtype_name(dtype: Any) -> str:
    """'float32' for NumPy's, and 'library.float32' without the library; '>f4' stays itself."""
    return str(dtype).rpartition(".")[2]


def _cast(xp: ModuleType, array: Any, dtype: Any) -> Any:
    if array.dtype == dtype:
        return array
    # NumPy 2.0 lacks the function of the standard, and bfloat16 is in no standard.
    return array.astype(dtype) if xp is np else xp.astype(array, dtype)


def _where(xp: ModuleType, condition: Any, a: Any, b: Any) -> Any:
    """Elements of a or b, which share one dtype; CuPy's `where` would make bfloat16 float32."""
    if xp.__name__ == "cupy" and _dtype_name(a.dtype) == "bfloat16":
        return xp.where(condition, a.view(xp.uint16), b.view(xp.uint16)).view(a.dtype)
    return xp.where(condition, a, b)
