"""Between the process that leads a load test and those that send: one connection each, authenticated both ways, then frames.

Handshake and frames are those of `model_parallel.transport`; a frame's payload is msgpack.
"""

import asyncio
from typing import Any, Generic, TypeVar

import msgspec

from bench.loadtest.records import Health, Record
from bench.loadtest.runner import Resolved
from model_parallel.transport.authentication import (
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    HANDSHAKE_TIMEOUT_S,
    HELLO_BYTES,
    answer_challenge,
    check_answer,
    make_challenge,
    make_hello,
    parse_hello,
)
from model_parallel.transport.frames import FrameReader, LinkError, encode_frame

MAGIC = b"pktload1"
RECORDS_A_FRAME = 500
_READ_BYTES = 1 << 18


class Plan(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → sender: what to send. Keys are not in it; each machine reads its own."""

    scenario: str
    """As JSON."""
    resolved: list[Resolved]
    index: int
    count: int


class Connected(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sender → leader: its connections are open, its warm-up is over."""


class Begin(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → sender: the run begins so many seconds from now."""

    after_s: float


class Halt(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → sender: cancel what is under way and hand over what was measured."""


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sender → leader, twice a second."""

    tenants: list[list[int]]
    """Of each: sent, finished, refused, failed, cancelled, output tokens."""
    ttfts_s: list[float]
    max_lag_s: float
    cpu_s: float


class Records(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sender → leader, after the run."""

    records: list[Record]


class Done(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sender → leader, last."""

    health: Health


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sender → leader, last: it could not go on."""

    message: str
    is_connection: bool
    """The server could not be reached."""


FromLeader = Plan | Begin | Halt
FromSender = Connected | Progress | Records | Done | Failed
Message = TypeVar("Message")


class Peer(Generic[Message]):
    """One authenticated connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Any) -> None:
        self._reader, self._writer = reader, writer
        self._decoder, self._encoder = msgspec.msgpack.Decoder(received), msgspec.msgpack.Encoder()
        self._frames = FrameReader()

    async def send(self, message: FromLeader | FromSender) -> None:
        """Raises LinkError."""
        try:
            self._writer.write(encode_frame(self._encoder.encode(message)))
            await self._writer.drain()
        except OSError as error:
            raise LinkError(f"sending failed: {error}") from error

    async def receive(self) -> Message:
        """Raises LinkError, also at the end of the stream."""
        while (payload := self._frames.next_payload()) is None:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError as error:
                raise LinkError(f"the connection broke: {error}") from error
            if not data:
                raise LinkError("the connection was closed")
            self._frames.feed(data)
        try:
            message: Message = self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise LinkError(f"a message is not what the protocol allows: {error}") from error
        return message

    @property
    def has_left(self) -> bool:
        """The other end closed the connection, and nothing that it sent is left."""
        return self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> Peer[FromSender]:
    """The leader's side of the handshake. Raises LinkError for a stranger."""
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            hello = await reader.readexactly(HELLO_BYTES)
            parse_hello(hello, MAGIC)
            challenge = make_challenge(secret, hello)
            writer.write(challenge)
            await writer.drain()
            check_answer(secret, hello, challenge, await reader.readexactly(ANSWER_BYTES))
    except (OSError, EOFError, TimeoutError) as error:
        raise LinkError(f"no handshake: {error}") from error
    return Peer(reader, writer, FromSender)


async def join(host: str, port: int, secret: bytes) -> Peer[FromLeader]:
    """The sender's side. Raises LinkError."""
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            hello = make_hello(MAGIC)
            writer.write(hello)
            writer.write(answer_challenge(secret, hello, await reader.readexactly(CHALLENGE_BYTES)))
            await writer.drain()
    except (OSError, EOFError, TimeoutError) as error:
        raise LinkError(f"nobody leads a load test at {host}:{port}: {str(error) or 'no answer in time'}") from error
    return Peer(reader, writer, FromLeader)
