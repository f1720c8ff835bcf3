"""Event loops for the tests here."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, LoopFactory]:
    """What handles transports is tested with Serve's event loop too: uvloop's transports are not asyncio's."""
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem == "test_output_link":
        factories["uvloop"] = uvloop.new_event_loop
    return factories
