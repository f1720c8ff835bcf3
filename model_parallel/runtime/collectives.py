"""What ranks of one group say to each other while they compute."""

import os
import socket
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from model_parallel.config import ParallelConfig
from model_parallel.errors import GroupFailedError
from model_parallel.runtime.link import Rendezvous


class Collectives(Protocol):
    """Group operations, passed in where they are needed. Every call has a deadline; past it, GroupFailedError."""

    rank: int
    size: int
    in_rank_order: bool
    """Whether sums are added in rank order, so that they do not depend on the tensor's size or place."""
    only_enqueue: bool
    """Whether calls on a GPU's tensors only enqueue work there, so that a CUDA graph can hold them.

    Their deadline is then the leader's for the whole step; it ends processes that exceed it.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks. May use x's memory for the result."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], the same on every rank; x has one shape on all of them."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        ...


class SoloCollectives:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1
    in_rank_order = True
    only_enqueue = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class Exchange:
    """The table at which ranks that are threads of one process meet."""

    def __init__(self, size: int, *, timeout_s: float) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._tables: list[list[Tensor]] = [[torch.empty(0)] * size for _ in range(2)]
        self._barrier = threading.Barrier(size)

    def put(self, turn: int, rank: int, x: Tensor) -> list[Tensor]:
        """Lay down a copy of x and return all ranks' when they are there; they stay until the turn after next.

        A rank that is at turn t + 2 has met all others at turn t + 1, so they have finished with turn t's table.
        """
        table = self._tables[turn % 2]
        table[rank] = x.clone()
        try:
            self._barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError as error:
            raise GroupFailedError(f"rank {rank}: a peer failed or did not come within {self.timeout_s:g} s") from error
        return table

    def abort(self) -> None:
        """Fail all ranks that wait now or later."""
        self._barrier.abort()


class ThreadCollectives:
    """Ranks that are threads of one process."""

    in_rank_order = True
    only_enqueue = False

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.rank = rank
        self.size = exchange.size
        self._exchange = exchange
        self._turn = 0

    def _meet(self, x: Tensor) -> list[Tensor]:
        self._turn += 1
        return self._exchange.put(self._turn, self.rank, x)

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum_in_order(self._meet(x))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._meet(x))

    def barrier(self) -> None:
        self._meet(torch.empty(0))

    def close(self) -> None:
        self._exchange.abort()


class TorchCollectives:
    """Ranks that are processes, over Gloo. Uses no global process group. What lies on a GPU goes through the host.

    The first meeting, and each call, fails when a peer has not joined after step_timeout_s.
    """

    in_rank_order = True
    only_enqueue = False

    def __init__(
        self, parallel: ParallelConfig, rank: int, rendezvous: Rendezvous, store_listener: socket.socket | None = None
    ) -> None:
        """Meets the other ranks; raises GroupFailedError when they do not come.

        `store_listener` is where rank 0 serves the store of a group on several hosts; it is taken over.
        """
        self.rank = rank
        self.size = parallel.tp_size
        step_timeout = timedelta(seconds=parallel.step_timeout_s)
        try:
            self.store = _open_store(rendezvous, rank, self.size, step_timeout, store_listener)
            self._group: Any = _gloo(self.store, rank, self.size, rendezvous.bind_host, step_timeout)
        except RuntimeError as error:
            raise GroupFailedError(f"rank {rank} could not meet its peers: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum_in_order(self.all_gather(x))

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype)
        if x.numel() == 0:
            return gathered.to(x.device)
        # As bytes, so that the backend need not know the dtype.
        outputs = list(gathered.view(self.size, x.numel()).view(torch.uint8).unbind(0))
        source = x.cpu().contiguous().view(x.numel()).view(torch.uint8)
        try:
            self._group.allgather([outputs], [source]).wait()
        except RuntimeError as error:
            raise GroupFailedError(f"rank {self.rank}: all_gather failed: {error}") from error
        return gathered.to(x.device)

    def barrier(self) -> None:
        self.all_gather(torch.zeros(1))

    def close(self) -> None:
        self._group.shutdown()


def sum_in_order(parts: Iterable[Tensor]) -> Tensor:
    """The sum, added from first to last, in memory of its own."""
    first, *others = parts
    total = first.clone()
    for part in others:
        total += part
    return total


def _open_store(where: Rendezvous, rank: int, size: int, timeout: timedelta, listener: socket.socket | None) -> Store:
    if where.store_path:
        # Opened here and kept open: the leader may close its own while the store still refers to the file by name.
        return FileStore(f"/proc/self/fd/{os.open(where.store_path, os.O_RDWR | os.O_CLOEXEC)}", size)
    # Without a socket handed in, TCPStore would listen on every interface.
    fd = listener.detach() if rank == 0 and listener is not None else None
    return TCPStore(
        where.store_host,
        where.store_port,
        size,
        is_master=fd is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=fd,
    )


def _gloo(store: Store, rank: int, size: int, bind_host: str, step_timeout: timedelta) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=bind_host)]
    options._threads = 1
    options._timeout = step_timeout
    return ProcessGroupGloo(store, rank, size, options)
