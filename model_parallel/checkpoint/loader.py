"""One rank's weights out of a checkpoint of any supported format."""

import math
from collections.abc import Callable
from typing import Any

import torch

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.checkpoint.gguf import GgufCheckpoint
from model_parallel.checkpoint.huggingface import HuggingFaceCheckpoint
from model_parallel.checkpoint.meta import MetaCheckpoint
from model_parallel.checkpoint.names import is_known_buffer
from model_parallel.checkpoint.stored import Checkpoint
from model_parallel.errors import CheckpointError
from model_parallel.host_memory import empty_shard
from model_parallel.model.partition import EMBEDDING, LM_HEAD, Shard, fused_name

_NAMES_SHOWN = 5


def open_checkpoint(info: CheckpointInfo) -> Checkpoint:
    """Read the headers of a checkpoint's files. Raises CheckpointError naming a broken one."""
    formats: dict[str, Callable[[CheckpointInfo], Checkpoint]]
    formats = {"gguf": GgufCheckpoint, "huggingface": HuggingFaceCheckpoint, "meta": MetaCheckpoint}
    return formats[info.format](info)


def load_shard(
    info: CheckpointInfo,
    table: dict[str, Shard],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    convert: Callable[[str, torch.Tensor], Any] | None = None,
) -> dict[str, Any]:
    """The part of every parameter that `table` (partition.shard_table) gives this rank, under partition.fused_name's names.

    Each is read straight into its place, so that memory never holds more than the shard and one piece of a file. Nothing is
    allocated before the whole checkpoint is known to fit: no tensor missing, none left over, shapes and types right;
    otherwise CheckpointError names file and tensor. `progress(done, total)` counts bytes of the loaded shard.
    `convert(name, weight)` gives what is kept of each instead, as soon as it is read.
    """
    checkpoint = open_checkpoint(info)
    check_complete(info, checkpoint, table)
    if LM_HEAD in checkpoint.names() and LM_HEAD not in table:
        _check_tied(checkpoint, table[EMBEDDING])
    total = sum(math.prod(shard.shape) for shard in table.values()) * dtype.itemsize
    done = 0
    parts_of: dict[str, list[str]] = {}
    for name in table:
        parts_of.setdefault(fused_name(name), []).append(name)
    weights: dict[str, Any] = {}
    for fused, names in parts_of.items():
        rows = [table[name].shape[0] for name in names]
        weight = empty_shard((sum(rows), *table[names[0]].shape[1:]), dtype, device)
        for name, part in zip(names, weight.split(rows), strict=True):
            checkpoint.read_into(name, table[name], part)
            done += part.nbytes
            if progress is not None:
                progress(done, total)
        weights[fused] = weight if convert is None else convert(fused, weight)
    return weights


def check_complete(info: CheckpointInfo, checkpoint: Checkpoint, table: dict[str, Shard]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the parameters of `table`, besides known extras."""
    missing = sorted(table.keys() - checkpoint.names())
    if missing == [LM_HEAD]:
        raise CheckpointError(
            f"{info.path} holds no {LM_HEAD}, and its configuration does not say tie_word_embeddings: true; "
            "one of the two is needed"
        )
    if missing:
        raise CheckpointError(f"{info.path} lacks {_some(missing)}")
    left_over = sorted(n for n in checkpoint.names() - table.keys() if n != LM_HEAD and not is_known_buffer(n))
    if left_over:
        file = checkpoint.tensors[left_over[0]].file
        raise CheckpointError(f"{file} holds tensors that the model does not have: {_some(left_over)}")
    for name, shard in table.items():
        stored = checkpoint.tensors[name]
        if stored.shape != shard.full_shape:
            raise CheckpointError(
                f"{stored.file}: {name} has shape {list(stored.shape)}; the model needs {list(shard.full_shape)}"
            )
        if not stored.readable:
            raise CheckpointError(f"{stored.file}: {name} is of type {stored.type}, which cannot be read")


def _check_tied(checkpoint: Checkpoint, shard: Shard) -> None:
    """A tied checkpoint may repeat its embedding as LM head; this rank's rows of both must then be the same."""
    stored = checkpoint.tensors[LM_HEAD]
    same = stored.readable and stored.shape == shard.full_shape
    if not same or not torch.equal(*(checkpoint.read(name, shard, torch.float32) for name in (LM_HEAD, EMBEDDING))):
        raise CheckpointError(
            f"{stored.file}: {LM_HEAD} differs from {EMBEDDING}, and the configuration says that they are tied"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
