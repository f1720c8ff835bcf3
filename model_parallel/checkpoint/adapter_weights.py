"""A rank's part of a LoRA adapter: cut as the base model's matrices are, and laid beside one another as they are.

Shape suffixes: R rank of an adapter · I features in · O features out, of this rank's part of a matrix
"""

from pathlib import Path

import torch
from torch import Tensor

from model_parallel.checkpoint.adapter_files import WEIGHTS_FILE, AdapterReader, AdapterTensor, adapter_shards
from model_parallel.checkpoint.mapped import SAFETENSORS_FLOATS
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import LowRankPart, LowRankUpdate
from model_parallel.model.partition import Shard, fused_name, shard_table


def load_adapter(
    path: Path, digest: str, model: ModelConfig, tp_size: int, rank: int, dtype: torch.dtype
) -> dict[str, LowRankUpdate]:
    """What the adapter adds to each matrix of this rank, on the CPU, under partition.fused_name's names.

    B is multiplied by the adapter's scale before it is rounded to `dtype`. Raises CheckpointError when the directory is not what
    it was when somebody gave its digest, and for a number that is not finite.
    """
    reader = AdapterReader(path, model)
    table = shard_table(model, tp_size, rank)
    down_RI: dict[str, Tensor] = {}
    up_OR: dict[str, Tensor] = {}
    not_finite: list[str] = []
    for stored in reader.tensors():
        down, up = adapter_shards(stored.module, table, reader.rank)
        is_down = stored.part == "lora_A"
        part = _cut(stored, down if is_down else up)
        if not part.isfinite().all():
            not_finite.append(stored.name)
        if is_down:
            down_RI[stored.module] = part.to(dtype)
        else:
            up_OR[stored.module] = part.mul_(reader.scale).to(dtype)
    if reader.info().digest != digest:
        raise CheckpointError(f"{path} holds another adapter than when it was added; add it again")
    if not_finite:
        raise CheckpointError(f"{path / WEIGHTS_FILE}: {not_finite[0]} holds numbers that are not finite")

    first_row: dict[str, int] = {}
    num_rows: dict[str, int] = {}
    for name, shard in table.items():
        first_row[name] = num_rows.get(fused_name(name), 0)
        num_rows[fused_name(name)] = first_row[name] + shard.shape[0]
    parts: dict[str, list[LowRankPart]] = {}
    for module in reader.modules:
        name = f"{module}.weight"
        parts.setdefault(fused_name(name), []).append(
            LowRankPart(first_output=first_row[name], down_RI=down_RI[module], up_OR=up_OR[module])
        )
    return {
        name: LowRankUpdate(num_outputs=num_rows[name], parts=tuple(sorted(of_matrix, key=lambda p: p.first_output)))
        for name, of_matrix in parts.items()
    }


def _cut(stored: AdapterTensor, shard: Shard) -> Tensor:
    """float32, in memory of its own: the whole tensor's is free again."""
    whole = torch.frombuffer(stored.content, dtype=SAFETENSORS_FLOATS[stored.type]).view(stored.shape)
    return torch.empty(shard.shape).copy_(whole[shard.index])
