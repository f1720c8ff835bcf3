"""What a key looks like, how it is hashed, and how it is read from a header.

A key is `pt_` + 16 hexadecimal digits + `_` + 43 characters: a fixed mark, its public id, and 256 random bits in base64url.
The mark lets secret scanners find keys in places where they do not belong.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_HEADER_LENGTH = 4096

_KEY = re.compile(r"pt_([0-9a-f]{16})_[A-Za-z0-9_-]{43}", re.ASCII)
_BEARER = re.compile(r"bearer +(\S+) *", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class KeyText:
    """A well-formed key: shown once when it is made, sent by clients, never kept."""

    id: str
    text: str = field(repr=False)

    def hash(self) -> bytes:
        """SHA-256 of all of it. Nothing slower is needed: 256 random bits cannot be guessed, with the hash or without."""
        return hashlib.sha256(self.text.encode()).digest()


def new_key() -> KeyText:
    """A random key with a random id."""
    key_id = secrets.token_hex(8)
    return KeyText(key_id, f"pt_{key_id}_{secrets.token_urlsafe(32)}")


def read_credentials(credentials: Sequence[str]) -> KeyText | None:
    """The key in the values of all `authorization` headers; None unless there is exactly one, `Bearer KEY`, of that form."""
    if len(credentials) != 1 or len(credentials[0]) > MAX_HEADER_LENGTH:
        return None
    bearer = _BEARER.fullmatch(credentials[0])
    key = _KEY.fullmatch(bearer[1]) if bearer else None
    return KeyText(key[1], key[0]) if key else None
