"""Who joins a load test before it begins."""

import asyncio

import pytest

from bench.loadtest.leader import Senders, crew
from bench.loadtest.sender import run_sender
from bench.loadtest.wire import join
from model_parallel.transport.frames import LinkError

SECRET = "0123456789abcdef"


async def test_who_leaves_before_the_start_is_replaced_and_who_comes_too_late_is_told() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    senders = Senders(num_processes=0, num_joined=2, secret=SECRET)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def lead() -> None:
        async with crew(senders, None, lines.put_nowait):
            begun.set()
            await ended.wait()

    async with asyncio.timeout(60):
        leading = asyncio.create_task(lead())
        line = await lines.get()
        assert line.startswith("waiting for 2 processes to join at 127.0.0.1:")
        port = int(line.rpartition(":")[2])
        first = await join("127.0.0.1", port, SECRET.encode())
        first.close()
        assert await lines.get() == "a process that had joined has left; 0 of 2 are there"
        peers = [await join("127.0.0.1", port, SECRET.encode()) for _ in range(2)]
        await begun.wait()
        with pytest.raises(LinkError, match="has all processes that it waits for"):
            await run_sender("127.0.0.1", port, SECRET.encode(), None, owns_targets=False)
        ended.set()
        await leading
    for peer in peers:
        peer.close()
