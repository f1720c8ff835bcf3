"""Weights under Hugging Face's names, in safetensors or torch files: one, or several with or without an index."""

from pathlib import Path

from torch import Tensor

from model_parallel.checkpoint.info import CheckpointInfo
from model_parallel.checkpoint.mapped import copy_mapped, open_safetensors, open_torch_file
from model_parallel.checkpoint.names import is_known_buffer
from model_parallel.checkpoint.settings import join
from model_parallel.checkpoint.stored import Checkpoint, StoredTensor
from model_parallel.checkpoint.weight_files import read_weight_map
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import LM_HEAD, Shard


class HuggingFaceCheckpoint(Checkpoint):
    """Files are mapped; a slice reads its own rows or columns only."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.tensors = {}
        files = {
            path: (open_safetensors if path.suffix == ".safetensors" else open_torch_file)(path)
            for path in info.weight_files
        }
        if info.index_file is not None:
            self._take_indexed(files, info.index_file, is_tied=info.config.tie_word_embeddings)
            return
        for path, tensors in files.items():
            for name, stored in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name} stands both in {self.tensors[name].file} and in {path}, and no index says which is right"
                    )
                self.tensors[name] = stored

    def _take_indexed(self, files: dict[Path, dict[str, StoredTensor]], index: Path, *, is_tied: bool) -> None:
        """Each tensor from the file that the index says; others that the files hold are stale and reported."""
        weight_map = read_weight_map(index)
        for name, file_name in weight_map.items():
            stored = files[index.parent / file_name].get(name)
            if stored is not None:
                self.tensors[name] = stored
            elif not (is_known_buffer(name) or (is_tied and name == LM_HEAD)):
                raise CheckpointError(
                    f"{index} says that {name} is in {file_name}, and it is not there; download both again"
                )
        stale = [
            f"{path.name}: {name}"
            for path, tensors in files.items()
            for name in sorted(tensors)
            if weight_map.get(name) != path.name and not is_known_buffer(name)
        ]
        if stale:
            self.warnings = (f"{index.parent}: {index.name} does not name {join(stale)}: not read",)

    def read_into(self, name: str, shard: Shard, out: Tensor) -> None:
        mapped = self.tensors[name].mapped
        assert mapped is not None  # loader.check_complete refuses what cannot be read
        copy_mapped(mapped[shard.index], out)
