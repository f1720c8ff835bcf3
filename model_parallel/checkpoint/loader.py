"""One rank's weights out of a checkpoint of any supported format."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model_parallel.checkpoint.gguf import GgufCheckpoint
from model_parallel.checkpoint.huggingface import HuggingFaceCheckpoint
from model_parallel.checkpoint.info import CheckpointInfo
from model_parallel.checkpoint.meta import MetaCheckpoint
from model_parallel.checkpoint.names import is_known_buffer
from model_parallel.checkpoint.placeholders import refuse
from model_parallel.checkpoint.settings import join
from model_parallel.checkpoint.stored import Checkpoint
from model_parallel.errors import CheckpointError
from model_parallel.host_memory import empty_shard
from model_parallel.kernels.interface import Fp8Matrix, GroupMatrix, Matrix, joined
from model_parallel.model.partition import EMBEDDING, GATE, LM_HEAD, Shard, fused_name, kept_formats

_TIED_CHUNK_ELEMENTS = 1 << 22


def open_checkpoint(info: CheckpointInfo) -> Checkpoint:
    """Read the headers of a checkpoint's files. Raises CheckpointError naming a broken one, or all that are no weights."""
    refuse(info.weight_files)
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
    keep_groups: bool = False,
    keep_fp8: bool = False,
) -> dict[str, Any]:
    """The part of every parameter that `table` (partition.shard_table) gives this rank, under partition.fused_name's names.

    Each is read straight into its place, so that memory never holds more than the shard and one piece of a file. Nothing is
    allocated before the whole checkpoint is known to fit: no tensor missing, none left over, shapes and types right;
    otherwise CheckpointError names file and tensor. `progress(done, total)` counts bytes of the loaded shard.
    `convert(name, weight)` gives what is kept of each instead, as soon as it is read.
    `keep_groups`: a matrix that is stored in groups comes as a GroupMatrix; or, where parts that are fused into one are stored
    in different ways, as a tuple of matrices. `keep_fp8`: so comes one that is stored in e4m3, as an Fp8Matrix.
    """
    checkpoint = open_checkpoint(info)
    check_complete(info, checkpoint, table)
    check_tied_head(checkpoint, table)
    total = sum(math.prod(shard.shape) for shard in table.values()) * dtype.itemsize
    done = 0
    parts_of: dict[str, list[str]] = {}
    for name in table:
        parts_of.setdefault(fused_name(name), []).append(name)
    formats = {name: found for name in table if (found := checkpoint.group_format(name)) is not None}
    kept = frozenset(kept_formats(table, formats)) if keep_groups else frozenset()
    kept_fp8 = info.config.fp8_weights if keep_fp8 else frozenset()
    weights: dict[str, Any] = {}
    for fused, names in parts_of.items():
        if any(name in kept or name in kept_fp8 for name in names):
            matrices: list[Matrix] = []
            for name in names:
                if name in kept:
                    matrices.append(checkpoint.read_groups(name, table[name]).to(device))
                elif name in kept_fp8:
                    matrices.append(checkpoint.read_fp8(name, table[name]).to(device))
                else:
                    matrices.append(_read_dense(checkpoint, name, table[name], dtype, device))
            weights[fused] = _fused(matrices)
            if isinstance(weights[fused], tuple) and names[0].endswith(GATE):
                raise CheckpointError(
                    f"{info.path}: {' and '.join(names)} have their inputs in groups of different orders"
                )
            done += sum(math.prod(table[name].shape) for name in names) * dtype.itemsize
            if progress is not None:
                progress(done, total)
            continue
        rows = [table[name].shape[0] for name in names]
        weight = empty_shard((sum(rows), *table[names[0]].shape[1:]), dtype, device)
        for name, part in zip(names, weight.split(rows), strict=True):
            checkpoint.read_into(name, table[name], part)
            done += part.nbytes
            if progress is not None:
                progress(done, total)
        weights[fused] = weight if convert is None else convert(fused, weight)
    return weights


def _read_dense(checkpoint: Checkpoint, name: str, shard: Shard, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = empty_shard(shard.shape, dtype, device)
    checkpoint.read_into(name, shard, weight)
    return weight


def _fused(matrices: Sequence[Matrix]) -> Matrix | tuple[Matrix, ...]:
    """Neighbours of one form as one matrix; the matrix alone where there is no more than that."""
    runs: list[list[Matrix]] = []
    for matrix in matrices:
        last = runs[-1][0] if runs else None
        both_fp8 = isinstance(matrix, Fp8Matrix) and isinstance(last, Fp8Matrix)
        if both_fp8 or (isinstance(matrix, GroupMatrix) and isinstance(last, GroupMatrix) and last.matches(matrix)):
            runs[-1].append(matrix)
        else:
            runs.append([matrix])
    merged = tuple(_joined(run) if len(run) > 1 else run[0] for run in runs)
    return merged[0] if len(merged) == 1 else merged


def _joined(run: Sequence[Matrix]) -> Matrix:
    """Of matrices in e4m3, or of such in groups that match."""
    in_fp8 = [matrix for matrix in run if isinstance(matrix, Fp8Matrix)]
    if in_fp8:
        values_OI = torch.cat([matrix.values_OI.view(torch.uint8) for matrix in in_fp8]).view(torch.float8_e4m3fn)
        return Fp8Matrix(values_OI, torch.cat([matrix.scales_O for matrix in in_fp8]))
    return joined([matrix for matrix in run if isinstance(matrix, GroupMatrix)])


def check_complete(info: CheckpointInfo, checkpoint: Checkpoint, table: dict[str, Shard]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the parameters of `table`, besides known extras."""
    missing = sorted(table.keys() - checkpoint.names())
    if missing == [LM_HEAD]:
        raise CheckpointError(
            f"{info.path} holds no {LM_HEAD}, and its configuration does not say tie_word_embeddings: true; "
            "one of the two is needed"
        )
    left_over = sorted(n for n in checkpoint.names() - table.keys() if n != LM_HEAD and not is_known_buffer(n))
    if missing:
        instead = f"; it holds {join(left_over)}, which the model does not have" if left_over else ""
        raise CheckpointError(f"{info.path} lacks {join(missing)}{instead}")
    if left_over:
        file = checkpoint.tensors[left_over[0]].file
        raise CheckpointError(f"{file} holds tensors that the model does not have: {join(left_over)}")
    for name, shard in table.items():
        stored = checkpoint.tensors[name]
        if stored.shape != shard.full_shape:
            raise CheckpointError(
                f"{stored.file}: {name} has shape {list(stored.shape)}; the model needs {list(shard.full_shape)}"
            )
        if not stored.readable:
            readable = (
                "F32, F16, BF16 and quantised types can"
                if info.format == "gguf"
                else "floating-point weights of 16, 32 or 64 bits can, and quantised ones of AWQ, GPTQ and compressed-tensors"
            )
            raise CheckpointError(f"{stored.file}: {name} is of type {stored.type}, which cannot be read; {readable}")


def check_tied_head(checkpoint: Checkpoint, table: dict[str, Shard]) -> None:
    """A tied checkpoint may repeat its embedding as LM head; this rank's rows of both must then be the same.

    Reads these rows, a few at a time. Raises CheckpointError with both ways out.
    """
    if LM_HEAD in table or LM_HEAD not in checkpoint.names():
        return
    shard, stored = table[EMBEDDING], checkpoint.tensors[LM_HEAD]
    same = stored.readable and stored.shape == shard.full_shape
    if same:
        rows = range(shard.start, shard.stop)
        step = max(1, _TIED_CHUNK_ELEMENTS // shard.full_shape[1])
        parts = (replace(shard, start=start, stop=min(start + step, rows.stop)) for start in rows[::step])
        same = all(
            torch.equal(*(checkpoint.read(name, part, torch.float32) for name in (LM_HEAD, EMBEDDING)))
            for part in parts
        )
    if not same:
        raise CheckpointError(
            f"{stored.file}: {LM_HEAD} differs from {EMBEDDING}, and the configuration says that they are tied. To use "
            f"{LM_HEAD}, set tie_word_embeddings to false in {stored.file.parent / 'config.json'}; to use the embedding, delete "
            f"{LM_HEAD} from the file"
        )
