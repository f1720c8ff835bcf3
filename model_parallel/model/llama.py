"""Llama (Touvron et al. 2023) as one rank computes it: architecture only, no loading, no processes.

Shape suffixes: T tokens of a step · E hidden · V local vocabulary rows · R rows that logits are wanted for
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives
from model_parallel.config import ModelConfig
from model_parallel.kernels.interface import (
    AttentionPlan,
    GroupMatrix,
    Heads,
    Kernels,
    LayerCache,
    LowRankUpdate,
    PackedAdapter,
    Weight,
)
from model_parallel.model.attention import Attention
from model_parallel.model.layers import FeedForward
from model_parallel.model.partition import EMBEDDING, FINAL_NORM, LM_HEAD, HeadPartition, even_range, partition_heads

_PRODUCTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""Those of a layer, in the order in which adapters count them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block: attention and feed-forward, each with its norm before and its all-reduce after."""

    attention_norm_E: Tensor
    attention: Attention
    feed_forward_norm_E: Tensor
    feed_forward: FeedForward


class Llama:
    """A rank's shard of the model."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Any], *, kernels: Kernels, collectives: Collectives
    ) -> None:
        """weights: this rank's slices by name, as checkpoint/loader.py gives them: tensors, or matrices in int8 or in groups.

        Layers are taken out of it one by one, so that no more than one exists both as loaded and as the kernels want it.
        """
        self.config = config
        self.kernels = kernels
        self.num_layers_done = 0
        """In all calls of `forward` together; another thread may read it."""
        self._collectives = collectives
        self.vocabulary = even_range(config.vocab_size, collectives.size, collectives.rank)
        head, embedding = weights.get(LM_HEAD), weights[EMBEDDING]
        # Of a GroupMatrix the kernels keep one form for look-ups and for products.
        self.embedding: Tensor | Weight = (
            kernels.pack_head(embedding) if isinstance(embedding, GroupMatrix) else embedding
        )
        part = partition_heads(config.num_query_heads, config.num_kv_heads, collectives.size, collectives.rank)
        device = weights[FINAL_NORM].device
        self.layers = [self._layer(weights, i, part, device) for i in range(config.num_layers)]
        self.final_norm_E = weights[FINAL_NORM].float()
        if head is None and isinstance(embedding, GroupMatrix):
            self.head = self.embedding
        else:
            self.head = kernels.pack_head(embedding if head is None else head)

    def pack_adapter(self, updates: Mapping[str, LowRankUpdate]) -> PackedAdapter:
        """An adapter for this rank's matrices, by the names of `weights`. May be called by any thread while others compute."""
        names = [f"model.layers.{layer}.{name}.weight" for layer in range(self.config.num_layers) for name in _PRODUCTS]
        gated = frozenset(range(_PRODUCTS.index("mlp.gate_up_proj"), len(names), len(_PRODUCTS)))
        return self.kernels.pack_adapter([updates.get(name) for name in names], gated=gated)

    def _layer(self, weights: dict[str, Any], index: int, part: HeadPartition, device: torch.device) -> Layer:
        prefix = f"model.layers.{index}"
        qkv, o, gate_up, down = range(index * len(_PRODUCTS), (index + 1) * len(_PRODUCTS))
        attention = Attention(
            qkv_weight=self.kernels.pack_linear(weights.pop(f"{prefix}.self_attn.qkv_proj.weight")),
            o_weight=self.kernels.pack_linear(weights.pop(f"{prefix}.self_attn.o_proj.weight")),
            heads=Heads(
                num_query_heads=len(part.query_heads),
                num_kv_heads=len(part.kv_heads),
                head_dim=self.config.head_dim,
                kv_of_query_H=torch.tensor(part.kv_of_query, device=device),
            ),
            kernels=self.kernels,
            qkv_product=qkv,
            o_product=o,
        )
        feed_forward = FeedForward(
            gate_up_weight=self.kernels.pack_gated(weights.pop(f"{prefix}.mlp.gate_up_proj.weight")),
            down_weight=self.kernels.pack_linear(weights.pop(f"{prefix}.mlp.down_proj.weight")),
            kernels=self.kernels,
            gate_up_product=gate_up,
            down_product=down,
        )
        return Layer(
            attention_norm_E=weights.pop(f"{prefix}.input_layernorm.weight"),
            attention=attention,
            feed_forward_norm_E=weights.pop(f"{prefix}.post_attention_layernorm.weight"),
            feed_forward=feed_forward,
        )

    def forward(
        self,
        token_ids_T: Tensor,
        plan: AttentionPlan,
        caches: Sequence[LayerCache],
        *,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        adapted_rows: Any = None,
    ) -> Tensor:
        """float32 [T, E]: hidden states after the final norm. The step's keys and values go to `caches`.

        `adapted_rows` are those that adapters change (Kernels.adapted_rows); None is none.
        `all_reduce` replaces the collectives' own sum over ranks; a recorder passes one that also records the call.

        The residual stream and the sums over ranks are float32 whatever the weights' dtype: only what enters a matrix product
        is rounded.
        """
        all_reduce = all_reduce or self._collectives.all_reduce
        norm, eps = self.kernels.add_rms_norm, self.config.rms_norm_eps
        residual_TE = all_reduce(self.kernels.embed(token_ids_T, self.embedding, self.vocabulary.start))
        x_TE = self.kernels.rms_norm(residual_TE, self.layers[0].attention_norm_E, eps)
        next_norms = [layer.attention_norm_E for layer in self.layers[1:]] + [self.final_norm_E]
        for layer, cache, next_norm_E in zip(self.layers, caches, next_norms, strict=True):
            x_TE = all_reduce(layer.attention(x_TE, plan, cache, adapted_rows))
            x_TE, residual_TE = norm(x_TE, residual_TE, layer.feed_forward_norm_E, eps)
            x_TE = all_reduce(layer.feed_forward(x_TE, adapted_rows))
            x_TE, residual_TE = norm(x_TE, residual_TE, next_norm_E, eps)
            self.num_layers_done += 1
        return x_TE

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """float32 [R, V]: logits of this rank's part of the vocabulary, from rows of `forward`."""
        return self.kernels.logits(hidden_RE, self.head)
