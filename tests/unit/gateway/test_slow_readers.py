"""What a gateway keeps for clients that do not read, on both front ends."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence

import pytest

from bench.support.fake_backend import FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest
from tests.support.waiting import until
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.test_http2_attacks import SETTINGS, WINDOW_UPDATE, Attacker, frame, request
from tests.unit.gateway.test_http_connections import deaf_client

TOKENS = 1000
MAX_WINDOW = 2**31 - 1
OPEN_ALL_WINDOWS = frame(SETTINGS, 0, struct.pack(">HI", 4, MAX_WINDOW)) + frame(
    WINDOW_UPDATE, 0, struct.pack(">I", MAX_WINDOW - 65535)
)


class Flood:
    """A script that says more than any buffer holds, and knows how much it has got rid of."""

    def __init__(self) -> None:
        self.num_tokens = 0

    async def __call__(self, requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        while True:
            yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("x"),) * TOKENS),)
            self.num_tokens += TOKENS
            await asyncio.sleep(0)

    async def stopped(self, backend: FakeBackend) -> None:
        """Wait until the gateway has ended the request."""
        await until(lambda: self.num_tokens and not backend.num_open)


async def test_over_http_no_more_than_the_buffers_hold(serve: Serve) -> None:
    """32 KiB here, 32 KiB in the kernel, which counts its own overhead twice, and the client's own few."""
    flood = Flood()
    async with serve(FakeBackend(flood), http_port=0, slow_reader_timeout_s=0.5) as gateway:
        with deaf_client(gateway.http_port):
            await flood.stopped(gateway.backend)
    assert flood.num_tokens < 192 << 10  # a byte of text each


@pytest.mark.parametrize(
    ("opening", "max_bytes"),
    [
        (b"", 128 << 10),  # the window of HTTP/2 is 64 KiB
        (OPEN_ALL_WINDOWS, 12 << 20),  # tcp_wmem is the bound: the kernel's buffer is not ours to set
    ],
    ids=["default window", "widest window"],
)
async def test_over_grpc_no_more_than_the_buffers_hold(serve: Serve, opening: bytes, max_bytes: int) -> None:
    flood = Flood()
    async with (
        serve(FakeBackend(flood), slow_reader_timeout_s=0.5) as gateway,
        Attacker.connect(gateway, reads=False) as deaf,
    ):
        await deaf.send(opening + request(1))
        await flood.stopped(gateway.backend)
    assert 2 * flood.num_tokens < max_bytes  # a byte of text and one of its id
