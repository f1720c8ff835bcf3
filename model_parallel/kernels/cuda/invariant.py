"""Kernels for NVIDIA GPUs with which a row's bits are the same whatever else is in the step.

cuBLAS, and tiles that fit the number of rows, are faster; but a GPU then has other instructions, or adds in another order, for
another number of rows. Here all products are Triton's, with tiles that depend on the weight alone, contexts are cut into parts at
fixed positions, and rows are summed by kernels of our own.

Shape suffixes: those of kernels/interface.py
"""

import logging
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model_parallel.kernels.cuda.backend import CudaKernels, Packed, num_programs_a_context
from model_parallel.kernels.cuda.elementwise import softmax_parts_kernel
from model_parallel.kernels.cuda.fp8_weights import Fp8Weight
from model_parallel.kernels.cuda.group_weights import GroupWeight
from model_parallel.kernels.cuda.invariant_attention import invariant_attention_kernel, join_parts_kernel
from model_parallel.kernels.cuda.products import product_kernel
from model_parallel.kernels.interface import Adapted, AttentionPlan, Heads, Int8Matrix, LayerCache

logger = logging.getLogger(__name__)

PART_LEN = 256
"""Cached positions of a part of a context; a multiple of any tile's."""
_SMALLEST_DOT = 16
"""Columns that tl.dot needs."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes of a product, and how."""

    num_rows: int
    num_outputs: int
    num_inputs: int
    num_warps: int
    num_stages: int


# With 64 rows Hopper takes the instruction (wgmma) that it takes for more. Programs of few outputs keep all processors reading.
NARROW = {2: Tile(64, 32, 64, 4, 6), 4: Tile(32, 32, 32, 4, 2)}
"""By bytes of an element of x. Wide ones take as many inputs at a time."""
WIDE = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 8, 2)}
"""For many rows, where the arithmetic decides: each weight is read for more of them."""


class InvariantCudaKernels(CudaKernels):
    """See kernels/interface.py, and CudaKernels."""

    batch_invariant = True

    def __init__(self, *, device: str = "cuda", num_multiprocessors: int, architecture: str = "") -> None:
        """architecture: of the GPU; another one has other instructions, and so other bits."""
        super().__init__(device=device, num_multiprocessors=num_multiprocessors)
        self.name = f"cuda-invariant {architecture}".rstrip()
        self.part_len = PART_LEN
        self.has_wide_tiles = False

    def settle_tiles(self, dtype: torch.dtype) -> None:
        """Use wide tiles from now on if they give this GPU's products with x of `dtype` the bits that narrow ones give.

        They do where each output is one chain of the same instructions, which no document of the GPU promises.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        wide = WIDE[dtype.itemsize]
        num_rows, num_outputs, num_inputs = wide.num_rows + 1, wide.num_outputs + 1, 4 * wide.num_inputs + 8
        x = torch.randn((num_rows, num_inputs), device=self.device, generator=generator).to(dtype)
        weight = torch.randn((num_outputs, num_inputs), device=self.device, generator=generator)
        scales = torch.rand(num_outputs, device=self.device, generator=generator)
        weights = (weight.to(dtype), Int8Matrix((weight * 40).to(torch.int8), scales))
        products = [
            [self._in_tiles(x, each, tile, torch.float32) for each in weights]
            for tile in (NARROW[dtype.itemsize], wide)
        ]
        self.has_wide_tiles = all(map(torch.equal, *products))
        if not self.has_wide_tiles:
            logger.warning("prompts are computed in narrow tiles (slow): this GPU has other bits for wide ones")

    def linear(self, x_TI: Tensor, weight: Packed | tuple[Packed, ...], adapted: Adapted | None = None) -> Tensor:
        if adapted is None and isinstance(weight, Tensor | Int8Matrix):
            return self._tiled(x_TI, weight, x_TI.dtype)
        return self._adapted(x_TI, weight, adapted).to(x_TI.dtype)

    def gated_linear(self, x_TI: Tensor, weight: Packed, adapted: Adapted | None = None) -> Tensor:
        return self.swiglu(self._adapted(x_TI, weight, adapted), x_TI.dtype)

    def _product(self, x_TI: Tensor, weight: Packed) -> Tensor:
        if isinstance(weight, GroupWeight):
            return weight.product(x_TI, self.num_multiprocessors, is_invariant=True)
        assert not isinstance(weight, Fp8Weight), "ParallelConfig refuses it"
        return self._tiled(x_TI, weight, torch.float32)

    def _tiled(self, x_TI: Tensor, weight: Tensor | Int8Matrix, dtype: torch.dtype) -> Tensor:
        """[T, O] of `dtype`: x · weightᵀ."""
        narrow = NARROW[x_TI.element_size()]
        is_wide = self.has_wide_tiles and x_TI.shape[0] > narrow.num_rows
        return self._in_tiles(x_TI, weight, WIDE[x_TI.element_size()] if is_wide else narrow, dtype)

    def _in_tiles(self, x_TI: Tensor, weight: Tensor | Int8Matrix, tile: Tile, dtype: torch.dtype) -> Tensor:
        values_OI, scales_O = (weight, None) if isinstance(weight, Tensor) else (weight.values_OI, weight.scales_O)
        num_rows, (num_outputs, num_inputs) = x_TI.shape[0], values_OI.shape
        out_TO = torch.empty((num_rows, num_outputs), dtype=dtype, device=x_TI.device)
        if num_rows:
            product_kernel[(triton.cdiv(num_rows, tile.num_rows), triton.cdiv(num_outputs, tile.num_outputs))](
                x_TI.contiguous(),
                values_OI,
                scales_O,
                out_TO,
                num_rows,
                num_outputs,
                num_inputs,
                NUM_ROWS=tile.num_rows,
                NUM_OUTPUTS=tile.num_outputs,
                NUM_INPUTS=tile.num_inputs,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        return out_TO

    def softmax_parts(self, logits_RV: Tensor) -> Tensor:
        num_rows, num_columns = logits_RV.shape
        parts_R3 = torch.empty((num_rows, 3), dtype=torch.float64, device=logits_RV.device)
        if num_rows:
            softmax_parts_kernel[(num_rows,)](logits_RV.contiguous(), parts_R3, num_columns, 2048)
        return parts_R3

    def normalisers(self, values_RV: Tensor) -> Tensor:
        return self.softmax_parts(values_RV)[:, :2]

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
        is_decode, is_wide = longest_run == 1, q_THD.dtype == torch.float32
        num_runs, group_size, block_size = plan.runs_S4.shape[0], heads.queries_of_kv_KG.shape[1], cache.keys.shape[2]
        num_rows = max(32 if is_wide else 64, group_size)
        num_tokens = 1 if is_decode else num_rows // group_size
        longest_context = max(len(run.block_table) for run in plan.runs) * block_size
        num_parts = triton.cdiv(longest_context, self.part_len) if is_decode else 1
        part_shape = (num_runs, heads.num_query_heads, num_parts) if is_decode else (0,)
        part_maxima, part_sums = (torch.empty(part_shape, dtype=torch.float32, device=q_THD.device) for _ in range(2))
        part_outs = torch.empty((*part_shape, heads.head_dim), dtype=torch.float32, device=q_THD.device)
        sizes = {
            "PART_LEN": self.part_len,
            "HEAD_DIM": heads.head_dim,
            "HEAD_DIM_PADDED": max(_SMALLEST_DOT, triton.next_power_of_2(heads.head_dim)),
        }
        if is_decode:  # who computes a part does not matter
            wanted = num_programs_a_context(num_runs * heads.num_kv_heads, self.num_multiprocessors)
            num_programs = min(num_parts, wanted)
        else:
            num_programs = triton.cdiv(longest_run, num_tokens)
        invariant_attention_kernel[(num_programs, heads.num_kv_heads, num_runs)](
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
            num_parts,
            IS_DECODE=is_decode,
            NUM_TOKENS=num_tokens,
            GROUP_SIZE=group_size,
            NUM_ROWS=num_rows,
            NUM_KEYS=32 if is_wide else 64,
            BLOCK_SIZE=block_size,
            **sizes,
            num_warps=8 if num_rows * sizes["HEAD_DIM_PADDED"] > 64 * 64 else 4,
            enable_fp_fusion=False,
        )
        if is_decode:
            join_parts_kernel[(heads.num_query_heads, num_runs)](
                part_outs,
                part_maxima,
                part_sums,
                out_THD,
                plan.runs_S4,
                heads.num_query_heads,
                num_parts,
                **sizes,
                enable_fp_fusion=False,
            )
