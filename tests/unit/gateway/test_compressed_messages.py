"""A small message that inflates to a large one is refused by what it inflates to, before there is any of it."""

import gzip
import struct

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.test_http2_attacks import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    REQUEST_HEADERS,
    RST_STREAM,
    Attacker,
    frame,
    header,
    memory_bytes,
)

BOMB_BYTES = 48 << 20
"""Compressed, it fits into the window of a new stream."""


def prompt(num_bytes: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="x" * num_bytes))


async def test_the_limit_is_on_what_a_message_inflates_to(serve: Serve) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with (
        serve() as gateway,
        grpc.aio.insecure_channel(gateway.target, options, compression=grpc.Compression.Gzip) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert (await stub.Generate(prompt(50))).choices[0].text == "Paris"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(prompt(5 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bomb_takes_no_memory(serve: Serve) -> None:
    bomb = gzip.compress(prompt(BOMB_BYTES).SerializeToString())
    assert len(bomb) < 60_000
    body = b"\1" + struct.pack(">I", len(bomb)) + bomb
    parts = [body[start : start + 16_000] for start in range(0, len(body), 16_000)]
    headers = REQUEST_HEADERS + header(b"grpc-encoding", b"gzip")
    async with serve() as gateway, Attacker.connect(gateway, reads=True) as attacker:
        before = memory_bytes()
        await attacker.send(frame(HEADERS, 1, headers, END_HEADERS))
        for part in parts:
            await attacker.send(frame(DATA, 1, part, END_STREAM if part is parts[-1] else 0))
        await attacker.until((HEADERS, RST_STREAM), 1)
        assert memory_bytes() - before < BOMB_BYTES // 2
        await gateway.stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)
        assert gateway.backend.requests == []
