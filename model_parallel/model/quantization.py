"""Weights in eight bits: made while a checkpoint is loaded, one matrix at a time.

Symmetric, a scale for every output channel: weight ≈ scale · value. In int8 values are −127 … 127, and the scale is the channel's
largest absolute weight / 127; in fp8 they are e4m3 numbers, and it is that / 448. See docs/quantization.md.

Shape suffixes: O output channels · I inputs
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives
from model_parallel.kernels import fp8
from model_parallel.kernels.interface import Fp8Matrix, Int8Matrix
from model_parallel.model.partition import EMBEDDING, LM_HEAD, Shard

LARGEST_VALUE = 127
_CHUNK_ELEMENTS = 1 << 22
"""Converted at a time: float32 copies never hold more."""


def quantize(weight_OI: Tensor, largest_O: Tensor) -> Int8Matrix:
    """`largest_O`: the largest absolute weight of each whole channel, float32.

    A channel that is not finite stays so: its scale is not finite either.
    """
    scales_O = largest_O / LARGEST_VALUE
    values_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    for rows in _chunks(weight_OI):
        # A channel of zeros has the scale 0.
        values_OI[rows] = (weight_OI[rows].float() / scales_O[rows].unsqueeze(1)).round_().nan_to_num_(nan=0.0)
    return Int8Matrix(values_OI, scales_O)


def quantize_fp8(weight_OI: Tensor, largest_O: Tensor) -> Fp8Matrix:
    """`largest_O` as in `quantize`. What is not finite stays so in its channel."""
    scales_O = fp8.scales_of(largest_O)
    values_OI = torch.empty_like(weight_OI, dtype=fp8.FP8)
    for rows in _chunks(weight_OI):
        values_OI[rows] = fp8.rounded(weight_OI[rows], scales_O[rows])
    return Fp8Matrix(values_OI, scales_O)


def largest_weights(weight_OI: Tensor) -> Tensor:
    """float32 [O]: the largest absolute weight of each row."""
    return torch.cat([weight_OI[rows].abs().amax(dim=1).float() for rows in _chunks(weight_OI)])


def converter(
    quantization: str, table: Mapping[str, Shard], collectives: Collectives
) -> Callable[[str, Tensor], Tensor | Int8Matrix | Fp8Matrix] | None:
    """(name, this rank's part) → the part in eight bits, where it is a matrix that is multiplied; norms and embedding stay.
    None where `quantization` is neither int8 nor fp8.

    With fp8 the LM head stays, too: its product would round the hidden states, so that close logits became equal.
    A matrix that is cut by columns is scaled by what all ranks hold of a channel, so that values do not depend on how many
    ranks there are. All ranks must therefore convert the same matrices in the same order.
    """

    if quantization not in ("int8", "fp8"):
        return None
    stays = (EMBEDDING, LM_HEAD) if quantization == "fp8" else (EMBEDDING,)
    quantized = quantize_fp8 if quantization == "fp8" else quantize

    def convert(name: str, weight: Tensor) -> Tensor | Int8Matrix | Fp8Matrix:
        if weight.ndim == 1 or name in stays:
            return weight
        largest_O = largest_weights(weight)
        if name in table and table[name].axis == 1:
            largest_O = collectives.all_gather(largest_O).amax(dim=0)
        return quantized(weight, largest_O)

    return convert


def _chunks(weight_OI: Tensor) -> list[slice]:
    num_rows, num_columns = weight_OI.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    return [slice(start, start + step) for start in range(0, num_rows, step)]
