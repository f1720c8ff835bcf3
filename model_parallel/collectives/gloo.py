"""Collectives of ranks that are processes, over Gloo: the portable way, on one host or several."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from model_parallel.collectives.interface import sum_in_order
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import ParallelConfig
from model_parallel.errors import GroupFailedError


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
