"""Text to token ids and back, for every kind of tokenizer that a Llama checkpoint comes with.

One rule holds for all of them: text never becomes a control token. `</s>` in a prompt is encoded as the characters that
it is; control tokens are only ever placed by id (chat.py).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import models, pre_tokenizers

from model_parallel.checkpoint.detect import CheckpointInfo, describe, read_json
from model_parallel.checkpoint.gguf_file import GgufFile
from model_parallel.errors import CheckpointError, ConfigError, RequestError

# Token types of GGUF; sentencepiece has the same.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer. Never changes after it is made, and may be used from several threads at once."""

    def __init__(
        self,
        *,
        info: CheckpointInfo,
        encode: Callable[[str], Sequence[int]],
        token_bytes: Sequence[bytes],
        control: Mapping[str, int],
        add_bos: bool,
        strips_leading_space: bool,
    ) -> None:
        """`token_bytes` has what each token stands for, and `control` the control tokens by their text."""
        self._encode = encode
        self._token_bytes = token_bytes
        self._control = {text: i for text, i in control.items() if i < info.config.vocab_size}
        self._add_bos = add_bos
        self.bos_token_id = info.config.bos_token_id
        self.eos_token_ids = info.config.eos_token_ids
        self.strips_leading_space = strips_leading_space
        """The first token of a text carries a space that the text does not have (sentencepiece's dummy prefix)."""
        special = {*self.eos_token_ids} if self.bos_token_id is None else {*self.eos_token_ids, self.bos_token_id}
        self.control_token_ids = frozenset(control.values()) | special

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; the model's logits may be wider."""
        return len(self._token_bytes)

    def control_token_id(self, text: str) -> int:
        """The control token written `text`, for a chat format. Raises ConfigError when there is none."""
        if text not in self._control:
            raise ConfigError(f"the model's tokenizer has no control token {text!r}")
        return self._control[text]

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; with `add_bos`, after BOS if this model's texts begin with it.

        Raises RequestError for a text that is not Unicode (a lone surrogate, which JSON can smuggle in), and for one that would
        become a control token, which no known tokenizer does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds a lone surrogate at character {error.start}, which is no text"
            ) from error
        ids = list(self._encode(text))
        if not self.control_token_ids.isdisjoint(ids):
            raise RequestError("the text holds characters that this model's tokenizer reads as a control token")
        if add_bos and self._add_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
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


def load_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: a directory in Hugging Face format, or a GGUF file.

    Raises CheckpointError when it has none, or one whose rules are not known here, or that the model is too small for.
    """
    info = describe(source)
    tokenizer = _make_tokenizer(info)
    for token_id in range(info.config.vocab_size, tokenizer.vocab_size):
        if tokenizer.token_bytes(token_id):
            raise CheckpointError(
                f"{info.tokenizer_path} has the token {token_id}, and the model's vocabulary {info.config.vocab_size}"
            )
    return tokenizer


def _make_tokenizer(info: CheckpointInfo) -> Tokenizer:
    if info.tokenizer_path is None:
        raise CheckpointError(f"{info.path} has no tokenizer: tokenizer.json or tokenizer.model is needed")
    if info.tokenizer_kind == "tokenizer.json":
        return _from_tokenizer_json(info, info.tokenizer_path)
    if info.tokenizer_kind == "tokenizer.model":
        return _from_sentencepiece(info, info.tokenizer_path.read_bytes())
    file = GgufFile(info.tokenizer_path)
    model = file.get("tokenizer.ggml.model")
    if model == "gpt2":
        return _from_gguf_byte_level(info, file)
    if model == "llama":
        return _from_sentencepiece(info, _gguf_sentencepiece_model(file))
    raise CheckpointError(f"{file.path}: tokenizer.ggml.model is {model!r}; gpt2 and llama are supported")


# ---- tokenizer.json ----


def _from_tokenizer_json(info: CheckpointInfo, path: Path) -> Tokenizer:
    data = read_json(path)
    special_ids = {*info.config.eos_token_ids, info.config.bos_token_id}
    try:
        added = {token["id"]: token for token in data.get("added_tokens") or ()}
        for token in added.values():
            token["special"] = token["special"] or token["id"] in special_ids  # what is special is never found in text
        library = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from error
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()

    steps = _decoder_steps(data.get("decoder"))
    if "ByteLevel" in steps:
        to_bytes: Callable[[str], bytes] = _byte_level_bytes
    elif "ByteFallback" in steps:
        to_bytes = _piece_bytes
    else:
        raise CheckpointError(f"{path}: its decoder is {steps or None}; ByteLevel or ByteFallback is needed")
    token_bytes = [b""] * (max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
    for text, token_id in library.get_vocab(with_added_tokens=True).items():
        if token_id not in added:
            token_bytes[token_id] = to_bytes(text)
        elif not added[token_id]["special"]:
            token_bytes[token_id] = text.encode()
    bos = info.config.bos_token_id
    return Tokenizer(
        info=info,
        encode=lambda text: library.encode(text, add_special_tokens=False).ids,
        token_bytes=token_bytes,
        control={token["content"]: token_id for token_id, token in added.items() if token["special"]},
        add_bos=bos in library.encode("").ids if info.add_bos is None else info.add_bos,
        strips_leading_space="Strip" in steps,
    )


def _decoder_steps(decoder: Any) -> list[str]:
    """Kinds of the steps of a tokenizer.json's decoder."""
    if not isinstance(decoder, dict):
        return []
    return [step["type"] for step in decoder.get("decoders", [decoder])]


# ---- GGUF with a byte-level BPE ----


def _from_gguf_byte_level(info: CheckpointInfo, file: GgufFile) -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {"gpt-2": byte_level, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])}
    pre = file.get("tokenizer.ggml.pre")
    if pre not in known:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(known)}")
    tokens, types = _gguf_tokens(file)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    try:
        library = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{file.path}: its tokenizer is not valid: {error}") from error
    library.pre_tokenizer = known[pre]
    user_defined = [text for text, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    library.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in user_defined])

    def to_bytes(text: str, kind: int) -> bytes:
        if kind in (_UNKNOWN, _CONTROL, _UNUSED):
            return b""
        return text.encode() if kind == _USER_DEFINED else _byte_level_bytes(text)

    return Tokenizer(
        info=info,
        encode=lambda text: library.encode(text, add_special_tokens=False).ids,
        token_bytes=[to_bytes(text, kind) for text, kind in zip(tokens, types, strict=True)],
        control={text: i for i, text in enumerate(tokens) if types[i] in (_UNKNOWN, _CONTROL)},
        add_bos=bool(info.add_bos),
        strips_leading_space=False,
    )


def _gguf_tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """Every token's text, and its type."""
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type", [])
    if not all(isinstance(text, str) for text in tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens holds something else than text")
    if len(tokens) != len(types):
        raise CheckpointError(f"{file.path}: its tokenizer has {len(tokens)} tokens and {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: two tokens of its tokenizer have the same text")
    return tokens, types


# ---- sentencepiece ----


def _from_sentencepiece(info: CheckpointInfo, model: bytes) -> Tokenizer:
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise CheckpointError(f"{info.tokenizer_path} is not a sentencepiece model: {error}") from error
    ids = range(processor.get_piece_size())
    control = {processor.id_to_piece(i): i for i in ids if processor.is_control(i) or processor.is_unknown(i)}

    def to_bytes(token_id: int) -> bytes:
        piece = processor.id_to_piece(token_id)
        if piece in control or processor.is_unused(token_id):
            return b""
        return _piece_bytes(piece) if processor.is_byte(token_id) else piece.replace(_SPACE, " ").encode()

    return Tokenizer(
        info=info,
        encode=lambda text: processor.encode(text, add_bos=False, add_eos=False),
        token_bytes=[to_bytes(i) for i in ids],
        control=control,
        add_bos=info.add_bos is not False,
        strips_leading_space=_parse(model).normalizer_spec.add_dummy_prefix,
    )


def _parse(model: bytes) -> Any:
    """A sentencepiece ModelProto, for which there are no types."""
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]


def _gguf_sentencepiece_model(file: GgufFile) -> bytes:
    """A sentencepiece model with the pieces of a GGUF file and the rules of Llama's."""
    tokens, types = _gguf_tokens(file)
    scores = file.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    proto = _parse(b"")
    for text, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(tokens)
    proto.trainer_spec.byte_fallback = _BYTE in types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


# ---- what a token's text stands for ----


def _piece_bytes(piece: str) -> bytes:
    """Of a sentencepiece token: "<0x0A>" is a byte, "▁" a space."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(_SPACE, " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    """Of a byte-level token, which has one visible character a byte; one with other characters is text as it stands."""
    if not _BYTE_OF_CHARACTER.keys() >= set(token):
        return token.encode()
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: visible Latin-1 characters stand for themselves, other bytes for U+0100 and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
