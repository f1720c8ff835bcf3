"""Grouped-query attention over this rank's heads and the paged KV cache (Ainslie et al. 2023)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model_parallel.kernels.interface import AttentionPlan, Heads, Kernels, LayerCache, Weight
from model_parallel.model.layers import adapted


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

    qkv_product: int
    """Which product of the model it is, to adapters; as is `o_product`."""
    o_product: int

    def __call__(self, x_TE: Tensor, plan: AttentionPlan, cache: LayerCache, adapted_rows: Any = None) -> Tensor:
        """float32 [T, E]. `adapted_rows`: of Kernels.adapted_rows, or None."""
        qkv_TX = self.kernels.linear(x_TE, self.qkv_weight, adapted(adapted_rows, self.qkv_product))
        x_TX = self.kernels.attention(qkv_TX, plan, cache, self.heads)
        return self.kernels.partial_sum(x_TX, self.o_weight, adapted(adapted_rows, self.o_product))
