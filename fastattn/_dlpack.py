"""Arrays of other libraries, taken by DLPack as NumPy or CuPy arrays that share their memory.

NumPy's own `from_dlpack` refuses bfloat16, so the capsule is read here, for every dtype alike: the
structures below are those of dlpack.h, for version 1 and for the unversioned protocol before it.
CuPy's takes all dtypes and orders the streams, and is only told what it does not ask for.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import numpy as np

from fastattn._backends import is_cupy_array, load_cupy

# DLDeviceType of memory that the CPU may read: kDLCPU, and kDLCUDAHost, which is pinned.
_HOST_DEVICES = (1, 3)
_CUDA_DEVICES = (2, 13)  # kDLCUDA, and kDLCUDAManaged
_READ_ONLY = 1  # bit 0 of DLManagedTensorVersioned.flags

# (DLDataTypeCode, bits) -> the type string of NumPy's array interface, in native byte order.
# bfloat16 (code 4) has none: its memory is passed as 16-bit integers and viewed.
_BFLOAT16 = (4, 16)
_TYPE_STRINGS = {
    (code, bits): np.dtype(f"{kind}{bits // 8}").str
    for code, kind in ((0, "i"), (1, "u"), (2, "f"), (6, "b"))
    for bits in ((8,) if kind == "b" else (16, 32, 64) if kind == "f" else (8, 16, 32, 64))
} | {_BFLOAT16: np.dtype("u2").str}


class _Tensor(ctypes.Structure):
    """DLTensor: the array itself; strides in elements, or null for C order."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


# Called with the GIL held, as a capsule's destructor would call it.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor, from before versions and flags, in a capsule named "dltensor"."""

    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))
    major = flags = 0


class _ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned, in a capsule named "dltensor_versioned"."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Capsule name -> what it points at, and its name once taken. PyCapsule_SetName keeps the pointer,
# so the names live as long as this table.
_CAPSULES = {
    b"dltensor": (_Managed, b"used_dltensor"),
    b"dltensor_versioned": (_ManagedVersioned, b"used_dltensor_versioned"),
}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_rename = ctypes.pythonapi.PyCapsule_SetName
_capsule_rename.restype = ctypes.c_int
_capsule_rename.argtypes = (ctypes.py_object, ctypes.c_char_p)


class _Owner:
    """The taken tensor, base of the array that shows it: calls the deleter once, when it dies."""

    __slots__ = ("__array_interface__", "_managed", "_producer")

    def __init__(self, managed: Any, producer: Any, array_interface: dict[str, Any]) -> None:
        self.__array_interface__ = array_interface
        self._managed = managed
        self._producer = producer

    def __del__(self) -> None:
        if self._managed.deleter:
            self._managed.deleter(ctypes.addressof(self._managed))


class _CudaExport:
    """What CuPy imports instead of a producer, of which it would not ask all that matters."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.flags = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._producer.__dlpack_device__()

    def __dlpack__(self, *, stream: Any, **_: Any) -> Any:
        capsule, _, managed = _export(self._producer, stream=stream)
        self.flags = managed.flags
        return capsule


def is_on_device(value: Any) -> bool:
    """Whether a value is an array on a GPU, which Python could read only by waiting for it."""
    if is_cupy_array(value):
        return True
    try:
        return type(value).__dlpack_device__(value)[0] in _CUDA_DEVICES
    except Exception:  # no producer, or one that cannot say
        return False


def from_dlpack(name: str, producer: Any, written: bool = False) -> Any:
    """The NumPy or CuPy array over a producer's memory: no copy, its strides.

    Raises a TypeError that names the argument where the producer refuses, or where its memory is
    not the host's or CUDA's, or its dtype not one of NumPy's or bfloat16. A NumPy array has the
    producer's read-only flag; CuPy has none, so one to be `written` is a ValueError.
    """
    kind = f"{type(producer).__module__}.{type(producer).__qualname__}"
    # PyTorch exports the memory of a tensor whose sign is to be turned at each access, such as
    # x.conj().imag, and says nothing of the sign.
    is_neg = getattr(producer, "is_neg", None)
    if callable(is_neg) and is_neg() is True:
        raise TypeError(
            f"{name} is a {kind} whose negative bit is set; pass {name}.resolve_neg(), a copy"
        )
    try:
        device, _ = producer.__dlpack_device__()
        if device in _CUDA_DEVICES:
            exported = _CudaExport(producer)
            array = load_cupy().from_dlpack(exported, copy=False)
        elif device in _HOST_DEVICES:
            capsule, used_name, managed = _export(producer)
        else:
            raise BufferError(f"it is on a device of DLPack type {int(device)}, not CPU or CUDA")
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(
            f"{name} is a {kind} that cannot be taken by DLPack: {error}. A tensor that requires a "
            "gradient is passed as tensor.detach(), one on another device as tensor.cpu()"
        ) from error

    if device in _CUDA_DEVICES:
        if written and exported.flags & _READ_ONLY:
            refuse_read_only(name)
        return array

    tensor = managed.tensor
    dtype = (tensor.dtype_code, tensor.dtype_bits)
    if dtype not in _TYPE_STRINGS or tensor.dtype_lanes != 1:
        raise TypeError(
            f"{name} is a {kind} of DLPack's dtype code {tensor.dtype_code}, {tensor.dtype_bits} "
            f"bits, {tensor.dtype_lanes} lanes; expected bool, an integer or a float up to 64 bits"
        )

    item = tensor.dtype_bits // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(item * s for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    interface = {
        "version": 3,
        "typestr": _TYPE_STRINGS[dtype],
        "shape": shape,
        "strides": strides,
        "data": ((tensor.data or 0) + tensor.byte_offset, bool(managed.flags & _READ_ONLY)),
    }
    _capsule_rename(capsule, used_name)
    array = np.asarray(_Owner(managed, producer, interface))
    return array.view(_bfloat16(name)) if dtype == _BFLOAT16 else array


def refuse_read_only(name: str) -> NoReturn:
    """Raise the error about a result that cannot be written."""
    raise ValueError(f"{name} is read-only, and the result is to be written to it")


def _export(producer: Any, **stream: Any) -> tuple[Any, bytes, Any]:
    """The producer's capsule, its name once taken, and what it holds; never of a copy."""
    try:
        capsule = producer.__dlpack__(**stream, max_version=(1, 0), copy=False)
    except TypeError:  # a producer from before these arguments; its real errors come again
        capsule = producer.__dlpack__(**stream)
    capsule_name = _capsule_name(capsule)
    structure, used_name = _CAPSULES[capsule_name]
    managed = structure.from_address(_capsule_pointer(capsule, capsule_name))
    if managed.major > 1:
        raise BufferError(f"its DLPack version {managed.major}.{managed.minor} is not known")
    return capsule, used_name, managed


def _bfloat16(name: str) -> np.dtype:
    """NumPy's bfloat16, which ml_dtypes registers."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError(f"{name} is bfloat16, for which NumPy needs ml_dtypes: {error}") from error
    return np.dtype(ml_dtypes.bfloat16)
