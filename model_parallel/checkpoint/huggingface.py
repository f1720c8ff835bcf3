"""Weights in safetensors files, one or several with an index."""

import torch
from safetensors import SafetensorError, safe_open

from model_parallel.checkpoint.detect import INDEX_FILE, CheckpointInfo, read_json
from model_parallel.checkpoint.stored import Checkpoint, StoredTensor
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import Shard

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class HuggingFaceCheckpoint(Checkpoint):
    """Files are mapped; a slice reads its own rows or columns only."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.tensors = {}
        self._files = {}
        for path in info.weight_files:
            try:
                file = self._files[path] = safe_open(path, framework="pt")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
            for name, part in slices.items():
                if name in self.tensors:
                    raise CheckpointError(f"{name} stands both in {self.tensors[name].file} and in {path}")
                kind = part.get_dtype()
                shape = tuple(part.get_shape())
                self.tensors[name] = StoredTensor(file=path, shape=shape, type=kind, readable=kind in _FLOATS)
        if len(info.weight_files) > 1:
            self._check_index(info)

    def _check_index(self, info: CheckpointInfo) -> None:
        index = info.path / INDEX_FILE
        for name, file_name in read_json(index)["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise CheckpointError(f"{index} says that {name} is in {file_name}, and it is not there")

    def read(self, name: str, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
        path = self.tensors[name].file
        try:
            part: torch.Tensor = self._files[path].get_slice(name)[shard.index]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        return part.to(dtype).contiguous()
