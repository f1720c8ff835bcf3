"""grpc.health.v1 of a gateway."""

from collections.abc import Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

HEALTH = "grpc.health.v1.Health"


class _Servicer(health.aio.HealthServicer):
    """The library's, with the one method that it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, health_pb2.HealthCheckResponse] = {}

    async def set(self, service: str, status: Any) -> None:
        self._shown[service] = health_pb2.HealthCheckResponse(status=status)
        await super().set(service, status)

    async def List(self, request: Any, context: Any) -> Any:
        """The status of every name."""
        return health_pb2.HealthListResponse(statuses=self._shown)  # type: ignore[attr-defined]  # newer than the stubs


class HealthService:
    """Keeps the status of "" (the whole gateway) and of every named service."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = _Servicer()
        self._names = ("", *services)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it there."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def show(self, is_serving: bool) -> None:
        """Every name is SERVING, or NOT_SERVING; who watches is told of a change."""
        answers = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, answers.SERVING if is_serving else answers.NOT_SERVING)
