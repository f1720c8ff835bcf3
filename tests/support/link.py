"""The gateway's end of the link to its groups, and waiting for what comes over it."""

import asyncio
from collections.abc import Callable

from serving.gateway.groups.loads import GroupLoads
from serving.gateway.groups.output_receiver import OutputReceiver

HOST = "127.0.0.1"


async def listening() -> OutputReceiver:
    """A gateway's end. Stop it."""
    receiver = OutputReceiver(GroupLoads())
    await receiver.start(HOST)
    return receiver


async def until(condition: Callable[[], object]) -> None:
    """Wait for it, but not long."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
