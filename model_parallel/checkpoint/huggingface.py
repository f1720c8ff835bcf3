"""Weights under Hugging Face's names, in safetensors or torch files: one, or several with an index."""

from torch import Tensor

from model_parallel.checkpoint.detect import CheckpointInfo, read_json
from model_parallel.checkpoint.mapped import copy_mapped, open_safetensors, open_torch_file
from model_parallel.checkpoint.stored import Checkpoint
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import Shard


class HuggingFaceCheckpoint(Checkpoint):
    """Files are mapped; a slice reads its own rows or columns only."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.tensors = {}
        for path in info.weight_files:
            for name, stored in (open_safetensors if path.suffix == ".safetensors" else open_torch_file)(path).items():
                if name in self.tensors:
                    raise CheckpointError(f"{name} stands both in {self.tensors[name].file} and in {path}")
                self.tensors[name] = stored
        if info.index_file is not None:
            for name, file_name in read_json(info.index_file)["weight_map"].items():
                if name not in self.tensors or self.tensors[name].file.name != file_name:
                    raise CheckpointError(f"{info.index_file} says that {name} is in {file_name}, and it is not there")

    def read_into(self, name: str, shard: Shard, out: Tensor) -> None:
        mapped = self.tensors[name].mapped
        assert mapped is not None  # loader.check_complete refuses what cannot be read
        copy_mapped(mapped[shard.index], out)
