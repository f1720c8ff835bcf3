"""LoRA adapters with random weights, of PEFT's format, for whatever a checkpoint's shape is: to time, and to try things out.

python -m bench.support.random_adapter CHECKPOINT DIRECTORY [--rank 16] [--seed 0] [--modules q_proj,v_proj] [--size 0.05]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from model_parallel.checkpoint.adapter_files import (
    ATTENTION_MODULES,
    CONFIG_FILE,
    FEED_FORWARD_MODULES,
    WEIGHTS_FILE,
)
from model_parallel.checkpoint.detect import describe
from model_parallel.config import ModelConfig
from model_parallel.errors import EngineError
from model_parallel.model.partition import shard_table

ALL_MODULES = (*ATTENTION_MODULES, *FEED_FORWARD_MODULES)


def save_random_adapter(
    path: Path,
    model: ModelConfig,
    *,
    rank: int = 16,
    seed: int = 0,
    modules: Sequence[str] = ALL_MODULES,
    size: float = 0.05,
    base_model: str = "",
) -> None:
    """Of the same rank in all layers. `size` is the standard deviation of B: how much it changes."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shard in shard_table(model, 1, 0).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        num_rows, num_columns = shard.full_shape
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_columns, generator=draw) / num_columns**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_rows, rank, generator=draw) * size
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(modules),
        "bias": "none",
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(settings, indent=2))
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / WEIGHTS_FILE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a directory, or a GGUF file")
    parser.add_argument("directory", type=Path, help="where the adapter goes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", default=",".join(ALL_MODULES), help="of " + ",".join(ALL_MODULES))
    parser.add_argument("--size", type=float, default=0.05, help="how much it changes")
    given = parser.parse_args(arguments)
    modules = given.modules.split(",")
    if unknown := sorted(set(modules) - set(ALL_MODULES)):
        parser.error(f"--modules names {', '.join(unknown)}; allowed: {', '.join(ALL_MODULES)}")
    try:
        model = describe(given.checkpoint).config
    except EngineError as error:
        parser.error(str(error))
    save_random_adapter(
        given.directory,
        model,
        rank=given.rank,
        seed=given.seed,
        modules=modules,
        size=given.size,
        base_model=given.checkpoint.name,
    )
    print(f"{given.directory}: rank {given.rank}, {', '.join(modules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
