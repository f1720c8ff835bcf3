"""Writes a GGUF model in Hugging Face's format, in bfloat16: python -m bench.peers.convert_huggingface GGUF DIRECTORY"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def convert(source: Path, target: Path) -> None:
    """The tokenizer is left out: peers are given token ids."""
    # Any: its stubs do not agree with its classes.
    model: Any = LlamaForCausalLM(AutoConfig.from_pretrained(source.parent, gguf_file=source.name))
    loaded = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{source}: missing {missing}, left over {unexpected}")
    model.tie_weights()
    model.bfloat16().save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
