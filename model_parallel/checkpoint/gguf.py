"""Weights in a GGUF file, dequantised as they are read or kept as they are."""

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from model_parallel.checkpoint.gguf_config import ROPE_FREQUENCIES
from model_parallel.checkpoint.gguf_file import GgufFile, GgufTensor
from model_parallel.checkpoint.gguf_formats import FORMATS
from model_parallel.checkpoint.gguf_groups import group_matrix
from model_parallel.checkpoint.info import CheckpointInfo
from model_parallel.checkpoint.names import from_gguf
from model_parallel.checkpoint.rotary import QUERY_AND_KEY, interleaved_rows
from model_parallel.checkpoint.stored import Checkpoint, StoredTensor
from model_parallel.kernels.interface import GroupMatrix, joined
from model_parallel.model.partition import Shard
from model_parallel.weight_format import GroupFormat

_CHUNK_ELEMENTS = 1 << 22
"""Dequantised at a time: bounds the float32 copies that are made on the way."""


class GgufCheckpoint(Checkpoint):
    """The file is mapped; a slice reads its own rows, or the blocks that its columns touch."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._file = GgufFile(info.path)
        self._head_dim = info.config.head_dim
        self._stored: dict[str, GgufTensor] = {}
        self.tensors = {}
        for gguf_name, tensor in self._file.tensors.items():
            if gguf_name == ROPE_FREQUENCIES:  # part of the configuration, which has read it
                continue
            name = from_gguf(gguf_name)
            self._stored[name] = tensor
            self.tensors[name] = StoredTensor(
                file=info.path, shape=tensor.shape, type=tensor.type.name, readable=_can_dequantise(tensor.type)
            )

    def group_format(self, name: str) -> GroupFormat | None:
        return FORMATS.get(self._stored[name].type) if len(self._stored[name].shape) == 2 else None

    def read_groups(self, name: str, shard: Shard) -> GroupMatrix:
        kind, stored, index, columns = self._part(name, shard)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        num_blocks, num_before = stored.shape[1] // block_bytes, columns.start % block_size
        step = max(1, _CHUNK_ELEMENTS // max(1, len(columns)))
        pieces = [
            group_matrix(
                kind, stored[index[start : start + step]], num_blocks, num_inputs=len(columns), num_before=num_before
            )
            for start in range(0, len(index), step)
        ]
        return joined(pieces)

    def _bytes(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor as stored, [rows, bytes a row]; a view of the mapped file."""
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        stored = np.frombuffer(self._file.data, np.uint8, tensor.num_bytes, tensor.offset)
        return stored.reshape(num_rows, -1)

    def _part(self, name: str, shard: Shard) -> tuple[GGMLQuantizationType, np.ndarray, np.ndarray, range]:
        """The tensor's type; all its rows, with the blocks that the part's columns touch; the part's rows; its columns."""
        tensor = self._stored[name]
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.type]
        stored = self._bytes(tensor)
        rows, columns = range(stored.shape[0]), range(tensor.shape[-1])
        if shard.axis is not None:
            part = range(shard.start, shard.stop)
            rows, columns = (part, columns) if shard.axis == 0 else (rows, part)
        first_block, last_block = columns.start // block_size, -(-columns.stop // block_size)
        stored = stored[:, first_block * block_bytes : last_block * block_bytes]
        index = np.arange(rows.start, rows.stop)
        if name.endswith(QUERY_AND_KEY):
            index = interleaved_rows(rows, self._head_dim)
        return tensor.type, stored, index, columns

    def read_into(self, name: str, shard: Shard, out: torch.Tensor) -> None:
        kind, stored, index, columns = self._part(name, shard)
        first = columns.start % GGML_QUANT_SIZES[kind][0]
        trim = slice(first, first + len(columns))
        out_rows = out.view(len(index), len(columns))
        step = max(1, _CHUNK_ELEMENTS // max(1, len(columns)))
        for start in range(0, len(index), step):
            values = quants.dequantize(stored[index[start : start + step]], kind)
            out_rows[start : start + step] = torch.from_numpy(values[:, trim])


def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    block_bytes = GGML_QUANT_SIZES[kind][1]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
