"""Meta's own format: consolidated.00.pth and on, each with a part of every tensor, as its model-parallel ranks had them.

Query, key, value, gate and up projections and the LM head are cut by rows; the output and down projections by columns. The
embedding is cut by columns in Llama 2, and by rows where later code of Meta's wrote it; its parts' shapes tell. Norms are
whole in every file. (fairscale's ColumnParallelLinear, RowParallelLinear and ParallelEmbedding.)
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from model_parallel.checkpoint.info import CheckpointInfo
from model_parallel.checkpoint.mapped import copy_mapped, open_torch_file
from model_parallel.checkpoint.names import from_meta, is_known_buffer
from model_parallel.checkpoint.rotary import QUERY_AND_KEY, half_split_as_pairs
from model_parallel.checkpoint.stored import Checkpoint, StoredTensor
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import EMBEDDING, LM_HEAD, Shard

_BY_COLUMNS = (".o_proj.weight", ".down_proj.weight")


class MetaCheckpoint(Checkpoint):
    """Files are mapped; a slice reads only its parts of only the files that hold them."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._config = info.config
        self._parts: dict[str, list[StoredTensor]] = {}
        self._axes: dict[str, int | None] = {}
        files = [open_torch_file(path) for path in info.weight_files]
        for meta_name in dict.fromkeys(name for file in files for name in file):
            if is_known_buffer(meta_name):
                continue
            for path, file in zip(info.weight_files, files, strict=True):
                if meta_name not in file:
                    raise CheckpointError(f"{path} lacks {meta_name}, which other files of the checkpoint have")
            name = from_meta(meta_name)
            self._parts[name] = [file[meta_name] for file in files]
        self._check_number()
        self.tensors = {name: self._join(name, parts) for name, parts in self._parts.items()}

    def _check_number(self) -> None:
        """Raise CheckpointError for fewer or more files than the LM head is cut into."""
        parts = self._parts.get(LM_HEAD)
        if parts is None or len(parts[0].shape) != 2 or not parts[0].shape[0]:
            return
        num_needed, rest = divmod(self._config.vocab_size, parts[0].shape[0])
        if not rest and num_needed != len(parts):
            raise CheckpointError(
                f"{parts[0].file}: {LM_HEAD} has shape {list(parts[0].shape)}, one of {num_needed} parts; so the model needs the "
                f"files consolidated.00.pth to consolidated.{num_needed - 1:02}.pth, and {len(parts)} are there"
            )

    def _join(self, name: str, parts: list[StoredTensor]) -> StoredTensor:
        """The whole tensor that the parts are of; its file is the first."""
        first = parts[0]
        axis = self._axis(name, first)
        self._axes[name] = axis
        for part in parts:
            if part.type != first.type or part.shape != first.shape:
                raise CheckpointError(
                    f"{part.file}: {name} is {part.type} {list(part.shape)}, and {first.type} {list(first.shape)} in {first.file}"
                )
            if name.endswith(QUERY_AND_KEY) and (not part.shape or part.shape[0] % self._config.head_dim):
                raise CheckpointError(
                    f"{part.file}: {name} has {list(part.shape)}, not whole heads of {self._config.head_dim} rows"
                )
        if axis is None:
            return first
        shape = tuple(n * len(parts) if a == axis else n for a, n in enumerate(first.shape))
        return replace(first, shape=shape, mapped=None)

    def _axis(self, name: str, part: StoredTensor) -> int | None:
        if len(part.shape) < 2:
            return None
        if name == EMBEDDING:
            return 1 if part.shape[0] == self._config.vocab_size else 0
        return 1 if name.endswith(_BY_COLUMNS) else 0

    def read_into(self, name: str, shard: Shard, out: Tensor) -> None:
        parts, axis = self._parts[name], self._axes[name]
        if axis is None:
            self._check_copies(name, parts)
            copy_mapped(_mapped(parts[0]), out)
            return
        ends = list(accumulate(part.shape[axis] for part in parts))
        wanted = [range(*index.indices(n)) for index, n in zip(shard.index, shard.full_shape, strict=True)]
        for part, end in zip(parts, ends, strict=True):
            begin = end - part.shape[axis]
            start, stop = max(wanted[axis].start, begin), min(wanted[axis].stop, end)
            if start >= stop:
                continue
            held = list(wanted)
            held[axis] = range(start - begin, stop - begin)
            source = _mapped(part)[tuple(slice(r.start, r.stop) for r in held)]
            target = out.narrow(axis, start - wanted[axis].start, stop - start)
            self._copy(name, source, target)

    def _copy(self, name: str, source: Tensor, target: Tensor) -> None:
        if not name.endswith(QUERY_AND_KEY):
            copy_mapped(source, target)
            return
        dim = self._config.head_dim
        copy_mapped(source.unflatten(0, (-1, dim // 2, 2)), half_split_as_pairs(target, dim))

    def _check_copies(self, name: str, parts: list[StoredTensor]) -> None:
        """What every file has whole must be the same in all: otherwise they are of different models."""
        for part in parts[1:]:
            if not torch.equal(_mapped(part), _mapped(parts[0])):
                raise CheckpointError(f"{part.file}: {name} differs from the one in {parts[0].file}")


def _mapped(part: StoredTensor) -> Tensor:
    assert part.mapped is not None  # open_torch_file maps every tensor
    return part.mapped
