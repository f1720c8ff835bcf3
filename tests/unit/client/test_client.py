"""The key goes with every call of the client, and only when there is one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.client.client import Client
from tests.support.waiting import PATIENCE_S


class Recorder(inference_pb2_grpc.InferenceServicer):
    """Notes the credentials of each call."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._note(context)
        return pb.ListModelsResponse()

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
        self._note(context)
        yield pb.GenerateStreamResponse(text="a")

    def _note(self, context: Any) -> None:
        self.seen.append([str(value) for key, value in context.invocation_metadata() if key == "authorization"])


@pytest.mark.parametrize(
    ("api_key", "expected"), [("pt_1_2", ["Bearer pt_1_2"]), (" pt_1_2\n", ["Bearer pt_1_2"]), ("", []), ("\n", [])]
)
def test_the_key_goes_with_unary_and_streamed_calls(api_key: str, expected: list[str]) -> None:
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(recorder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", api_key=api_key) as client:
            client.models()
            chunks, _ = client.stream(pb.GenerateRequest(), timeout_s=PATIENCE_S)
            assert [chunk.text for chunk in chunks] == ["a"]
    finally:
        server.stop(0).wait(PATIENCE_S)
    assert recorder.seen == [expected, expected]


@pytest.mark.parametrize("api_key", ["a b", "a\nb", "a\0b", "ключ-secret", "a\x7f"])
def test_a_key_that_can_never_be_sent_is_refused_at_once(api_key: str) -> None:
    with pytest.raises(ConfigError, match="api_key holds a space, or a character that is not ASCII") as caught:
        Client("127.0.0.1:1", "127.0.0.1:2", api_key=api_key)
    assert api_key not in str(caught.value)
