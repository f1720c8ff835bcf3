"""The operations that the model is written in. A backend implements all of them; the model code never asks which.

Shape suffixes: T tokens of a step · I, O features in and out · E hidden · F local feed-forward columns · H local query heads
· K local key/value heads · D head dim · B KV blocks · P block size · R rows that logits are wanted for
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged KV cache on one rank. The last block is scratch: padding tokens are written there, nobody reads it."""

    keys_BPKD: Tensor
    values_BPKD: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRun:
    """A run of one sequence's tokens in a step."""

    first_row: int
    """Its first row among the step's tokens."""
    num_tokens: int
    start: int
    """Position of its first token. Token i attends to positions 0 … start + i."""
    block_table: Tensor
    """int64, block ids in sequence order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How a step's rows lie in the cache. Rows past the last run are padding."""

    positions_T: Tensor
    """int64."""
    slots_T: Tensor
    """int64, block id × block size + offset: where each token's key and value go."""
    cos_TD: Tensor
    """float32, cosine of the rotary angles at positions_T; the two halves of D are equal."""
    sin_TD: Tensor
    runs: tuple[SequenceRun, ...]


class Kernels(Protocol):
    """A backend. Rows are independent: what a row holds never depends on the other rows, if `batch_invariant`."""

    name: str
    batch_invariant: bool
    """Whether a row's bits are the same whatever else is in the step, once rows are padded to `row_multiple`."""
    row_multiple: int
    """Steps are padded to a multiple of this many rows."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """[T, O]: x · weightᵀ."""
        ...

    def pack_head(self, weight_VE: Tensor) -> Tensor:
        """The LM head in the form that `logits` wants; called once, at load."""
        ...

    def logits(self, x_RE: Tensor, head: Tensor) -> Tensor:
        """float32 [R, V] of float32 x; never rounded to the weights' dtype, in which close logits would become equal."""
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight in float32 (Zhang & Sennrich 2019), then rounded to the weight's dtype."""
        ...

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); x and residual are float32, and so is their sum."""
        ...

    def silu_and_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """[T, F]: silu(first half) · second half (SwiGLU, Shazeer 2020)."""
        ...

    def rope_and_cache(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: AttentionPlan, cache: LayerCache
    ) -> Tensor:
        """Rotate q and k by their positions (Su et al. 2021, half-split layout), write k and v to their slots, return q."""
        ...

    def attention(self, q_THD: Tensor, plan: AttentionPlan, cache: LayerCache, kv_of_query_H: Tensor) -> Tensor:
        """[T, H, D]: causal softmax(q · kᵀ / sqrt(D)) · v over each run's own cached positions.

        kv_of_query_H: int64, the local key/value head that each local query head reads; any map. Padding rows are undefined
        but finite.
        """
        ...
