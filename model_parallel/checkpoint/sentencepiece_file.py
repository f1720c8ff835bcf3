"""The pieces of a sentencepiece model, read without its library: what a vocabulary's size and special tokens are.

A ModelProto (sentencepiece_model.proto) is a protobuf message whose field 1 repeats, one SentencePiece a token in the order
of the ids; of that, field 1 is the text. The tokenizer itself is made by the library (serving/text/tokenizer.py).
"""

from collections.abc import Iterator
from pathlib import Path

from model_parallel.errors import CheckpointError

_MAX_BYTES = 64 << 20
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def read_pieces(path: Path) -> list[str]:
    """The text of every token. Raises CheckpointError naming a file that is no sentencepiece model."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the most is {_MAX_BYTES}")
        pieces = [_text(value) for number, value in _fields(path.read_bytes()) if number == 1]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from error
    if not pieces:
        raise CheckpointError(f"{path} is not a sentencepiece model: it has no pieces")
    return pieces


def _text(piece: bytes) -> str:
    return next((value.decode() for number, value in _fields(piece) if number == 1), "")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each length-delimited field; the others are skipped. Raises ValueError."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == _VARINT:
            _, position = _varint(message, position)
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED_64, _FIXED_32):
            length = 8 if kind == _FIXED_64 else 4
        else:
            raise ValueError(f"field of kind {kind} at byte {position}")
        if length > len(message) - position:
            raise ValueError(f"it ends inside the field at byte {position}")
        if kind == _BYTES:
            yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:  # the top bit says that more follow
            return value, position + index + 1
    raise ValueError(f"a number is cut off at byte {position}")
