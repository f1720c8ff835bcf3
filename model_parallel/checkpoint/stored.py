"""A checkpoint as named tensors in files, whatever its format."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from model_parallel.model.partition import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, known from a file's header."""

    file: Path
    shape: tuple[int, ...]
    type: str
    """As the format calls it: "F16", "Q4_1", …"""
    readable: bool
    """False for a type that holds no floating-point weights, or that cannot be dequantised."""


class Checkpoint(ABC):
    """Tensors under Hugging Face's names; only what is read comes from the disk."""

    tensors: dict[str, StoredTensor]

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.tensors[name].shape

    @abstractmethod
    def read(self, name: str, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
        """The part `shard` of `name`, contiguous, on the CPU. `shard` must fit the stored shape (loader.py checks)."""
