"""A model and a draft model for it, where no such pair is at hand: the model is another one with more layers, which add nothing.

So the other one guesses all its tokens and costs a fraction of it, which shows the most that speculation can bring at that price.
A draft model of random weights guesses none, which shows what is lost.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import open_checkpoint
from model_parallel.config import ModelConfig
from model_parallel.model.partition import EMBEDDING, Shard, shard_table


def save_deepened(source: Path, path: Path, *, factor: int) -> None:
    """The model of `source` with `factor` times as many layers, which computes the same."""
    info = describe(source)
    checkpoint = open_checkpoint(info)
    tensors = {
        name: checkpoint.read(name, shard, torch.bfloat16) for name, shard in shard_table(info.config, 1, 0).items()
    }
    deep = factor * info.config.num_layers
    for name, shard in _layer_shards(info.config).items():
        for layer in range(info.config.num_layers, deep):
            tensors[name.replace(".0.", f".{layer}.", 1)] = torch.zeros(shard.full_shape, dtype=torch.bfloat16)
    _save(path, info.config, tensors, num_layers=deep)


def save_random(source: Path, path: Path) -> None:
    """A model of the shape of `source` that knows nothing of it."""
    config = describe(source).config
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: (
            0.02 * torch.randn(shard.full_shape, generator=draw)
            if len(shard.full_shape) == 2
            else torch.ones(shard.full_shape)
        ).bfloat16()
        for name, shard in shard_table(config, 1, 0).items()
    }
    _save(path, config, tensors, num_layers=config.num_layers)


def _layer_shards(config: ModelConfig) -> dict[str, Shard]:
    return {name: shard for name, shard in shard_table(config, 1, 0).items() if ".layers.0." in name}


def _save(path: Path, config: ModelConfig, tensors: dict[str, Tensor], *, num_layers: int) -> None:
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tensors[EMBEDDING].shape[0],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "model.safetensors")
