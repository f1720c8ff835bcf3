"""How long tests wait for what must come. A machine that does much else needs seconds for what takes milliseconds alone."""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""Within it comes what must come, unless something is broken. It says nothing about speed."""


async def until(condition: Callable[[], object]) -> None:
    """Returns when the condition holds. Raises TimeoutError when it does not come to hold."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object]) -> bool:
    """The same in a thread that may block: whether the condition came to hold."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
