"""A client that does not read its answer: its group is told to compute no more of it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serving.gateway.backend import GroupUnavailableError

logger = logging.getLogger(__name__)

HOLD_AFTER_S = 0.25
"""A part of an answer that is not taken for so long is taken to be unread. What is computed until then lies in buffers."""
_RETRY_S = 1.0


class ReaderWatch:
    """Of one client request. Within `with watch:` a part of the answer waits to be taken."""

    def __init__(self, hold: Callable[[bool], Awaitable[None]]) -> None:
        """`hold` tells the group, and raises GroupUnavailableError when that may not have worked."""
        self._hold = hold
        self._is_stuck = False
        self._was_told = False
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._set_stuck, True)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._is_stuck:
            self._set_stuck(False)

    def close(self) -> None:
        """The request has ended, and with it what its group holds."""
        if self._telling is not None:
            self._telling.cancel()

    def _set_stuck(self, is_stuck: bool) -> None:
        self._is_stuck = is_stuck
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Until the group knows how it is: one message at a time, so that none overtakes another."""
        while self._was_told != self._is_stuck:
            is_stuck = self._is_stuck
            try:
                await self._hold(is_stuck)
                self._was_told = is_stuck
            except GroupUnavailableError as error:
                logger.warning("a group could not be told to %s: %s", "pause" if is_stuck else "go on", error)
                await asyncio.sleep(_RETRY_S)
