"""The wire between a leader and its ranks: one TCP connection a rank, mutually authenticated, then framed msgpack.

Handshake (fixed sizes, so that nothing is parsed before both sides have proved that they know the group's secret):

    rank → leader   MAGIC · epoch · rank · nonce_r
    leader → rank   nonce_l · HMAC-SHA256(secret, "leader" · hello · nonce_l)
    rank → leader   HMAC-SHA256(secret, "rank" · hello · nonce_l)

Frame: length (u32) · CRC32 of length and payload (u32) · payload, one msgpack message. Big-endian throughout.
"""

import contextlib
import hmac
import secrets
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import GroupConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.errors import ConfigError

MAGIC = b"packtrn1"
SECRET_BYTES = 32
MAX_FRAME_BYTES = 64 << 20
HANDSHAKE_TIMEOUT_S = 5.0
"""A connection that has not proved itself by then is closed."""
_MAX_STRANGERS = 32
"""Unproved connections that are heard at the same time, beyond one for each rank."""
_POLL_S = 0.02
_HELLO = struct.Struct("!8sQI32s")
_HEADER = struct.Struct("!II")
_NONCE_BYTES = 32
_MAC_BYTES = 32
_RECEIVE_BYTES = 1 << 18


class LinkError(Exception):
    """The peer is gone, sent something that is not a frame, or is not who it must be."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must be told before it can reach its leader."""

    host: str
    port: int
    secret: bytes
    epoch: int
    rank: int
    rank_class: str
    """Factory of the rank, as "package.module:Class"."""


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


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank → leader, last: it cannot go on."""

    kind: str
    """Name of the exception's class."""
    message: str


LeaderMessage = Start | Step | Stop
RankMessage = Progress | Ready | Result | Ack | Failed


def encode_frame(payload: bytes) -> bytes:
    """Raises LinkError for a payload over MAX_FRAME_BYTES."""
    if len(payload) > MAX_FRAME_BYTES:
        raise LinkError(f"a message of {len(payload)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(payload), _checksum(payload)) + payload


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "big")))


class FrameReader:
    """Cuts a byte stream into payloads. After an error the stream is of no use: its borders are lost."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_payload(self) -> bytes | None:
        """The next whole payload, or None until more is fed. Raises LinkError for an oversized or damaged frame."""
        if len(self._buffer) < _HEADER.size:
            return None
        length, checksum = _HEADER.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise LinkError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        if _checksum(payload) != checksum:
            raise LinkError(f"the checksum of a frame of {length} bytes does not match")
        return payload


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

    def sever(self) -> None:
        """End both directions at once, which wakes every thread on either side. Safe to call twice."""
        _sever(self.sock)

    def close(self) -> None:
        self.sock.close()


class Listener:
    """Takes the connections of a group's ranks, on one address, for as long as the group is being started."""

    def __init__(self, host: str, *, secret: bytes, epoch: int, num_ranks: int) -> None:
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"the secret of a group has {len(secret)} bytes; it must have {SECRET_BYTES}")
        self._secret, self._epoch, self._num_ranks = secret, epoch, num_ranks
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, 0), family=family, backlog=num_ranks + _MAX_STRANGERS)
        self._sock.setblocking(False)
        self.host = host
        self.port: int = self._sock.getsockname()[1]

    def accept_all(self, timeout_s: float, check: Callable[[], None]) -> list[Connection[RankMessage]]:
        """Connections by rank, once every rank has one.

        `check` is called many times a second and may raise to give up. Raises TimeoutError naming the absent ranks.
        Whoever does not prove to know the secret and epoch is closed and otherwise ignored; nobody is heard any more
        when this returns.
        """
        deadline = time.monotonic() + timeout_s
        gate = _Gate()
        greetings: dict[threading.Thread, socket.socket] = {}
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)

        def greet(sock: socket.socket) -> None:
            gate.admit(_greet_rank(sock, self._secret, self._epoch, self._num_ranks), sock)

        try:
            while len(gate.found) < self._num_ranks:
                check()
                if time.monotonic() > deadline:
                    absent = sorted(set(range(self._num_ranks)) - set(gate.found))
                    raise TimeoutError(f"ranks {absent} did not connect within {timeout_s:g} s")
                if not poller.poll(_POLL_S * 1e3):
                    continue
                greetings = {thread: sock for thread, sock in greetings.items() if thread.is_alive()}
                if len(greetings) == self._num_ranks + _MAX_STRANGERS:
                    time.sleep(_POLL_S)
                    continue
                try:
                    sock, _ = self._sock.accept()
                except (BlockingIOError, ConnectionAbortedError):  # it went away while it waited
                    continue
                thread = threading.Thread(target=greet, args=(sock,), name="packtrain-handshake", daemon=True)
                greetings[thread] = sock
                thread.start()
        except BaseException:
            for sock in gate.shut().values():
                sock.close()
            raise
        finally:
            self.close()
            admitted = gate.shut().values()
            for thread, sock in greetings.items():
                if sock not in admitted:
                    _sever(sock)  # wakes its thread, which closes it
                thread.join(HANDSHAKE_TIMEOUT_S)
        return [Connection(sock, RankMessage) for _, sock in sorted(gate.shut().items())]

    def close(self) -> None:
        self._sock.close()


class _Gate:
    """Sockets by proved rank; the first of each rank is kept until the gate is shut, all others are closed."""

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
    hello = _HELLO.pack(MAGIC, epoch, rank, secrets.token_bytes(_NONCE_BYTES))
    try:
        sock = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise LinkError(f"cannot reach the leader at {host}:{port}: {error}") from error
    try:
        sock.sendall(hello)
        answer = _read_exactly(sock, _NONCE_BYTES + _MAC_BYTES, deadline)
        nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(secret, b"leader", hello, nonce)):
            raise LinkError(f"the leader at {host}:{port} does not know the group's secret")
        sock.sendall(_proof(secret, b"rank", hello, nonce))
    except (LinkError, OSError) as error:
        sock.close()
        raise LinkError(f"the leader at {host}:{port} refused rank {rank}: {error}") from error
    _tune(sock)
    sock.settimeout(None)
    return Connection(sock, LeaderMessage)


def _greet_rank(sock: socket.socket, secret: bytes, epoch: int, num_ranks: int) -> int | None:
    """The rank at the other end, or None when it is a stranger."""
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    try:
        hello = _read_exactly(sock, _HELLO.size, deadline)
        magic, its_epoch, rank, _ = _HELLO.unpack(hello)
        if magic != MAGIC or its_epoch != epoch or rank >= num_ranks:
            return None
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sock.sendall(nonce + _proof(secret, b"leader", hello, nonce))
        if not hmac.compare_digest(_read_exactly(sock, _MAC_BYTES, deadline), _proof(secret, b"rank", hello, nonce)):
            return None
        _tune(sock)
    except (LinkError, OSError):
        return None
    return int(rank)


def _proof(secret: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, side + hello + nonce, "sha256")


def _read_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        sock.settimeout(max(deadline - time.monotonic(), 1e-6))
        part = sock.recv(num_bytes - len(data))
        if not part:
            raise LinkError("the connection was closed during the handshake")
        data += part
    return data


def _sever(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)


def _tune(sock: socket.socket) -> None:
    """No waiting for more to send; and a host that vanished without a word is noticed within about 15 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
