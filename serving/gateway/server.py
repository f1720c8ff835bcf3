"""The front ends of one process, gRPC and HTTP: their servers, from binding to draining."""

import asyncio
import errno
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc
from google.protobuf.internal import api_implementation
from starlette.types import ASGIApp

from model_parallel.errors import ConfigError
from protos import inference_pb2, inference_pb2_grpc
from serving.config import AdminConfig, GatewayConfig, LimitsConfig
from serving.contracts.accounts import Accounts, OpenAccounts
from serving.contracts.addresses import (
    explain_listening,
    host_port,
    is_loopback,
    listening_addresses,
    resolve,
    why_not_listening,
)
from serving.contracts.fleet import ModelDemand
from serving.contracts.models import ModelCard
from serving.contracts.observer import Observe, unobserved
from serving.gateway.core.admission import Admission
from serving.gateway.core.backend import Backend
from serving.gateway.core.generation import Generator
from serving.gateway.core.health import HealthMonitor
from serving.gateway.core.resume_tokens import ResumeTokens, load_key
from serving.gateway.grpc.health import HEALTH, HealthService
from serving.gateway.grpc.interceptors import StatusInterceptor
from serving.gateway.grpc.reflection import add_reflection
from serving.gateway.grpc.servicer import InferenceServicer
from serving.gateway.http.app import HttpFrontEnd, allow_origins
from serving.gateway.http.endpoints import PATHS
from serving.gateway.http.listener import ConnectionLimits, HttpListener, make_room
from serving.gateway.tls import load_tls
from serving.text.tokenizer import Tokenizer

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
METHODS = (
    *(f"/{INFERENCE}/{method.name}" for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods),
    *PATHS,
)
"""What metrics may name."""

_MAX_CONNECTION_AGE_S = 600
_MAX_UNREQUESTED_S = 3600
"""Longer than any deadline: a call waits for a gateway that is busy as long as its client does."""
_KEEPALIVE_S = 30.0
_KEEPALIVE_TIMEOUT_S = 10.0
"""A dead peer is noticed within the sum, and its requests end."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a gateway listens."""

    grpc: int
    http: int | None
    """None when it is turned off."""


class GatewayServer:
    """Serves packtrain.v1.Inference, health and reflection over gRPC, and OpenAI's API over HTTP, with one Generator and one
    Admission. One start, one drain or stop."""

    def __init__(
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        backend: Backend,
        tokenizers: Mapping[str, Tokenizer],
        accounts: Accounts | None = None,
        observe: Observe = unobserved,
        resume_key: bytes = b"",
    ) -> None:
        """`tokenizers` by model name. `resume_key` is the deployment's, unless the configuration has one; without either, streams
        are resumed by this gateway alone.

        Raises ConfigError for an address that is open to others without `accounts` or `insecure`, for certificates and a key that
        cannot be used, and for a model without tokenizer.
        """
        check_listening(config, has_keys=accounts is not None)
        if missing := sorted({card.base for card in backend.models.values()} - set(tokenizers)):
            raise ConfigError(f"no tokenizer for the models {', '.join(missing)}")
        self._config = config
        self._admission = Admission(config.max_concurrent_requests)
        self._health_service = HealthService([INFERENCE])
        self._health = HealthMonitor(backend, self._health_service.show)
        self._health_task: asyncio.Task[None] | None = None
        self._accounts: Accounts = accounts or OpenAccounts()
        if config.resume_key_file is not None:
            resume_key = load_key(config.resume_key_file)
        tokens = ResumeTokens(resume_key) if resume_key else None
        self._generator = Generator(
            backend,
            tokenizers,
            limits,
            accounts=self._accounts,
            resume_tokens=tokens,
            max_concurrent_requests=config.max_concurrent_requests,
        )
        self._observe = observe
        self._limits = limits
        self._tls = None if config.tls is None else load_tls(config.tls)
        self._server: grpc.aio.Server | None = None
        self._http = self._http_listener()

    async def set_model(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        """See Generator.set_model."""
        await self._generator.set_model(card, tokenizer)

    def forget_model(self, name: str) -> None:
        """See Generator.forget_model."""
        self._generator.forget_model(name)

    @property
    def demand(self) -> Mapping[str, ModelDemand]:
        """What has arrived for each model that is served."""
        return self._generator.demand.totals

    async def start(self) -> Ports:
        """Listen and serve. Raises ConfigError when an address cannot be had."""
        if self._server is not None:
            raise RuntimeError("a gateway server starts once")
        check_protobuf()
        make_room(self._config)
        await self._health.refresh()
        ports = Ports(await self._start_grpc(), await self._start_http())
        self._health_task = asyncio.create_task(self._health.run())
        return ports

    async def _start_grpc(self) -> int:
        interceptor = StatusInterceptor(
            self._admission,
            self._accounts,
            admitted_service=INFERENCE,
            open_service=HEALTH,
            retry_delay_s=self._config.retry_delay_s,
            slow_reader_timeout_s=self._config.slow_reader_timeout_s,
            observe=self._observe,
        )
        server = self._server = grpc.aio.server(interceptors=(interceptor,), options=self._options())
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(self._generator), server)
        self._health_service.add_to(server)
        if self._config.reflection:
            add_reflection(server, [INFERENCE, HEALTH])
        port = bind(server, self._config.host, self._config.port, None if self._tls is None else self._tls.grpc)
        await server.start()
        return port

    def _http_listener(self) -> HttpListener:
        app: ASGIApp = HttpFrontEnd(
            self._generator,
            self._accounts,
            self._admission,
            self._health,
            max_body_bytes=self._limits.max_message_bytes,
            retry_delay_s=self._config.retry_delay_s,
            keep_alive_s=self._config.stream_keep_alive_s,
            observe=self._observe,
        )
        if self._config.cors_allow_origins:
            app = allow_origins(app, self._config.cors_allow_origins)
        limits = ConnectionLimits.of(self._config, self._limits)
        return HttpListener(app, limits, None if self._tls is None else self._tls.http)

    async def _start_http(self) -> int | None:
        if self._config.http_port is None:
            return None
        return await self._http.start(self._config.host, self._config.http_port)

    @property
    def is_serving(self) -> bool:
        """Some group can serve, and the gateway is not stopping; what health and /readyz tell."""
        return self._health.is_serving

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
        await self._http.stop(grace_s)
        if self._server is not None:
            await self._server.stop(grace_s)
        self._generator.close()

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),  # or two gateways would share a port unnoticed
            ("grpc.max_receive_message_length", self._limits.max_message_bytes),
            ("grpc.max_send_message_length", self._limits.max_message_bytes),
            # Twice as many as may run: one connection can then learn that the gateway is full, not wait in HTTP/2.
            ("grpc.max_concurrent_streams", 2 * self._config.max_concurrent_requests),
            # A burst is refused by us, with a reason and a delay. gRPC by itself cancels what is beyond a thousand.
            ("grpc.server.max_pending_requests", 2 * self._config.max_concurrent_requests),
            ("grpc.server.max_pending_requests_hard_limit", 4 * self._config.max_concurrent_requests),
            # gRPC cancels what the event loop has not taken up within 30 s, and no client tries again after CANCELLED.
            ("grpc.server_max_unrequested_time_in_server", _MAX_UNREQUESTED_S),
            ("grpc.max_allowed_incoming_connections", self._config.max_grpc_connections),
            ("grpc.server_handshake_timeout_ms", round(1000 * self._config.header_timeout_s)),
            ("grpc.keepalive_time_ms", round(1000 * _KEEPALIVE_S)),
            ("grpc.keepalive_timeout_ms", round(1000 * _KEEPALIVE_TIMEOUT_S)),
            ("grpc.http2.ping_timeout_ms", round(1000 * _KEEPALIVE_TIMEOUT_S)),  # 60 s otherwise, for keepalive too
            ("grpc.keepalive_permit_without_calls", 1),
            # Clients are told 10 s. A ping that was in flight for long comes early after the one before it.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            # Connections are renewed, so that an L4 balancer can spread them over new gateways; streams on them finish.
            ("grpc.max_connection_age_ms", _MAX_CONNECTION_AGE_S * 1000),
        ]


def check_protobuf() -> None:
    """Refuse protobuf's parser in Python, which is slow and has had recursion without a bound. Raises ConfigError."""
    if (parser := api_implementation.Type()) != "upb":
        raise ConfigError(
            f"protobuf runs its parser {parser!r}, and only upb, its own default, is safe with strangers' bytes; "
            "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
        )


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Have the server listen on every address of a host, over TLS with `credentials`. Returns the port, which is the same
    for all. Raises ConfigError."""
    for address in listening_addresses(host):
        where = host_port(address, port)
        try:
            if credentials is None:
                port = server.add_insecure_port(where)
                continue
            port = server.add_secure_port(where, credentials)
        except RuntimeError as error:
            number = why_not_listening(address, port) or errno.EADDRINUSE
            raise ConfigError(f"cannot listen: {explain_listening(number, address, port)}") from error
    return port


def check_listening(config: GatewayConfig, *, has_keys: bool) -> None:
    """Refuse to be open to others by accident. Raises ConfigError."""
    if is_loopback(config.host):
        return
    if not (has_keys or config.insecure):
        _check_known("gateway.host", config.host)
        raise ConfigError(
            f"gateway.host is {config.host!r}, which others can reach, and there are no keys; configure tenancy, "
            "listen on 127.0.0.1, or set gateway.insecure (--insecure) to accept everybody's requests"
        )
    if has_keys and config.tls is None:
        logger.warning("keys and prompts travel unencrypted to %s: gateway.tls is not set", config.host)


def _check_known(setting: str, host: str) -> None:
    """A name with a letter too few is told as such. Raises ConfigError."""
    try:
        resolve(host)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error


def check_admin_listening(admin: AdminConfig, *, has_keys: bool, insecure: bool) -> None:
    """The same for the operators' ports. Raises ConfigError."""
    if not (is_loopback(admin.host) or has_keys or insecure):
        _check_known("admin.host", admin.host)
        raise ConfigError(
            f"admin.host is {admin.host!r}, which others can reach, and there are no keys; configure tenancy, "
            "listen on 127.0.0.1, or set gateway.insecure (--insecure) to show metrics to everybody"
        )
