"""The gateway's end of the link to replica groups: one connection from each group, with a frame a step for all requests.

Serve carries a request to a group and tells whether the group has accepted it. Outputs travel here, because an item for each
stream and step costs both sides of Serve more than the token, and a call that is held open 40 KiB (docs/performance.md).

A gateway listens at a port of its own. The leader of a group connects when the first request of that gateway comes
(`serving.replica.output_sender`); the secret for the handshake came with the request. Its first frame is the id of the group,
every later one a GroupUpdate, at least one each HEARTBEAT_S. The other way go Commands. A connection that is lost ends the
requests that went over it, at both ends. One that says nothing for SILENT_AFTER_S belongs to a leader that hangs: it is closed,
and its requests go elsewhere. What such a leader sends when it goes on is lost with the connection; and outputs of a request
count only over the connection of the group that has accepted it.
"""

import asyncio
import enum
import logging
import secrets
from collections import deque
from collections.abc import Sequence

import msgspec

from model_parallel.engine.request import EngineOutput
from model_parallel.transport.authentication import SECRET_BYTES
from model_parallel.transport.frame_protocol import AcceptingProtocol
from serving.contracts.errors import GroupCallLostError, GroupSilentError, GroupUnavailableError
from serving.contracts.group_link import HEARTBEAT_S, MAGIC, Command, GroupOutputs, GroupUpdate, Outputs, ReturnAddress
from serving.gateway.groups.loads import AVOIDED_WHEN_LOST_S, AVOIDED_WHEN_SILENT_S, GroupLoads, prompt_load

logger = logging.getLogger(__name__)

MAX_UNAUTHENTICATED = 32
"""Connections in their handshake at a time."""
SILENT_AFTER_S = 2.0
"""Counted in looks of HEARTBEAT_S, so that a gateway that was held up itself blames nobody."""
UNANSWERED_AFTER_S = 2.0
"""While a group is silent, a request that none has answered for so long is taken to have gone to that one."""
MAX_UNREAD_STEPS = 64
PAUSE_AFTER_TURNS = 10
"""A request with so many unread steps is paused when its reader has not come in so many turns of the event loop. A loop that was
busy finds as much at once, and its readers take it within a turn or two."""


class _State(enum.Enum):
    SUBMITTED = enum.auto()
    """On its way to a group."""
    ACCEPTED = enum.auto()
    """A group runs it; its connection is there."""
    CLOSED = enum.auto()
    """Nobody reads any more."""


class Inbox:
    """Where the outputs of one client request arrive: SUBMITTED, then ACCEPTED, then CLOSED.

    `next` and `close` are called by the reader, all else by the receiver and by the call that submits the request.
    """

    def __init__(self, receiver: "OutputReceiver", request_ids: Sequence[str], num_prompt_tokens: int) -> None:
        self._request_ids = tuple(request_ids)
        self._prompt_load = prompt_load(num_prompt_tokens)
        """What its prompt adds to the load of its group; 0 when it is computed."""
        self._first_look = receiver.num_looks
        self._receiver = receiver
        self._state = _State.SUBMITTED
        self._connection: GroupConnection | None = None
        self._unread: deque[Outputs] = deque()
        self._arrived = asyncio.Event()
        self._is_paused = False
        self._error: Exception | None = None

    async def next(self) -> GroupOutputs:
        """All that has come since the last call, whole steps; the first time without outputs, when a group has accepted.

        Whoever calls has dealt with what came before. Raises what `fail` was given, after all that came before it.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            self._set_paused(False)
            await self._arrived.wait()
        outputs = tuple(output for step in self._unread for output in step)
        self._unread.clear()
        assert self._connection is not None, "outputs come over a connection"
        return GroupOutputs(self._connection.engine, outputs)

    def accepted(self, connection: "GroupConnection | None") -> None:
        """A group has accepted the request; `connection` is the group's, None when it is lost already."""
        if self._state is not _State.SUBMITTED:
            return
        if connection is None:
            self.fail(GroupCallLostError("the connection to the replica group was lost"))
            return
        self._state = _State.ACCEPTED
        self._connection = connection
        self._receiver.loads.begin(connection.engine, len(self._request_ids))
        self._receiver.loads.prompt_begins(connection.engine, self._prompt_load)
        self._add(())

    def put(self, outputs: Outputs, connection: "GroupConnection") -> None:
        """One step's outputs of this request, which `takes_from` that group. They may overtake the reply that it has accepted."""
        self.accepted(connection)
        self._end_prompt()
        self._add(outputs)

    def takes_from(self, connection: "GroupConnection") -> bool:
        """Whether the group of this connection runs the request, or may turn out to."""
        return self._state is _State.SUBMITTED or self._connection is connection

    @property
    def is_unanswered(self) -> bool:
        """No group has said for a while whether it accepts the request."""
        num_looks = self._receiver.num_looks - self._first_look
        return self._state is _State.SUBMITTED and num_looks * HEARTBEAT_S >= UNANSWERED_AFTER_S

    @property
    def is_waiting(self) -> bool:
        """No group has accepted the request yet."""
        return self._state is _State.SUBMITTED

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error = error
        self._arrived.set()

    def runs_over(self, connection: "GroupConnection") -> bool:
        """Its outputs come over this connection."""
        return self._connection is connection

    def close(self, *, cancel: bool) -> None:
        """Nobody reads any more; with `cancel` the request has not ended, and shall."""
        state, self._state = self._state, _State.CLOSED
        self._receiver.forget(self._request_ids)
        command = Command(self._request_ids, "cancel")
        if self._connection is not None:
            self._end_prompt()
            self._receiver.loads.end(self._connection.engine, len(self._request_ids))
            if cancel:
                self._connection.send(command)
        elif cancel and state is _State.SUBMITTED:
            self._receiver.send_to_all(command)

    def _end_prompt(self) -> None:
        """It is computed, or will never be."""
        if self._connection is not None:
            self._receiver.loads.prompt_ends(self._connection.engine, self._prompt_load)
            self._prompt_load = 0

    def _add(self, outputs: Outputs) -> None:
        self._unread.append(outputs)
        self._arrived.set()
        if len(self._unread) == MAX_UNREAD_STEPS:
            self._pause_unless_read(PAUSE_AFTER_TURNS)

    def _pause_unless_read(self, num_turns: int) -> None:
        if len(self._unread) < MAX_UNREAD_STEPS or self._state is _State.CLOSED:
            return
        if num_turns:
            asyncio.get_running_loop().call_soon(self._pause_unless_read, num_turns - 1)
        else:
            self._set_paused(True)

    def _set_paused(self, is_paused: bool) -> None:
        if self._connection is not None and is_paused != self._is_paused:
            self._is_paused = is_paused
            self._connection.send(Command(self._request_ids, "pause" if is_paused else "resume"))


class OutputReceiver:
    """A gateway's end of all connections. One start, one stop."""

    def __init__(self, loads: GroupLoads) -> None:
        """`loads` is kept up to date."""
        self.loads = loads
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.connections: set[GroupConnection] = set()
        self.num_looks = 0
        """How often it was looked which groups are silent: every HEARTBEAT_S."""
        self._last_distrustful_look = 0
        """Until then some group may be silent that Serve still sends requests to."""
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
        self._server = await loop.create_server(lambda: GroupConnection(self), host, 0)
        self._address = ReturnAddress(host, self._server.sockets[0].getsockname()[1], self.secret)
        self._next_look = loop.call_later(HEARTBEAT_S, self._look)

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            self._next_look.cancel()
            self._server.close()
            for connection in list(self.connections):
                connection.transport.abort()
            await self._server.wait_closed()

    def open(self, request_ids: Sequence[str], num_prompt_tokens: int = 0) -> Inbox:
        """The inbox of a request that is about to be sent. Its choices have one prompt, of so many tokens."""
        inbox = Inbox(self, request_ids, num_prompt_tokens)
        self._inboxes.update(dict.fromkeys(request_ids, inbox))
        return inbox

    def forget(self, request_ids: Sequence[str]) -> None:
        """Outputs that still come for these are dropped."""
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)

    def connection_of(self, engine: str) -> "GroupConnection | None":
        """The one from this group, if there is one."""
        of_engine = (connection for connection in self.connections if connection.engine == engine)
        return next((connection for connection in of_engine if not connection.transport.is_closing()), None)

    def send_to_all(self, command: Command) -> None:
        """To every group: one of them may have the requests, and it is not known which."""
        for connection in self.connections:
            if connection.engine:
                connection.send(command)

    def take(self, outputs: Outputs, connection: "GroupConnection") -> None:
        """One step of a group."""
        by_inbox: dict[Inbox, list[EngineOutput]] = {}
        unwanted: list[str] = []
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None and inbox.takes_from(connection):
                by_inbox.setdefault(inbox, []).append(output)
            elif output.finish_reason is None:
                unwanted.append(output.request_id)
        for inbox, belonging in by_inbox.items():
            inbox.put(tuple(belonging), connection)
        if (
            unwanted
        ):  # Their clients have gone, or another group runs them; the group was not told, or had not begun when it was.
            connection.send(Command(tuple(unwanted), "cancel"))

    def _look(self) -> None:
        """Give up the groups that have been silent for too long, and look again after a while."""
        self.num_looks += 1
        for connection in [connection for connection in self.connections if connection.engine]:
            connection.num_silent_looks += 1
            if connection.num_silent_looks * HEARTBEAT_S > SILENT_AFTER_S:
                self._give_up(connection)
        if self.num_looks <= self._last_distrustful_look:
            for inbox in {inbox for inbox in self._inboxes.values() if inbox.is_unanswered}:
                inbox.fail(GroupSilentError("the replica group that was asked does not answer"))
        self._next_look = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._look)

    def _give_up(self, connection: "GroupConnection") -> None:
        """The group is silent: what it runs goes elsewhere, and so does from now on what it does not answer."""
        logger.warning("the replica group %s has said nothing for %g s", connection.engine, SILENT_AFTER_S)
        self.loads.refused(connection.engine, AVOIDED_WHEN_SILENT_S)
        connection.transport.abort()
        self._last_distrustful_look = self.num_looks + int(AVOIDED_WHEN_SILENT_S / HEARTBEAT_S)

    def lose(self, connection: "GroupConnection") -> None:
        """The requests that ran over it get nothing more."""
        self.connections.discard(connection)
        self.loads.forget(connection.engine)
        self.loads.refused(connection.engine, AVOIDED_WHEN_LOST_S)  # so that what it ran goes elsewhere
        for inbox in {inbox for inbox in self._inboxes.values() if inbox.runs_over(connection)}:
            inbox.fail(GroupUnavailableError("the replica group was lost"))


class GroupConnection(AcceptingProtocol):
    """A connection that somebody has made to a gateway; a group's, once it is authenticated."""

    def __init__(self, receiver: OutputReceiver) -> None:
        super().__init__(MAGIC, receiver.secret)
        self.engine = ""
        """Id of the group; empty until it has told."""
        self.num_silent_looks = 0
        """Since the last frame."""
        self._receiver = receiver
        self._decode = msgspec.msgpack.Decoder(GroupUpdate).decode

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connections = self._receiver.connections
        connections.add(self)
        if sum(not connection.is_authenticated for connection in connections) > MAX_UNAUTHENTICATED:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._receiver.lose(self)

    def frame_received(self, payload: bytes) -> None:
        self.num_silent_looks = 0
        if self.engine:
            update = self._decode(payload)
            self._receiver.loads.tell(self.engine, update.num_elsewhere)
            self._receiver.take(update.outputs, self)
            return
        engine = msgspec.msgpack.decode(payload, type=str)
        former = self._receiver.connection_of(engine)
        if former is not None:  # The group has lost it.
            former.transport.abort()
        self.engine = engine

    def send(self, command: Command) -> None:
        """To the group."""
        self.send_frame(msgspec.msgpack.encode(command))
