"""Event loops for the tests here, and the gateway's end of the link to groups."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from serving.gateway.groups.output_receiver import OutputReceiver
from tests.support.link import listening

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, LoopFactory]:
    """What handles transports is tested with Serve's event loop too: uvloop's transports are not asyncio's."""
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem == "test_output_link":
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture
async def receiver() -> AsyncIterator[OutputReceiver]:
    receiver = await listening()
    yield receiver
    await receiver.stop()
