"""Over gRPC as over HTTP, nothing but health is there without a key, however a method's name is written."""

from contextlib import suppress
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.test_http_server import FakeAccounts, keyed

UNAUTHENTICATED, UNIMPLEMENTED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED
GOOD = (("authorization", "Bearer good"),)
REFLECTION = [f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")]
METHODS = [f"/packtrain.v1.Inference/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Inference"].methods]
OTHER_NAMES = [
    "//packtrain.v1.Inference/Generate", "/packtrain.v1.Inference//Generate", "/packtrain.v1.Inference/Generate/",
    "/packtrain.v1.Inference/generate", "/PACKTRAIN.V1.INFERENCE/Generate", "/packtrain.v1.Inference/%47enerate",
    "/grpc.health.v1.Health/../packtrain.v1.Inference/Generate", "/packtrain.v1.Admin/ListKeys",
    "/grpc.health.v1.Health/Generate", "/", "",
]  # fmt: skip
WRONG: list[tuple[tuple[str, str | bytes], ...]] = [
    (), (("authorization", "Bearer bad"),), (("authorization", "good"),), GOOD * 2, (("authorization", "Bearer ' OR 1=1 --"),),
    (("authorization", "Bearer " + "k" * 4000),), (("x-api-key", "good"),), (("authorization-bin", b"Bearer good"),),
]  # fmt: skip


async def code_of(channel: grpc.aio.Channel, path: str, metadata: Any) -> grpc.StatusCode:
    """Of an empty request; of reflection, of none: a message that goes out when the server has ended the stream makes
    grpc.aio's client say INTERNAL."""
    call: Any
    if path in REFLECTION:
        call = channel.stream_stream(path)(metadata=metadata, timeout=PATIENCE_S)
        return await call.code()  # type: ignore[no-any-return]
    call = channel.unary_stream(path)(b"", metadata=metadata, timeout=PATIENCE_S)
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


@pytest.mark.parametrize("metadata", WRONG, ids=lambda value: str(value)[:40])
async def test_every_method_needs_a_key(metadata: Any) -> None:
    async with keyed(FakeAccounts()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        for path in METHODS + REFLECTION:
            assert await code_of(channel, path, metadata) is UNAUTHENTICATED, path
        assert await code_of(channel, "/grpc.health.v1.Health/Check", metadata) is grpc.StatusCode.OK
        assert gateway.backend.requests == []


async def test_no_other_name_leads_to_a_method() -> None:
    async with keyed(FakeAccounts()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        for metadata in ((), GOOD):
            for path in OTHER_NAMES:
                assert await code_of(channel, path, metadata) is UNIMPLEMENTED, path
        for path in METHODS:
            assert await code_of(channel, path, GOOD) not in (UNAUTHENTICATED, UNIMPLEMENTED), path
        assert gateway.backend.requests == []
