"""The compiled half. Needs no torch, so that a leader can find out whether its ranks will be able to use it."""

import ctypes

from model_parallel.native import SHARED_MEMORY, load_library

_GROUP = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
"""Segment, rank, size."""
_TIMEOUT_NS = ctypes.c_int64


def load() -> ctypes.CDLL:
    """The library, compiled when it is not there. Raises NativeBuildError."""
    library = load_library(SHARED_MEMORY)
    library.packtrain_segment_bytes.argtypes = (ctypes.c_int32,)
    library.packtrain_segment_bytes.restype = ctypes.c_int64
    library.packtrain_all_reduce.argtypes = (*_GROUP, _TIMEOUT_NS, ctypes.c_void_p, ctypes.c_int64)
    library.packtrain_all_gather.argtypes = (*_GROUP, _TIMEOUT_NS, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.packtrain_leave.argtypes = _GROUP
    library.packtrain_leave.restype = None
    return library
