"""The layers of Llama that are cut over ranks, besides attention."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from model_parallel.kernels.interface import Kernels, Weight


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU over this rank's columns. Shape suffixes: T tokens · E hidden

    The result is this rank's addend: the sum over ranks is the layer's output.
    """

    gate_up_weight: Weight
    down_weight: Weight
    kernels: Kernels

    def __call__(self, x_TE: Tensor) -> Tensor:
        """float32 [T, E]."""
        return self.kernels.addend(self.kernels.gated_linear(x_TE, self.gate_up_weight), self.down_weight)


@dataclass(frozen=True, slots=True)
class VocabularyEmbedding:
    """This rank's rows of the embedding. Shape suffixes: T tokens · V local vocabulary rows · E hidden"""

    weight_VE: Tensor
    vocabulary: range
    """Token ids of the rows."""

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """[T, E]: the embedding where this rank holds it, zero elsewhere; the sum over ranks is whole."""
        held_T = (token_ids_T >= self.vocabulary.start) & (token_ids_T < self.vocabulary.stop)
        local_T = (token_ids_T - self.vocabulary.start).where(held_T, 0)
        return F.embedding(local_T, self.weight_VE).masked_fill_(~held_T.unsqueeze(-1), 0)
