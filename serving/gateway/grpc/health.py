"""grpc.health.v1 of a gateway."""

from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

HEALTH = "grpc.health.v1.Health"


class HealthService:
    """Keeps the status of "" (the whole gateway) and of every named service."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = health.aio.HealthServicer()
        self._names = ("", *services)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it there."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def show(self, is_serving: bool) -> None:
        """Every name is SERVING, or NOT_SERVING; who watches is told of a change."""
        answers = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, answers.SERVING if is_serving else answers.NOT_SERVING)
