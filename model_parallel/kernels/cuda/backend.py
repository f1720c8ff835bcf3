"""Kernels for NVIDIA GPUs: products by cuBLAS, the rest in Triton (elementwise.py, attention.py, products.py, fp8.py,
groups.py).

Shape suffixes: those of kernels/interface.py
"""

import math
from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from model_parallel.kernels.cuda import adapters
from model_parallel.kernels.cuda.attention import combine_kernel, paged_attention_kernel
from model_parallel.kernels.cuda.elementwise import rms_norm_kernel, rotate_and_store_kernel, swiglu_kernel
from model_parallel.kernels.cuda.fp8_weights import Fp8Weight
from model_parallel.kernels.cuda.group_weights import GroupWeight
from model_parallel.kernels.cuda.products import product_kernel
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
)
from model_parallel.kernels.randomness import best_draws
from model_parallel.kernels.reference import embedded
from model_parallel.kernels.softmax import normalisers, softmax_parts

MAX_PARTS = 32
"""Parts that a context is cut into at most, for programs to share in decode."""
PROGRAMS_A_PROCESSOR = 4
"""Programs of decode attention that keep a multiprocessor's loads in flight."""
MAX_INT8_ROWS = 128
"""With more, a product takes longer than to read its weights, and cuBLAS takes less than our own kernel."""
_SMALLEST_DOT = 16
"""Rows, columns and depth that tl.dot needs."""

Packed = Tensor | Int8Matrix | Fp8Weight | GroupWeight


class CudaKernels:
    """See kernels/interface.py. float32, bfloat16 and float16; calls only enqueue work, so CUDA graphs can hold them.

    cuBLAS takes another kernel for another number of rows, so that a row's last bits do depend on the rest of the step.
    """

    name = "cuda"
    batch_invariant = False
    row_multiple = 1
    adapted_multiple = 1
    has_threads = False
    only_enqueue = True
    num_done = 0
    """What is enqueued is done soon after; a step takes tenths of a second at most."""

    def __init__(self, *, device: str = "cuda", num_multiprocessors: int) -> None:
        self.device = device
        self.num_multiprocessors = num_multiprocessors
        self.is_compiling = False
        triton.knobs.runtime.jit_cache_hook = partial(self._set_compiling, True)
        triton.knobs.runtime.jit_post_compile_hook = partial(self._set_compiling, False)

    def _set_compiling(self, is_compiling: bool, **_: object) -> bool:
        """Triton compiles a kernel, or has compiled it. Returns that it shall."""
        self.is_compiling = is_compiling
        return False

    def pack_linear(self, weight_OI: Matrix | tuple[Matrix, ...]) -> Packed | tuple[Packed, ...]:
        return tuple(_packed(part) for part in weight_OI) if isinstance(weight_OI, tuple) else _packed(weight_OI)

    def pack_gated(self, gate_up_F2I: Matrix) -> Packed:
        return _packed(gate_up_F2I)

    def pack_head(self, weight_VE: Matrix) -> Packed:
        return _packed(weight_VE)

    def allocate_cache(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerCache:
        # A head's positions side by side, as attention reads them.
        shape = (num_blocks + 1, num_kv_heads, block_size, head_dim)
        return LayerCache(*(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)))

    def embed(self, token_ids_T: Tensor, weight: Tensor | GroupWeight, first_id: int) -> Tensor:
        if isinstance(weight, GroupWeight):
            return weight.rows(token_ids_T, first_id, torch.float32)
        return embedded(token_ids_T, weight, first_id)

    def pack_adapter(
        self, updates: Sequence[LowRankUpdate | None], *, gated: Collection[int]
    ) -> adapters.PackedAdapter:
        return adapters.pack(updates, self.device)

    def adapted_rows(self, runs: Sequence[AdaptedRun]) -> adapters.AdaptedRows:
        return adapters.rows_of(runs, self.device)

    def linear(self, x_TI: Tensor, weight: Packed | tuple[Packed, ...], adapted: Adapted | None = None) -> Tensor:
        if isinstance(weight, Tensor) and adapted is None:
            return F.linear(x_TI, weight)
        if isinstance(weight, Fp8Weight) and adapted is None:
            return weight.product(x_TI, x_TI.dtype)
        return self._adapted(x_TI, weight, adapted).to(x_TI.dtype)

    def partial_sum(self, x_TI: Tensor, weight: Packed | tuple[Packed, ...], adapted: Adapted | None = None) -> Tensor:
        return self._adapted(x_TI, weight, adapted)

    def gated_linear(self, x_TI: Tensor, weight: Packed, adapted: Adapted | None = None) -> Tensor:
        if isinstance(weight, Tensor) and adapted is None:
            return self.swiglu(F.linear(x_TI, weight), x_TI.dtype)
        if isinstance(weight, Fp8Weight) and adapted is None:
            return weight.gated_product(x_TI)
        return self.swiglu(self._adapted(x_TI, weight, adapted), x_TI.dtype)

    def _adapted(self, x_TI: Tensor, weight: Packed | tuple[Packed, ...], adapted: Adapted | None) -> Tensor:
        """float32 [T, O]."""
        parts = weight if isinstance(weight, tuple) else (weight,)
        products = [self._product(x_TI, part) for part in parts]
        out_TO = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return out_TO if adapted is None else adapters.add_low_rank(out_TO, x_TI, adapted)

    def _product(self, x_TI: Tensor, weight: Packed) -> Tensor:
        """float32 [T, O]: x · weightᵀ."""
        if isinstance(weight, GroupWeight):
            return weight.product(x_TI, self.num_multiprocessors)
        if isinstance(weight, Fp8Weight):
            return weight.product(x_TI, torch.float32)
        return _product(x_TI, weight)

    def swiglu(self, gate_up_T2F: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, F] in `dtype`: silu(gate) · up."""
        num_rows, num_columns = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        out_TF = torch.empty((num_rows, num_columns), dtype=dtype, device=gate_up_T2F.device)
        if num_rows:
            num_columns_a_program = min(1024, triton.next_power_of_2(num_columns))
            grid = (num_rows, triton.cdiv(num_columns, num_columns_a_program))
            swiglu_kernel[grid](gate_up_T2F.contiguous(), out_TF, num_columns, num_columns_a_program)
        return out_TF

    def logits(self, x_RE: Tensor, head: Packed) -> Tensor:
        dtype = head.dtype if isinstance(head, Tensor) else torch.bfloat16
        if dtype == torch.float32:
            return self._product(x_RE, head)
        # The rounded part of x and what rounding took away, in one product that reads the weights once.
        rounded_RE = x_RE.to(dtype)
        rest_RE = (x_RE - rounded_RE.float()).to(dtype)
        rounded_RV, rest_RV = self._product(torch.cat([rounded_RE, rest_RE]), head).chunk(2)
        return rounded_RV + rest_RV

    softmax_parts = staticmethod(softmax_parts)
    normalisers = staticmethod(normalisers)
    best_draws = staticmethod(best_draws)

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return self._norm(x_TE, None, weight_E, eps)

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual_TE = residual_TE.contiguous()
        return self._norm(x_TE, residual_TE, weight_E, eps), residual_TE

    def _norm(self, x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        num_rows, num_columns = x_TE.shape
        out_TE = torch.empty(x_TE.shape, dtype=weight_E.dtype, device=x_TE.device)
        if num_rows:
            num_padded = triton.next_power_of_2(num_columns)
            rms_norm_kernel[(num_rows,)](
                x_TE.contiguous(),
                residual_TE,
                weight_E,
                out_TE,
                num_columns,
                eps,
                NUM_COLUMNS_PADDED=num_padded,
                HAS_RESIDUAL=residual_TE is not None,
                num_warps=min(max(num_padded // 256, 1), 16),
            )
        return out_TE

    def attention(self, qkv_TX: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads) -> Tensor:
        num_rows, dim = qkv_TX.shape[0], heads.head_dim
        q_THD = torch.empty((num_rows, heads.num_query_heads, dim), dtype=qkv_TX.dtype, device=qkv_TX.device)
        out_THD = torch.empty_like(q_THD)
        if num_rows:
            self._rotate_and_store(qkv_TX.contiguous(), q_THD, plan, cache, heads)
            longest = max((run.num_tokens for run in plan.runs), default=0)
            if any(run.num_tokens == 1 for run in plan.runs):
                self._attend(q_THD, out_THD, plan, cache, heads, longest_run=1)
            if longest > 1:
                self._attend(q_THD, out_THD, plan, cache, heads, longest_run=longest)
        return out_THD.flatten(1)

    def _rotate_and_store(
        self, qkv_TX: Tensor, q_THD: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads
    ) -> None:
        num_heads = heads.num_query_heads + 2 * heads.num_kv_heads
        num_heads_a_program = 8
        rotate_and_store_kernel[(qkv_TX.shape[0], triton.cdiv(num_heads, num_heads_a_program))](
            qkv_TX,
            q_THD,
            cache.keys,
            cache.values,
            plan.slots_T,
            plan.cos_TD,
            plan.sin_TD,
            heads.num_query_heads,
            heads.num_kv_heads,
            BLOCK_SIZE=cache.keys.shape[2],
            HEAD_DIM=heads.head_dim,
            HALF_PADDED=triton.next_power_of_2(heads.head_dim // 2),
            NUM_HEADS_A_PROGRAM=num_heads_a_program,
        )

    def _attend(
        self,
        q_THD: Tensor,
        out_THD: Tensor,
        plan: AttentionPlan,
        cache: LayerCache,
        heads: Heads,
        *,
        longest_run: int,
    ) -> None:
        """Fills the rows of all runs of one token if longest_run is 1, and of all longer ones otherwise."""
        is_decode = longest_run == 1
        num_runs, group_size = plan.runs_S4.shape[0], heads.queries_of_kv_KG.shape[1]
        is_wide = q_THD.dtype == torch.float32
        if is_decode:
            num_tokens, num_rows = 1, max(_SMALLEST_DOT, group_size)
            wanted = num_programs_a_context(num_runs * heads.num_kv_heads, self.num_multiprocessors)
            num_parts = min(MAX_PARTS, _padded(wanted))
        else:
            num_tokens = max(1, (32 if is_wide else 128) // group_size)
            num_rows = max(_SMALLEST_DOT, num_tokens * group_size)
            num_parts = 1
        part_shape = (num_runs, heads.num_query_heads, num_parts) if num_parts > 1 else (0,)
        part_maxima, part_sums = (torch.empty(part_shape, dtype=torch.float32, device=q_THD.device) for _ in range(2))
        part_outs = torch.empty((*part_shape, heads.head_dim), dtype=torch.float32, device=q_THD.device)
        sizes = {"HEAD_DIM": heads.head_dim, "HEAD_DIM_PADDED": max(_SMALLEST_DOT, _padded(heads.head_dim))}
        num_programs = num_parts if is_decode else triton.cdiv(longest_run, num_tokens)
        paged_attention_kernel[(num_programs, heads.num_kv_heads, num_runs)](
            q_THD,
            cache.keys,
            cache.values,
            out_THD,
            part_outs,
            part_maxima,
            part_sums,
            plan.runs_S4,
            plan.blocks,
            heads.queries_of_kv_KG,
            heads.head_dim**-0.5 / math.log(2),
            heads.num_query_heads,
            heads.num_kv_heads,
            IS_DECODE=is_decode,
            NUM_TOKENS=num_tokens,
            GROUP_SIZE=group_size,
            NUM_ROWS=num_rows,
            NUM_KEYS=32 if is_wide else 64,
            NUM_PARTS=num_parts,
            BLOCK_SIZE=cache.keys.shape[2],
            **sizes,
            num_warps=8 if num_rows > 64 else 4,
        )
        if num_parts > 1:
            combine_kernel[(heads.num_query_heads, num_runs)](
                part_outs, part_maxima, part_sums, out_THD, plan.runs_S4, heads.num_query_heads, num_parts, **sizes
            )


def _packed(matrix: Matrix) -> Packed:
    if isinstance(matrix, Fp8Matrix):
        return Fp8Weight.packed(matrix)
    return GroupWeight.packed(matrix) if isinstance(matrix, GroupMatrix) else matrix


def _padded(size: int) -> int:
    padded: int = triton.next_power_of_2(size)
    return padded


def num_programs_a_context(num_contexts: int, num_multiprocessors: int) -> int:
    """That keep all processors busy in decode."""
    return -(-PROGRAMS_A_PROCESSOR * num_multiprocessors // num_contexts)


def _product(x_TI: Tensor, weight_OI: Tensor | Int8Matrix) -> Tensor:
    """float32 [T, O]: x · weightᵀ."""
    if isinstance(weight_OI, Int8Matrix):
        return _int8_product(x_TI, weight_OI)
    if weight_OI.dtype == torch.float32:
        return torch.mm(x_TI, weight_OI.t())
    return torch.mm(x_TI, weight_OI.t(), out_dtype=torch.float32)


def _int8_product(x_TI: Tensor, weight: Int8Matrix) -> Tensor:
    num_rows, (num_outputs, num_inputs) = x_TI.shape[0], weight.values_OI.shape
    if num_rows > MAX_INT8_ROWS:
        return _product(x_TI, weight.values_OI.to(x_TI.dtype)) * weight.scales_O
    out_TO = torch.empty((num_rows, num_outputs), dtype=torch.float32, device=x_TI.device)
    if num_rows:
        num_padded, num_outputs_a_program = max(_SMALLEST_DOT, _padded(num_rows)), 32
        # With few rows, more weights on their way at a time, which is what the time goes for.
        is_wide, has_few_rows = x_TI.dtype == torch.float32, num_padded <= 32
        product_kernel[(1, triton.cdiv(num_outputs, num_outputs_a_program))](
            x_TI.contiguous(),
            weight.values_OI,
            weight.scales_O,
            out_TO,
            num_rows,
            num_outputs,
            num_inputs,
            NUM_ROWS=num_padded,
            NUM_OUTPUTS=num_outputs_a_program,
            NUM_INPUTS=32 if is_wide else 256 if has_few_rows else 128,
            num_warps=4 if has_few_rows else 8,
            num_stages=5 if has_few_rows else 3,
        )
    return out_TO
