"""Products with weights in e4m3, on GPUs that multiply them: x's rows in e4m3, torch's scaled product, then the scales.

No GPU has run them yet. Shape suffixes: T tokens · O features out · I features in · P, Q these padded to what the product takes
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model_parallel.kernels.cuda.fp8 import quantize_rows_kernel, scale_kernel, scaled_swiglu_kernel
from model_parallel.kernels.fp8 import FP8, LARGEST_VALUE, SMALLEST_LARGEST
from model_parallel.kernels.interface import Fp8Matrix

MULTIPLE = 16
"""Of inputs and outputs of a product (torch._scaled_mm). What they are padded with is zero, and left out of the result."""
_SMALLEST_NUM_ROWS = 16
"""With fewer rows, no time is saved, and the product has not been tried on a device."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """As torch._scaled_mm takes it."""

    values_QP: Tensor
    scales_O: Tensor
    num_inputs: int
    one: Tensor
    """float32, the scale that the product itself multiplies with."""

    @classmethod
    def packed(cls, matrix: Fp8Matrix) -> "Fp8Weight":
        num_outputs, num_inputs = matrix.values_OI.shape
        values_QP = matrix.values_OI.contiguous()
        shape = (_padded(num_outputs), _padded(num_inputs))
        if values_QP.shape != shape:
            values_QP = torch.zeros(shape, dtype=torch.uint8, device=values_QP.device).view(FP8)
            values_QP[:num_outputs, :num_inputs] = matrix.values_OI
        one = torch.ones((), dtype=torch.float32, device=values_QP.device)
        return cls(values_QP, matrix.scales_O.float().contiguous(), num_inputs, one)

    @property
    def num_outputs(self) -> int:
        return len(self.scales_O)

    @property
    def nbytes(self) -> int:
        return self.values_QP.nbytes + self.scales_O.nbytes

    def numel(self) -> int:
        return self.num_outputs * self.num_inputs

    def product(self, x_TI: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, O] in `dtype`: x · weightᵀ."""
        out_TO = torch.empty((len(x_TI), self.num_outputs), dtype=dtype, device=x_TI.device)
        if len(x_TI):
            product_TQ, scales_T = self._unscaled(x_TI)
            num_columns, num_stored = self.num_outputs, product_TQ.shape[1]
            grid, size = _pieces(len(x_TI), num_columns)
            scale_kernel[grid](product_TQ, scales_T, self.scales_O, out_TO, num_columns, num_stored, size)
        return out_TO

    def gated_product(self, x_TI: Tensor) -> Tensor:
        """[T, O / 2] of x's dtype: silu(x · gateᵀ) · (x · upᵀ), of gate rows and then up rows."""
        num_columns = self.num_outputs // 2
        out_TF = torch.empty((len(x_TI), num_columns), dtype=x_TI.dtype, device=x_TI.device)
        if len(x_TI):
            product_TQ, scales_T = self._unscaled(x_TI)
            grid, size = _pieces(len(x_TI), num_columns)
            scaled_swiglu_kernel[grid](
                product_TQ, scales_T, self.scales_O, out_TF, num_columns, product_TQ.shape[1], size
            )
        return out_TF

    def _unscaled(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """(float32 [T or more, Q], float32 [T or more]): the sums of products of e4m3 numbers, and the scales of x's rows."""
        values_TP, scales_T = quantized_rows(x_TI, num_stored=self.values_QP.shape[1])
        product_TQ = torch._scaled_mm(
            values_TP, self.values_QP.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.float32
        )
        return product_TQ, scales_T


def quantized_rows(x_TI: Tensor, *, num_stored: int) -> tuple[Tensor, Tensor]:
    """As kernels/fp8.py, with zeros in columns up to `num_stored`, and in rows up to the fewest that are multiplied."""
    num_rows, num_columns = x_TI.shape
    num_stored_rows = max(_SMALLEST_NUM_ROWS, num_rows)
    values_TP = torch.empty((num_stored_rows, num_stored), dtype=FP8, device=x_TI.device)
    scales_T = torch.empty(num_stored_rows, dtype=torch.float32, device=x_TI.device)
    num_padded = triton.next_power_of_2(num_stored)
    quantize_rows_kernel[(num_stored_rows,)](
        x_TI.contiguous(),
        values_TP,
        scales_T,
        num_rows,
        num_columns,
        num_stored,
        LARGEST_VALUE=LARGEST_VALUE,
        SMALLEST_LARGEST=SMALLEST_LARGEST,
        NUM_COLUMNS_PADDED=num_padded,
        num_warps=min(max(num_padded // 256, 1), 16),
    )
    return values_TP, scales_T


def _pieces(num_rows: int, num_columns: int) -> tuple[tuple[int, int], int]:
    """A grid of programs, and how many columns each takes."""
    size = min(1024, triton.next_power_of_2(num_columns))
    return (num_rows, triton.cdiv(num_columns, size)), size


def _padded(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
