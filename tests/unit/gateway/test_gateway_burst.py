"""More calls at one moment than the event loop has seen: every one is answered by us."""

import asyncio
from collections import Counter

import grpc

from bench.support.fake_backend import FakeBackend, for_ever
from protos import inference_pb2 as pb
from tests.unit.gateway.conftest import Serve


async def test_no_call_of_a_burst_is_cancelled_by_grpc(serve: Serve) -> None:
    """By default gRPC cancels calls at random when a thousand or more wait for the event loop."""
    num_calls, limit = 2400, 1200

    async def code(call: grpc.aio.UnaryUnaryCall[pb.GenerateRequest, pb.GenerateResponse]) -> grpc.StatusCode:
        return await call.code()

    async with serve(FakeBackend(for_ever), max_concurrent_requests=limit) as gateway:
        request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
        calls = [gateway.stub.Generate(request, timeout=60) for _ in range(num_calls)]
        tasks = [asyncio.create_task(code(call)) for call in calls]
        async with asyncio.timeout(60):
            while sum(task.done() for task in tasks) < num_calls - limit:
                await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        assert Counter(task.result() for task in tasks if task.done()) == {
            grpc.StatusCode.RESOURCE_EXHAUSTED: num_calls - limit
        }
        for call in calls:
            call.cancel()
        await asyncio.gather(*tasks)
