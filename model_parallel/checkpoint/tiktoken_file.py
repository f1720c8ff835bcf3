"""The vocabulary file of Llama 3 in Meta's format (tokenizer.model): a line a token, its bytes in base64 and its rank.

The tokens that control a conversation are not in the file; Meta's code adds them, 256 in all, after its last (llama-models,
models/llama3/tokenizer.py).
"""

import base64
import re
from pathlib import Path

from model_parallel.errors import CheckpointError

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\r?")
_MAX_BYTES = 64 << 20
_NUM_SPECIAL = 256
_HEAD_BYTES = 512
_FIRST_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def is_tiktoken_file(path: Path) -> bool:
    """Whether the file's first line is one of such a vocabulary; sentencepiece models are binary."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return _LINE.fullmatch(head.partition(b"\n")[0]) is not None


def read_tiktoken(path: Path) -> list[bytes]:
    """Every token's bytes, in the order of the ranks, which are the ids. Raises CheckpointError naming a broken file."""
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the most is {_MAX_BYTES}")
    tokens: list[bytes] = []
    for number, line in enumerate(filter(None, path.read_bytes().split(b"\n")), start=1):
        match = _LINE.fullmatch(line)
        if match is None or int(match[2]) != len(tokens):
            raise CheckpointError(f"{path}: line {number} is no token with the rank {len(tokens)}")
        try:
            tokens.append(base64.b64decode(match[1], validate=True))
        except ValueError as error:
            raise CheckpointError(f"{path}: line {number} is not base64: {error}") from error
    return tokens


def llama3_special_tokens() -> list[str]:
    """Texts of the tokens that follow the file's."""
    num_reserved = _NUM_SPECIAL - len(_FIRST_SPECIAL)
    return [*_FIRST_SPECIAL, *(f"<|reserved_special_token_{2 + i}|>" for i in range(num_reserved))]
