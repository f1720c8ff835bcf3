"""What ranks of one group exchange while they compute: the interface, and a group of one."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


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


def sum_in_order(parts: Iterable[Tensor]) -> Tensor:
    """The sum, added from first to last, in memory of its own."""
    first, *others = parts
    total = first.clone()
    for part in others:
        total += part
    return total
