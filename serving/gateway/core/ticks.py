"""Signs of life between the parts of a slow stream."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from serving.contracts.errors import ValidationError

T = TypeVar("T")

KEEP_ALIVE_HEADER = "x-packtrain-keep-alive-s"
_SHORTEST_S, _LONGEST_S = 1.0, 300.0
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def keep_alive_of(values: list[str], default_s: float | None) -> float | None:
    """Seconds that a client wants to wait for a sign of life, from the values of its headers. Raises ValidationError."""
    if not values:
        return default_s
    seconds = only_number(values)
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise ValidationError(
            KEEP_ALIVE_HEADER,
            f"{KEEP_ALIVE_HEADER} must be one number of seconds, from {_SHORTEST_S:g} to {_LONGEST_S:g}",
        )
    return seconds


def only_number(values: list[str]) -> float:
    """Of the values of a header: the only one, as JSON writes numbers; nan when there is no such."""
    return float(values[0]) if len(values) == 1 and _NUMBER.fullmatch(values[0]) else math.nan


async def with_ticks(items: AsyncGenerator[T, None], period_s: float) -> AsyncGenerator[T | None, None]:
    """The items, and None whenever none has come for `period_s`. Raises what making them raises.

    One task makes all of them, as it would without ticks; it is at most two items ahead.
    """
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue(1)

    async def pump() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    await queue.put((item,))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    task = asyncio.create_task(pump())
    try:
        while True:
            try:
                async with asyncio.timeout(period_s):
                    part = await queue.get()
            except TimeoutError:
                yield None
                continue
            if part is None:
                return
            if isinstance(part, BaseException):
                raise part
            yield part[0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
