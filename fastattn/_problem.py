"""Arguments in, one `Problem` out: every argument is checked here, once, for every backend.

A `Problem` is an immutable value. Its arrays are plain, broadcast and in range, its options are
folded into the fewest that say the same, and nothing behind it looks at a user's argument again.
Small calls feel each step made here, so an option that is absent costs one comparison.

The library and device of q are those of the call: every array must be there, but for integers on
the host, which are checked and moved. What is on a GPU is never read here, for that would wait.

Every error names the argument, says what it was and what was expected, and is raised before a
result is allocated or written.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastattn._backends import (
    PLAIN_ARRAYS,
    arithmetic_on,
    is_cupy_array,
    load_cupy,
    namespace_of,
    readable,
    to_device,
)
from fastattn._dlpack import from_dlpack, is_on_device, refuse_read_only
from fastattn._overlap import addresses, overlap, overlaps_itself

Array = Any  # checked: an ndarray or a cupy.ndarray

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_INT64 = np.dtype(np.int64)
_ACCUMULATION: dict[str, np.dtype] = {
    "float16": _FLOAT32,
    "bfloat16": _FLOAT32,
    "float32": _FLOAT32,
    "float64": _FLOAT64,
}
_FLOATS = ", ".join(_ACCUMULATION)
# dtype -> its name, native byte order only; bfloat16 joins when first seen, as its dtype belongs
# to ml_dtypes, which is not imported for it.
_FLOAT_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64")}

# A window side beyond any axis acts as this one, and offsets end here, so that a kernel's
# i + offset + right stays within 64 bits.
_WIDEST_WINDOW = 1 << 62
_FARTHEST_OFFSET = 1 << 61

WRT_NAMES = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


class Problem(NamedTuple):
    """One attention problem, checked: what a backend reads.

    A tuple, because creating one must cost little; `make_problem` fills it in this order.
    """

    lead: tuple[int, ...]  # the leading axes; batch is their product
    batch: int
    Hq: int
    Hkv: int
    group: int  # Hq // Hkv, and 0 where there are no heads
    Lq: int
    Lk: int
    D: int
    Dv: int
    dtype: str  # of q, k, v: "float16", "bfloat16", "float32" or "float64"
    acc: np.dtype  # accumulation: float32, or float64 for float64
    q: Array  # lead + (Hq, Lq, D), any strides and alignment; so are k and v
    k: Array
    v: Array
    attn_mask: Array | None  # view of shape lead + (Hq, Lq, Lk), bool or float; so is bias
    bias: Array | None
    window_left: int | None  # None = unbounded; is_causal is window_right = 0
    window_right: int | None
    # int64 (batch,), contiguous; None = 0 everywhere; with CuPy also an int, for all entries
    causal_offset: Array | int | None
    # int64 (batch,), contiguous; within the axis, unless the caller had them on the device
    q_lens: Array | None
    kv_lens: Array | None
    q_segment_ids: Array | None  # int64 views, lead + (Lq,) and lead + (Lk,); both or none
    kv_segment_ids: Array | None
    scale: float  # finite
    softcap: float  # 0.0 = off
    alibi_slopes: Array | None  # (Hq,), contiguous, dtype acc; so is sinks
    sinks: Array | None
    dropout_p: float
    seed: Array | int  # in [0, 2**64), or CuPy's uint64 (1,) or (); 0 when dropout_p is 0
    deterministic: bool
    num_threads: int | None


def make_problem(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    bias: Any,
    is_causal: Any,
    causal_offset: Any,
    window_size: Any,
    q_lens: Any,
    kv_lens: Any,
    q_segment_ids: Any,
    kv_segment_ids: Any,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    seed: Any,
    deterministic: Any,
    num_threads: Any,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> Problem:
    """Check every argument of a call and normalise it; `names` is what q, k, v are called there.

    Positional, because passing this many keywords would take longer than all the checks.
    """
    if not (type(q) is type(k) is type(v) is np.ndarray):  # plain as they are
        q = as_array(names[0], q)
        k = beside(names[1], k, names[0], q)
        v = beside(names[2], v, names[0], q)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    q_dtype = q.dtype
    dtype = _FLOAT_NAMES.get(q_dtype)
    # NumPy's own dtypes are one object each, and `is` is the quicker test.
    if dtype is None or not (k.dtype is q_dtype is v.dtype or k.dtype == q_dtype == v.dtype):
        dtype = _common_dtype(names, (q, k, v))
    acc = _ACCUMULATION[dtype]
    lead = q_shape[:-3]
    if (
        len(q_shape) < 3
        or len(k_shape) != len(q_shape)
        or k_shape[:-3] != lead
        or k_shape[-1] != q_shape[-1]
        or v_shape[:-1] != k_shape[:-1]
    ):
        _refuse_shapes(names, q_shape, k_shape, v_shape)
    Hq, Lq, D = q_shape[-3:]
    Hkv, Lk, Dv = v_shape[-3:]
    if Hkv == Hq:
        group = 1 if Hq else 0
    elif Hkv and Hq % Hkv == 0:
        group = Hq // Hkv
    else:
        raise ValueError(
            f"{names[0]} has {Hq} heads and {names[1]} has {Hkv} (axis -3): the number of query "
            "heads must be a multiple of the number of key heads"
        )
    batch = math.prod(lead)

    if attn_mask is not None:
        attn_mask = _broadcast_mask("attn_mask", attn_mask, names[0], q, (*lead, Hq, Lq, Lk))
    if bias is not None:
        bias = _broadcast_mask("bias", bias, names[0], q, (*lead, Hq, Lq, Lk))

    if q_lens is not None:
        meaning = f"the length of {names[0]}'s axis -2"
        q_lens = _per_batch("q_lens", q_lens, names[0], q, lead, batch, 0, Lq, meaning)
    if kv_lens is not None:
        meaning = f"the length of {names[1]}'s axis -2"
        kv_lens = _per_batch("kv_lens", kv_lens, names[0], q, lead, batch, 0, Lk, meaning)
    if causal_offset is None or (type(causal_offset) is int and causal_offset == 0):
        causal_offset = None
    elif isinstance(causal_offset, str):
        causal_offset = _lower_right(causal_offset, q_lens, kv_lens, q, batch, Lq, Lk)
    else:
        given = causal_offset
        causal_offset = _per_batch(
            "causal_offset", causal_offset, names[0], q, lead, batch,
            -_FARTHEST_OFFSET, _FARTHEST_OFFSET, "far beyond any axis",
        )  # fmt: skip
        if type(given) is int and type(q) is not np.ndarray:
            causal_offset = given  # one number for all entries needs no memory of the device
    window_left = window_right = None
    if window_size is not None:
        window_left, window_right = _window(window_size)
    if _flag("is_causal", is_causal):
        window_right = 0

    if q_segment_ids is not None or kv_segment_ids is not None:
        if q_segment_ids is None or kv_segment_ids is None:
            given, missing = "q_segment_ids", "kv_segment_ids"
            if q_segment_ids is None:
                given, missing = missing, given
            raise ValueError(f"{given} was given without {missing}: segments need both")
        q_segment_ids = _segments("q_segment_ids", q_segment_ids, names[0], q, (*lead, Lq))
        kv_segment_ids = _segments("kv_segment_ids", kv_segment_ids, names[0], q, (*lead, Lk))

    if scale is None:
        scale = 1.0 / math.sqrt(D) if D else 1.0
    else:
        scale = _finite("scale", scale)
    if softcap is None:
        softcap = 0.0
    else:
        softcap = _finite("softcap", softcap)
        if softcap < 0.0:
            raise ValueError(f"softcap must be positive, or 0 or None for off, got {softcap}")
    if alibi_slopes is not None:
        alibi_slopes = _per_head("alibi_slopes", alibi_slopes, names[0], q, Hq, acc)
    if sinks is not None:
        sinks = _per_head("sinks", sinks, names[0], q, Hq, acc)

    if seed is not None:
        seed = _seed(seed, names[0], q)
    if type(dropout_p) is not float:
        dropout_p = _real("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:  # NaN as well
        raise ValueError(f"dropout_p must be a probability, 0 to 1, got {dropout_p}")
    if dropout_p == 0.0:
        seed = 0
    elif seed is None:
        raise ValueError(f"seed must be given when dropout_p > 0 (dropout_p is {dropout_p})")

    deterministic = _flag("deterministic", deterministic)
    if num_threads is not None:
        num_threads = thread_count("num_threads", num_threads)

    if type(q) is not np.ndarray and not (
        causal_offset is q_lens is kv_lens is q_segment_ids is kv_segment_ids is None
    ):
        causal_offset, q_lens, kv_lens, q_segment_ids, kv_segment_ids = (
            to_device(array, q) if type(array) is np.ndarray else array
            for array in (causal_offset, q_lens, kv_lens, q_segment_ids, kv_segment_ids)
        )

    return tuple.__new__(  # a third of the time that Problem(...) takes
        Problem,
        (
            lead, batch, Hq, Hkv, group, Lq, Lk, D, Dv, dtype, acc, q, k, v,
            attn_mask, bias, window_left, window_right, causal_offset, q_lens, kv_lens,
            q_segment_ids, kv_segment_ids, scale, softcap, alibi_slopes, sinks,
            dropout_p, seed, deterministic, num_threads,
        ),
    )  # fmt: skip


def as_array(name: str, value: Any, written: bool = False) -> Array:
    """An array argument as a plain array over the same memory; no dtype is refused here."""
    if type(value) in PLAIN_ARRAYS:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost; pass {name}.data (what attention "
            "is to leave out, attn_mask says)"
        )
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} is an np.matrix, which is always 2-D; pass np.asarray({name})")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if isinstance(value, np.generic):  # what NumPy makes of a 0-d array wherever it can
        return np.asarray(value)
    if is_cupy_array(value):
        cupy = load_cupy()
        if isinstance(value, cupy.ndarray):
            return value.view(cupy.ndarray)
    elif hasattr(type(value), "__dlpack__"):
        return from_dlpack(name, value, written)
    raise TypeError(
        f"{name} must be a NumPy or CuPy array, or one that exports __dlpack__, got "
        f"{describe(value)}"
    )


def beside(name: str, value: Any, q_name: str, q: Array, written: bool = False) -> Array:
    """An array argument as `as_array` has it, of the library and on the device of q."""
    if type(value) is type(q) and (
        type(q) is np.ndarray or value.data.device_id == q.data.device_id
    ):
        return value
    array = as_array(name, value, written)
    check_place(name, array, q_name, q)
    return array


def check_place(name: str, array: Array, q_name: str, q: Array) -> None:
    """Refuse an array that is of another library than q, or on another device."""
    if type(array) is type(q):
        if type(q) is np.ndarray or array.data.device_id == q.data.device_id:
            return
        helps = "the arrays of a call must be on one device"
    elif type(array) is np.ndarray:
        helps = f"pass cupy.asarray({name})"
    else:
        helps = f"pass cupy.asnumpy({name}), or the others as CuPy arrays"
    raise TypeError(f"{name} is {_place(array)}, but {q_name} is {_place(q)}: {helps}")


def _place(array: Array) -> str:
    if type(array) is np.ndarray:
        return "a NumPy array"
    return f"a CuPy array on device {array.data.device_id}"


def _is_array(value: Any) -> bool:
    """Whether `as_array` sees an array with memory of its own; not NumPy's scalars."""
    return isinstance(value, np.ndarray) or hasattr(type(value), "__dlpack__")


def float_name(dtype: np.dtype) -> str | None:
    """The name of one of the four supported dtypes in native byte order, else None."""
    name = _FLOAT_NAMES.get(dtype)
    if name is None and dtype.name == "bfloat16" and dtype.isnative:
        name = _FLOAT_NAMES[dtype] = "bfloat16"
    return name


def accumulation_dtype(name: str, array: Array) -> np.dtype:
    """The dtype that arithmetic on a float array is done in; a TypeError for any other array."""
    dtype = float_name(array.dtype)
    if dtype is None:
        raise TypeError(f"{name} must be one of {_FLOATS}, got {_describe_dtype(array.dtype)}")
    return _ACCUMULATION[dtype]


def describe(value: Any) -> str:
    """What a message says of a value: a number or a string itself, else its type."""
    if value is None or isinstance(value, (numbers.Number, str, np.generic)):
        return f"{value!r} ({type(value).__name__})"
    if isinstance(value, np.ndarray):
        return f"an array of {_describe_dtype(value.dtype)}, shape {value.shape}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _describe_dtype(dtype: np.dtype) -> str:
    if dtype.isnative:
        return dtype.name
    return f"{dtype.name} in the other byte order ({dtype.str!r})"


def _common_dtype(names: tuple[str, ...], arrays: tuple[Array, ...]) -> str:
    """The name of the arrays' one dtype, where it is not among those known at once."""
    for name, array in zip(names, arrays):
        accumulation_dtype(name, array)
    first = arrays[0].dtype
    if any(array.dtype != first for array in arrays):
        given = ", ".join(f"{n} is {_describe_dtype(a.dtype)}" for n, a in zip(names, arrays))
        raise TypeError(f"{', '.join(names)} must share one dtype: {given}")
    return _FLOAT_NAMES[first]


def _refuse_shapes(
    names: tuple[str, str, str], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    """Raise the ValueError that says which of the shapes is wrong, and why."""
    forms = ("(..., Hq, Lq, D)", "(..., Hkv, Lk, D)", "(..., Hkv, Lk, Dv)")
    for name, form, shape in zip(names, forms, (q, k, v)):
        if len(shape) < 3:
            raise ValueError(f"{name} must have shape {form}, three axes or more, got {shape}")
    if not q[:-3] == k[:-3] == v[:-3]:
        wrong = "leading (batch) axes must be equal"
    elif q[-1] != k[-1]:
        wrong = f"{names[0]} and {names[1]} must have the same last axis (D)"
    elif k[-3] != v[-3]:
        wrong = f"{names[1]} and {names[2]} must have the same number of heads (axis -3)"
    else:
        wrong = f"{names[1]} and {names[2]} must have the same length (axis -2)"
    given = ", ".join(f"{name} {shape}" for name, shape in zip(names, (q, k, v)))
    raise ValueError(f"shapes do not fit, {wrong}: {given}")


def broadcast(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """A view of the array broadcast to `shape`, which it must not enlarge."""
    if array.shape == shape:
        return array
    try:
        return namespace_of(array).broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to shape {shape}, got {array.shape}") from None


def _broadcast_mask(name: str, value: Any, q_name: str, q: Array, shape: tuple[int, ...]) -> Array:
    """attn_mask or bias, as a view of the scores' shape."""
    array = beside(name, value, q_name, q)
    if float_name(array.dtype) is None and not (name == "attn_mask" and array.dtype == bool):
        expected = f"of a float dtype that is added to the scores ({_FLOATS})"
        if name == "attn_mask":
            expected = f"bool, where True means attend, or {expected}"
        raise TypeError(f"{name} must be {expected}, got {_describe_dtype(array.dtype)}")
    return broadcast(name, array, shape)


def _per_head(name: str, value: Any, q_name: str, q: Array, heads: int, acc: np.dtype) -> Array:
    """alibi_slopes or sinks: one number per query head, in the accumulation dtype."""
    array = beside(name, value, q_name, q)
    accumulation_dtype(name, array)
    if array.shape != (heads,):
        raise ValueError(
            f"{name} must have shape ({heads},), one per query head, got {array.shape}"
        )
    return _contiguous(readable(array), acc)


def cast(array: Array, dtype: np.dtype) -> Array:
    """The array in another dtype, itself where it has it; silent where a value overflows."""
    if array.dtype == dtype:
        return array
    with arithmetic_on(array):
        return array.astype(dtype)


def _contiguous(array: Array, dtype: np.dtype) -> Array:
    """The array in another dtype and in C order, itself where it is so."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    with arithmetic_on(array):
        return namespace_of(array).ascontiguousarray(array.astype(dtype, copy=False))


def _integers(name: str, value: Any, q_name: str, q: Array) -> Array:
    """An int, a sequence of ints or an integer array, as an array whose values fit int64.

    It is on the host, or on q's device, and then nothing is known of its values.
    """
    expected = f"{name} must be an int, a sequence of ints or an integer array"
    if _is_array(value):
        array = as_array(name, value)
        if type(array) is not np.ndarray:
            check_place(name, array, q_name, q)
    elif isinstance(value, (int, np.integer, Sequence)) and not isinstance(
        value, (bool, str, bytes)
    ):
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{expected}, got a ragged sequence") from None
        except TypeError as error:  # CuPy's scalars, which would have to be waited for
            raise TypeError(f"{expected}, got a sequence of something else: {error}") from None
        if array.size == 0:  # NumPy sees no ints here and calls it float64
            array = array.astype(np.int64)
        if array.dtype.kind in "fO":  # also what NumPy calls ints that none of its dtypes holds
            array = _as_int64(name, value, array)
    else:
        raise TypeError(f"{expected}, got {describe(value)}")
    if array.dtype.kind not in "iu" or not array.dtype.isnative:
        raise TypeError(f"{expected}, got {_describe_dtype(array.dtype)}")
    if type(array) is np.ndarray and array.dtype == np.uint64:
        _check_range(name, array, 0, (1 << 63) - 1, "to fit a signed 64-bit integer")
    return readable(array)


def _as_int64(name: str, value: Any, array: np.ndarray) -> np.ndarray:
    """An int or a sequence as int64 where all of it is ints, else the array that NumPy made."""
    items = np.asarray(value, object)
    if not all(isinstance(i, (int, np.integer)) and type(i) is not bool for i in items.flat):
        return array
    try:
        return items.astype(np.int64)
    except OverflowError:
        largest = max(items.flat, key=abs)
        raise ValueError(f"{name} must fit 64-bit integers, got {largest}") from None


def _check_range(name: str, array: np.ndarray, low: int, high: int, meaning: str) -> None:
    """Refuse the first value outside [low, high], with its index."""
    outside = (array < low) | (array > high)
    if outside.any():
        index = np.unravel_index(int(outside.argmax()), array.shape)
        place = f"[{', '.join(map(str, index))}]" if index else ""
        raise ValueError(f"{name}{place} is {array[index]}, expected {low} to {high}, {meaning}")


def _per_batch(
    name: str, value: Any, q_name: str, q: Array, lead: tuple[int, ...], batch: int,
    low: int, high: int, meaning: str,
) -> Array:  # fmt: skip
    """One number per batch entry, checked on the host and copied there.

    What was checked is what the backend reads; it bounds what it reads on a device itself.
    """
    if type(value) is int and low <= value <= high:  # much the quickest of the usual ways
        entries = np.empty(batch, np.int64)
        entries.fill(value)
        return entries
    array = _integers(name, value, q_name, q)
    if type(array) is np.ndarray:
        array = np.array(array)
        _check_range(name, array, low, high, meaning)
    elif array.dtype == np.uint64:  # beyond int64 is beyond any axis, and must not turn negative
        with arithmetic_on(array):
            array = namespace_of(array).minimum(array, np.uint64((1 << 63) - 1))
    return _contiguous(broadcast(name, array, lead), _INT64).reshape(batch)


def _lower_right(
    word: str, q_lens: Array | None, kv_lens: Array | None, q: Array, batch: int, Lq: int, Lk: int
) -> Array | int:
    """The offset that puts the last query on the last key, of the lengths where they are given."""
    if word != "lower_right":
        raise ValueError(
            f"causal_offset must be an int, one per batch entry or 'lower_right', got {word!r}"
        )
    lens = [given for given in (q_lens, kv_lens) if given is not None]
    if not lens and type(q) is not np.ndarray:
        return Lk - Lq
    if all(type(given) is np.ndarray for given in lens):
        last_keys = np.full(batch, Lk, np.int64) if kv_lens is None else kv_lens
        return last_keys - (Lq if q_lens is None else q_lens)
    with arithmetic_on(q):  # lengths of the device count as far as their axis goes
        last_keys = Lk if kv_lens is None else to_device(kv_lens, q).clip(0, Lk)
        return last_keys - (Lq if q_lens is None else to_device(q_lens, q).clip(0, Lq))


def _segments(name: str, value: Any, q_name: str, q: Array, shape: tuple[int, ...]) -> Array:
    return broadcast(name, cast(_integers(name, value, q_name, q), _INT64), shape)


def _seed(value: Any, q_name: str, q: Array) -> Array | int:
    """The key of dropout: an int, or an array of the device that is not read."""
    if type(value) is not int and is_on_device(value):
        array = beside("seed", value, q_name, q)
        if array.dtype != np.uint64:
            raise TypeError(f"seed must be an int or uint64, got {_describe_dtype(array.dtype)}")
        if array.size != 1:
            raise ValueError(f"seed must have one element, got shape {array.shape}")
        return readable(array).reshape(1)
    seed = as_int("seed", value)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed


def _window(value: Any) -> tuple[int | None, int | None]:
    """The two sides of window_size."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            "window_size must be a pair (left, right) of ints or None, got "
            f"{value if isinstance(value, (tuple, list)) else describe(value)}"
        )
    sides = [
        None if side is None else as_int(f"window_size[{n}]", side, "an int or None")
        for n, side in enumerate(value)
    ]
    for side in sides:
        if side is not None and side < 0:
            raise ValueError(
                f"window_size must hold ints >= 0, or None for unbounded, got {tuple(value)}"
            )
    left, right = (None if side is None else min(side, _WIDEST_WINDOW) for side in sides)
    return left, right


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def as_int(name: str, value: Any, expected: str = "an int") -> int:
    """An int, or what stands for one; a bool does not, nor what is on a GPU."""
    if type(value) is int:
        return value
    if not isinstance(value, (bool, np.bool_)) and not is_on_device(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {expected}, got {describe(value)}")


def thread_count(name: str, value: Any) -> int:
    """A number of threads; more than a C int holds is as good as what it holds."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, or None, got {number}")
    return min(number, (1 << 31) - 1)


def _real(name: str, value: Any) -> float:
    """A real number, a NumPy scalar of any float dtype included; a bool is none."""
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} must fit a float, got an int beyond its range") from None
    if isinstance(value, np.generic) and float_name(value.dtype) is not None:
        return float(value)
    raise TypeError(f"{name} must be a real number, got {describe(value)}")


def _finite(name: str, value: Any) -> float:
    number = _real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_outputs(problem: Problem, out: Any, inputs: dict[str, Any]) -> tuple[Array, Array | None]:
    """The arrays of a forward's `out=`: out, and lse where it was given as well.

    `inputs` are the arguments as they were given, as the problem may hold copies.
    """
    lse = None
    if isinstance(out, (tuple, list)):
        if isinstance(out, list) or len(out) != 2:
            raise TypeError(
                f"out must be an array or a tuple (out, lse), got {describe(out)} of {len(out)}"
            )
        out, lse = out
    out_shape = (*problem.q.shape[:-1], problem.Dv)
    q = problem.q
    results = {"out": _result("out", out, q, out_shape, _out_dtypes(problem))}
    if lse is not None:
        results["out[1] (lse)"] = _result("out[1] (lse)", lse, q, out_shape[:-1], [problem.acc])

    given = {
        name: addresses(as_array(name, value))
        for name, value in inputs.items()
        if value is not None and _is_array(value)
    }
    for name, array in results.items():
        result = addresses(array)
        if overlaps_itself(result):
            raise ValueError(
                f"{name} has elements that share memory with one another (strides "
                f"{result.strides}): each needs memory of its own"
            )
        for other, taken in given.items():
            if overlap(result, taken):
                raise ValueError(
                    f"{name} shares an element with {other}: it needs memory of its own"
                )
        given[name] = result
    return results["out"], results.get("out[1] (lse)")


def _out_dtypes(problem: Problem) -> list[np.dtype]:
    """What `out` may be: of q's dtype, and float32 for 16-bit inputs."""
    dtype = problem.q.dtype
    return [dtype] if problem.acc == dtype else [dtype, problem.acc]


def _result(
    name: str, value: Any, q: Array, shape: tuple[int, ...], dtypes: list[np.dtype]
) -> Array:
    """An array to be written: right in place, shape and dtype, and writeable."""
    array = beside(name, value, "q", q, written=True)
    _check_like(name, array, shape, dtypes)
    if type(array) is np.ndarray and not array.flags.writeable:
        refuse_read_only(name)
    return array


def _check_like(name: str, array: Array, shape: tuple[int, ...], dtypes: list[np.dtype]) -> None:
    if array.dtype not in dtypes:
        expected = " or ".join(dtype.name for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {_describe_dtype(array.dtype)}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def check_backward(
    problem: Problem, dout: Any, out: Any, lse: Any, dlse: Any
) -> tuple[Array, Array, Array, Array | None]:
    """dout, out, lse and dlse (in the accumulation dtype), as arrays that fit the problem."""
    out_shape = (*problem.q.shape[:-1], problem.Dv)
    q, dtype, acc = problem.q, problem.q.dtype, problem.acc
    dout, out = beside("dout", dout, "q", q), beside("out", out, "q", q)
    lse = beside("lse", lse, "q", q)
    _check_like("dout", dout, out_shape, [dtype])
    _check_like("out", out, out_shape, _out_dtypes(problem))
    _check_like("lse", lse, out_shape[:-1], [acc])
    if dlse is not None:
        dlse = beside("dlse", dlse, "q", q)
        accumulation_dtype("dlse", dlse)
        _check_like("dlse", dlse, out_shape[:-1], [dlse.dtype])
        dlse = cast(readable(dlse), acc)
    return dout, out, lse, dlse


def check_wrt(wrt: Any, bias: Any, sinks: Any, alibi_slopes: Any) -> frozenset[str]:
    """The names of the wanted gradients; a lone name stands for itself."""
    if isinstance(wrt, str):
        wrt = (wrt,)
    if not isinstance(wrt, Iterable):
        raise TypeError(f"wrt must hold names out of {WRT_NAMES}, got {describe(wrt)}")
    wanted = tuple(wrt)
    given = {"bias": bias, "sinks": sinks, "alibi_slopes": alibi_slopes}
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"wrt must hold names out of {WRT_NAMES}, got {describe(name)}")
        if name not in WRT_NAMES:
            raise ValueError(f"wrt must hold names out of {WRT_NAMES}, got {name!r}")
        if name in given and given[name] is None:
            raise ValueError(f"wrt asks for the gradient of {name}, which was not given")
    return frozenset(wanted)


def check_gqa(problem: Problem, enable_gqa: Any, names: tuple[str, str, str]) -> None:
    """PyTorch's rule: one key head serves all, other numbers only where it was said."""
    if not _flag("enable_gqa", enable_gqa) and problem.Hkv not in (1, problem.Hq):
        raise ValueError(
            f"{names[0]} has {problem.Hq} heads and {names[1]} has {problem.Hkv}: pass "
            "enable_gqa=True to share each key head among several query heads"
        )
