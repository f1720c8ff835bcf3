"""Weights in e4m3 of Hugging Face checkpoints, compressed-tensors' float-quantized, as they are stored.

Shape suffixes: O outputs · I inputs
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model_parallel.checkpoint.mapped import SAFETENSORS_FLOATS, copy_mapped
from model_parallel.checkpoint.stored import StoredTensor
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import Fp8Matrix
from model_parallel.model.partition import Shard

_FLOATS = frozenset(SAFETENSORS_FLOATS.values())


class Fp8Linear:
    """One matrix in e4m3, as tensors of mapped files: values, and a scale for each output or for all of them."""

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], *, per_channel: bool) -> None:
        """Raises CheckpointError where the files do not hold what the configuration says."""
        self.stored = tensors[name]
        self._values_OI = _mapped(name, self.stored, frozenset([torch.float8_e4m3fn]), "F8_E4M3")
        scale_name = f"{name}_scale"
        if scale_name not in tensors:
            raise CheckpointError(f"{self.stored.file}: {name} is in e4m3, and there is no {scale_name}")
        self._scales = _mapped(scale_name, tensors[scale_name], _FLOATS, "F32, BF16 or F16")
        num_outputs = self.stored.shape[0]
        shapes = [[num_outputs, 1], [num_outputs]] if per_channel else [[1], []]
        if list(self._scales.shape) not in shapes:
            raise CheckpointError(
                f"{tensors[scale_name].file}: {scale_name} has shape {list(self._scales.shape)}; {shapes[0]} is needed"
            )

    def read(self, shard: Shard) -> Fp8Matrix:
        """A scale for all outputs is repeated."""
        values_OI = torch.empty(shard.shape, dtype=torch.float8_e4m3fn)
        copy_mapped(self._values_OI[shard.index], values_OI)
        scales_O = self._scales.float().flatten().expand(self.stored.shape[0])
        if shard.axis == 0:
            scales_O = scales_O[shard.start : shard.stop]
        return Fp8Matrix(values_OI, scales_O.contiguous())


def take_fp8(tensors: dict[str, StoredTensor], names: frozenset[str], *, per_channel: bool) -> dict[str, Fp8Linear]:
    """Those of `names` that there are; their scales are taken out of `tensors`, and they count as readable there.

    Rows of activations have scales of their own here: one that is stored for all of them (`input_scale`) is not needed.
    """
    linears = {name: Fp8Linear(name, tensors, per_channel=per_channel) for name in sorted(names & tensors.keys())}
    for name in linears:
        del tensors[f"{name}_scale"]
        tensors.pop(f"{name.removesuffix('weight')}input_scale", None)
        tensors[name] = replace(tensors[name], readable=True)
    return linears


def _mapped(name: str, stored: StoredTensor, dtypes: frozenset[torch.dtype], needed: str) -> Tensor:
    if stored.mapped is None or stored.mapped.dtype not in dtypes:
        raise CheckpointError(f"{stored.file}: {name} is of type {stored.type}; {needed} is needed")
    return stored.mapped
