"""Directories with adapters for a model that is only described: quick to make, of PEFT's format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model_parallel.config import ModelConfig
from model_parallel.model.partition import shard_table

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=36,
    intermediate_size=50,
    num_layers=2,
    num_query_heads=9,
    num_kv_heads=3,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position=64,
)
TABLE = shard_table(MODEL, 1, 0)
MODULES = [
    name.removesuffix(".weight")
    for name, shard in TABLE.items()
    if name.startswith("model.layers") and len(shard.shape) == 2
]
Tensors = dict[str, torch.Tensor]


def tensor_name(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def adapter_tensors(modules: list[str], *, rank: int = 4, model: ModelConfig = MODEL) -> Tensors:
    torch.manual_seed(1)
    table = shard_table(model, 1, 0)
    tensors = {}
    for module in modules:
        num_rows, num_columns = table[f"{module}.weight"].full_shape
        tensors[tensor_name(module, "A")] = torch.randn(rank, num_columns)
        tensors[tensor_name(module, "B")] = torch.randn(num_rows, rank)
    return tensors


def save_adapter(path: Path, tensors: Tensors | None = None, **settings: Any) -> None:
    """All modules, unless other tensors are given."""
    usual = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(usual | settings))
    save_file(adapter_tensors(MODULES) if tensors is None else tensors, path / "adapter_model.safetensors")
