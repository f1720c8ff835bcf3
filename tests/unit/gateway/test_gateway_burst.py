"""More calls at one moment than the event loop has seen: every one is answered by us."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, for_ever
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve


async def test_no_call_of_a_burst_is_cancelled_by_grpc(serve: Serve) -> None:
    """By default gRPC cancels calls at random when a thousand or more wait for the event loop."""
    num_calls, limit = 1600, 800

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


GRPC_PATIENCE_S = 30.0
"""How long a call may wait for the event loop before gRPC cancels it, unless it is told otherwise."""


@pytest.mark.nightly
async def test_a_call_that_waits_long_for_a_busy_gateway_is_answered(serve: Serve) -> None:
    """CANCELLED is what a client has asked for, and no client tries again after it."""
    num_early = 5
    request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))

    def ask(target: str, after_s: float) -> str:
        time.sleep(after_s)
        with grpc.insecure_channel(target) as channel:
            return str(InferenceStub(channel).Generate(request, timeout=2 * PATIENCE_S).choices[0].text)

    async with serve() as gateway:
        with ThreadPoolExecutor(num_early + 1) as pool:
            # It is when another call comes that gRPC looks for those that have waited too long.
            delays_s = [0.0] * num_early + [GRPC_PATIENCE_S + 2]
            calls = [pool.submit(ask, gateway.target, after_s) for after_s in delays_s]
            time.sleep(GRPC_PATIENCE_S + 4)  # in the event loop
            answers = await asyncio.gather(*map(asyncio.wrap_future, calls))
    assert answers == ["Paris"] * len(calls)
