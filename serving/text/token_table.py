"""A tokenizer as constrained output needs it: the bytes of every token."""

from collections.abc import Sequence

from model_parallel.config import TokenTable
from serving.text.tokenizer import Tokenizer


def token_table(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> TokenTable:
    """`vocab_size` is the width of the logits. Bytes are those that the detokenizer joins: what a grammar allows is what the
    answer's text is."""
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
    return TokenTable.of(tokens, tuple(eos_token_ids))
