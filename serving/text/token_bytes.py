"""What a token's text in a vocabulary stands for, as bytes: one character may be spread over several tokens."""

import re

SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(piece: str) -> bytes:
    """Of a sentencepiece token: "<0x0A>" is a byte, "▁" a space."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(SPACE, " ").encode()


def byte_level_bytes(token: str) -> bytes:
    """Of a byte-level token, which has one visible character a byte; one with other characters is text as it stands."""
    if not _BYTE_OF_CHARACTER.keys() >= set(token):
        return token.encode()
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def byte_level_text(data: bytes) -> str:
    """The other way: how a byte-level vocabulary writes these bytes."""
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in data)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: visible Latin-1 characters stand for themselves, other bytes for U+0100 and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
