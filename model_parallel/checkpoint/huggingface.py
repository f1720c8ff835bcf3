"""Weights under Hugging Face's names, in safetensors or torch files: one, or several with or without an index."""

from pathlib import Path

import torch
from torch import Tensor

from model_parallel.checkpoint.fp8_tensors import Fp8Linear, take_fp8
from model_parallel.checkpoint.group_settings import GroupSettings, converted_names
from model_parallel.checkpoint.group_tensors import GroupedLinear, owner
from model_parallel.checkpoint.info import CheckpointInfo
from model_parallel.checkpoint.mapped import copy_mapped, open_safetensors, open_torch_file
from model_parallel.checkpoint.names import is_known_buffer
from model_parallel.checkpoint.settings import join
from model_parallel.checkpoint.stored import Checkpoint, StoredTensor
from model_parallel.checkpoint.weight_files import read_weight_map
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import Fp8Matrix, GroupMatrix
from model_parallel.model.partition import EMBEDDING, LM_HEAD, Shard
from model_parallel.weight_format import GroupFormat

_CHUNK_ELEMENTS = 1 << 22
"""Dequantised at a time."""


class HuggingFaceCheckpoint(Checkpoint):
    """Files are mapped; a slice reads its own rows or columns only."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.tensors = {}
        files = {
            path: (open_safetensors if path.suffix == ".safetensors" else open_torch_file)(path)
            for path in info.weight_files
        }
        self._grouped: dict[str, GroupedLinear] = {}
        self._fp8: dict[str, Fp8Linear] = {}
        if info.index_file is not None:
            self._take_indexed(files, info.index_file, is_tied=info.config.tie_word_embeddings)
        else:
            self._take_all(files)
        if info.config.tie_word_embeddings and EMBEDDING not in self.tensors and LM_HEAD in self.tensors:
            self.tensors[EMBEDDING] = self.tensors.pop(LM_HEAD)  # safetensors' save_model keeps one name of the two
        if info.groups is not None:
            self._take_grouped(info.groups)
        if info.config.weight_formats and not self._grouped:
            name = next(iter(info.config.weight_formats.values())).name
            raise CheckpointError(
                f"{info.path}: its settings say that the weights are quantised ({name}), and its files hold none that are; take "
                "quantization_config out of config.json, or quantize_config.json or quant_config.json out of the directory"
            )
        if info.fp8 is not None:
            names = frozenset(converted_names(info.fp8, info.config, info.path / "config.json"))
            self._fp8 = take_fp8(self.tensors, names, per_channel=info.fp8.per_channel)

    def _take_all(self, files: dict[Path, dict[str, StoredTensor]]) -> None:
        for path, tensors in files.items():
            for name, stored in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name} stands both in {self.tensors[name].file} and in {path}, and no index says which is right"
                    )
                self.tensors[name] = stored

    def _take_grouped(self, settings: GroupSettings) -> None:
        """Put one matrix in the place of the tensors that it is quantised into. Which layers are, the files decide."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name in sorted(self.tensors):
            if owned := owner(name, settings):
                parts.setdefault(owned[0], {})[owned[1]] = self.tensors[name]
        for name, tensors in parts.items():
            if name in self.tensors:
                raise CheckpointError(f"{self.tensors[name].file} holds {name} both quantised and not")
            module = name.removesuffix(".weight")
            matrix = GroupedLinear(name, settings, tensors)
            for part in tensors:
                del self.tensors[f"{module}.{part}"]
            self._take_bias(f"{module}.bias")
            self._grouped[name] = matrix
            first = next(iter(tensors.values()))
            self.tensors[name] = StoredTensor(
                file=first.file, shape=matrix.shape, type=matrix.format.name, readable=True
            )

    def _take_bias(self, name: str) -> None:
        """Some tools write a bias of zeros to layers that have none; any other stays, and is reported as left over."""
        stored = self.tensors.get(name)
        if stored is not None and stored.mapped is not None and not stored.mapped.any():
            del self.tensors[name]

    def group_format(self, name: str) -> GroupFormat | None:
        return self._grouped[name].format if name in self._grouped else None

    def read_groups(self, name: str, shard: Shard) -> GroupMatrix:
        return self._grouped[name].read(shard)

    def read_fp8(self, name: str, shard: Shard) -> Fp8Matrix:
        return self._fp8[name].read(shard)

    def _take_indexed(self, files: dict[Path, dict[str, StoredTensor]], index: Path, *, is_tied: bool) -> None:
        """Each tensor from the file that the index says; others that the files hold are stale and reported."""
        weight_map = read_weight_map(index)
        tied = {EMBEDDING, LM_HEAD} if is_tied else set()
        stored_names = {name for name, file_name in weight_map.items() if name in files[index.parent / file_name]}
        for name, file_name in weight_map.items():
            stored = files[index.parent / file_name].get(name)
            if stored is not None:
                self.tensors[name] = stored
            elif not (is_known_buffer(name) or (name in tied and tied & stored_names)):
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
        if name in self._grouped:
            self._dequantise_into(self._grouped[name], shard, out)
            return
        if name in self._fp8:
            out.copy_(self._fp8[name].read(shard).dequantized(torch.float32))
            return
        mapped = self.tensors[name].mapped
        assert mapped is not None  # loader.check_complete refuses what cannot be read
        copy_mapped(mapped[shard.index], out)

    def _dequantise_into(self, linear: GroupedLinear, shard: Shard, out: Tensor) -> None:
        if shard.axis == 1 and linear.order_I is not None:  # each group has inputs of every rank
            num_outputs, num_inputs = linear.shape
            step = max(1, _CHUNK_ELEMENTS // num_inputs)
            for start in range(0, num_outputs, step):
                rows = Shard(linear.shape, 0, start, min(start + step, num_outputs))
                out[start : rows.stop] = linear.read(rows).dequantized(torch.float32)[:, shard.index[1]]
            return
        matrix = linear.read(shard)
        step = max(1, _CHUNK_ELEMENTS // matrix.num_inputs)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            out[part] = matrix.rows(part).dequantized(torch.float32)
