"""Whether two checkpoints are the same one, told in milliseconds and not by reading all of their weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from model_parallel.checkpoint.info import CheckpointInfo

_SETTINGS = (
    "config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "params.json",
)  # fmt: skip
"""What is read beside weights and tokenizer."""
_SETTINGS_OF_RANKS = ("config.json", "quantize_config.json", "quant_config.json", "params.json")
"""What decides beside the weights what they mean."""
_END_BYTES = 1 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Of a larger one, beside its first and last MiB."""


def fingerprint(info: CheckpointInfo) -> str:
    """A digest (hex) of the names and sizes of the files that are used, of all small ones, and of samples of the large ones.
    What else lies beside them decides nothing, and may be unreadable.

    Weights that were trained further differ in nearly every page; that a file is changed in places that are not sampled is not
    noticed. Raises OSError.
    """
    return _digest(info, (info.index_file, info.tokenizer_path, *(info.path / name for name in _SETTINGS)))


def weights_fingerprint(info: CheckpointInfo) -> str:
    """The same of what ranks load alone: a model may get another chat template, or other settings of sampling, and stays the
    same one. Raises OSError."""
    return _digest(info, (info.index_file, *(info.path / name for name in _SETTINGS_OF_RANKS)))


def _digest(info: CheckpointInfo, others: Iterable[Path | None]) -> str:
    """Of the weights, and of those of the `others` that are there."""
    digest = hashlib.sha256()
    for path in sorted({*info.weight_files, *(path for path in others if path is not None and path.is_file())}):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{num_bytes}\0".encode())
        with path.open("rb") as file:
            if num_bytes <= 2 * _END_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(_END_BYTES))
            for sample in range(_NUM_SAMPLES):
                file.seek(num_bytes * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
            file.seek(-_END_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()
