"""Weights in eight bits: made while a checkpoint is loaded, one matrix at a time.

Symmetric, a scale for every output channel: weight ≈ scale · value, with values of −127 … 127, and the channel's largest absolute
weight / 127 as scale. See docs/quantization.md.

Shape suffixes: O output channels · I inputs
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives
from model_parallel.kernels.interface import Int8Matrix
from model_parallel.model.partition import EMBEDDING, Shard

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


def largest_weights(weight_OI: Tensor) -> Tensor:
    """float32 [O]: the largest absolute weight of each row."""
    return torch.cat([weight_OI[rows].abs().amax(dim=1).float() for rows in _chunks(weight_OI)])


def int8_converter(
    table: Mapping[str, Shard], collectives: Collectives
) -> Callable[[str, Tensor], Tensor | Int8Matrix]:
    """(name, this rank's part) → the part as int8, where it is a matrix that is multiplied; norms and embedding stay.

    A matrix that is cut by columns is scaled by what all ranks hold of a channel, so that values do not depend on how many
    ranks there are. All ranks must therefore convert the same matrices in the same order.
    """

    def convert(name: str, weight: Tensor) -> Tensor | Int8Matrix:
        if weight.ndim == 1 or name == EMBEDDING:
            return weight
        largest_O = largest_weights(weight)
        if name in table and table[name].axis == 1:
            largest_O = collectives.all_gather(largest_O).amax(dim=0)
        return quantize(weight, largest_O)

    return convert


def _chunks(weight_OI: Tensor) -> list[slice]:
    num_rows, num_columns = weight_OI.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    return [slice(start, start + step) for start in range(0, num_rows, step)]
