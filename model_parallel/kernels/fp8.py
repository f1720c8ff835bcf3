"""Numbers in e4m3, eight bits with four of them for the exponent: what a row of them stands for. See docs/quantization.md.

Shape suffixes: R rows · I their numbers
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST_VALUE = 448.0
"""Of e4m3, which has no infinities."""
SMALLEST_LARGEST = 2.0**-100
"""The least that a row's largest number counts as, so that its scale is neither zero nor too small to divide by."""


def scales_of(largest_R: Tensor) -> Tensor:
    """float32 [R]: scales of rows with such largest absolute numbers. Of a row that is not finite, not finite or any."""
    return largest_R.float().clamp_min(SMALLEST_LARGEST) / LARGEST_VALUE


def rounded(x_RI: Tensor, scales_R: Tensor) -> Tensor:
    """e4m3 [R, I]: x / scale, to the nearest, of two that are as near the even one. NaN stays, and infinity becomes NaN."""
    return (x_RI.float() / scales_R.unsqueeze(1)).to(FP8)


def cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a KV cache of `dtype` holds it: in e4m3, which has no infinities, what is too large becomes the largest number."""
    return x.clamp(-LARGEST_VALUE, LARGEST_VALUE).to(dtype) if dtype == FP8 else x.to(dtype)


def quantized_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [R, I], float32 [R]): each row with a scale of its own, its largest absolute number / 448."""
    scales_R = scales_of(x_RI.abs().amax(dim=1))
    return rounded(x_RI, scales_R), scales_R
