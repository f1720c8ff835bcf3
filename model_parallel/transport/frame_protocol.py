"""Frames on an asyncio transport: length (u32, big-endian) · payload."""

import asyncio
import logging
import socket
import struct
from typing import cast

import msgspec

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20
MAX_BUFFERED_BYTES = 1 << 20
"""When the peer leaves so much unread, the protocol's `pause_writing` is called."""
DEAD_PEER_S = 15
"""Data that is not acknowledged for so long ends the connection."""
_LENGTH = struct.Struct("!I")


class FrameProtocol(asyncio.Protocol):
    """One end of a connection."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, DEAD_PEER_S // 3),
            (socket.TCP_KEEPINTVL, DEAD_PEER_S // 3),
            (socket.TCP_KEEPCNT, 2),
            (socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_S),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            self.take_received(self._received)
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("a connection for outputs is closed: %s", error)
            self.transport.abort()

    def take_received(self, received: bytearray) -> None:
        """Take what is complete away from the front. Raises ValueError and MsgspecError."""
        while len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(received) < end:
                return
            payload = bytes(received[_LENGTH.size : end])
            del received[:end]
            self.take_frame(payload)

    def take_frame(self, payload: bytes) -> None:
        """One whole frame."""
        raise NotImplementedError

    def send_frame(self, payload: bytes) -> None:
        if not self.transport.is_closing():  # Otherwise the other end has gone, and both ends have been told.
            self.transport.write(_LENGTH.pack(len(payload)) + payload)
