"""Ranks that are processes of one host and meet in memory that they all map."""

import ctypes
import mmap
import os

import torch
from torch import Tensor

from model_parallel.collectives.interface import sum_in_order
from model_parallel.collectives.shared_memory import library
from model_parallel.errors import GroupFailedError

_REASONS = {1: "did not come within {timeout_s:g} s", 2: "did not come, and a rank has left", 3: "brought another size"}


class SharedMemoryCollectives:
    """Exchange in microseconds, between at least two ranks. After an error the group is of no use.

    The interpreter's lock is not held while a rank waits.
    """

    in_rank_order = True
    only_enqueue = False

    def __init__(self, path: str, rank: int, size: int, *, timeout_s: float) -> None:
        """Maps the file at `path`, which is all zeros before the first rank comes. Waits for nobody.

        Raises NativeBuildError, and GroupFailedError when there is no room for the memory.
        """
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._library = library.load()
        num_bytes = self._library.packtrain_segment_bytes(size)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, 0, num_bytes)  # what is missing is missed now, not by a signal in some step
                self._memory = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(fd)
        except OSError as error:
            raise GroupFailedError(f"rank {rank} cannot map {num_bytes} bytes of shared memory: {error}") from error
        self._group = (ctypes.addressof(ctypes.c_char.from_buffer(self._memory)), rank, size)
        self._timeout_ns = round(timeout_s * 1e9)

    @property
    def native_all_reduce(self) -> tuple[int, ...]:
        """The address of the native function, and its arguments but for the tensor's address and length."""
        address = ctypes.cast(self._library.packtrain_all_reduce, ctypes.c_void_p).value
        assert address is not None
        return (address, *self._group, self._timeout_ns)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return sum_in_order(self.all_gather(x))
        x = x.contiguous()
        self.check(self._library.packtrain_all_reduce(*self._group, self._timeout_ns, x.data_ptr(), x.numel()))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        gathered = x.new_empty((self.size, *x.shape))
        self._gather(x.data_ptr(), gathered.data_ptr(), x.nbytes)
        return gathered

    def barrier(self) -> None:
        self._gather(None, None, 0)

    def close(self) -> None:
        """Leave the group: peers that wait for this rank fail. The memory goes with the last rank's process."""
        self._library.packtrain_leave(*self._group)

    def _gather(self, source: int | None, target: int | None, num_bytes: int) -> None:
        self.check(self._library.packtrain_all_gather(*self._group, self._timeout_ns, source, target, num_bytes))

    def check(self, status: int) -> None:
        """Raises GroupFailedError for what a native call returned, unless that is 0."""
        if status:
            reason = _REASONS[status & 0xFF].format(timeout_s=self._timeout_s)
            raise GroupFailedError(f"rank {self.rank}: rank {status >> 8} {reason}")
