"""What a client shows to any gateway of the deployment, so that a stream goes on whose gateway is gone.

No gateway keeps anything of a stream. The token says which request it was, who sent it, with which seed, by which model, and
under which id it is billed; the client says how many tokens it has. Draws are a pure function of seed, choice and position, so
the same request makes the same tokens again, and those that the client has are left out.

The token is authenticated and not encrypted: nothing in it is a secret of anybody but its holder. It has digests of tenant and
request under the deployment's key, so that whoever finds one in a log can guess at neither.
"""

import base64
import binascii
import hmac
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from model_parallel.errors import ConfigError
from serving.contracts.errors import (
    CannotResumeError,
    GroupUnavailableError,
    PermissionDeniedError,
    ValidationError,
)
from serving.contracts.models import ModelCard

LIFETIME_S = 600
KEY_BYTES = 32
_VERSION = 1
_LAYOUT = struct.Struct(">B16sIIQ8s8s16s")
"""Version, billed id, times of making and expiry (UNIX seconds), seed; digests of tenant, model and request."""
_MAC_BYTES = 16
_TOKEN_BYTES = _LAYOUT.size + _MAC_BYTES
_MAX_SHOWN_CHARS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedStream:
    """A streamed request as far as a token is about it."""

    request: bytes
    """Everything that changes a byte of the answer, in one spelling for all ways to say the same, the front end included."""
    tenant_id: str
    card: ModelCard
    token_field: str = "resume_token"
    """What errors call the token."""


@dataclass(kw_only=True, slots=True)
class Stream:
    """An answer on its way, whichever gateways send it."""

    billed_id: str
    """Id of the request that began it: its usage is counted under this one, once."""
    seed: int
    created_unix_s: int
    """When it was begun."""
    delivered: tuple[int, ...] = ()
    """Tokens that the client has of each choice. Choices behind the last have none."""
    _token: bytes = b""
    _renew_at_s: float = 0.0
    _make: Callable[["Stream"], tuple[bytes, float]] | None = field(default=None, repr=False)
    _wall_clock: Callable[[], float] = time.time

    def token(self) -> bytes:
        """To resume it with: another one when the last has lived for half of its time. Empty where it cannot be resumed."""
        if self._make is not None and self._wall_clock() >= self._renew_at_s:
            self._token, self._renew_at_s = self._make(self)
        return self._token

    def num_delivered(self, choice: int) -> int:
        """Tokens of a choice that the client has."""
        return self.delivered[choice] if choice < len(self.delivered) else 0


class ResumeTokens:
    """Makes and reads the tokens of one deployment."""

    def __init__(self, key: bytes, wall_clock: Callable[[], float] = time.time) -> None:
        """`key` is the same in all gateways of the deployment; `wall_clock` gives UNIX seconds."""
        self._keys = {use: hmac.digest(key, b"packtrain resume " + use, "sha256") for use in (b"mac", b"digest")}
        self._wall_clock = wall_clock

    def begin(self, asked: AskedStream, *, request_id: str, seed: int) -> Stream:
        """A stream that nobody has seen anything of."""
        stream = Stream(billed_id=request_id, seed=seed, created_unix_s=int(self._wall_clock()))
        return self._with_tokens(stream, asked)

    def resume(self, token: bytes, asked: AskedStream, delivered: tuple[int, ...]) -> Stream:
        """The stream that `token` is of, with the tokens that the client says it has.

        Raises ValidationError for a token that is not ours or is another request's, PermissionDeniedError for another tenant's,
        CannotResumeError when it has expired or the model has changed, and GroupUnavailableError before any group has told what
        it computes with.
        """
        name, shown = asked.token_field, _shown(token)
        billed_id, created_s, expires_s, seed, tenant, model, request = self._read(token, name)
        if not hmac.compare_digest(tenant, self._digest(b"tenant", asked.tenant_id.encode())):
            error = PermissionDeniedError(f"{name} {shown} is of another tenant's request")
            error.field = name
            raise error
        if (late_s := self._wall_clock() - expires_s) > 0:
            raise CannotResumeError(
                name,
                f"{name} {shown} has expired {late_s:.0f} s ago; a token is good for {LIFETIME_S} s: send the "
                "request anew",
            )
        if request != self._digest(b"request", asked.request, 16):
            raise ValidationError(
                name,
                f"{name} {shown} is of another request; it goes with the very request whose stream told it",
            )
        if not asked.card.kernels:  # as long as no group has told what it computes with
            raise GroupUnavailableError("no replica group can go on with the stream now", may_have_run=False)
        if not asked.card.deterministic or model != self._digest(b"model", _model_bytes(asked.card)):
            raise CannotResumeError(
                name,
                f"{name} {shown} is of another state of model {asked.card.name!r}, which would not make the same "
                "tokens again: send the request anew",
            )
        stream = Stream(billed_id=billed_id.hex(), seed=seed, created_unix_s=created_s, delivered=delivered)
        return self._with_tokens(stream, asked)

    def _with_tokens(self, stream: Stream, asked: AskedStream) -> Stream:
        if not asked.card.deterministic:
            return stream
        stream._wall_clock = self._wall_clock
        billed_id = bytes.fromhex(stream.billed_id)
        tenant = self._digest(b"tenant", asked.tenant_id.encode())
        model = self._digest(b"model", _model_bytes(asked.card))
        request = self._digest(b"request", asked.request, 16)

        def make(stream: Stream) -> tuple[bytes, float]:
            now_s = self._wall_clock()
            data = _LAYOUT.pack(
                _VERSION, billed_id, stream.created_unix_s, int(now_s) + LIFETIME_S, stream.seed, tenant, model, request
            )
            return data + self._mac(data), now_s + LIFETIME_S / 2

        stream._make = make
        return stream

    def _read(self, token: bytes, name: str) -> tuple[bytes, int, int, int, bytes, bytes, bytes]:
        data, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
        if len(token) != _TOKEN_BYTES or data[0] != _VERSION or not hmac.compare_digest(mac, self._mac(data)):
            raise ValidationError(
                name,
                f"{name} {_shown(token)} of {len(token)} bytes is not one that this deployment has made; allowed: the last one "
                f"that the stream has told, {_TOKEN_BYTES} bytes as they came",
            )
        fields: tuple[bytes, int, int, int, bytes, bytes, bytes] = _LAYOUT.unpack(data)[1:]
        return fields

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._keys[b"mac"], data, "sha256")[:_MAC_BYTES]

    def _digest(self, kind: bytes, data: bytes, num_bytes: int = 8) -> bytes:
        return hmac.digest(self._keys[b"digest"], kind + b"\0" + data, "sha256")[:num_bytes]


def as_text(token: bytes) -> str:
    """A token for a header."""
    return base64.urlsafe_b64encode(token).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """The token again; b"" for what is none."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""


def load_key(path: Path) -> bytes:
    """The key in a file of an operator's. Raises ConfigError."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"gateway.resume_key_file: {path}: {error.strerror}") from error
    if len(key) < KEY_BYTES:
        raise ConfigError(
            f"gateway.resume_key_file: {path} holds {len(key)} bytes; at least {KEY_BYTES} random ones are needed, such as "
            f"`openssl rand -hex {KEY_BYTES}` makes"
        )
    return key


def _model_bytes(card: ModelCard) -> bytes:
    """What decides the tokens, and not how many groups there are."""
    return msgspec.json.encode(msgspec.structs.replace(card, num_groups=0), order="deterministic")


def _shown(token: bytes) -> str:
    text = as_text(token)
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…")
