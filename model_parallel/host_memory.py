"""Memory of a CPU rank: huge pages for weights, and a heap that does not grow while steps run."""

import ctypes
import mmap

import torch
from torch import Tensor

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_MAX_HEAP_BLOCK_BYTES = 32 << 20
"""Blocks up to here can come from the heap, which is as far as glibc lets it go; larger ones are mapped for themselves."""
_PIECE_BYTES = 16 << 20


def reserve_heap(num_bytes: int) -> None:
    """Have the heap end in so much free memory that is resident, and give none of it back to the system.

    What a step computes with is of megabytes and fits into no hole that loading has left, so the heap would grow each time a
    step needs more than all before it: by 1.5 to 5 MB at a time, hours after the start.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc, and its heap is laid out otherwise
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(_M_MMAP_THRESHOLD, _MAX_HEAP_BLOCK_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    pieces = [libc.malloc(_PIECE_BYTES) for _ in range(-(-num_bytes // _PIECE_BYTES))]
    for piece in pieces:
        if piece is None:
            raise MemoryError(f"there is no room for {num_bytes} bytes to compute in")
        ctypes.memset(piece, 0, _PIECE_BYTES)
    for piece in pieces:
        libc.free(piece)


def empty_shard(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for weights; on the CPU of huge pages where they can be had, which also halve the time to load."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        advise(out.data_ptr(), out.nbytes, mmap.MADV_HUGEPAGE)
    return out


def mapped(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], zero: pages of its own, huge where they can be had, which the system has back with the tensor's end."""
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    out = torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
    advise(out.data_ptr(), len(pages), mmap.MADV_HUGEPAGE)
    return out


def advise(address: int, num_bytes: int, advice: int) -> None:
    """Advise the whole pages inside a range. A system that does not take the advice loses speed or memory, nothing else."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
