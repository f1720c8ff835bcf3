"""gRPC calls that are cancelled at any moment: before they arrive, while they wait, in the middle, at the last message."""

import asyncio
import logging
import random
from contextlib import suppress

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, say
from protos import inference_pb2 as pb
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Running, Serve

ASK = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
NUM_PERMITS = 64


async def cancelled_somewhen(gateway: Running, rng: random.Random) -> bool:
    """Whether it was before its end."""
    call = getattr(gateway.stub, rng.choice(["Generate", "GenerateStream"]))(ASK)
    for _ in range(rng.randrange(40)):
        await asyncio.sleep(0)
    is_early = not call.done()
    call.cancel()
    with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call.code()
    return is_early


async def ask_all(gateway: Running) -> list[str | grpc.StatusCode]:
    """As many as there are permits: what they were told, or the status."""
    calls = [gateway.stub.Generate(ASK, timeout=30) for _ in range(NUM_PERMITS)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [each.code() if isinstance(each, grpc.aio.AioRpcError) else each.choices[0].text for each in answers]


async def cancel(serve: Serve, count: int, seed: int) -> None:
    rng = random.Random(seed)
    num_early = 0
    async with serve(FakeBackend(say("a few tokens")), max_concurrent_requests=NUM_PERMITS) as gateway:
        for _ in range(count // 32):
            num_early += sum(await asyncio.gather(*(cancelled_somewhen(gateway, rng) for _ in range(32))))
        await gateway.backend.closed()
        async with asyncio.timeout(PATIENCE_S):
            while (said := await ask_all(gateway)) != ["a few tokens"] * NUM_PERMITS:
                # gRPC refuses new streams while it is still taking too many cancelled ones apart, and nothing else may go wrong.
                assert set(said) <= {"a few tokens", grpc.StatusCode.UNAVAILABLE}, said
                await asyncio.sleep(0.01)
    assert num_early > count // 4


async def test_every_moment_to_cancel_leaves_nothing_behind(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await cancel(serve, 640, seed=1)
    assert caplog.records == []


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_ten_thousand_cancels(serve: Serve) -> None:
    await cancel(serve, 10_000, seed=2)
