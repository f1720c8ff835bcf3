"""How many requests run at a time, and the end of running ones when the gateway stops."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class OverloadedError(Exception):
    """As many requests are open as are allowed."""


class DrainingError(Exception):
    """The gateway is stopping."""


class Admission:
    """Permits, at most `limit` at a time. A request without one is refused at once rather than queued: the queue that
    counts is the replica group's."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._ended = False

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Hold a permit for the current task. Raises OverloadedError or DrainingError, the latter also when a drain
        ends the task."""
        if self._draining:
            raise DrainingError("this gateway is stopping")
        if len(self._tasks) >= self._limit:
            raise OverloadedError(f"{self._limit} requests are running, which is the most at a time")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a permit belongs to a task")
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._ended:
                raise
            task.uncancel()
            raise DrainingError("this gateway stopped before the answer was complete") from None
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Give no more permits, wait for the held ones, and after `timeout_s` end what still runs. Returns when all are
        back, or a second after they were told to end."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._ended = True
        for task in self._tasks:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._idle.wait()
