"""A rank's part of a LoRA adapter: cut as the base model's matrices are, and laid beside one another as they are.

Shape suffixes: R rank of an adapter · I features in · O features out, of this rank's part of a matrix
"""

from pathlib import Path

import torch
from torch import Tensor

from model_parallel.checkpoint.adapter_files import WEIGHTS_FILE, adapter_shards, describe_adapter
from model_parallel.checkpoint.mapped import open_safetensors
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
    info = describe_adapter(path, model)
    if info.digest != digest:
        raise CheckpointError(f"{path} holds another adapter than when it was added; add it again")
    file = path / WEIGHTS_FILE
    stored = open_safetensors(file)
    table = shard_table(model, tp_size, rank)

    def read(name: str, shard: Shard) -> Tensor:
        mapped = stored[name].mapped
        assert mapped is not None  # describe_adapter refuses what cannot be read
        part = mapped[shard.index].to(torch.float32)
        if not part.isfinite().all():
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite")
        return part

    first_row: dict[str, int] = {}
    num_rows: dict[str, int] = {}
    for name, shard in table.items():
        first_row[name] = num_rows.get(fused_name(name), 0)
        num_rows[fused_name(name)] = first_row[name] + shard.shape[0]
    parts: dict[str, list[LowRankPart]] = {}
    for module in info.modules:
        down, up = adapter_shards(module, table, info.rank)
        name = f"{module}.weight"
        parts.setdefault(fused_name(name), []).append(
            LowRankPart(
                first_output=first_row[name],
                down_RI=read(info.tensor_name(module, "lora_A"), down).to(dtype),
                up_OR=(read(info.tensor_name(module, "lora_B"), up) * info.scale).to(dtype),
            )
        )
    return {
        name: LowRankUpdate(num_outputs=num_rows[name], parts=tuple(sorted(of_matrix, key=lambda p: p.first_output)))
        for name, of_matrix in parts.items()
    }
