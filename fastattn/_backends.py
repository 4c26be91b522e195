"""Which backend computes, decided by the type of an array.

A backend is a module with the two functions of `Backend`. It gets a `Problem` whose every array has
been checked, and fills the results it is given; it raises nothing about a user's argument.

CuPy is recognised without being imported: an array of a library that nobody imported cannot exist.
It and the backend for its arrays are imported at the first such array.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastattn import _cpu

if TYPE_CHECKING:
    from fastattn._problem import Problem


class Backend(Protocol):
    """The two functions of every backend; arrays are of the backend's own library."""

    def forward(self, problem: Problem, out: Any, lse: Any) -> None:
        """Fill `out` (q's dtype, or float32 for 16-bit inputs) and `lse`; any strides."""

    def backward(
        self, problem: Problem, dout: Any, out: Any, lse: Any, dlse: Any,
        dq: Any, dk: Any, dv: Any, dbias: Any, dsinks: Any, dalibi_slopes: Any,
    ) -> None:  # fmt: skip
        """Fill the gradients that are not None.

        dbias is a writable view, broadcast to the scores' shape, of an array of the bias's own
        shape; dsinks and dalibi_slopes are in the accumulation dtype.
        """


# The class of a checked array -> its backend. CuPy's joins when it is imported.
_BACKENDS: dict[type, Backend] = {np.ndarray: _cpu}
# Likewise, where a forward without `out` may be like one that was done; see the GPU's driver.
_AGAIN: dict[type, ModuleType] = {}
# The classes of checked arrays: those of the table, now and later.
PLAIN_ARRAYS = _BACKENDS.keys()

_OLDEST_CUPY = 14
_NEEDS_CUPY = (
    f"fastattn computes on a GPU with CuPy {_OLDEST_CUPY} or newer, and %s. "
    'Install it by pip install "fastattn[cuda12]" or "fastattn[cuda13]", as the driver allows'
)


def is_cupy_array(value: Any) -> bool:
    """Whether the value's class is CuPy's, or derived from one of CuPy's."""
    return any(cls.__module__.partition(".")[0] == "cupy" for cls in type(value).__mro__)


def load_cupy() -> ModuleType:
    """CuPy, with the backend for its arrays; an ImportError says what is missing."""
    try:
        import cupy
    except Exception as error:  # a broken installation raises anything
        raise ImportError(_NEEDS_CUPY % f"importing it failed: {error}", name="cupy") from error
    if int(cupy.__version__.partition(".")[0]) < _OLDEST_CUPY:
        raise ImportError(_NEEDS_CUPY % f"this is {cupy.__version__}", name="cupy")
    if cupy.ndarray not in _BACKENDS:
        try:
            from fastattn._gpu import driver
        except (ImportError, AttributeError) as error:
            problem = f"{cupy.__version__} lacks something: {error}"
            raise ImportError(_NEEDS_CUPY % problem, name="cupy") from error
        _BACKENDS[cupy.ndarray] = _AGAIN[cupy.ndarray] = driver
    return cupy


def backend_of(array: Any) -> Backend:
    """The backend that serves a checked array."""
    return _BACKENDS[type(array)]


def forward_again(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> tuple[Any, Any]:
    """The kind of a forward that is to be remembered, else None; and (out, lse) where one of that
    kind was done before, else None. The arguments may be anything."""
    driver = _AGAIN.get(type(q))
    return (None, None) if driver is None else driver.forward_again(q, k, v, options)


def remember_forward(kind: Any, problem: Problem, out: Any, lse: Any) -> None:
    """Have the next forward of a kind done at once."""
    _AGAIN[type(out)].remember_forward(kind, problem, out, lse)


def namespace_of(array: Any) -> ModuleType:
    """The module with the functions of a checked array's library: NumPy or CuPy."""
    return np if type(array) is np.ndarray else sys.modules["cupy"]


def empty_like(array: Any, shape: tuple[int, ...]) -> Any:
    """An array of another shape that is laid out in memory as a checked one is."""
    if array.flags.c_contiguous:
        return type(array)(shape, array.dtype)  # in half the time
    return namespace_of(array).empty_like(array, shape=shape)


def arithmetic_on(array: Any) -> AbstractContextManager[Any]:
    """What operations on an array run in: on its device with CuPy, without NumPy's warnings."""
    if type(array) is np.ndarray or type(array) not in PLAIN_ARRAYS:
        return np.errstate(all="ignore")
    return array.device


def readable(array: Any) -> Any:
    """A checked array; a copy of it where it is CuPy's and not aligned to its dtype.

    CuPy's own kernels cannot read such addresses, the backend's can.
    """
    if type(array) is np.ndarray:
        return array
    size = array.itemsize
    if array.data.ptr % size == 0 and all(stride % size == 0 for stride in array.strides):
        return array
    cupy = sys.modules["cupy"]
    with array.device:
        single = cupy.ndarray((*array.shape, size), np.uint8, array.data, (*array.strides, 1))
        return single.copy().view(array.dtype).reshape(array.shape)


def is_elsewhere(array: Any) -> bool:
    """Whether a checked array is CuPy's, on a device that is not the current one."""
    if type(array) is np.ndarray:
        return False
    return array.data.device_id != sys.modules["cupy"].cuda.runtime.getDevice()


def to_device(array: Any, like: Any) -> Any:
    """An int64 array of the host on the device of a CuPy array, on which it may be already.

    Nothing waits, and a graph that is being captured holds the values themselves: a copy from the
    host would read memory at each replay that is not ours by then.
    """
    if type(array) is type(like):
        return array
    cupy = sys.modules["cupy"]
    # Axes that are repeated here are repeated there.
    once = array[tuple(slice(None if stride else 1) for stride in array.strides)]
    values = once.flatten()
    starts = np.flatnonzero(np.diff(values, prepend=~values[:1])).tolist()  # of runs of one value
    with like.device:
        stream = cupy.cuda.get_current_stream()
        capturing = stream.ptr > 1 and stream.is_capturing()  # 0, 1: a default stream never is
        if len(starts) > 1 and not capturing:
            moved = cupy.asarray(values)
        else:
            moved = cupy.empty(values.size, np.int64)
            for start, stop in zip(starts, [*starts[1:], values.size]):
                moved[start:stop].fill(values[start])
    return cupy.broadcast_to(moved.reshape(once.shape), array.shape)
