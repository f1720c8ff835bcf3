"""Mutual proof that both ends of a connection know one secret, before anything else is parsed.

    connector → acceptor   hello: MAGIC · epoch · number · nonce_c
    acceptor → connector   challenge: nonce_a · HMAC-SHA256(secret, "acceptor" · hello · nonce_a)
    connector → acceptor   answer: HMAC-SHA256(secret, "connector" · hello · nonce_a)

All messages have fixed sizes. The nonces are new each time, so a recorded handshake cannot be replayed.
"""

import hmac
import secrets
import struct
from typing import NamedTuple

from model_parallel.transport.frames import LinkError

SECRET_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0
"""A connection that is not authenticated by then is closed."""
_HELLO = struct.Struct("!8sQI32s")
_NONCE_BYTES = 32
HELLO_BYTES = _HELLO.size
ANSWER_BYTES = 32
CHALLENGE_BYTES = _NONCE_BYTES + ANSWER_BYTES


class Hello(NamedTuple):
    """Who the connector claims to be."""

    magic: bytes
    """Names the protocol; 8 bytes."""
    epoch: int
    number: int


def make_hello(magic: bytes, *, epoch: int = 0, number: int = 0) -> bytes:
    """The connector's first message. The protocol says what `epoch` (u64) and `number` (u32) mean."""
    return _HELLO.pack(magic, epoch, number, secrets.token_bytes(_NONCE_BYTES))


def parse_hello(hello: bytes, magic: bytes) -> Hello:
    """Raises LinkError when it is another protocol's."""
    found = Hello(*_HELLO.unpack(hello)[:3])
    if found.magic != magic:
        raise LinkError("the peer speaks another protocol")
    return found


def make_challenge(secret: bytes, hello: bytes) -> bytes:
    """The acceptor's message, which also proves that it knows the secret."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + _proof(secret, b"acceptor", hello, nonce)


def answer_challenge(secret: bytes, hello: bytes, challenge: bytes) -> bytes:
    """The connector's second message. Raises LinkError when the acceptor does not know the secret."""
    nonce, proof = challenge[:_NONCE_BYTES], challenge[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"acceptor", hello, nonce)):
        raise LinkError("the peer does not know the secret")
    return _proof(secret, b"connector", hello, nonce)


def check_answer(secret: bytes, hello: bytes, challenge: bytes, answer: bytes) -> None:
    """Raises LinkError when the connector does not know the secret."""
    if not hmac.compare_digest(answer, _proof(secret, b"connector", hello, challenge[:_NONCE_BYTES])):
        raise LinkError("the peer does not know the secret")


def _proof(secret: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, side + hello + nonce, "sha256")
