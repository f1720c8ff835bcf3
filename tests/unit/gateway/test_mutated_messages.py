"""Bytes that are almost a request, for every method of both services: each gets a status that says whose fault it is, and it is
never ours.

The one exception is reflection, whose stream grpc reads by itself: what it cannot read there it answers INTERNAL.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from bench.support.fake_backend import FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from model_parallel.errors import ConfigError
from protos import admin_pb2, inference_pb2
from serving.admin.service import AdminServer
from serving.config import AdminConfig
from serving.contracts.errors import ValidationError
from serving.gateway.grpc import convert
from serving.gateway.grpc.convert import explain_undecodable, unknown_fields_of
from serving.tenants.records import KeyGrant, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store
from tests.support.effort import by_day
from tests.support.mutated_messages import mutants
from tests.unit.gateway.conftest import Serve

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
Code = grpc.StatusCode
OURS = {Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.DATA_LOSS, Code.DEADLINE_EXCEEDED}
NUM_AT_A_TIME = 32


async def answers(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """Whatever is asked for, scores among it, in one step."""
    yield tuple(
        EngineOutput(
            request_id=request.request_id,
            choice=request.choice,
            token_ids=(ord("x"),) if request.sampling.max_tokens else (),
            logprobs=(TokenLogprobs(ord("x"), -0.5),) if request.sampling.logprobs is not None else (),
            prompt_logprobs=_prompt_logprobs(request),
            finish_reason=FinishReason.LENGTH,
        )
        for request in requests
    )


def _prompt_logprobs(request: EngineRequest) -> tuple[TokenLogprobs, ...]:
    if request.sampling.prompt_logprobs is None:
        return ()
    start = max(1, request.sampling.prompt_logprobs_start)
    return tuple(TokenLogprobs(token, -0.5, ((token, -0.5),)) for token in request.prompt_token_ids[start:])


async def status_of(channel: grpc.aio.Channel, path: str, data: bytes, metadata: Any) -> grpc.StatusCode:
    """What becomes of a request of these bytes."""
    call: Any = channel.unary_stream(path)(data, metadata=metadata, timeout=60)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


async def throw(
    channel: grpc.aio.Channel, service: ServiceDescriptor, count: int, seed: int, metadata: Any = None
) -> Counter[grpc.StatusCode]:
    """So many mutants, and how often each status came. A status that says that it is the server's fault fails at once, with the
    bytes."""
    kinds = {method.name: GetMessageClass(method.input_type) for method in service.methods}
    seen: Counter[grpc.StatusCode] = Counter()
    endless = mutants(seed, kinds)
    while seen.total() < count:
        batch = list(itertools.islice(endless, NUM_AT_A_TIME))
        paths = [f"/{service.full_name}/{name}" for name, _ in batch]
        codes = await asyncio.gather(
            *(status_of(channel, path, data, metadata) for path, (_, data) in zip(paths, batch, strict=True))
        )
        for code, sent in zip(codes, batch, strict=True):
            assert code not in OURS, (code, sent, seed)
        seen.update(codes)
    return seen


async def throw_at_inference(serve: Serve, count: int, seed: int) -> None:
    async with serve(FakeBackend(answers)) as gateway:
        seen = await throw(gateway.channel, INFERENCE, count, seed)
    assert {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND} <= set(seen), seen


async def throw_at_admin(directory: Path, count: int, seed: int) -> None:
    database = Database(f"sqlite:///{directory / 'tenants.db'}")
    store = Store(database)
    store.create_tenant(Tenant(id="operators", plan="unlimited"))
    key = store.create_key("operators", KeyGrant(is_admin=True, models=())).text
    server = AdminServer(AdminConfig(port=0), store, refresh_s=1.0)
    target = f"127.0.0.1:{await server.start()}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            seen = await throw(channel, ADMIN, count, seed, [("authorization", f"Bearer {key}")])
    finally:
        await server.stop(0)
        database.close()
    assert {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND} <= set(seen), seen


async def test_no_bytes_are_the_gateways_fault(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await throw_at_inference(serve, by_day(1000, by_night=3000), seed=1)
    assert caplog.records == []


async def test_no_bytes_are_the_admin_services_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await throw_at_admin(tmp_path, by_day(400, by_night=1000), seed=2)
    assert caplog.records == []


@pytest.mark.nightly
@pytest.mark.timeout(7200)
async def test_a_million_mutants(serve: Serve, tmp_path: Path) -> None:
    await throw_at_inference(serve, 900_000, seed=3)
    await throw_at_admin(tmp_path, 100_000, seed=4)


def repeated(field: bytes, num_bytes: int) -> bytes:
    return field * (num_bytes // len(field))


def within(number: int, data: bytes) -> bytes:
    """A message in a field of another."""
    size, encoded = len(data), b""
    while size > 127:
        encoded += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (repeated(b"\xb8\x06\x01", 4 << 20), "fields that this server does not know"),
        (within(2, within(3, repeated(b"\x0a\x00", 4_000_000))), "may have 16384"),
    ],
    ids=["unknown fields", "messages"],
)
def test_millions_of_parts_are_counted_and_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.setattr(convert, "_unknown_fields", None)
    request = inference_pb2.GenerateRequest.FromString(within(1, b"tiny") + data)
    with pytest.raises(ValidationError, match=message):
        unknown_fields_of(request)


def test_millions_of_unreadable_parts_are_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_unknown_fields", None)
    data = repeated(b"\x0a\x01x", 4 << 20) + within(1, b"\xff")
    error = explain_undecodable(inference_pb2.GenerateRequest.DESCRIPTOR, data)
    assert "not a readable" in str(error)


async def test_protobufs_own_parser_in_python_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-4565: it recurses without a bound."""
    monkeypatch.setattr("google.protobuf.internal.api_implementation.Type", lambda: "python")
    with pytest.raises(ConfigError, match="PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"):
        async with serve():
            pass
