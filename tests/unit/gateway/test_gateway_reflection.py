"""Clients that know nothing but reflection."""

import asyncio
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from bench.support.fake_backend import FakeBackend, say
from tests.unit.gateway.conftest import Serve

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "packtrain.v1.Inference",
]
QUESTION = {"model": "tiny", "prompt": {"text": "hi"}, "sampling": {"temperature": 0, "maxTokens": 5}}


def ask_knowing_nothing(target: str) -> tuple[list[str], Any, list[Any]]:
    """The services, the answer of Generate and that of GenerateStream, by a synchronous client."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("packtrain.v1.Inference")

        def call(name: str) -> Any:
            method = service.methods_by_name[name]
            request = message_factory.GetMessageClass(method.input_type)()
            json_format.ParseDict(QUESTION, request)
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            return make(
                f"/{service.full_name}/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )(request)

        return sorted(database.get_services()), call("Generate"), list(call("GenerateStream"))


async def test_a_generic_client_can_ask(serve: Serve) -> None:
    async with serve(FakeBackend(say("Paris"))) as gateway:
        services, answer, chunks = await asyncio.to_thread(ask_knowing_nothing, gateway.target)
    assert services == SERVICES
    assert answer.choices[0].text == "Paris"
    assert "".join(chunk.text for chunk in chunks) == "Paris"
    assert chunks[-1].usage.completion_tokens == 6


async def test_a_client_of_v1_gets_every_listed_service(serve: Serve) -> None:
    """No stubs of v1 exist for Python: its messages are built from the descriptor that the server itself gives."""
    async with serve() as gateway:
        v1 = gateway.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")

        async def ask(request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
            [answer] = [response async for response in v1([request.SerializeToString()])]
            return reflection_pb2.ServerReflectionResponse.FromString(answer)

        listed = await ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = [service.name for service in listed.list_services_response.service]
        assert names == SERVICES
        for name in names:
            found = await ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            files = {}
            for data in found.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[file.name] = file
            pool = descriptor_pool.DescriptorPool()
            for file in files.values():
                pool.Add(file)  # the pool links them when they are first used
            assert pool.FindServiceByName(name).methods
        unknown = await ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"))
        assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_v1_is_v1alpha_but_for_its_name(serve: Serve) -> None:
    async with serve() as gateway:
        found = {}
        for version in ("v1", "v1alpha"):
            call = gateway.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
            request = reflection_pb2.ServerReflectionRequest(
                file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
            )
            [answer] = [response async for response in call([request.SerializeToString()])]
            response = reflection_pb2.ServerReflectionResponse.FromString(answer)
            [data] = response.file_descriptor_response.file_descriptor_proto
            found[version] = data
    v1 = descriptor_pb2.FileDescriptorProto.FromString(found["v1"])
    v1alpha = descriptor_pb2.FileDescriptorProto.FromString(found["v1alpha"])
    assert v1.package == "grpc.reflection.v1"
    v1alpha.ClearField("options")
    assert str(v1) == str(v1alpha).replace("v1alpha", "v1")


async def test_reflection_can_be_off(serve: Serve) -> None:
    async with serve(reflection=False) as gateway:
        # Nothing is sent: it might go out when the server has ended the stream, which grpc.aio calls INTERNAL.
        call = gateway.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
