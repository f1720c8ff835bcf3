"""Collectives of ranks that are threads of one process."""

import threading

import torch
from torch import Tensor

from model_parallel.collectives.interface import sum_in_order
from model_parallel.errors import GroupFailedError


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
