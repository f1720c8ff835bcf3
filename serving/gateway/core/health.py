"""grpc.health.v1: a gateway is SERVING while some model has a replica group that can serve."""

import asyncio
import logging
from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from serving.gateway.core.backend import Backend

logger = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthMonitor:
    """Keeps the status of "" (the whole gateway) and of every named service."""

    def __init__(self, backend: Backend, services: Sequence[str], *, period_s: float = 1.0) -> None:
        self.servicer = health.aio.HealthServicer()
        self._backend = backend
        self._names = ("", *services)
        self.is_serving = False
        """Some group can serve, and the gateway is not stopping."""
        self._is_stopping = False
        self._period_s = period_s

    async def refresh(self) -> None:
        """LeaseRequest the backend once, for at most ten periods; no answer counts as no group."""
        is_healthy = False
        try:
            async with asyncio.timeout(10 * self._period_s):
                can_serve = await asyncio.gather(*(self._backend.can_serve(name) for name in self._backend.models))
            is_healthy = any(can_serve)
        except Exception:  # the loop must outlive whatever the backend does; NOT_SERVING shows it
            logger.exception("the backend cannot say how many groups are healthy")
        self.is_serving = is_healthy and not self._is_stopping
        await self._set(_SERVING if is_healthy else _NOT_SERVING)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._period_s)

    async def stop_serving(self) -> None:
        """NOT_SERVING from now on, whatever the groups are."""
        self._is_stopping, self.is_serving = True, False
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, status: int) -> None:
        for name in self._names:
            await self.servicer.set(name, status)
