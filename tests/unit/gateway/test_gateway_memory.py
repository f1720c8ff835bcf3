"""Requests that have ended leave nothing behind in the gateway, however they ended."""

import asyncio

import grpc
import psutil
import pytest

from bench.support.fake_backend import FakeBackend, say
from protos import inference_pb2 as pb
from tests.support.live_objects import LiveObjects
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Running, Serve
from tests.unit.gateway.http_client import CHAT, client

NUM_FIRST_ROUNDS, NUM_ROUNDS, REQUESTS_A_ROUND = 80, 150, 6


async def _serve(gateway: Running, num_rounds: int) -> None:
    """In each round an answer, a stream, one that is left half way and a mistake over gRPC, and two over HTTP."""
    async with client(gateway) as http:
        for _ in range(num_rounds):
            request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
            await gateway.stub.Generate(request)
            async for _ in gateway.stub.GenerateStream(request):
                pass
            left = gateway.stub.GenerateStream(request)
            await left.read()
            left.cancel()
            with pytest.raises(grpc.aio.AioRpcError):
                await gateway.stub.Generate(pb.GenerateRequest(model="nobody"))
            for stream in (False, True):
                assert (await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})).is_success
    await gateway.backend.closed()


async def test_requests_leave_nothing_behind(serve: Serve) -> None:
    process = psutil.Process()
    async with serve(FakeBackend(say("one two three")), http_port=0) as gateway, asyncio.timeout(4 * PATIENCE_S):
        # Caches and free lists fill up: after 30 rounds some 600 blocks of memory are still to come, after 100 some 300.
        await _serve(gateway, NUM_FIRST_ROUNDS)
        before, num_fds, num_threads = LiveObjects(), process.num_fds(), process.num_threads()
        await _serve(gateway, NUM_ROUNDS)
        assert before.leaked(NUM_ROUNDS * REQUESTS_A_ROUND) == {}
        # One or two may come and go with connections; a leak would be of one a request.
        assert process.num_fds() - num_fds < NUM_ROUNDS // 10
        assert process.num_threads() - num_threads < NUM_ROUNDS // 10
