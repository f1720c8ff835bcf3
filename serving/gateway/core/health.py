"""A gateway serves while some model has a replica group that can serve, and until it stops."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serving.gateway.core.backend import Backend

logger = logging.getLogger(__name__)


class HealthMonitor:
    """Looks at the backend every `period_s`, and gives what it finds to `show`, which tells clients."""

    def __init__(self, backend: Backend, show: Callable[[bool], Awaitable[None]], *, period_s: float = 1.0) -> None:
        self.is_serving = False
        """Some group can serve, and the gateway is not stopping."""
        self._backend = backend
        self._show = show
        self._is_stopping = False
        self._period_s = period_s

    async def refresh(self) -> None:
        """Ask the backend once, for at most ten periods; no answer counts as no group."""
        is_healthy = False
        try:
            async with asyncio.timeout(10 * self._period_s):
                models = [name for name, card in self._backend.models.items() if not card.parent]
                can_serve = await asyncio.gather(*map(self._backend.can_serve, models))
            is_healthy = any(can_serve)
        except Exception:  # the loop must outlive whatever the backend does; clients are shown that it does not serve
            logger.exception("the backend cannot say how many groups are healthy")
        self.is_serving = is_healthy and not self._is_stopping
        await self._show(self.is_serving)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._period_s)

    async def stop_serving(self) -> None:
        """The gateway does not serve from now on, whatever the groups are."""
        self._is_stopping, self.is_serving = True, False
        await self._show(False)
