"""A rank's weights, taken apart again into the parameters of the checkpoint."""

import torch
from torch import Tensor

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.checkpoint.loader import load_shard
from model_parallel.model.partition import fused_name, shard_table


def load_parts(
    info: CheckpointInfo, num_ranks: int = 1, rank: int = 0, *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """This rank's slice of every parameter, by Hugging Face's names."""
    table = shard_table(info.config, num_ranks, rank)
    weights = load_shard(info, table, dtype=dtype, device=torch.device("cpu"))
    parts, rows = {}, dict.fromkeys(weights, 0)
    for name, shard in table.items():
        whole, start = weights[fused_name(name)], rows[fused_name(name)]
        parts[name] = whole[start : start + shard.shape[0]]
        rows[fused_name(name)] = start + shard.shape[0]
    for name, whole in weights.items():
        if rows[name] != len(whole):
            raise AssertionError(f"{name} has {len(whole)} rows, and its parts {rows[name]}")
    return parts
