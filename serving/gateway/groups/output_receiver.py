"""The way between the leaders of groups and a gateway: one connection each, with a frame a step for all requests.

Serve carries a request to a group and tells whether the group has taken it in. All that follows travels here, because an item for
each stream and step costs both sides of Serve more than the token, and a call that is held open 40 KiB (docs/performance.md).

A gateway listens at a port of its own (`OutputReceiver`). The leader of a group connects when the first request of that gateway
comes (`OutputSenders`), and proves itself by the secret that came with the request:

    leader → gateway   MAGIC · secret, and nothing is read before that is right · frame with the id of the group
    leader → gateway   a frame a step: Step
    gateway → leader   a frame when a client has gone, or does not read, or reads again: Order

Frame: length (u32, big-endian) · payload, msgpack. What a frame holds is a step of one group, so the bound is generous.
A connection that is lost ends the requests that went over it, at both ends.
"""

import asyncio
import hmac
import logging
import secrets
from collections import deque
from collections.abc import Sequence

import msgspec

from model_parallel.engine.request import EngineOutput
from model_parallel.transport.frame_protocol import FrameProtocol
from serving.contracts.errors import GroupUnavailableError
from serving.contracts.group_link import CONNECT_TIMEOUT_S, MAGIC, SECRET_BYTES, Order, Outputs, ReturnAddress, Step
from serving.gateway.groups.loads import GroupLoads

logger = logging.getLogger(__name__)

MAX_STRANGERS = 32
"""Unproved connections at a time."""
MAX_UNREAD_STEPS = 64
HOLD_AFTER_S = 0.1
"""A request of which so much lies unread for so long is held until all of that is read. An event loop that was busy finds as much
at once, and reads it at once."""
LATE_S = 10.0
"""How long the connection of a group may take after the word that it has taken a request in, which travels another way."""


class Inbox:
    """Where the outputs of one client request arrive."""

    def __init__(self, receiver: "OutputReceiver", request_ids: Sequence[str]) -> None:
        self.engine = ""
        """Id of the group that runs it, known from the word that it has taken it in or from its first output."""
        self._request_ids = tuple(request_ids)
        self.connection: _FromLeader | None = None
        self._receiver = receiver
        self._unread: deque[Outputs] = deque()
        self._arrived = asyncio.Event()
        self._is_accepted = False
        self._is_held = False
        self._is_closed = False
        self._error: Exception | None = None

    async def next(self) -> Outputs:
        """What has come since, whole steps. Who asks has done with what came before. Raises what `fail` was told."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            self._hold(False)
            await self._arrived.wait()
        outputs = tuple(output for step in self._unread for output in step)
        self._unread.clear()
        return outputs

    def accepted(self, engine: str) -> None:
        """A group has taken the request in; its connection is there, or will be within LATE_S."""
        self.engine = engine
        if self._is_closed:
            self._receiver.order(engine, Order(self._request_ids, "cancel"))
            return
        self._is_accepted = True
        self._receiver.loads.begin(engine, len(self._request_ids))
        self.connection = self._receiver.connection_of(engine)
        if self.connection is None:
            asyncio.get_running_loop().call_later(LATE_S, self._check_connected)

    def put(self, outputs: Outputs, connection: "_FromLeader") -> None:
        """One step's, of this request."""
        self.engine, self.connection = connection.engine, connection
        self._unread.append(outputs)
        self._arrived.set()
        if len(self._unread) == MAX_UNREAD_STEPS:
            asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._hold_if_unread)

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error = error
        self._arrived.set()

    def close(self, *, cancel: bool) -> None:
        """Nobody reads any more; with `cancel` the request has not ended, and shall."""
        self._is_closed = True
        self._receiver.forget(self._request_ids)
        if self._is_accepted:
            self._receiver.loads.end(self.engine, len(self._request_ids))
        if cancel and self.connection is not None:
            self.connection.send_order(Order(self._request_ids, "cancel"))

    def _check_connected(self) -> None:
        if self.connection is None:
            self.fail(GroupUnavailableError("the connection to the replica group was lost"))

    def _hold_if_unread(self) -> None:
        if len(self._unread) >= MAX_UNREAD_STEPS:
            self._hold(True)

    def _hold(self, is_held: bool) -> None:
        if self.connection is not None and is_held != self._is_held:
            self._is_held = is_held
            self.connection.send_order(Order(self._request_ids, "hold" if is_held else "resume"))


class OutputReceiver:
    """A gateway's end of all connections. One start, one stop."""

    def __init__(self, loads: GroupLoads) -> None:
        """`loads` is kept up to date."""
        self.loads = loads
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

    def connection_of(self, engine: str) -> "_FromLeader | None":
        """The one from this group, if there is one."""
        of_engine = (connection for connection in self.connections if connection.engine == engine)
        return next((connection for connection in of_engine if not connection.transport.is_closing()), None)

    def order(self, engine: str, order: Order) -> None:
        """Send it to a group, unless that is lost."""
        connection = self.connection_of(engine)
        if connection is not None:
            connection.send_order(order)

    def take(self, outputs: Outputs, connection: "_FromLeader") -> None:
        """One step of a group."""
        by_inbox: dict[Inbox, list[EngineOutput]] = {}
        unwanted: list[str] = []
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                by_inbox.setdefault(inbox, []).append(output)
            elif output.finish_reason is None:
                unwanted.append(output.request_id)
        for inbox, belonging in by_inbox.items():
            inbox.put(tuple(belonging), connection)
        if unwanted:  # Their clients have gone, and the group has not heard of it yet or was not known then.
            connection.send_order(Order(tuple(unwanted), "cancel"))

    def lose(self, connection: "_FromLeader") -> None:
        """What ran over it has no end."""
        self.connections.discard(connection)
        self.loads.forget(connection.engine)
        for inbox in {inbox for inbox in self._inboxes.values() if inbox.connection is connection}:
            inbox.fail(GroupUnavailableError("the replica group was lost"))


class _FromLeader(FrameProtocol):
    """A connection that somebody has made to a gateway."""

    def __init__(self, receiver: OutputReceiver) -> None:
        super().__init__()
        self.engine = ""
        """Id of the group; empty until it has told."""
        self._receiver = receiver
        self._is_proved = False
        self._decode = msgspec.msgpack.Decoder(Step).decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connections = self._receiver.connections
        connections.add(self)
        if sum(not connection.engine for connection in connections) > MAX_STRANGERS:
            self.transport.abort()
        asyncio.get_running_loop().call_later(CONNECT_TIMEOUT_S, self._check_proved)

    def connection_lost(self, error: Exception | None) -> None:
        self._receiver.lose(self)

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
            engine = msgspec.msgpack.decode(payload, type=str)
            former = self._receiver.connection_of(engine)
            if former is not None:  # The group has lost it.
                former.transport.abort()
            self.engine = engine
        else:
            step = self._decode(payload)
            self._receiver.loads.tell(self.engine, step.num_elsewhere)
            self._receiver.take(step.outputs, self)

    def send_order(self, order: Order) -> None:
        """To the group."""
        self.send_frame(msgspec.msgpack.encode(order))

    def _check_proved(self) -> None:
        if not self.engine and not self.transport.is_closing():
            logger.warning(
                "a connection for outputs is closed: it has not proved itself within %g s", CONNECT_TIMEOUT_S
            )
            self.transport.abort()
