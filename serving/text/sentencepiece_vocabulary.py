"""Vocabularies of sentencepiece: tokenizer.model, and GGUF files that carry its pieces.

Tokens that other files add are appended to the model's own pieces, so that one library cuts all text.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.checkpoint.info import AddedToken
from model_parallel.errors import CheckpointError
from serving.text.gguf_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, gguf_tokens
from serving.text.token_bytes import SPACE, piece_bytes
from serving.text.vocabulary import ControlToken, Vocabulary, is_markup, special_ids

if TYPE_CHECKING:  # what reads GGUF needs NumPy
    from model_parallel.checkpoint.gguf_file import GgufFile

_NUM_BYTES = 256


def from_tokenizer_model(info: CheckpointInfo, path: Path, markup: str) -> Vocabulary:
    """`path` is a sentencepiece model. Raises CheckpointError."""
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
        _check(proto)
    except Exception as error:  # protobuf's and the library's
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from error
    added = _add_tokens(proto, info, path, markup)
    if info.tokenizer.is_llamas and info.tokenizer.add_prefix_space is not None:
        proto.normalizer_spec.add_dummy_prefix = info.tokenizer.add_prefix_space
    # As transformers 5 takes a file that does not say: no space of its own for a part after a control token.
    return _vocabulary(info, path, proto, added, markup, later_prefix=not info.tokenizer.only_first_has_space)


def from_gguf_pieces(info: CheckpointInfo, file: "GgufFile", markup: str) -> Vocabulary:
    """A sentencepiece model with the pieces of a GGUF file and the rules of Llama's. Raises CheckpointError."""
    tokens, types = gguf_tokens(file)
    scores = file.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    unknown = _unknown_id(file, tokens, types)
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for token_id, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # sentencepiece knows one unknown token; others are converters' way to mark what text must never become.
        own_kind = UNKNOWN if token_id == unknown else CONTROL if kind == UNKNOWN else kind
        proto.pieces.add(piece=text or f"<|empty_{token_id}|>", score=score, type=own_kind if text else UNUSED)
    if unknown is None:
        proto.pieces.add(piece="<|no_unknown|>", score=0.0, type=UNKNOWN)  # the library needs one
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.byte_fallback = types.count(BYTE) == _NUM_BYTES
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = info.tokenizer.add_prefix_space is not False
    proto.normalizer_spec.remove_extra_whitespaces = False
    try:
        _check(proto)
    except RuntimeError as error:
        raise CheckpointError(f"{file.path}: its tokenizer is not valid: {error}") from error
    return _vocabulary(info, file.path, proto, {}, markup, later_prefix=True, size=len(tokens))


def _unknown_id(file: "GgufFile", tokens: list[str], types: list[int]) -> int | None:
    named = file.get("tokenizer.ggml.unknown_token_id")
    if isinstance(named, int) and 0 <= named < len(tokens):
        return named
    if "<unk>" in tokens:
        return tokens.index("<unk>")
    return types.index(UNKNOWN) if UNKNOWN in types else None


def _check(proto: Any) -> None:
    """Raises what the library raises."""
    if not proto.pieces:
        raise RuntimeError("it has no pieces")
    SentencePieceProcessor().LoadFromSerializedProto(proto.SerializeToString())


def _add_tokens(proto: Any, info: CheckpointInfo, path: Path, markup: str) -> dict[str, AddedToken]:
    """Put the tokens of the files beside the model into it. Raises CheckpointError."""
    added = {}
    known = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    for token in info.tokenizer.added:
        if not token.text:
            continue
        is_control = token.special or is_markup(info, token.text, markup) or token.id >= info.config.vocab_size
        kind = CONTROL if is_control else USER_DEFINED
        piece = token.text.replace(" ", SPACE)  # as it stands in a text that is being cut
        text = token.text if is_control or known.get(piece, token.id) != token.id else piece
        if (old := known.get(text)) is not None:
            if old == token.id and proto.pieces[old].type in (NORMAL, UNUSED, USER_DEFINED):
                proto.pieces[old].type = kind
            if old == token.id:
                added[text] = token
            continue
        if token.id < len(proto.pieces):
            if proto.pieces[token.id].type in (BYTE, UNKNOWN):
                raise CheckpointError(
                    f"{path}: the token {token.text!r:.40} is added at {token.id}, which is {proto.pieces[token.id].piece!r}"
                )
            proto.pieces[token.id].piece, proto.pieces[token.id].type = text, kind
        else:
            for gap in range(len(proto.pieces), token.id):
                proto.pieces.add(piece=f"<|gap_{gap}|>", score=0.0, type=UNUSED)
            proto.pieces.add(piece=text, score=0.0, type=kind)
        known[text] = token.id
        added[text] = token
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return added


def _vocabulary(
    info: CheckpointInfo,
    path: Path,
    proto: Any,
    added: dict[str, AddedToken],
    markup: str,
    *,
    later_prefix: bool,
    size: int | None = None,
) -> Vocabulary:
    # A token that the checkpoint names as its end, or a chat format writes, must not be found in text either.
    for token_id, piece in enumerate(proto.pieces):
        if piece.type in (USER_DEFINED, UNUSED, NORMAL) and (
            token_id in special_ids(info) or (piece.type == USER_DEFINED and is_markup(info, piece.piece, markup))
        ):
            piece.type = CONTROL
    processor = _processor(path, proto)
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    later = processor
    if has_prefix and not later_prefix:
        proto.normalizer_spec.add_dummy_prefix = False
        later = _processor(path, proto)
    pieces = list(proto.pieces)[:size]
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    control = {}
    for token_id, piece in enumerate(pieces):
        if piece.type in (CONTROL, UNKNOWN):
            token = added.get(piece.piece)
            control[piece.piece] = ControlToken(
                id=token_id, lstrip=bool(token and token.lstrip), rstrip=bool(token and token.rstrip)
            )

    def to_bytes(piece: Any) -> bytes:
        if piece.type in (CONTROL, UNKNOWN, UNUSED):
            return b""
        return piece_bytes(piece.piece) if piece.type == BYTE else str(piece.piece).replace(SPACE, " ").encode()

    bos_text = info.tokenizer.bos_text
    return Vocabulary(
        encode=lambda text: processor.encode(text, add_bos=False, add_eos=False),
        encode_later=lambda text: later.encode(text, add_bos=False, add_eos=False),
        token_bytes=[to_bytes(piece) for piece in pieces],
        control=control,
        token_id=ids.get,
        add_bos=info.add_bos is not False,
        strips_leading_space=has_prefix,
        bos_token_id=ids.get(bos_text),
        unknown_id=processor.unk_id(),
    )


def _processor(path: Path, proto: Any) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto.SerializeToString())
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its tokenizer is not valid: {error}") from error
    return processor
