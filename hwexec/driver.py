"""Raw pointers, by ctypes: what libcuda can do and PyTorch does not offer, and a pointer made a tensor."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch.utils import dlpack

EXTERNAL = 1  # CU_EVENT_WAIT_EXTERNAL: a captured wait for an event that lives outside of the graph
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the legacy default stream does not wait for it
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not touched the GPU yet


@cache
def load_driver() -> Any:
    """libcuda, which PyTorch has loaded already; None where it is not to be had."""
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
        driver.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        driver.cuMemcpyAsync.restype = ctypes.c_int
        driver.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        driver.cuStreamWaitEvent.restype = ctypes.c_int
        driver.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        driver.cuEventRecord.restype = ctypes.c_int
        driver.cuStreamCreate.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        driver.cuStreamCreate.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return driver


def driver_error(driver: Any, code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    driver.cuGetErrorString(code, ctypes.byref(text))
    said = (text.value or b"no description").decode()
    return f"{said} ({(name.value or b'CUDA error').decode()}, {code})"


def new_stream(driver: Any) -> int:
    """The handle of a stream of the current GPU, PyTorch's own being few. RuntimeError where the driver refuses."""
    raw = ctypes.c_void_p()
    code = driver.cuStreamCreate(ctypes.byref(raw), NON_BLOCKING)
    if code or not raw.value:
        raise RuntimeError(f"a new stream: {driver_error(driver, code)}")
    return raw.value


def captured_nodes(stream: int) -> int | None:
    """Nodes of the graph being captured on a stream: the driver tells, PyTorch does not."""
    driver = load_driver()
    if driver is None:
        return None
    try:
        status, graph, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
        got = (ctypes.c_void_p(stream), ctypes.byref(status), None, ctypes.byref(graph), None, None)
        if hasattr(driver, "cuStreamGetCaptureInfo_v2"):
            code = driver.cuStreamGetCaptureInfo_v2(*got)
        else:  # one more output, for annotated edges
            code = driver.cuStreamGetCaptureInfo_v3(*got, None)
        if code != 0 or not graph.value:
            return None
        code = driver.cuGraphGetNodes(graph, None, ctypes.byref(count))
    except AttributeError:
        return None
    return count.value if code == 0 else None


# DLPack: a pointer becomes a tensor of the GPU that we name. See dmlc/dlpack, dlpack.h, DLManagedTensor.

_CUDA_DEVICE_TYPE = 2  # kDLCUDA


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_alive: dict[int, object] = {}
"""By address of the managed tensor: itself, its arrays, and the memory's owner, until PyTorch calls the deleter."""


def _forget(address: int, _alive: dict[int, object] = _alive) -> None:
    _alive.pop(address, None)


_deleter = _Deleter(_forget)
# PyTorch may call it when the interpreter has already cleared this module: neither may ever be freed
for _immortal in (_deleter, _alive):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_immortal))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def labelled(pointer: int, size_bytes: int, gpu: int, owner: object) -> torch.Tensor:
    """uint8 tensor of `gpu` over `size_bytes` at `pointer`; `owner` lives as long as it."""
    shape, strides = (ctypes.c_int64 * 1)(size_bytes), (ctypes.c_int64 * 1)(1)
    tensor = _DLTensor(pointer, _DLDevice(_CUDA_DEVICE_TYPE, gpu), 1, _DLDataType(1, 8, 1), shape, strides, 0)
    managed = _DLManagedTensor(tensor, None, _deleter)
    address = ctypes.addressof(managed)
    _alive[address] = (managed, shape, strides, owner)
    made: torch.Tensor = dlpack.from_dlpack(_new_capsule(address, b"dltensor", None))
    return made
