"""The wire between a leader and its ranks: one TCP connection a rank, mutually authenticated, then frames of msgpack.

The rank connects. Its hello carries the group's epoch and its rank (see `model_parallel.transport.authentication`).
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import GroupConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.errors import ConfigError
from model_parallel.transport.authentication import (
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    HANDSHAKE_TIMEOUT_S,
    HELLO_BYTES,
    SECRET_BYTES,
    answer_challenge,
    check_answer,
    make_challenge,
    make_hello,
    parse_hello,
)
from model_parallel.transport.frames import FrameReader, LinkError, encode_frame
from model_parallel.transport.sockets import detect_dead_peer, send_at_once

MAGIC = b"packtrn1"
_MAX_UNAUTHENTICATED = 32
"""Connections in their handshake at a time, beyond one for each rank."""
_POLL_S = 0.02
_RECEIVE_BYTES = 1 << 18


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must be told before it can reach its leader."""

    host: str
    port: int
    secret: bytes
    epoch: int
    rank: int
    rank_class: str
    """Factory of the rank, as "package.module:Class"."""
    life_path: str = ""
    """Of the leader's LifeLocks, for a rank on its host."""


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → rank, first: load this."""

    config: GroupConfig
    rendezvous: Rendezvous


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → rank."""

    plan: StepPlan


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leader → rank, last: end in good order."""


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank → leader while it loads."""

    done_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank → leader: loaded, waiting for steps."""

    pid: int
    kernels: str
    """Name of the backend that it computes with."""
    deterministic: bool
    """A row's bits do not depend on the rest of the step."""


class Result(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank 0 → leader after each step."""

    result: StepResult


class Ack(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Every other rank → leader after each step."""

    epoch: int
    step_id: int


class Moved(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank → leader, in a long step: some more of it is done."""

    step_id: int
    is_compiling: bool
    """What it does now can take long, and nothing of it can be counted."""


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank → leader, last: it cannot go on."""

    kind: str
    """Name of the exception's class."""
    message: str


LeaderMessage = Start | Step | Stop
RankMessage = Progress | Ready | Result | Ack | Moved | Failed


Received = TypeVar("Received")


class Connection(Generic[Received]):
    """One end of an authenticated link. Sending and receiving may be done by two threads; each by one at a time."""

    def __init__(self, sock: socket.socket, received: Any) -> None:
        """`received` is the union of message types that the peer may send."""
        self.sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(received)
        self._reader = FrameReader()

    def encode(self, message: LeaderMessage | RankMessage) -> bytes:
        return encode_frame(self._encoder.encode(message))

    def send(self, message: LeaderMessage | RankMessage) -> None:
        self.send_frame(self.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """For a message that is encoded once and sent to many. Raises LinkError; TimeoutError as set on the socket."""
        try:
            self.sock.sendall(frame)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkError(f"sending failed: {error.strerror}") from error

    def receive(self, timeout_s: float | None = None) -> Received:
        """The next message. Raises LinkError, and TimeoutError when it is not whole by then; None waits for ever."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self.receive_buffered()) is None:
            if deadline is not None:
                self.sock.settimeout(max(deadline - time.monotonic(), 1e-6))
            self.read_once()
        return message

    def receive_buffered(self) -> Received | None:
        """The next message among the bytes that have been read already. Raises LinkError."""
        payload = self._reader.next_payload()
        if payload is None:
            return None
        try:
            message: Received = self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise LinkError(f"a message is not what the protocol allows: {error}") from error
        return message

    def read_once(self) -> None:
        """Read what has come; waits as set on the socket. Raises LinkError at the end of the stream."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkError(f"the connection broke: {error.strerror}") from error
        if not data:
            raise LinkError("the connection was closed")
        self._reader.feed(data)

    def shutdown(self) -> None:
        """End both directions at once, which wakes every thread on either side. Safe to call twice."""
        _shutdown(self.sock)

    def close(self) -> None:
        self.sock.close()


class Listener:
    """Takes the connections of a group's ranks, on one address, for as long as the group is being started."""

    def __init__(self, host: str, *, secret: bytes, epoch: int, num_ranks: int) -> None:
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"the secret of a group has {len(secret)} bytes; it must have {SECRET_BYTES}")
        self._secret, self._epoch, self._num_ranks = secret, epoch, num_ranks
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, 0), family=family, backlog=num_ranks + _MAX_UNAUTHENTICATED)
        self._sock.setblocking(False)
        self.host = host
        self.port: int = self._sock.getsockname()[1]

    def accept_all(self, timeout_s: float, check: Callable[[], None]) -> list[Connection[RankMessage]]:
        """Connections by rank, once every rank has one.

        `check` is called many times a second and may raise to give up. Raises TimeoutError naming the absent ranks.
        A connection that is not authenticated, or of another epoch, is closed and otherwise ignored. No handshake goes on when
        this returns.
        """
        deadline = time.monotonic() + timeout_s
        gate = _Gate()
        handshakes: dict[threading.Thread, socket.socket] = {}
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)

        def authenticate(sock: socket.socket) -> None:
            gate.admit(_authenticate_rank(sock, self._secret, self._epoch, self._num_ranks), sock)

        try:
            while len(gate.found) < self._num_ranks:
                check()
                if time.monotonic() > deadline:
                    absent = sorted(set(range(self._num_ranks)) - set(gate.found))
                    raise TimeoutError(f"ranks {absent} did not connect within {timeout_s:g} s")
                if not poller.poll(_POLL_S * 1e3):
                    continue
                handshakes = {thread: sock for thread, sock in handshakes.items() if thread.is_alive()}
                if len(handshakes) == self._num_ranks + _MAX_UNAUTHENTICATED:
                    time.sleep(_POLL_S)
                    continue
                try:
                    sock, _ = self._sock.accept()
                except (BlockingIOError, ConnectionAbortedError):  # it went away while it waited
                    continue
                thread = threading.Thread(target=authenticate, args=(sock,), name="packtrain-handshake", daemon=True)
                handshakes[thread] = sock
                thread.start()
        except BaseException:
            for sock in gate.shut().values():
                sock.close()
            raise
        finally:
            self.close()
            admitted = gate.shut().values()
            for thread, sock in handshakes.items():
                if sock not in admitted:
                    _shutdown(sock)  # wakes its thread, which closes it
                thread.join(HANDSHAKE_TIMEOUT_S)
        return [Connection(sock, RankMessage) for _, sock in sorted(gate.shut().items())]

    def close(self) -> None:
        self._sock.close()


class _Gate:
    """Sockets by authenticated rank; the first of each rank is kept until the gate is shut, all others are closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True
        self.found: dict[int, socket.socket] = {}

    def admit(self, rank: int | None, sock: socket.socket) -> None:
        with self._lock:
            if self._open and rank is not None and rank not in self.found:
                self.found[rank] = sock
            else:
                sock.close()

    def shut(self) -> dict[int, socket.socket]:
        with self._lock:
            self._open = False
            return self.found


def connect(
    host: str, port: int, *, secret: bytes, epoch: int, rank: int, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Connection[LeaderMessage]:
    """A rank's connection to its leader. Raises LinkError when the leader does not know the secret."""
    deadline = time.monotonic() + timeout_s
    hello = make_hello(MAGIC, epoch=epoch, number=rank)
    try:
        sock = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise LinkError(f"cannot reach the leader at {host}:{port}: {error}") from error
    try:
        sock.sendall(hello)
        sock.sendall(answer_challenge(secret, hello, _read_exactly(sock, CHALLENGE_BYTES, deadline)))
    except (LinkError, OSError) as error:
        sock.close()
        raise LinkError(f"the leader at {host}:{port} refused rank {rank}: {error}") from error
    _configure(sock)
    sock.settimeout(None)
    return Connection(sock, LeaderMessage)


def _authenticate_rank(sock: socket.socket, secret: bytes, epoch: int, num_ranks: int) -> int | None:
    """The rank at the other end, or None when it is not authenticated."""
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    try:
        hello = _read_exactly(sock, HELLO_BYTES, deadline)
        claimed = parse_hello(hello, MAGIC)
        if claimed.epoch != epoch or claimed.number >= num_ranks:
            return None
        challenge = make_challenge(secret, hello)
        sock.sendall(challenge)
        check_answer(secret, hello, challenge, _read_exactly(sock, ANSWER_BYTES, deadline))
        _configure(sock)
    except (LinkError, OSError):
        return None
    return claimed.number


def _read_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        sock.settimeout(max(deadline - time.monotonic(), 1e-6))
        part = sock.recv(num_bytes - len(data))
        if not part:
            raise LinkError("the connection was closed during the handshake")
        data += part
    return data


def _configure(sock: socket.socket) -> None:
    send_at_once(sock)
    detect_dead_peer(sock)


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)
