"""The tokens of a GGUF file."""

from typing import TYPE_CHECKING

from model_parallel.errors import CheckpointError

if TYPE_CHECKING:  # what reads GGUF needs NumPy
    from model_parallel.checkpoint.gguf_file import GgufFile

# Token types of GGUF; sentencepiece has the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def gguf_tokens(file: "GgufFile") -> tuple[list[str], list[int]]:
    """Every token's text, and its type. Raises CheckpointError."""
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type", [])
    if not all(isinstance(text, str) for text in tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens holds something else than text")
    if len(tokens) != len(types):
        raise CheckpointError(f"{file.path}: its tokenizer has {len(tokens)} tokens and {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: two tokens of its tokenizer have the same text")
    return tokens, types
