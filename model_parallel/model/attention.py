"""Grouped-query attention over this rank's heads and the paged KV cache (Ainslie et al. 2023)."""

from dataclasses import dataclass

from torch import Tensor

from model_parallel.kernels.interface import AttentionPlan, Kernels, LayerCache
from model_parallel.model.partition import HeadPartition


@dataclass(frozen=True, slots=True)
class Attention:
    """Shape suffixes: T tokens · E hidden · H local query heads · K local key/value heads · D head dim

    The result is this rank's addend: the sum over ranks is the layer's output.
    """

    qkv_weight: Tensor
    """[(H + 2K) · D, E]: query, key and value rows one after another."""
    o_weight: Tensor
    """[E, H · D]."""
    heads: HeadPartition
    head_dim: int
    kv_of_query_H: Tensor
    kernels: Kernels

    def __call__(self, x_TE: Tensor, plan: AttentionPlan, cache: LayerCache) -> Tensor:
        num_query_heads, num_kv_heads = len(self.heads.query_heads), len(self.heads.kv_heads)
        qkv_TXD = self.kernels.linear(x_TE, self.qkv_weight).unflatten(-1, (-1, self.head_dim))
        q_THD, k_TKD, v_TKD = qkv_TXD.split((num_query_heads, num_kv_heads, num_kv_heads), dim=1)
        q_THD = self.kernels.rope_and_cache(q_THD, k_TKD, v_TKD, plan, cache)
        out_THD = self.kernels.attention(q_THD, plan, cache, self.kv_of_query_H)
        return self.kernels.linear(out_THD.flatten(1), self.o_weight)
