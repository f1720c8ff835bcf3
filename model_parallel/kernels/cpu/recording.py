"""Native calls that are recorded once and then made again as one.

A step of decode is some two hundred calls of a few microseconds each, and as much again for Python to make them. Recorded, it is
one call. It works on the same memory each time: inputs have fixed places, and results lie in a workspace.
"""

import ctypes
import math
import weakref

import torch
from torch import Tensor


class Workspace:
    """Memory for the results of recorded operations. Programs that never run at the same time can share it.

    A result's memory is free for a later one as soon as no tensor refers to it: at the same place in every run of the program.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._blocks: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = {}
        """Blocks by the bytes of a row."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of at most max_rows rows."""
        if shape[0] > self._max_rows:
            raise ValueError(f"{shape[0]} rows do not fit a workspace of {self._max_rows}")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        free = self._free.setdefault(row_bytes, [])
        if not free:
            free.append(torch.empty(row_bytes * self._max_rows, dtype=torch.uint8))
            self._blocks += free
        block = free.pop()
        lease = (ctypes.c_char * (shape[0] * row_bytes)).from_address(block.data_ptr())
        weakref.finalize(
            lease, free.append, block
        )  # torch holds the lease as long as anything shares the tensor's memory
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    @staticmethod
    def kept(tensor: Tensor) -> Tensor:
        """The same memory for good, whatever is written there by then. The workspace must live as long."""
        memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


class Program:
    """Calls of one CpuKernels, in their order."""

    def __init__(self, library: ctypes.CDLL, address: int, workspace: Workspace) -> None:
        self._library = library
        self._workspace = workspace
        self._address = ctypes.c_void_p(address)
        weakref.finalize(self, library.packtrain_forget, self._address)

    @property
    def num_calls(self) -> int:
        return int(self._library.packtrain_num_calls(self._address))

    def add_all_reduce(self, call: tuple[int, ...], x: Tensor) -> None:
        """call: see SharedMemoryCollectives.native_all_reduce. `x` must be contiguous float32."""
        self._library.packtrain_record_all_reduce(self._address, *call, x.data_ptr(), x.numel())

    def run(self, durations: "ctypes.Array[ctypes.c_int64] | None" = None) -> int:
        """Make all calls again. 0, or the status of the one that failed. durations: nanoseconds of each, to be filled in."""
        return int(self._library.packtrain_replay(self._address, durations))
