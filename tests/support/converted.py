"""What transformers makes of a GGUF file, kept for the next time: 49,152 tokens and 135 million weights take it 40 s."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from model_parallel.directories import cache_directory
from tests.support.ranks import reference_from_gguf


def converted(gguf: Path) -> Path:
    """A directory with the configuration and the tokenizer, for `from_pretrained`."""

    def convert(directory: Path) -> None:
        transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)

    return _kept(gguf, "tokenizer", convert)


def reference_model(gguf: Path) -> "transformers.LlamaForCausalLM":
    """reference_from_gguf of a file that has no head of its own."""
    path = _kept(gguf, "model", lambda directory: reference_from_gguf(gguf).save_pretrained(directory))
    model: transformers.LlamaForCausalLM = transformers.LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ).eval()
    return model


def _kept(gguf: Path, part: str, convert: Callable[[Path], None]) -> Path:
    """For a file that does not change: it is known by its name, size and time."""
    stat = gguf.stat()
    name = f"{gguf.name}-{stat.st_size}-{stat.st_mtime_ns}-{transformers.__version__}-{part}"
    kept = cache_directory() / "converted" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(scratch) / name
            convert(made)
            try:
                os.rename(made, kept)
            except OSError:  # another process was first
                if not kept.exists():
                    raise
    return kept
