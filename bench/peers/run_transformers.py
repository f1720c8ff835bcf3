"""Hugging Face transformers' generate as a peer. Run in our own environment: python -m bench.peers.run_transformers
MODEL_DIRECTORY NUM_THREADS
"""

import sys
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.peers.worker import Generate, Prompts, serve


def load() -> tuple[Generate, str]:
    torch.set_num_threads(int(sys.argv[2]))
    model: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.eval()

    def generate(prompts: Prompts, num_new_tokens: int) -> int:
        ids = torch.tensor(prompts)
        all_ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
        )
        return int(all_ids[:, ids.shape[1] :].numel())

    return generate, f"transformers {version('transformers')}"


if __name__ == "__main__":
    serve(load)
