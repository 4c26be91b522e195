"""Which backend computes, decided by the type of an array.

A backend is a module with the two functions of `Backend`. It gets a `Problem` whose every array has
been checked, and fills the results it is given; it raises nothing about a user's argument.

CuPy is recognised without being imported: an array of a library that nobody imported cannot exist.
"""

from __future__ import annotations

import sys
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


def is_cupy_array(value: Any) -> bool:
    """Whether the value's class is CuPy's, or derived from one of CuPy's."""
    return any(cls.__module__.partition(".")[0] == "cupy" for cls in type(value).__mro__)


# The class of a checked array -> its backend; plain ndarrays only reach a backend.
_BACKENDS: dict[type, Backend] = {np.ndarray: _cpu}


def backend_of(array: Any) -> Backend:
    """The backend that serves a checked array."""
    return _BACKENDS[type(array)]


def namespace_of(array: Any) -> ModuleType:
    """The module with the functions of an array's library: NumPy, or CuPy once it is served."""
    return sys.modules[type(array).__module__.partition(".")[0]]
