"""Frames that no gRPC client sends, at the rate of an attacker. Others are served meanwhile, memory has a bound, and nothing is
left behind.

Frames are made by hand (RFC 9113 §4.1, RFC 7541 §6.2.2): libraries refuse to send most of these.
"""

import asyncio
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import psutil
import pytest

from bench.support.fake_backend import FakeBackend, for_ever
from protos import inference_pb2 as pb
from tests.support.waiting import PATIENCE_S, until
from tests.unit.gateway.conftest import Running, Serve

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
ACK, END_STREAM, END_HEADERS = 0x1, 0x1, 0x4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CANCEL = struct.pack(">I", 8)
ENHANCE_YOUR_CALM = 11

DEAF_S = 1.0
"""What is not taken for so long from a peer that reads nothing is not taken any more."""
Attack = Callable[[int], bytes]
"""Makes the i-th piece of what is sent."""


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal that no table remembers; both parts are shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


REQUEST_HEADERS = b"".join(
    header(name, value)
    for name, value in [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/packtrain.v1.Inference/GenerateStream"),
        (b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
    ]
)  # fmt: skip
MESSAGE = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi")).SerializeToString()
MESSAGE = b"\0" + struct.pack(">I", len(MESSAGE)) + MESSAGE


def request(stream: int) -> bytes:
    """A whole call of GenerateStream."""
    return frame(HEADERS, stream, REQUEST_HEADERS, END_HEADERS) + frame(DATA, stream, MESSAGE, END_STREAM)


def rapid_reset(index: int) -> bytes:
    """CVE-2023-44487: a request and its end, before it can count among the open ones."""
    return request(2 * index + 1) + frame(RST_STREAM, 2 * index + 1, CANCEL)


def pings(index: int) -> bytes:
    return frame(PING, 0, b"12345678")


def settings(index: int) -> bytes:
    return frame(SETTINGS, 0)


def settings_that_change(index: int) -> bytes:
    """Among them the size of the table that the server keeps for its own headers."""
    return frame(SETTINGS, 0, struct.pack(">HIHI", 1, index % 4096, 4, 65535 + index % 1000))


def empty_data(index: int) -> bytes:
    start = frame(HEADERS, 1, REQUEST_HEADERS, END_HEADERS) if index == 0 else b""
    return start + frame(DATA, 1)


def priorities(index: int) -> bytes:
    return frame(PRIORITY, 2 * index + 1, struct.pack(">IB", 0, 1))


def endless_headers(index: int) -> bytes:
    """CVE-2024-27316 and its like: a block of headers that never ends."""
    start = frame(HEADERS, 1, REQUEST_HEADERS) if index == 0 else b""
    return start + frame(CONTINUATION, 1, header(b"x%d" % index, b"a" * 100))


class Attacker:
    """A connection that speaks frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reads: bool) -> None:
        self._reader = reader
        self._writer = writer
        self.num_received: Counter[int] = Counter()
        """Frames, by kind."""
        self.farewell = b""
        """Payload of GOAWAY."""
        self.is_ended = False
        self._index = 0
        self._listening = asyncio.create_task(self._listen()) if reads else None

    @classmethod
    @asynccontextmanager
    async def connect(cls, gateway: Running, *, reads: bool) -> AsyncIterator["Attacker"]:
        sock = socket.socket()
        if not reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = gateway.target.split(":")
        sock.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(PREFACE + frame(SETTINGS, 0))
        attacker = cls(reader, writer, reads=reads)
        try:
            yield attacker
        finally:
            writer.transport.abort()
            if attacker._listening is not None:
                await asyncio.wait_for(attacker._listening, PATIENCE_S)

    async def flood(self, attack: Attack, num_frames: int) -> bool:
        """Send as fast as the gateway takes it. Returns whether it took everything: not when it has ended the connection, or
        stopped reading."""
        with suppress(ConnectionError):
            for _ in range(num_frames // 50):
                self._writer.write(b"".join(attack(self._index + each) for each in range(50)))
                self._index += 50
                try:
                    async with asyncio.timeout(PATIENCE_S if self._listening else DEAF_S):
                        await self._writer.drain()
                        await asyncio.sleep(0)  # a socket that has room takes no turn of the loop
                except TimeoutError:
                    return False
                if self.is_ended:
                    return False
            return True
        return False

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def until(self, kinds: tuple[int, ...], count: int) -> None:
        """Wait until so many frames of these kinds have come."""
        await until(lambda: sum(self.num_received[kind] for kind in kinds) >= count)

    async def ended(self) -> None:
        """Wait until the gateway closes the connection."""
        assert self._listening is not None
        await asyncio.wait_for(asyncio.shield(self._listening), PATIENCE_S)

    async def _listen(self) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self.num_received[head[3]] += 1
                if (
                    head[3] == PING and not head[4] & ACK
                ):  # by which the server tells who is alive, and slows down who resets
                    self._writer.write(frame(PING, 0, payload, ACK))
                if head[3] == GOAWAY:
                    self.farewell = payload
        self.is_ended = True


async def keep_asking(gateway: Running, asked: list[int]) -> None:
    """What everybody else does. Raises when it is not answered within seconds."""
    while True:
        answer = await gateway.stub.Tokenize(pb.TokenizeRequest(model="tiny", text="hello"), timeout=PATIENCE_S)
        asked.append(len(answer.token_ids))


@asynccontextmanager
async def bystander(gateway: Running) -> AsyncIterator[None]:
    """Somebody else asks all the while, and gets an answer each time."""
    asked: list[int] = []
    asking = asyncio.create_task(keep_asking(gateway, asked))
    try:
        yield
        num_asked = len(asked)
        await until(lambda: not (len(asked) < num_asked + 3 and not asking.done()))
    finally:
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    assert set(asked) == {6}


def memory_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


ATTACKS = [rapid_reset, pings, settings, settings_that_change, empty_data, priorities, endless_headers]
MAX_PARTS = 40
everybody = pytest.mark.parametrize("reads", [True, False], ids=["reads", "deaf"])


def kept_bytes(attack: Attack, num_frames: int) -> int:
    """What it takes to keep so many frames, as a list of bytes."""
    sample = [attack(index) for index in range(1000)]
    return sum(sys.getsizeof(each) + 8 for each in sample) * num_frames // len(sample)


async def attacked(serve: Serve, attack: Attack, *, reads: bool, num_frames: int) -> None:
    """Frames come in parts until one finds no more room: were anything kept of each frame, every part would take as much memory
    as its frames do. What is bounded is full after some parts, and whatever else this process does takes memory in some."""
    async with serve(FakeBackend(for_ever), max_concurrent_requests=64) as gateway:
        async with bystander(gateway), Attacker.connect(gateway, reads=reads) as attacker:
            growths: list[int] = []
            allowed_bytes = kept_bytes(attack, num_frames) // 2
            takes_more = await attacker.flood(attack, num_frames)
            while takes_more and min(growths, default=allowed_bytes) >= allowed_bytes and len(growths) < MAX_PARTS:
                before = memory_bytes()
                takes_more = await attacker.flood(attack, num_frames)
                growths.append(memory_bytes() - before)
            assert min(growths, default=0) < allowed_bytes, growths
        await gateway.backend.closed()


@everybody
@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_flood_of_frames_leaves_others_alone(serve: Serve, attack: Attack, reads: bool) -> None:
    await attacked(serve, attack, reads=reads, num_frames=10_000)


@pytest.mark.nightly
@everybody
@pytest.mark.parametrize("attack", ATTACKS)
async def test_hundreds_of_thousands_of_frames_leave_others_alone(serve: Serve, attack: Attack, reads: bool) -> None:
    await attacked(serve, attack, reads=reads, num_frames=250_000)


async def test_who_pings_too_much_is_told_to_calm_down(serve: Serve) -> None:
    async with serve() as gateway, Attacker.connect(gateway, reads=True) as attacker:
        await attacker.send(b"".join(map(pings, range(10))))
        await attacker.ended()
        assert struct.unpack(">I", attacker.farewell[4:8]) == (ENHANCE_YOUR_CALM,)


MADE_TO_RESET: dict[str, Callable[[int], bytes]] = {
    "a window that grows by nothing": lambda stream: frame(WINDOW_UPDATE, stream, bytes(4)),
    "a window beyond all bounds": lambda stream: frame(WINDOW_UPDATE, stream, struct.pack(">I", 2**31 - 1)),
    "a window of three bytes": lambda stream: frame(WINDOW_UPDATE, stream, bytes(3)),
    "data after the end": lambda stream: frame(DATA, stream, MESSAGE),
    "headers after the end": lambda stream: frame(HEADERS, stream, REQUEST_HEADERS, END_HEADERS | END_STREAM),
    "a priority of four bytes": lambda stream: frame(PRIORITY, stream, bytes(4)),
    "a request that waits for itself": lambda stream: frame(PRIORITY, stream, struct.pack(">IB", stream, 1)),
    "a reset of three bytes": lambda stream: frame(RST_STREAM, stream, bytes(3)),
    "a frame over the limit": lambda stream: frame(DATA, stream, bytes(20_000)),
}


@pytest.mark.parametrize("wrong", MADE_TO_RESET.values(), ids=MADE_TO_RESET)
async def test_the_gateway_cannot_be_made_to_reset_requests(serve: Serve, wrong: Callable[[int], bytes]) -> None:
    """CVE-2025-8671: requests that the server resets no longer count among the open ones while their work goes on. Here such a
    frame either ends the connection or changes nothing."""
    async with serve(FakeBackend(for_ever), max_concurrent_requests=64) as gateway:
        async with Attacker.connect(gateway, reads=True) as attacker:
            await attacker.flood(lambda index: request(2 * index + 1) + wrong(2 * index + 1), 50)
            await until(lambda: not (not attacker.is_ended and attacker.num_received[DATA] < 50))
            if not attacker.is_ended:
                assert gateway.backend.num_open == 50
                assert attacker.num_received[RST_STREAM] == 0
            assert attacker.num_received[RST_STREAM] <= 1
        await gateway.backend.closed()


async def test_requests_that_are_reset_after_they_began_leave_nothing(serve: Serve) -> None:
    """Over and over on one connection, with others beside it; every permit and every request of the backend comes back."""
    async with (
        serve(FakeBackend(for_ever), max_concurrent_requests=64) as gateway,
        bystander(gateway),
        Attacker.connect(gateway, reads=True) as attacker,
    ):
        for batch in range(10):
            streams = range(100 * batch + 1, 100 * batch + 81, 2)
            await attacker.send(b"".join(map(request, streams)))
            # gRPC slows a connection that resets much: it counts what was reset among the open requests until its next ping.
            await attacker.until((DATA, RST_STREAM), 40 * (batch + 1))
            await attacker.send(b"".join(frame(RST_STREAM, stream, CANCEL) for stream in streams))
            await gateway.backend.closed()


async def test_streams_beyond_the_limit_of_a_connection_are_refused(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), max_concurrent_requests=8) as gateway:
        async with Attacker.connect(gateway, reads=True) as attacker:
            await attacker.flood(lambda index: request(2 * index + 1), 1000)
            await attacker.until((RST_STREAM,), 1000 - 16)
            await attacker.until((DATA,), 8)
            assert gateway.backend.num_open == 8
        await gateway.backend.closed()


async def test_requests_that_never_arrive_whole_hold_no_permit(serve: Serve) -> None:
    """Slowloris: headers, and then the message a byte at a time. It is a stream of its connection and nothing more."""
    async with (
        serve(FakeBackend(for_ever), max_concurrent_requests=8) as gateway,
        Attacker.connect(gateway, reads=True) as attacker,
        bystander(gateway),
    ):
        streams = range(1, 33, 2)
        await attacker.send(b"".join(frame(HEADERS, stream, REQUEST_HEADERS, END_HEADERS) for stream in streams))
        for byte in MESSAGE[:-1]:
            await attacker.send(b"".join(frame(DATA, stream, bytes([byte])) for stream in streams))
        assert gateway.backend.num_open == 0
