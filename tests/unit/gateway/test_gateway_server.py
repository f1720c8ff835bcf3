import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.support.fake_backend import ByteTokenizer, FakeBackend, for_ever
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.grpc import health
from serving.gateway.server import GatewayServer
from tests.support.waiting import PATIENCE_S, until
from tests.unit.gateway.conftest import Serve

INFERENCE = "packtrain.v1.Inference"
Status = health_pb2.HealthCheckResponse
ASK = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))


def server(backend: FakeBackend | None = None, **config: Any) -> GatewayServer:
    backend = backend or FakeBackend()
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    return GatewayServer(GatewayConfig(**{"http_port": 0, **config}), LimitsConfig(), backend, tokenizers)


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
def test_an_open_address_needs_insecure(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if host == "example.com":  # a name server need not be in reach
        monkeypatch.setattr("serving.gateway.server.resolve", lambda name: ["192.0.2.1"])
    with pytest.raises(ConfigError, match="insecure"):
        server(host=host)
    server(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost"])
async def test_loopback_needs_nothing(host: str) -> None:
    gateway = server(host=host, port=0)
    ports = await gateway.start()
    assert ports.grpc > 0
    assert ports.http
    await gateway.stop()
    await gateway.stop()  # again is harmless


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = server(port=port)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await gateway.start()
        await gateway.stop()


async def test_two_gateways_cannot_share_a_port() -> None:
    first = server(port=0)
    ports = await first.start()
    for taken in ({"port": ports.grpc}, {"port": 0, "http_port": ports.http}):
        second = server(**taken)
        with pytest.raises(ConfigError, match=str([*taken.values()][-1])):
            await second.start()
        await second.stop()
    await first.stop()


def test_every_model_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="plain"):
        GatewayServer(GatewayConfig(), LimitsConfig(), FakeBackend(), {"tiny": ByteTokenizer()})  # type: ignore[dict-item]


async def test_health_follows_the_groups(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    backend.healthy = {"tiny": False, "plain": False}
    async with serve(backend) as gateway:
        stub = health_pb2_grpc.HealthStub(gateway.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
        assert (await watch.read()).status == Status.NOT_SERVING
        for name in ("", INFERENCE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == Status.NOT_SERVING
        backend.healthy["plain"] = True
        assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == Status.SERVING
        listed = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: each.status for name, each in listed.items()} == {"": Status.SERVING, INFERENCE: Status.SERVING}
        watch.cancel()


async def test_a_method_that_nobody_has_written_is_told_so(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(health._Servicer, "List")
    async with serve(FakeBackend()) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health_pb2_grpc.HealthStub(gateway.channel).List(health_pb2.HealthListRequest())
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error.value.details() == "/grpc.health.v1.Health/List is not implemented by this server"
        assert "Traceback" not in caplog.text


async def test_health_of_an_unknown_service(serve: Serve) -> None:
    async with serve() as gateway:
        stub = health_pb2_grpc.HealthStub(gateway.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == Status.SERVICE_UNKNOWN
        watch.cancel()


async def test_a_backend_that_breaks_its_word_is_not_serving(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(model: str) -> int:
        raise OSError("gone")

    backend = FakeBackend()
    monkeypatch.setattr(backend, "can_serve", broken)
    async with serve(backend) as gateway:
        stub = health_pb2_grpc.HealthStub(gateway.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING
    assert "gone" in caplog.text


async def test_a_full_gateway_refuses_at_once(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), max_concurrent_requests=2) as gateway:
        running = [gateway.stub.GenerateStream(ASK) for _ in range(2)]
        for call in running:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.ListModels(pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
        # Health asks for no permit.
        assert (await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())).status
        running[0].cancel()
        await eventually(lambda: _answers(gateway.stub))
        running[1].cancel()


async def _answers(stub: Any) -> bool:
    try:
        await stub.ListModels(pb.ListModelsRequest())
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_a_drain_lets_running_requests_finish(serve: Serve) -> None:
    more = asyncio.Event()

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        name = requests[0].request_id
        yield (EngineOutput(request_id=name, token_ids=(ord("a"),)),)
        await more.wait()
        yield (EngineOutput(request_id=name, token_ids=(ord("c"),), finish_reason=FinishReason.LENGTH),)

    async with serve(FakeBackend(script), drain_timeout_s=30) as gateway:
        health = health_pb2_grpc.HealthStub(gateway.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        stream = gateway.stub.GenerateStream(ASK)
        assert (await stream.read()).text == "a"
        drain = asyncio.create_task(gateway.server.drain())
        assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Generate(ASK)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
        assert not drain.done()
        more.set()
        assert (await stream.read()).text == "c"
        assert await stream.read() is grpc.aio.EOF
        await asyncio.wait_for(drain, PATIENCE_S)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING
        watch.cancel()


async def test_a_drain_ends_what_takes_too_long(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), drain_timeout_s=0.1) as gateway:
        stream = gateway.stub.GenerateStream(ASK)
        await stream.read()
        unary = gateway.stub.Generate(ASK)
        await until(lambda: gateway.backend.num_open == 2)
        await asyncio.wait_for(gateway.server.drain(), PATIENCE_S)
        assert gateway.backend.num_open == 0
        for call in (stream, unary):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "stopped before the answer was complete" in await call.details()


async def test_a_gateway_starts_once() -> None:
    gateway = server(port=0)
    await gateway.start()
    with pytest.raises(RuntimeError, match="once"):
        await gateway.start()
    await gateway.stop()


async def test_an_unknown_method_is_unimplemented(serve: Serve) -> None:
    async with serve() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_unary("/packtrain.v1.Inference/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_that_does_not_read_is_paused_then_ended(serve: Serve) -> None:
    async def flood(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        while True:
            yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("x"),) * 10_000),)
            await asyncio.sleep(0)

    # The window of HTTP/2 stays at 64 KiB; one that grows with the rate takes in megabytes before anything is left unread.
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    async with (
        serve(FakeBackend(flood), slow_reader_timeout_s=0.3) as gateway,
        grpc.aio.insecure_channel(gateway.target, options=small_window) as channel,
    ):
        stream = InferenceStub(channel).GenerateStream(ASK)
        await stream.read()
        await gateway.backend.closed()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await stream.read() is not grpc.aio.EOF:
                pass
            raise AssertionError("it must not end well")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "unread" in str(caught.value.details())
