"""A checkpoint as named tensors in files, whatever its format."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model_parallel.kernels.interface import Fp8Matrix, GroupMatrix
from model_parallel.model.partition import Shard
from model_parallel.weight_format import GroupFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, known from a file's header."""

    file: Path
    shape: tuple[int, ...]
    type: str
    """As the format calls it: "F16", "bfloat16", "Q4_1", …"""
    readable: bool
    """False for a type that holds no floating-point weights, or that cannot be dequantised."""
    mapped: Tensor | None = None
    """The tensor as a view of the mapped file; None where it has to be decoded first."""


class Checkpoint(ABC):
    """Tensors under Hugging Face's names; only what is read comes from the disk."""

    tensors: dict[str, StoredTensor]
    warnings: tuple[str, ...] = ()
    """What was found in the files and did not matter, as sentences."""

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.tensors[name].shape

    def group_format(self, name: str) -> GroupFormat | None:
        """How `name` is quantised, where it can be kept as it is."""
        return None

    def read_groups(self, name: str, shard: Shard) -> GroupMatrix:
        """The part `shard` of a matrix that has a group format, as it is stored, on the CPU. Raises CheckpointError."""
        raise NotImplementedError(name)

    def read_fp8(self, name: str, shard: Shard) -> Fp8Matrix:
        """The part `shard` of a matrix of ModelConfig.fp8_weights, as it is stored, on the CPU."""
        raise NotImplementedError(name)

    @abstractmethod
    def read_into(self, name: str, shard: Shard, out: Tensor) -> None:
        """Write the part `shard` of `name` to `out`, in out's dtype and on its device.

        `shard` must fit the stored shape, and of query and key projections be whole heads (loader.py checks the one,
        partition.py gives the other).
        """

    def read(self, name: str, shard: Shard, dtype: torch.dtype) -> Tensor:
        """The part `shard` of `name` on the CPU."""
        out = torch.empty(shard.shape, dtype=dtype)
        self.read_into(name, shard, out)
        return out
