"""What a tokenizer is made of, whatever files it came in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model_parallel.checkpoint.detect import CheckpointInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlToken:
    """A token that no text becomes; a chat format places it by its text."""

    id: int
    lstrip: bool = False
    """Where its text stands in a format, the spaces before it belong to it; with `rstrip` those after it."""
    rstrip: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A vocabulary and its rules of cutting text."""

    encode: Callable[[str], Sequence[int]]
    """Of a text, or its first part. Finds no control tokens in it."""
    encode_later: Callable[[str], Sequence[int]]
    """Of a part that follows a control token: by the checkpoint's rule it may not begin with a space of its own."""
    token_bytes: Sequence[bytes]
    """What each token stands for; nothing for control tokens."""
    control: Mapping[str, ControlToken]
    """By their text."""
    token_id: Callable[[str], int | None]
    """Of any token, by its text."""
    add_bos: bool
    strips_leading_space: bool
    """The first token of a text carries a space that the text does not have (sentencepiece's dummy prefix)."""
    bos_token_id: int | None = None
    """As the tokenizer's files name it; None where they do not."""
    first_id: int | None = None
    """What texts begin with where `add_bos`; BOS when None."""
    unknown_id: int | None = None
    """What characters become that the vocabulary does not have; beyond it where there is no such token. None where the library
    knows all characters, or leaves such out."""
    warnings: tuple[str, ...] = ()
    """Where ids differ from what the files seem to say, as sentences."""


def is_markup(info: CheckpointInfo, text: str, markup: str) -> bool:
    """Whether an added token belongs to the control of conversations, although its file does not call it special: it is named
    in a special role, or the chat template or format (`markup`) writes it, and it is no ordinary word.
    """
    if text in info.tokenizer.special_texts or text == info.tokenizer.bos_text:
        return True
    return text in info.chat_template + markup and not text.strip().isalnum() and bool(text.strip())


def special_ids(info: CheckpointInfo) -> set[int]:
    """Control tokens by their ids."""
    bos = info.config.bos_token_id
    return {*info.config.eos_token_ids, *(() if bos is None else (bos,))}
