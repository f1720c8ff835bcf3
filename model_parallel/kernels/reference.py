"""The reference backend: torch operations on any device, and the oracle of every other backend's tests.

Shape suffixes: T tokens of a step · I, O features · E hidden · F feed-forward columns · H query heads · K key/value heads
· D head dim · B KV blocks · P block size · S sequences · N query tokens of each · R of them at a time
· L cached positions, padded · C cached positions of a tile

Batch invariance on CPU. A matrix product's row must not depend on how many rows stand beside it. The CPU libraries below
torch choose their inner loop by the number of rows, differently on each processor. So steps are padded to four rows a thread,
products and attention run over as many rows at a time, and sums over cached positions run in tiles of fixed length that are
added in order. tests/unit/kernels and tests/numerics check it on the machine at hand.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model_parallel.kernels.fp8 import cached, quantized_rows
from model_parallel.kernels.interface import (
    Adapted,
    AdaptedRun,
    AttentionPlan,
    Fp8Matrix,
    GroupMatrix,
    Heads,
    Int8Matrix,
    LayerCache,
    LowRankUpdate,
    Matrix,
    SequenceRun,
)
from model_parallel.kernels.low_rank import Runs, add_low_rank, on_device
from model_parallel.kernels.randomness import best_draws
from model_parallel.kernels.softmax import normalisers, softmax_parts

ROWS_PER_THREAD = 4
KEY_TILE = 128
"""Cached positions that one partial sum of attention covers."""


class ReferenceKernels:
    """See kernels/interface.py. Attention is computed in float32 whatever the dtype."""

    name = "reference"
    adapted_multiple = 1
    has_threads = False
    only_enqueue = False
    num_done = 0
    is_compiling = False

    def __init__(self, *, num_threads: int, device: str) -> None:
        self.row_multiple = ROWS_PER_THREAD * num_threads
        self.batch_invariant = device == "cpu"
        self.device = device

    def pack_linear(self, weight_OI: Matrix | tuple[Matrix, ...]) -> tuple[Matrix, ...]:
        return weight_OI if isinstance(weight_OI, tuple) else (weight_OI,)

    def pack_gated(self, gate_up_F2I: Matrix) -> Matrix:
        return gate_up_F2I

    def pack_head(self, weight_VE: Matrix) -> Matrix:
        if not isinstance(weight_VE, Tensor):
            return weight_VE
        # No CPU product of torch takes bfloat16 and gives float32; a GPU's does.
        return weight_VE if weight_VE.is_cuda else weight_VE.float()

    def allocate_cache(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerCache:
        shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)
        return LayerCache(*(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)))

    def embed(self, token_ids_T: Tensor, weight: Tensor | GroupMatrix, first_id: int) -> Tensor:
        return embedded(token_ids_T, weight, first_id)

    def pack_adapter(
        self, updates: Sequence[LowRankUpdate | None], *, gated: Collection[int]
    ) -> tuple[LowRankUpdate | None, ...]:
        return on_device(updates, self.device)

    def adapted_rows(self, runs: Sequence[AdaptedRun]) -> Runs:
        return tuple(runs)

    def linear(self, x_TI: Tensor, weights: tuple[Matrix, ...], adapted: Adapted | None = None) -> Tensor:
        return self._adapted(x_TI, weights, adapted).to(x_TI.dtype)

    def partial_sum(self, x_TI: Tensor, weights: tuple[Matrix, ...], adapted: Adapted | None = None) -> Tensor:
        return self._adapted(x_TI, weights, adapted).float()

    def gated_linear(self, x_TI: Tensor, weight_F2I: Matrix, adapted: Adapted | None = None) -> Tensor:
        gate_TF, up_TF = self._adapted(x_TI, (weight_F2I,), adapted).chunk(2, dim=-1)
        return (F.silu(gate_TF) * up_TF).to(x_TI.dtype)

    def _adapted(self, x_TI: Tensor, weights: tuple[Matrix, ...], adapted: Adapted | None) -> Tensor:
        """[T, O], of x's dtype, or float32 with quantised weights."""
        out_TO = torch.cat([_product(x_TI, weight) for weight in weights], dim=1)
        if adapted is None or not adapted.rows:
            return out_TO
        return add_low_rank(out_TO.float(), x_TI, adapted).to(out_TO.dtype)

    def logits(self, x_RE: Tensor, head: Matrix) -> Tensor:
        if not isinstance(head, Tensor) or head.dtype == torch.float32:
            return _product(x_RE, head)
        return torch.mm(x_RE.to(head.dtype), head.t(), out_dtype=torch.float32)

    softmax_parts = staticmethod(softmax_parts)
    normalisers = staticmethod(normalisers)
    best_draws = staticmethod(best_draws)

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        scale_T1 = torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + eps)
        return (x_TE * scale_T1 * weight_E.float()).to(weight_E.dtype)

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TE = x_TE + residual_TE
        return self.rms_norm(sum_TE, weight_E, eps), sum_TE

    def attention(self, qkv_TX: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads) -> Tensor:
        parts = (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
        q_THD, k_TKD, v_TKD = qkv_TX.unflatten(-1, (-1, heads.head_dim)).split(parts, dim=1)
        cache.keys.flatten(0, 1)[plan.slots_T] = cached(_rotate(k_TKD, plan), cache.keys.dtype)
        cache.values.flatten(0, 1)[plan.slots_T] = cached(v_TKD, cache.values.dtype)
        q_THD = _rotate(q_THD, plan)

        out_THD = torch.zeros_like(q_THD)
        decodes = [run for run in plan.runs if run.num_tokens == 1]
        if decodes:
            rows = torch.tensor([run.first_row for run in decodes], device=q_THD.device)
            out_THD[rows] = _attend(q_THD[rows].unsqueeze(1), decodes, cache, heads.kv_of_query_H).squeeze(1)
        for run in plan.runs:
            if run.num_tokens > 1:
                rows_of_run = slice(run.first_row, run.first_row + run.num_tokens)
                q_SNHD = q_THD[rows_of_run].unsqueeze(0)
                out_THD[rows_of_run] = _attend(q_SNHD, [run], cache, heads.kv_of_query_H).squeeze(0)
        return out_THD.flatten(1)


def embedded(token_ids_T: Tensor, weight: Tensor | GroupMatrix, first_id: int) -> Tensor:
    """See Kernels.embed."""
    local_T = token_ids_T - first_id
    held_T = (local_T >= 0) & (local_T < (len(weight) if isinstance(weight, Tensor) else weight.num_outputs))
    if isinstance(weight, GroupMatrix):
        rows_TE = weight.rows(local_T.where(held_T, 0)).dequantized(torch.float32)
        return rows_TE.masked_fill_(~held_T.unsqueeze(-1), 0)
    return F.embedding(local_T.where(held_T, 0), weight).float().masked_fill_(~held_T.unsqueeze(-1), 0)


def _product(x_TI: Tensor, weight_OI: Matrix) -> Tensor:
    """[T, O], of x's dtype; of quantised weights float32. Every dtype holds int8 weights exactly."""
    if isinstance(weight_OI, GroupMatrix):
        return _linear(x_TI.float(), weight_OI.dequantized(torch.float32))
    if isinstance(weight_OI, Fp8Matrix):
        values_TI, scales_T = quantized_rows(x_TI)
        return _linear(values_TI.float(), weight_OI.values_OI.float()) * scales_T.unsqueeze(1) * weight_OI.scales_O
    if isinstance(weight_OI, Int8Matrix):
        return _linear(x_TI, weight_OI.values_OI.to(x_TI.dtype)).float() * weight_OI.scales_O
    return _linear(x_TI, weight_OI)


def _linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """[T, O]; on a CPU a fixed number of rows at a time."""
    if x_TI.is_cuda:
        return F.linear(x_TI, weight_OI)
    return torch.cat([F.linear(rows_RI, weight_OI) for rows_RI in x_TI.split(_rows_at_once())])


def _rows_at_once() -> int:
    return ROWS_PER_THREAD * torch.get_num_threads()


def _rotate(x_THD: Tensor, plan: AttentionPlan) -> Tensor:
    first, second = x_THD.float().chunk(2, dim=-1)
    turned_THD = torch.cat((-second, first), dim=-1)
    return (x_THD * plan.cos_TD.unsqueeze(1) + turned_THD * plan.sin_TD.unsqueeze(1)).to(x_THD.dtype)


def _attend(q_SNHD: Tensor, runs: list[SequenceRun], cache: LayerCache, kv_of_query_H: Tensor) -> Tensor:
    """[S, N, H, D] for runs that all have N tokens."""
    device, dim = q_SNHD.device, q_SNHD.shape[-1]
    num_tokens = q_SNHD.shape[1]
    num_padded = -(-num_tokens // _rows_at_once()) * _rows_at_once()
    q_SHND = F.pad(q_SNHD.float(), (0, 0, 0, 0, 0, num_padded - num_tokens)).transpose(1, 2).contiguous()

    last_key_SN = torch.tensor(
        [[r.start + min(i, num_tokens - 1) for i in range(num_padded)] for r in runs], device=device
    )
    keys_SHLD, values_SHLD = _gather(runs, cache, kv_of_query_H, context_len=int(last_key_SN.max()) + 1)
    key_L = torch.arange(keys_SHLD.shape[2], device=device)
    # Slots after a sequence's end hold other requests' leftovers; a NaN among them must not reach the sum through 0 · NaN.
    values_SHLD.masked_fill_((key_L > last_key_SN[:, -1:])[:, None, :, None], 0.0)

    tiles = [slice(first, first + KEY_TILE) for first in range(0, keys_SHLD.shape[2], KEY_TILE)]
    keys = [keys_SHLD[:, :, tile].transpose(-1, -2).contiguous() for tile in tiles]
    values = [values_SHLD[:, :, tile].contiguous() for tile in tiles]
    out_SHND = torch.zeros_like(q_SHND)
    for first in range(0, num_padded, _rows_at_once()):
        rows = slice(first, first + _rows_at_once())
        q_SHRD = q_SHND[:, :, rows].contiguous()
        scores_SHRL = torch.cat([q_SHRD @ tile for tile in keys], dim=-1) * dim**-0.5
        scores_SHRL.masked_fill_((key_L > last_key_SN[:, rows, None])[:, None], float("-inf"))
        weights_SHRL = scores_SHRL.softmax(-1)
        for tile, values_SHCD in zip(tiles, values, strict=True):
            out_SHND[:, :, rows] += weights_SHRL[..., tile].contiguous() @ values_SHCD
    return out_SHND[:, :, :num_tokens].transpose(1, 2).to(q_SNHD.dtype)


def _gather(
    runs: list[SequenceRun], cache: LayerCache, kv_of_query_H: Tensor, *, context_len: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, H, L, D] in float32, L the context rounded up to whole tiles."""
    num_scratch, block_size = cache.keys.shape[0] - 1, cache.keys.shape[1]
    padded_len = -(-context_len // KEY_TILE) * KEY_TILE
    num_blocks = -(-padded_len // block_size)
    tables = torch.full((len(runs), num_blocks), num_scratch, dtype=torch.int64, device=cache.keys.device)
    for row, run in enumerate(runs):
        used = run.block_table[:num_blocks]
        tables[row, : len(used)] = used

    def gather(blocks_BPKD: Tensor) -> Tensor:
        cached_SLKD = blocks_BPKD[tables].flatten(1, 2)[:, :padded_len]
        return cached_SLKD.transpose(1, 2)[:, kv_of_query_H].float().contiguous()

    return gather(cache.keys), gather(cache.values)
