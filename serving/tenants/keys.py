"""What a key looks like, how it is hashed, and how it is read from a header.

A key is `pt_` + 16 hexadecimal digits + `_` + 43 characters: a fixed mark, its public id, and 256 random bits in base64url.
The mark lets secret scanners find keys in places where they do not belong.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.contracts.errors import ValidationError

MAX_HEADER_LENGTH = 4096
ID_LENGTH = 16

_KEY = re.compile(r"pt_([0-9a-f]{16})_[A-Za-z0-9_-]{43}", re.ASCII)
_WHOLE = re.compile(r"((?:pt_)?([0-9a-f]{16}))_\S*", re.ASCII | re.IGNORECASE)
"""Also what was cut off, and what begins with the id."""
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


def without_secrets(text: str) -> str:
    """What a user gave, for an error that is printed and logged: where it looks like a whole key, without what is secret."""
    return _WHOLE.sub(r"\1_…", text)


def check_key_id(field: str, text: str) -> None:
    """Raises ValidationError for what is longer than an id, and does not repeat it: it may be a whole key, or its secret."""
    if len(text) <= ID_LENGTH:
        return
    found = _WHOLE.search(text)
    said = f"{found[2]!r} of the whole key that was given" if found else f"and not {len(text)} characters"
    raise ValidationError(
        field, f"{field} must be a key's id, the {ID_LENGTH} characters between the underscores of the key: {said}"
    )


def read_bearer(credentials: Sequence[str]) -> str | None:
    """What stands after `Bearer` in the values of all `authorization` headers; None unless there is exactly one of that form."""
    if len(credentials) != 1 or len(credentials[0]) > MAX_HEADER_LENGTH:
        return None
    bearer = _BEARER.fullmatch(credentials[0])
    return bearer[1] if bearer else None


def read_credentials(credentials: Sequence[str]) -> KeyText | None:
    """The key in these; None unless there is one that is well formed."""
    bearer = read_bearer(credentials)
    key = _KEY.fullmatch(bearer) if bearer else None
    return KeyText(key[1], key[0]) if key else None
