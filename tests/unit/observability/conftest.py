from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend
from protos import inference_pb2_grpc
from serving.config import GatewayConfig, LimitsConfig
from serving.contracts.accounts import Accounts
from serving.gateway.server import METHODS, GatewayServer
from serving.observability.gateway import GatewayWatch
from serving.observability.tracing import Tracing
from tests.support.waiting import until


@dataclass
class Watched:
    """A gateway on a loopback port that is watched, and a client of it."""

    watch: GatewayWatch
    server: GatewayServer
    backend: FakeBackend
    stub: Any
    channel: grpc.aio.Channel
    http_port: int | None

    def value(self, name: str, **labels: str) -> float | None:
        """Of one sample, by all its labels."""
        return self.watch.metrics.registry.get_sample_value(name, labels)

    async def idle(self) -> None:
        """Wait until every request is counted: a client may have its answer before that."""
        progress = self.watch.metrics.requests_in_progress
        await until(lambda: not (any(sample.value for family in progress.collect() for sample in family.samples)))

    def samples(self) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        """Names and labels of all."""
        families = self.watch.metrics.registry.collect()
        return {(sample.name, tuple(sorted(sample.labels.items()))) for each in families for sample in each.samples}


Watch = Callable[..., AbstractAsyncContextManager[Watched]]


@pytest.fixture
def watched() -> Watch:
    @asynccontextmanager
    async def run(
        backend: FakeBackend | None = None, *, provider: Any = None, accounts: Accounts | None = None, **config: Any
    ) -> AsyncIterator[Watched]:
        backend = backend or FakeBackend()
        tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
        watch = GatewayWatch(backend.models.values(), METHODS, Tracing(provider))
        server = GatewayServer(
            GatewayConfig(port=0, **({"http_port": None} | config)),
            LimitsConfig(),
            backend,
            tokenizers,
            accounts,
            observe=watch.telemetry.observe,
        )
        ports = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                yield Watched(watch, server, backend, stub, channel, ports.http)
        finally:
            await server.stop(0)
            await watch.stop()

    return run
