"""Grouped-query attention over this rank's heads and the paged KV cache (Ainslie et al. 2023)."""

from dataclasses import dataclass

from torch import Tensor

from model_parallel.kernels.interface import AttentionPlan, Heads, Kernels, LayerCache, Weight


@dataclass(frozen=True, slots=True)
class Attention:
    """Shape suffixes: T tokens · E hidden · X all local query, key and value features

    The result is this rank's partial_sum: the sum over ranks is the layer's output.
    """

    qkv_weight: Weight
    """Of [X, E]: query, key and value rows one after another."""
    o_weight: Weight
    heads: Heads
    kernels: Kernels

    def __call__(self, x_TE: Tensor, plan: AttentionPlan, cache: LayerCache) -> Tensor:
        """float32 [T, E]."""
        qkv_TX = self.kernels.linear(x_TE, self.qkv_weight)
        return self.kernels.partial_sum(self.kernels.attention(qkv_TX, plan, cache, self.heads), self.o_weight)
