"""Weights in groups as the Triton kernels read them, and products with them.

Shape suffixes: T tokens · O features out · I features in · P inputs of all groups · S spans · G groups · N bytes of a group
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import triton
from torch import Tensor

from model_parallel.errors import ConfigError
from model_parallel.kernels.cuda.groups import dequantize_rows_kernel, group_product_kernel
from model_parallel.kernels.interface import GroupMatrix
from model_parallel.weight_format import GroupFormat

MAX_ROWS = 64
"""With more, a product takes longer than to read its weights, and cuBLAS on dequantised weights less than our own kernel."""
_SMALLEST_DOT = 16
_GROUP_SIZES = {4: (32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
_PROGRAMS_A_PROCESSOR = 4
_DEQUANTIZED_ROWS = 32


@dataclass(frozen=True, slots=True)
class GroupWeight:
    """Group after group, so that programs for neighbouring outputs read neighbouring bytes."""

    format: GroupFormat
    num_inputs: int
    num_before: int
    order_P: Tensor | None
    values_GON: Tensor
    scales_SO: Tensor
    minimums_SO: Tensor | None
    """Or zeros."""
    codes_GO: Tensor | None
    minimum_codes_GO: Tensor | None

    @classmethod
    def packed(cls, matrix: GroupMatrix) -> "GroupWeight":
        """Raises ConfigError for groups that tl.dot cannot multiply."""
        form = matrix.format
        if form.group_size not in _GROUP_SIZES[form.bits]:
            raise ConfigError(
                f"quantization is packed, and {form.name} has groups of {form.group_size} inputs; on cuda groups of "
                f"{', '.join(map(str, _GROUP_SIZES[form.bits]))} can be computed; none dequantises them"
            )

        def turned(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.t().contiguous()

        return cls(
            format=form,
            num_inputs=matrix.num_inputs,
            num_before=matrix.num_before,
            order_P=matrix.order_P,
            values_GON=matrix.values_OB.unflatten(1, (matrix.num_groups, -1)).transpose(0, 1).contiguous(),
            scales_SO=matrix.scales_OS.t().contiguous(),
            minimums_SO=turned(matrix.zeros_OS if form.kind == "zeros" else matrix.minimums_OS),
            codes_GO=turned(matrix.scale_codes_OG),
            minimum_codes_GO=turned(matrix.minimum_codes_OG),
        )

    @property
    def num_groups(self) -> int:
        return self.values_GON.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.values_GON.shape[1]

    @property
    def nbytes(self) -> int:
        parts = (self.values_GON, self.scales_SO, self.minimums_SO, self.codes_GO, self.minimum_codes_GO)
        return sum(part.nbytes for part in parts if part is not None)

    def _tensors(self) -> tuple[Tensor, ...]:
        """In the kernels' order; what the kind does not have is not read."""
        kept = (self.minimums_SO, self.codes_GO, self.minimum_codes_GO, self.order_P)
        return (self.values_GON, self.scales_SO, *(self.scales_SO if part is None else part for part in kept))

    def _constants(self) -> dict[str, Any]:
        form = self.format
        return {
            "NUM_BITS": form.bits,
            "GROUP_KIND": form.kind,
            "FIXED_ZERO": form.zero,
            "GROUP_SIZE": form.group_size,
            "GROUPS_PER_SPAN": form.groups_per_span,
            "HAS_ORDER": self.order_P is not None,
        }

    def product(self, x_TI: Tensor, num_multiprocessors: int, *, is_invariant: bool = False) -> Tensor:
        """float32 [T, O]: x · weightᵀ. is_invariant: a row's bits do not depend on how many there are."""
        num_rows, num_outputs = x_TI.shape[0], self.num_outputs
        if num_rows > MAX_ROWS and not is_invariant:
            rows_O = torch.arange(num_outputs, device=x_TI.device)
            weight_OI = self.rows(rows_O, 0, x_TI.dtype)
            if x_TI.dtype == torch.float32:
                return torch.mm(x_TI, weight_OI.t())
            return torch.mm(x_TI, weight_OI.t(), out_dtype=torch.float32)
        num_padded = MAX_ROWS if is_invariant else max(_SMALLEST_DOT, triton.next_power_of_2(num_rows))
        num_outputs_a_program = 64 if self.format.group_size <= 64 else 32
        num_programs = triton.cdiv(num_outputs, num_outputs_a_program)
        wanted_parts = -(-_PROGRAMS_A_PROCESSOR * num_multiprocessors // num_programs)
        groups_per_part = -(-self.num_groups // max(1, min(wanted_parts, self.num_groups // 4)))
        num_parts = -(-self.num_groups // groups_per_part)
        out_NTO = torch.empty((num_parts, num_rows, num_outputs), dtype=torch.float32, device=x_TI.device)
        if num_rows:
            group_product_kernel[(num_programs, num_parts, triton.cdiv(num_rows, num_padded))](
                x_TI.contiguous(),
                *self._tensors(),
                out_NTO,
                num_rows,
                num_outputs,
                self.num_inputs,
                self.num_before,
                self.num_groups,
                groups_per_part,
                **self._constants(),
                NUM_ROWS=num_padded,
                NUM_OUTPUTS=num_outputs_a_program,
                num_warps=4,
                num_stages=4 if x_TI.dtype != torch.float32 else 2,
            )
        if is_invariant:  # torch's own sum takes the parts in an order that depends on the shape
            total: Tensor = reduce(torch.add, out_NTO.unbind(0))
            return total
        return out_NTO[0] if num_parts == 1 else out_NTO.sum(0)

    def rows(self, rows_T: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
        """[T, I]: outputs rows_T − first_row of the matrix; zero for those that it does not have."""
        out_TI = torch.empty((len(rows_T), self.num_inputs), dtype=dtype, device=rows_T.device)
        if len(rows_T):
            dequantize_rows_kernel[(self.num_groups, triton.cdiv(len(rows_T), _DEQUANTIZED_ROWS))](
                rows_T,
                *self._tensors(),
                out_TI,
                first_row,
                len(rows_T),
                self.num_outputs,
                self.num_inputs,
                self.num_before,
                **self._constants(),
                NUM_ROWS=_DEQUANTIZED_ROWS,
                num_warps=4,
            )
        return out_TI
