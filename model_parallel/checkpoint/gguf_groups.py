"""GGUF's quantised types in the form that kernels multiply, without any loss. Layouts: ggml-common.h of llama.cpp.

Shape suffixes: R rows · B blocks of a row · N bytes
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from model_parallel.checkpoint.gguf_formats import FORMATS
from model_parallel.kernels.interface import GroupMatrix

Parts = dict[str, Tensor]


def group_matrix(
    kind: Type, stored_RN: np.ndarray, num_blocks: int, *, num_inputs: int, num_before: int
) -> GroupMatrix:
    """From rows of whole blocks, as they are in the file."""
    blocks_RBN = torch.from_numpy(np.ascontiguousarray(stored_RN)).unflatten(1, (num_blocks, -1))
    parts = _READERS[kind](blocks_RBN)
    return GroupMatrix(format=FORMATS[kind], num_inputs=num_inputs, num_before=num_before, **parts)


def _halves(bytes_RBN: Tensor) -> Tensor:
    """float16 [R, B] of two bytes each."""
    return bytes_RBN.contiguous().view(torch.float16).flatten(1)


def _fours(bytes_RBN: Tensor, size: int) -> Tensor:
    """uint8 [R, B · 2 N]: of every `size` bytes first the lower four bits, then the upper."""
    chunks = bytes_RBN.unflatten(2, (-1, size))
    return torch.stack((chunks & 15, chunks >> 4), dim=3).flatten(1)


def _packed_fours(bytes_RBN: Tensor, size: int) -> Tensor:
    """uint8 [R, B · N]: the numbers of `_fours`, two a byte. Of two bytes at a time, since numbers that are neighbours come from
    neighbours: 0x4321 holds the pairs 1, 3 (the lower four bits) and 2, 4.
    """
    pairs = bytes_RBN.contiguous().view(torch.int16).unflatten(2, (-1, size // 2))
    packed = bytes_RBN.new_empty((*pairs.shape[:3], 2, size // 2))
    packed[:, :, :, 0] = pairs & 0x0F | pairs >> 4 & 0xF0
    packed[:, :, :, 1] = pairs >> 4 & 0x0F | pairs >> 8 & 0xF0
    return packed.flatten(1)


def _single_bits(bytes_RBN: Tensor) -> Tensor:
    """uint8 [R, B, 8 N]: bits of each byte, the lowest first."""
    return (bytes_RBN.unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2)


def _q4_0(b: Tensor) -> Parts:
    return {"scales_OS": _halves(b[:, :, :2]), "values_OB": _packed_fours(b[:, :, 2:], 16)}


def _q4_1(b: Tensor) -> Parts:
    minimums = -_halves(b[:, :, 2:4])
    return {
        "scales_OS": _halves(b[:, :, :2]),
        "minimums_OS": minimums,
        "values_OB": _packed_fours(b[:, :, 4:], 16),
    }


def _five(high_RBN: Tensor, low_RBN: Tensor) -> Tensor:
    """uint8 [R, 32 B] of a bit and four."""
    return _fours(low_RBN, 16) | _single_bits(high_RBN).flatten(1) << 4


def _q5_0(b: Tensor) -> Parts:
    values = _five(b[:, :, 2:6], b[:, :, 6:]).view(torch.int8) - 16
    return {"scales_OS": _halves(b[:, :, :2]), "values_OB": values}


def _q5_1(b: Tensor) -> Parts:
    return {
        "scales_OS": _halves(b[:, :, :2]),
        "minimums_OS": -_halves(b[:, :, 2:4]),
        "values_OB": _five(b[:, :, 4:8], b[:, :, 8:]).view(torch.int8),
    }


def _q8_0(b: Tensor) -> Parts:
    return {"scales_OS": _halves(b[:, :, :2]), "values_OB": b[:, :, 2:].contiguous().view(torch.int8).flatten(1)}


def _codes(packed_RBN: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of six bits, from twelve bytes."""
    first, second, rest = packed_RBN.split(4, dim=2)
    scales = torch.cat((first & 63, rest & 15 | (first >> 6) << 4), dim=2)
    minimums = torch.cat((second & 63, rest >> 4 | (second >> 6) << 4), dim=2)
    return scales.flatten(1), minimums.flatten(1)


def _k_header(b: Tensor) -> Parts:
    scale_codes, minimum_codes = _codes(b[:, :, 4:16])
    return {
        "scales_OS": _halves(b[:, :, :2]),
        "minimums_OS": _halves(b[:, :, 2:4]),
        "scale_codes_OG": scale_codes,
        "minimum_codes_OG": minimum_codes,
    }


def _q4_k(b: Tensor) -> Parts:
    return _k_header(b) | {"values_OB": _packed_fours(b[:, :, 16:], 32)}


def _q5_k(b: Tensor) -> Parts:
    # Bit i of byte n is of input 32 i + n.
    high = (b[:, :, 16:48].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1) & 1).flatten(1)
    return _k_header(b) | {"values_OB": (_fours(b[:, :, 48:], 32) | high << 4).view(torch.int8)}


def _q6_k(b: Tensor) -> Parts:
    # Of each half of 128 inputs: 64 bytes of lower bits, and 32 with two bits of inputs n, n + 32, n + 64 and n + 96.
    low = torch.stack((b[:, :, :128].unflatten(2, (2, 64)) & 15, b[:, :, :128].unflatten(2, (2, 64)) >> 4), dim=3)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 1, 4, 1)
    high = b[:, :, 128:192].unflatten(2, (2, 32)).unsqueeze(3) >> shifts & 3
    values = low.flatten(1) | high.flatten(1) << 4
    codes = b[:, :, 192:208].contiguous().view(torch.int8).flatten(1)
    return {
        "scales_OS": _halves(b[:, :, 208:]),
        "scale_codes_OG": codes,
        "values_OB": values.view(torch.int8) - 32,
    }


_READERS: Mapping[Type, Callable[[Tensor], Parts]] = MappingProxyType(
    {
        Type.Q4_0: _q4_0,
        Type.Q4_1: _q4_1,
        Type.Q5_0: _q5_0,
        Type.Q5_1: _q5_1,
        Type.Q8_0: _q8_0,
        Type.Q4_K: _q4_k,
        Type.Q5_K: _q5_k,
        Type.Q6_K: _q6_k,
    }
)
