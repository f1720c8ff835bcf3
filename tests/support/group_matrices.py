"""Random matrices in groups, of every format that checkpoints have, and bounds of products with them."""

from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from model_parallel.checkpoint.gguf_formats import FORMATS as GGUF_FORMATS
from model_parallel.kernels.interface import GroupMatrix
from model_parallel.weight_format import GroupFormat

FLOAT32_ROUNDING = 2.0**-24
FORMATS = MappingProxyType(
    {form.name: form for form in GGUF_FORMATS.values()}
    | {
        "symmetric 128": GroupFormat(name="s", bits=4, kind="fixed_zero", zero=8, group_size=128),
        "zeros 32": GroupFormat(name="z", bits=4, kind="zeros", scale_type="bfloat16", group_size=32),
        "zeros 8 bits": GroupFormat(name="z8", bits=8, kind="zeros", scale_type="float32", zero=-127, group_size=64),
        "zeros 8": GroupFormat(name="z", bits=4, kind="zeros", zero=1, group_size=8),
    }
)


def random_matrix(
    form: GroupFormat, num_outputs: int, num_inputs: int, *, num_before: int = 0, reordered: bool = False
) -> GroupMatrix:
    """For inputs `num_before` … of the first span on, or for inputs in a random order with gaps."""
    num_spans = -(-(num_before + num_inputs) // form.span_size)
    num_groups, num_stored = num_spans * form.groups_per_span, num_spans * form.span_size
    if form.bits == 4:
        values = torch.randint(0, 256, (num_outputs, num_stored // 2), dtype=torch.uint8)
    else:
        values = torch.randint(-128, 128, (num_outputs, num_stored), dtype=torch.int8)
    dtype = getattr(torch, form.scale_type)
    parts: dict[str, Tensor] = {}
    if form.kind in ("minimums", "minimum_codes"):
        parts["minimums_OS"] = (torch.randn(num_outputs, num_spans) / 8).to(dtype)
    if form.kind == "zeros":
        parts["zeros_OS"] = torch.randint(0, 1 << form.bits, (num_outputs, num_spans), dtype=torch.uint8)
    if form.kind == "scale_codes":
        parts["scale_codes_OG"] = torch.randint(-128, 128, (num_outputs, num_groups), dtype=torch.int8)
    if form.kind == "minimum_codes":
        parts["scale_codes_OG"], parts["minimum_codes_OG"] = (
            torch.randint(0, 64, (num_outputs, num_groups), dtype=torch.uint8) for _ in range(2)
        )
    order = None
    if reordered:
        order = torch.full((num_stored,), -1, dtype=torch.int32)
        order[torch.randperm(num_stored)[:num_inputs]] = torch.randperm(num_inputs).int()
    return GroupMatrix(
        format=form,
        num_inputs=num_inputs,
        num_before=0 if reordered else num_before,
        order_P=order,
        values_OB=values,
        scales_OS=(torch.rand(num_outputs, num_spans) / 64 + 1e-3).to(dtype),
        **parts,
    )


def product_bound(x_TI: Tensor, matrix: GroupMatrix) -> tuple[Tensor, Tensor]:
    """x · weightᵀ in float64, and how far off a product in float32 may be (Higham 2002, §3).

    Of a group: chains of at most group_size multiply-adds over x · q, and as many additions of x. Of an output: two
    multiply-adds a group. Scale and minimum: at most three roundings each. All of it relative to |scale · q| + |minimum|.
    """
    weight_OI = matrix.dequantized(torch.float64)
    minimum_OI = -replace(matrix, values_OB=torch.zeros_like(matrix.values_OB)).dequantized(torch.float64)
    magnitudes_OI = (weight_OI + minimum_OI).abs() + minimum_OI.abs()
    num_roundings = matrix.format.group_size + 2 * matrix.num_groups + 8
    bound_TO = num_roundings * FLOAT32_ROUNDING * (x_TI.double().abs() @ magnitudes_OI.T)
    return x_TI.double() @ weight_OI.T, bound_TO
