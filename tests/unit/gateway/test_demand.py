"""What a gateway counts for the autoscaler: everything that groups are asked for, once, whatever becomes of it."""

from collections.abc import AsyncIterator, Sequence

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, say
from model_parallel.engine.request import EngineOutput, EngineRequest
from protos import inference_pb2 as pb
from serving.contracts.errors import GroupRefusedError
from serving.contracts.fleet import ModelDemand
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve


def ask(num_choices: int = 1, **sampling: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(n=num_choices, **sampling)
    )


async def refuse(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    raise GroupRefusedError("full", kind="overloaded", engine="g1", retry_after_s=60.0)
    yield ()


async def test_choices_and_their_prompts_are_counted(serve: Serve) -> None:
    async with serve(FakeBackend(say("a", "b"))) as gateway:
        await gateway.stub.Generate(ask(2), timeout=PATIENCE_S)
        assert gateway.server.demand == {"tiny": ModelDemand(2, 2 * 3), "plain": ModelDemand(0, 0)}


async def test_refused_requests_are_demand_too(serve: Serve) -> None:
    """Also those that are refused without asking a group again."""
    async with serve(FakeBackend(refuse)) as gateway:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                await gateway.stub.Generate(ask(), timeout=PATIENCE_S)
        assert gateway.server.demand["tiny"] == ModelDemand(3, 3 * 3)


async def test_what_no_group_will_ever_be_asked_for_is_none(serve: Serve) -> None:
    async with serve() as gateway:
        with pytest.raises(grpc.RpcError):
            await gateway.stub.Generate(ask(max_tokens=100_000), timeout=PATIENCE_S)
        assert gateway.server.demand["tiny"] == ModelDemand(0, 0)
