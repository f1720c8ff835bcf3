"""LoRA adapters that PEFT made, with random weights."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_random_adapter(path: Path, model: "transformers.LlamaForCausalLM", *, seed: int = 0, **settings: Any) -> None:
    """An adapter for `model`, which is left as it was, in PEFT's format at `path`; it is large enough to change answers."""
    torch.manual_seed(1000 + seed)
    config = peft.LoraConfig(
        **({"r": 8, "lora_alpha": 16, "target_modules": list(ALL_MODULES), "task_type": "CAUSAL_LM"} | settings)
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.15)
    adapted.save_pretrained(path)
    adapted.unload()


def with_adapter(model: "transformers.LlamaForCausalLM", path: Path) -> Any:
    """PEFT's own model of it, in float32. `unload` it to have `model` back."""
    return peft.PeftModel.from_pretrained(model, path).eval()
