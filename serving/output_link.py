"""The way of outputs from the leaders of groups to a gateway: one connection from each, one frame a step for all requests.

Serve carries a request to a group and tells when it has ended. Tokens do not travel through Serve, because an item for each
stream and step costs both sides more than the token (docs/performance.md).

A gateway listens at a port of its own (`OutputReceiver`). The leader of a group connects when the first request of that gateway
comes (`OutputSenders`), and proves itself by the secret that came with the request:

    leader → gateway   MAGIC · secret, and nothing is read before that is right · frame with the id of the group
    leader → gateway   a frame a step: its outputs
    gateway → leader   a frame when a client does not read, or reads again: Hold

Frame: length (u32, big-endian) · payload, msgpack. What a frame holds is a step of one group, so the bound is generous.
"""

import asyncio
import hmac
import logging
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from model_parallel.engine.request import EngineOutput
from serving.async_engine import AsyncEngine
from serving.gateway.backend import GroupUnavailableError

logger = logging.getLogger(__name__)

MAGIC = b"packtout"
SECRET_BYTES = 32
MAX_FRAME_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 5.0
"""A connection that has not proved itself by then is closed."""
MAX_STRANGERS = 32
"""Unproved connections at a time."""
MAX_UNREAD_STEPS = 64
HOLD_AFTER_S = 0.1
"""A request of which so much lies unread for so long is held until all of that is read. An event loop that was busy finds as much
at once, and reads it at once."""
MAX_BUFFERED_BYTES = 1 << 20
"""When a gateway leaves so much on the way, all that runs for it is held."""
LATE_S = 10.0
"""How long the last outputs of a request may take after the word that it has ended, which travels another way."""
DEAD_PEER_S = 15
"""Data that is not acknowledged for so long ends the connection."""
_LENGTH = struct.Struct("!I")

Outputs = tuple[EngineOutput, ...]


class ReturnAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the outputs of a request are wanted."""

    host: str
    port: int
    secret: bytes


class Hold(msgspec.Struct, frozen=True, array_like=True):
    """Compute no more of these requests while they are held."""

    request_ids: tuple[str, ...]
    is_held: bool


class _Frames(asyncio.Protocol):
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
        self.transport.write(_LENGTH.pack(len(payload)) + payload)


# The gateway's side.


class Inbox:
    """Where the outputs of one client request arrive."""

    def __init__(self, receiver: "OutputReceiver", request_ids: Sequence[str]) -> None:
        self.engine = ""
        """Id of the group that runs it, known from its first output on."""
        self._receiver = receiver
        self._request_ids = tuple(request_ids)
        self._unread: deque[Outputs] = deque()
        self._arrived = asyncio.Event()
        self._connection: _FromLeader | None = None
        self._is_held = False
        self._has_ended = False
        self._error: Exception | None = None

    async def next(self) -> Outputs:
        """What has come since, whole steps. Who asks has done with what came before.

        Raises what `end` was told, and GroupUnavailableError when the last outputs do not come.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            self._hold(False)
            try:
                async with asyncio.timeout(LATE_S if self._has_ended else None):
                    await self._arrived.wait()
            except TimeoutError as error:
                raise GroupUnavailableError("the replica group's last outputs were lost") from error
        outputs = tuple(output for step in self._unread for output in step)
        self._unread.clear()
        return outputs

    def put(self, outputs: Outputs, connection: "_FromLeader") -> None:
        """One step's, of this request."""
        self.engine, self._connection = connection.engine, connection
        self._unread.append(outputs)
        self._arrived.set()
        if len(self._unread) == MAX_UNREAD_STEPS:
            asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._hold_if_unread)

    def end(self, error: Exception | None) -> None:
        """The group does no more for this request. Without an error all outputs have been sent."""
        self._has_ended, self._error = True, error
        self._arrived.set()

    def close(self) -> None:
        """Nobody reads any more."""
        self._receiver.forget(self._request_ids)

    def _hold_if_unread(self) -> None:
        if len(self._unread) >= MAX_UNREAD_STEPS:
            self._hold(True)

    def _hold(self, is_held: bool) -> None:
        if self._connection is not None and is_held != self._is_held:
            self._is_held = is_held
            self._connection.send_frame(msgspec.msgpack.encode(Hold(self._request_ids, is_held)))


class OutputReceiver:
    """A gateway's end of all connections. One start, one stop."""

    def __init__(self) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.connections: set[_FromLeader] = set()
        self._inboxes: dict[str, Inbox] = {}
        self._server: asyncio.Server | None = None
        self._address: ReturnAddress | None = None

    @property
    def address(self) -> ReturnAddress:
        """Where groups send to."""
        if self._address is None:
            raise RuntimeError("the receiver of outputs has not started")
        return self._address

    async def start(self, host: str) -> None:
        """Listen at a free port of `host`, an address of this machine that the leaders can reach."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _FromLeader(self), host, 0)
        self._address = ReturnAddress(host, self._server.sockets[0].getsockname()[1], self.secret)

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            self._server.close()
            for connection in list(self.connections):
                connection.transport.abort()
            await self._server.wait_closed()

    def open(self, request_ids: Sequence[str]) -> Inbox:
        """The inbox of a request that is about to be sent."""
        inbox = Inbox(self, request_ids)
        self._inboxes.update(dict.fromkeys(request_ids, inbox))
        return inbox

    def forget(self, request_ids: Sequence[str]) -> None:
        """Outputs that still come for these are dropped."""
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)

    def take(self, outputs: Outputs, connection: "_FromLeader") -> None:
        """One step of a group."""
        by_inbox: dict[Inbox, list[EngineOutput]] = {}
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:  # Otherwise the client has gone, and the group will hear of it.
                by_inbox.setdefault(inbox, []).append(output)
        for inbox, belonging in by_inbox.items():
            inbox.put(tuple(belonging), connection)


class _FromLeader(_Frames):
    """A connection that somebody has made to a gateway."""

    def __init__(self, receiver: OutputReceiver) -> None:
        super().__init__()
        self.engine = ""
        """Id of the group; empty until it has told."""
        self._receiver = receiver
        self._is_proved = False
        self._decode = msgspec.msgpack.Decoder(Outputs).decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connections = self._receiver.connections
        connections.add(self)
        if sum(not connection.engine for connection in connections) > MAX_STRANGERS:
            self.transport.abort()
        asyncio.get_running_loop().call_later(CONNECT_TIMEOUT_S, self._check_proved)

    def connection_lost(self, error: Exception | None) -> None:
        self._receiver.connections.discard(self)

    def take_received(self, received: bytearray) -> None:
        if not self._is_proved:
            proof = MAGIC + self._receiver.secret
            if len(received) < len(proof):
                return
            if not hmac.compare_digest(bytes(received[: len(proof)]), proof):
                raise ValueError("it does not know the secret")
            del received[: len(proof)]
            self._is_proved = True
        super().take_received(received)

    def take_frame(self, payload: bytes) -> None:
        if not self.engine:
            self.engine = msgspec.msgpack.decode(payload, type=str)
        else:
            self._receiver.take(self._decode(payload), self)

    def _check_proved(self) -> None:
        if not self.engine and not self.transport.is_closing():
            logger.warning(
                "a connection for outputs is closed: it has not proved itself within %g s", CONNECT_TIMEOUT_S
            )
            self.transport.abort()


# The leader's side.


class ToGateway(_Frames):
    """A leader's connection to one gateway: the sink of the outputs of that gateway's requests."""

    def __init__(self, engine: AsyncEngine, on_lost: Callable[[], Any]) -> None:
        super().__init__()
        self._engine = engine
        self._on_lost = on_lost
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Hold).decode

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        """One step's outputs for this gateway."""
        self.send_frame(self._encode(outputs))

    def take_frame(self, payload: bytes) -> None:
        hold = self._decode(payload)
        self._engine.hold(hold.request_ids, is_held=hold.is_held)

    def pause_writing(self) -> None:
        self._engine.hold_all(self, is_held=True)

    def resume_writing(self) -> None:
        self._engine.hold_all(self, is_held=False)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
        self._engine.drop(self)


class OutputSenders:
    """A leader's connections, one to each gateway that has sent it a request."""

    def __init__(self, engine_id: str, engine: AsyncEngine) -> None:
        self._engine_id = engine_id
        self._engine = engine
        self._connections: dict[ReturnAddress, asyncio.Task[ToGateway]] = {}

    async def to(self, address: ReturnAddress) -> ToGateway:
        """The connection to a gateway, made if there is none. Raises OSError and TimeoutError."""
        if address not in self._connections:
            self._connections[address] = asyncio.create_task(self._connect(address))
        # Several requests may wait for it, and a client that leaves ends its own alone.
        connection = await asyncio.shield(self._connections[address])
        if connection.transport.is_closing():
            raise ConnectionResetError("the gateway has closed its connection")
        return connection

    async def _connect(self, address: ReturnAddress) -> ToGateway:
        def forget() -> None:
            self._connections.pop(address, None)

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ToGateway(self._engine, forget), address.host, address.port
                )
        except BaseException:
            forget()
            raise
        connection.transport.write(MAGIC + address.secret)
        connection.send_frame(msgspec.msgpack.encode(self._engine_id))
        return connection

    def close(self) -> None:
        """Close all."""
        for task in list(self._connections.values()):
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().transport.close()
            else:
                task.cancel()
