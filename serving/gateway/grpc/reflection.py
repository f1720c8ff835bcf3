"""gRPC reflection under both of its names. v1 is v1alpha renamed: same messages, same numbers, same bytes."""

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_SERVICES = (f"{_V1}.ServerReflection", f"{_V1ALPHA}.ServerReflection")


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Serve descriptions of `services` (full names, in protobuf's default pool) and of reflection itself."""
    servicer = reflection.aio.ReflectionServicer((*services, *_SERVICES), pool=_pool(services))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in _SERVICES)
    )


def _pool(services: Sequence[str]) -> descriptor_pool.DescriptorPool:
    """A pool of exactly the files that clients may see: adding v1 to the default pool would change it for all."""
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        pool.AddSerializedFile(file.serialized_pb)

    for service in (*services, f"{_V1ALPHA}.ServerReflection"):
        add(descriptor_pool.Default().FindFileContainingSymbol(service))
    pool.AddSerializedFile(_v1_file().SerializeToString())
    return pool


def _v1_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = _V1
    file.ClearField("options")  # names for generators of other languages, which say v1alpha too
    for message in file.message_type:
        for field in (field for field in message.field if field.HasField("type_name")):
            field.type_name = field.type_name.replace(f".{_V1ALPHA}.", f".{_V1}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(f".{_V1ALPHA}.", f".{_V1}.")
        method.output_type = method.output_type.replace(f".{_V1ALPHA}.", f".{_V1}.")
    return file
