"""Authenticated frames on an asyncio transport."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

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
from model_parallel.transport.sockets import detect_dead_peer

logger = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 1 << 20
"""When the peer leaves so much unread, `pause_writing` is called."""


class FrameProtocol(asyncio.Protocol):
    """One end of a connection. Subclasses take whole frames, once both ends are authenticated."""

    transport: asyncio.Transport
    is_authenticated = False

    def __init__(self, magic: bytes, secret: bytes) -> None:
        self._magic, self._secret = magic, secret
        self._reader = FrameReader()
        self._num_expected = 0
        """Bytes of the handshake's next message."""
        self._take_message: Callable[[bytes], None] = self.frame_received

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        detect_dead_peer(transport.get_extra_info("socket"))
        asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._check_authenticated)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while not self.transport.is_closing():
                message = (
                    self._reader.next_payload() if self.is_authenticated else self._reader.take(self._num_expected)
                )
                if message is None:
                    return
                self._take_message(message)
        except (LinkError, msgspec.MsgspecError) as error:
            logger.warning("a connection is closed: %s", error)
            self.transport.abort()

    def authenticated(self) -> None:
        """The peer knows the secret; frames may be sent."""

    def frame_received(self, payload: bytes) -> None:
        """One whole frame. Raises LinkError, MsgspecError for what the protocol does not allow."""
        raise NotImplementedError

    def send_frame(self, payload: bytes) -> None:
        """Nothing happens when the connection is closing: both ends have been told."""
        if not self.transport.is_closing():
            self.transport.write(encode_frame(payload))

    def expect(self, num_bytes: int, take: Callable[[bytes], None]) -> None:
        """The handshake's next message has so many bytes."""
        self._num_expected, self._take_message = num_bytes, take

    def finish_handshake(self) -> None:
        """From now on frames come."""
        self.is_authenticated, self._take_message = True, self.frame_received
        self.authenticated()

    def _check_authenticated(self) -> None:
        if not self.is_authenticated and not self.transport.is_closing():
            logger.warning("a connection is closed: it is not authenticated after %g s", HANDSHAKE_TIMEOUT_S)
            self.transport.abort()


class AcceptingProtocol(FrameProtocol):
    """The end that listens."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.expect(HELLO_BYTES, self._hello_received)

    def _hello_received(self, hello: bytes) -> None:
        parse_hello(hello, self._magic)
        challenge = make_challenge(self._secret, hello)
        self.transport.write(challenge)

        def answer_received(answer: bytes) -> None:
            check_answer(self._secret, hello, challenge, answer)
            self.finish_handshake()

        self.expect(ANSWER_BYTES, answer_received)


class ConnectingProtocol(FrameProtocol):
    """The end that connects."""

    def __init__(self, magic: bytes, secret: bytes) -> None:
        super().__init__(magic, secret)
        self._established: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def established(self) -> None:
        """Wait until both ends are authenticated. Raises ConnectionResetError when the connection is lost first."""
        await self._established

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        hello = make_hello(self._magic)
        self.transport.write(hello)

        def challenge_received(challenge: bytes) -> None:
            self.transport.write(answer_challenge(self._secret, hello, challenge))
            self.finish_handshake()

        self.expect(CHALLENGE_BYTES, challenge_received)

    def authenticated(self) -> None:
        if not self._established.done():
            self._established.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._established.done():
            self._established.set_exception(ConnectionResetError("the peer closed the connection during the handshake"))
