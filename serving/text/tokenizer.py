"""Text to token ids and back, for every kind of tokenizer that a Llama checkpoint comes with.

One rule holds for all of them: text never becomes a control token. `</s>` in a prompt is encoded as the characters that
it is; control tokens are only ever placed by id: by a chat format (chat.py), or by a caller who is trusted to write them
(`parse_special`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.checkpoint.placeholders import what_it_is
from model_parallel.errors import CheckpointError, ConfigError, RequestError
from serving.text.byte_level_vocabulary import from_gguf_byte_level, from_tiktoken
from serving.text.json_vocabulary import from_tokenizer_json
from serving.text.sentencepiece_vocabulary import from_gguf_pieces, from_tokenizer_model
from serving.text.vocabulary import ControlToken, Vocabulary


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a prompt: the text of somebody, or the markup of a chat format around it, in which control tokens are written."""

    text: str
    is_markup: bool


class Tokenizer:
    """A model's tokenizer. Never changes after it is made, and may be used from several threads at once."""

    def __init__(self, info: CheckpointInfo, vocabulary: Vocabulary) -> None:
        """`vocabulary` was made for `info`."""
        self._vocabulary = vocabulary
        self.warnings = vocabulary.warnings
        if info.tokenizer.add_eos and info.tokenizer_kind != "tokenizer.json":  # whose post_processor decides
            self.warnings += (
                f"{info.path}: add_eos_token is true; it is not used: an answer goes on where its prompt ends",
            )
        self._token_bytes = vocabulary.token_bytes
        vocab_size = info.config.vocab_size
        self._control = {text: token for text, token in vocabulary.control.items() if token.id < vocab_size}
        self._control_texts = {token.id: text for text, token in vocabulary.control.items()}
        self._marks = _any_of(self._control)
        named_bos = vocabulary.bos_token_id
        self.bos_token_id = info.config.bos_token_id if named_bos is None or named_bos >= vocab_size else named_bos
        self._first_id = self.bos_token_id if vocabulary.first_id is None else vocabulary.first_id
        self.eos_token_ids = _end_tokens(info, vocabulary)
        self.strips_leading_space = vocabulary.strips_leading_space
        """The first token of a text carries a space that the text does not have (sentencepiece's dummy prefix)."""
        special = {*self.eos_token_ids} if self.bos_token_id is None else {*self.eos_token_ids, self.bos_token_id}
        self.control_token_ids = frozenset(token.id for token in vocabulary.control.values()) | special
        self._unknown_id = vocabulary.unknown_id
        # The unknown token ends and begins nothing, unless the model names it for that.
        self._refused_ids = self.control_token_ids - {self._unknown_id} | special

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; the model's logits may be wider."""
        return len(self._token_bytes)

    def control_token_id(self, text: str) -> int:
        """The control token written `text`, for a chat format. Raises ConfigError when there is none."""
        if text not in self._control:
            raise ConfigError(f"the model's tokenizer has no control token {text!r}")
        return self._control[text].id

    def has_control_token(self, text: str) -> bool:
        return text in self._control

    def control_token_text(self, token_id: int | None) -> str | None:
        """How a control token is written; None for any other."""
        return self._control_texts.get(token_id) if token_id is not None else None

    def spelt_bytes(self, token_id: int) -> bytes:
        """What a token stands for, a control token its own spelling."""
        text = self._control_texts.get(token_id)
        return self.token_bytes(token_id) if text is None else text.encode()

    def split_markup(self, markup: str) -> list[str | ControlToken]:
        """Markup as texts and the control tokens between them, the longest where several begin."""
        found: list[str | ControlToken] = []
        position = 0
        for match in self._marks.finditer(markup) if self._marks else ():
            found += [markup[position : match.start()], self._control[match[0]]]
            position = match.end()
        return [part for part in (*found, markup[position:]) if part != ""]

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; with `add_bos`, after BOS if this model's texts begin with it.

        With `parse_special`, which is for callers who may write control tokens, their texts become them; BOS is then added
        only where the text does not begin with it.

        Raises RequestError for a text that is not Unicode (a lone surrogate, which JSON can smuggle in), for one that would
        become a control token, which no known tokenizer does, and for characters that the vocabulary has no token for.
        """
        if parse_special:
            bos_text = self.control_token_text(self._first_id) or ""
            begins_with_bos = bool(bos_text) and text.startswith(bos_text)
            ids = self.encode_parts([Part(text.removeprefix(bos_text), is_markup=True)])
        else:
            begins_with_bos = False
            ids = self._encode(text, is_first=True)
        if (begins_with_bos or (add_bos and self._vocabulary.add_bos)) and self._first_id is not None:
            ids.insert(0, self._first_id)
        return ids

    def encode_parts(self, parts: Iterable[Part], *, every_part_is_first: bool = False) -> list[int]:
        """Token ids of a prompt that is made of parts. What stands between two control tokens is encoded as one text, by the
        checkpoint's rule for texts there; with `every_part_is_first` by the rule for the beginning of a prompt, as Meta's
        reference does for Llama 2. Raises RequestError as `encode` does.
        """
        pieces: list[str | ControlToken] = []
        for part in parts:
            for piece in self.split_markup(part.text) if part.is_markup else [part.text]:
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, ControlToken):
                ids.append(piece.id)
                continue
            before = pieces[index - 1] if index else None
            after = pieces[index + 1] if index + 1 < len(pieces) else None
            text = piece
            if isinstance(before, ControlToken) and before.rstrip:
                text = text.lstrip()
            if isinstance(after, ControlToken) and after.lstrip:
                text = text.rstrip()
            if text:
                ids += self._encode(text, is_first=every_part_is_first or not index)
        return ids

    def _encode(self, text: str, *, is_first: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds a lone surrogate at character {error.start}, which is no text"
            ) from error
        ids = list(self._vocabulary.encode(text) if is_first else self._vocabulary.encode_later(text))
        if not self._refused_ids.isdisjoint(ids):
            raise RequestError("the text holds characters that this model's tokenizer reads as a control token")
        unknown_id = self._unknown_id
        if unknown_id is not None and unknown_id >= self.vocab_size and unknown_id in ids:
            raise RequestError("the text holds characters that this model's vocabulary has no token for")
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; nothing for a control token, and for an id that only the logits have.

        Bytes, as one character may be spread over several tokens.
        """
        if token_id >= len(self._token_bytes) or token_id in self.control_token_ids:
            return b""
        return self._token_bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(map(self.token_bytes, token_ids))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")


def load_tokenizer(source: Path, *, markup: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint: a directory in Hugging Face's or Meta's format, or a GGUF file.

    Raises CheckpointError when it has none, or one whose rules are not known here, or that the model is too small for.
    """
    return make_tokenizer(describe(source), markup=markup)


def make_tokenizer(info: CheckpointInfo, *, markup: str = "") -> Tokenizer:
    """The same for a checkpoint that was described. `markup` is what a chat format writes around messages: added tokens that
    stand in it are control tokens, whatever their file calls them.
    """
    vocabulary = _vocabulary(info, markup)
    vocab_size = info.config.vocab_size
    for token_id in range(vocab_size, len(vocabulary.token_bytes)):
        if vocabulary.token_bytes[token_id]:
            raise CheckpointError(
                f"{info.tokenizer_path} has the token {token_id}, and the model's vocabulary {vocab_size}: the two are "
                "of different models"
            )
    return Tokenizer(info, vocabulary)


def _vocabulary(info: CheckpointInfo, markup: str) -> Vocabulary:
    path = info.tokenizer_path
    if path is None:
        needed = {
            "huggingface": "tokenizer.json or tokenizer.model is needed",
            "meta": "tokenizer.model is needed",
            "gguf": "it has no tokenizer.ggml.tokens; convert the model with its tokenizer beside it",
        }
        raise CheckpointError(f"{info.path} has no tokenizer: {needed[info.format]}")
    if (found := what_it_is(path)) and info.tokenizer_kind != "tokenizer.model":
        raise CheckpointError(f"{path} {found}")
    if info.tokenizer_kind == "tokenizer.json":
        return from_tokenizer_json(info, path, markup)
    if info.tokenizer_kind == "tokenizer.model":
        return from_tokenizer_model(info, path, markup)
    if info.tokenizer_kind == "tiktoken":
        return from_tiktoken(path)
    from model_parallel.checkpoint.gguf_file import GgufFile  # noqa: PLC0415 - needs NumPy, a quarter of what a command loads

    file = GgufFile(path)
    model = file.get("tokenizer.ggml.model")
    if model == "gpt2":
        return from_gguf_byte_level(info, file, markup)
    if model == "llama":
        return from_gguf_pieces(info, file, markup)
    raise CheckpointError(f"{path}: tokenizer.ggml.model is {model!r}; gpt2 and llama are supported")


def _end_tokens(info: CheckpointInfo, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Of the configuration, then those that the tokenizer's files name."""
    named = (vocabulary.token_id(text) for text in info.tokenizer.eos_texts)
    ids = (*info.config.eos_token_ids, *(i for i in named if i is not None and i < info.config.vocab_size))
    return tuple(dict.fromkeys(ids))


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
