"""The gRPC front end of one process: its own server, from binding to draining."""

import asyncio
import ipaddress
from collections.abc import Mapping
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2_grpc

from model_parallel.errors import ConfigError
from protos import inference_pb2, inference_pb2_grpc
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.accounts import Accounts, OpenAccounts
from serving.gateway.admission import Admission
from serving.gateway.backend import Backend
from serving.gateway.generation import Generator
from serving.gateway.health import HealthMonitor
from serving.gateway.interceptors import StatusInterceptor
from serving.gateway.reflection import add_reflection
from serving.gateway.servicer import InferenceServicer
from serving.tokenizer import Tokenizer

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = "grpc.health.v1.Health"

_MAX_CONNECTION_AGE_S = 600


class GatewayServer:
    """Serves packtrain.v1.Inference, health and reflection. One start, one drain or stop."""

    def __init__(
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        backend: Backend,
        tokenizers: Mapping[str, Tokenizer],
        accounts: Accounts | None = None,
    ) -> None:
        """`tokenizers` by model name. Raises ConfigError for an address that is open to others without `insecure`, and
        for a model without tokenizer."""
        check_listening(config)
        if missing := sorted(set(backend.models) - set(tokenizers)):
            raise ConfigError(f"no tokenizer for the models {', '.join(missing)}")
        self._config = config
        self._admission = Admission(config.max_concurrent_requests)
        self._health = HealthMonitor(backend, [INFERENCE])
        self._health_task: asyncio.Task[None] | None = None
        self._accounts: Accounts = accounts or OpenAccounts()
        self._generator = Generator(backend, tokenizers, limits, accounts=self._accounts)
        self._limits = limits
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen and serve. Returns the port. Raises ConfigError when the address cannot be had."""
        if self._server is not None:
            raise RuntimeError("a gateway server starts once")
        interceptor = StatusInterceptor(
            self._admission,
            self._accounts,
            admitted_service=INFERENCE,
            open_service=HEALTH,
            retry_delay_s=self._config.retry_delay_s,
        )
        server = self._server = grpc.aio.server(interceptors=(interceptor,), options=self._options())
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(self._generator), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        if self._config.reflection:
            add_reflection(server, [INFERENCE, HEALTH])
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._config.port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: is the port taken, or the address another machine's?"
            ) from error
        await self._health.refresh()
        await server.start()
        self._health_task = asyncio.create_task(self._health.run())
        return port

    async def refresh_health(self) -> None:
        """Bring the health answers up to date now, and not at the next period's end."""
        await self._health.refresh()

    async def drain(self) -> None:
        """Stop without loss: NOT_SERVING first, new requests answered UNAVAILABLE, running ones finish within
        drain_timeout_s and are then ended as UNAVAILABLE. Health stays reachable; `stop` closes the port."""
        await self._health.stop_serving()
        await self._admission.drain(self._config.drain_timeout_s)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Close the port; what still runs after `grace_s` is cut off. Safe to call again, and without `start`."""
        if self._health_task is not None:
            self._health_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._health_task
            self._health_task = None
        if self._server is not None:
            await self._server.stop(grace_s)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),  # or two gateways would share a port unnoticed
            ("grpc.max_receive_message_length", self._limits.max_message_bytes),
            ("grpc.max_send_message_length", self._limits.max_message_bytes),
            # Twice as many as may run: one connection can then learn that the gateway is full, not wait in HTTP/2.
            ("grpc.max_concurrent_streams", 2 * self._config.max_concurrent_requests),
            # A dead peer is noticed within 40 s, and its requests end.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            # Connections are renewed, so that an L4 balancer can spread them over new gateways; streams on them finish.
            ("grpc.max_connection_age_ms", _MAX_CONNECTION_AGE_S * 1000),
        ]


def check_listening(config: GatewayConfig) -> None:
    """Refuse to be open to others by accident. Raises ConfigError."""
    if not (config.insecure or _is_loopback(config.host)):
        raise ConfigError(
            f"gateway.host is {config.host!r}, which others can reach, and there are no keys yet; "
            "listen on 127.0.0.1, or set gateway.insecure (--insecure) to accept everybody's requests"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
