"""A request that ends every group that computes it, among others that do not: real schedulers on fake ranks."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from model_parallel.engine.messages import StepPlan
from protos import inference_pb2 as pb
from serving.gateway.core import generation
from tests.support.fake_executor import VOCAB_SIZE
from tests.support.fake_groups import FakeGroups, solo_answer
from tests.unit.gateway.conftest import Serve

POISON = VOCAB_SIZE + 1
"""A token that no rank survives, and that none draws."""
POISONED_SEED = 1000
NUM_TOKENS = 30
NUM_NEIGHBOURS = 5


def survives(plan: StepPlan) -> bool:
    return not any(POISON in new.token_ids for new in plan.new_sequences)


def query(prompt: Sequence[int], seed: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="tiny",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
        sampling=pb.Sampling(max_tokens=NUM_TOKENS, seed=seed, ignore_eos=True),
    )


async def test_its_neighbours_finish_with_their_tokens_and_it_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 0.0)
    backend = FakeGroups(1, survives)
    async with serve(backend) as gateway:
        calls: list[Any] = []
        for seed in range(NUM_NEIGHBOURS):
            calls.append(gateway.stub.Generate(query([1, 2, seed], seed), timeout=60))
        poisoned = gateway.stub.Generate(query([POISON, 1], POISONED_SEED), timeout=60)
        answers = await asyncio.gather(*calls)
        assert await poisoned.code() is grpc.StatusCode.INTERNAL
    for seed, answer in enumerate(answers):
        assert tuple(answer.choices[0].token_ids) == solo_answer([1, 2, seed], seed, NUM_TOKENS).token_ids
    lost = [group for group in backend.incarnations if group.is_lost]
    assert len(lost) == 3
    assert lost[-1].seeds_of_steps[-1] == [POISONED_SEED], "it died alone"
    await backend.close()
