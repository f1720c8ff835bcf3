from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend
from protos import inference_pb2_grpc
from serving.config import GatewayConfig, LimitsConfig
from serving.contracts.accounts import Accounts
from serving.contracts.observer import Observe, unobserved
from serving.gateway.core import generation
from serving.gateway.server import GatewayServer
from tests.support.kept_trials import KeepingChecker, end_kept_trials


@dataclass
class Running:
    """A gateway on a loopback port, and a client of it."""

    server: GatewayServer
    backend: FakeBackend
    channel: grpc.aio.Channel
    stub: Any
    target: str
    http_port: int | None


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def running(
    backend: FakeBackend | None = None,
    *,
    limits: LimitsConfig | None = None,
    accounts: Accounts | None = None,
    observe: Observe = unobserved,
    **config: Any,
) -> AsyncIterator[Running]:
    """`async with running(backend, drain_timeout_s=1) as gateway:` with GatewayConfig's fields as keywords."""
    backend = backend or FakeBackend()
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    gateway = GatewayConfig(**{"port": 0, "http_port": None, **config})
    server = GatewayServer(gateway, limits or LimitsConfig(), backend, tokenizers, accounts, observe)
    ports = await server.start()
    target = f"127.0.0.1:{ports.grpc}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Running(server, backend, channel, inference_pb2_grpc.InferenceStub(channel), target, ports.http)
    finally:
        await server.stop(0)


@pytest.fixture
def serve() -> Serve:
    """See `running`."""
    return running


@pytest.fixture(autouse=True)
def _gateways_keep_the_processes_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GrammarChecker", KeepingChecker)


@pytest.fixture(autouse=True, scope="session")
def _no_process_of_trials_is_left() -> Iterator[None]:
    yield
    end_kept_trials()
