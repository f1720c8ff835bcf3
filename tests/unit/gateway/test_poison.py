"""A request that ends every group that computes it, among others that do not: real schedulers on fake ranks."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, card
from model_parallel.engine.messages import StepResult
from model_parallel.engine.request import EngineOutput, EngineRequest
from model_parallel.errors import GroupFailedError
from protos import inference_pb2 as pb
from serving.contracts.errors import GroupUnavailableError
from serving.contracts.group_link import GroupOutputs
from serving.gateway.core import generation
from tests.support.engine import Harness
from tests.support.fake_executor import VOCAB_SIZE, next_token
from tests.unit.gateway.conftest import Serve

POISON = VOCAB_SIZE + 1
"""A token that no rank survives, and that none draws."""
NUM_TOKENS = 30
NUM_NEIGHBOURS = 5


class Group:
    """One incarnation of a group. Its ranks die in the first step that has the poison."""

    def __init__(self) -> None:
        self.harness = Harness()
        self.queues: dict[str, asyncio.Queue[EngineOutput]] = {}
        collect = self.harness.executor.collect
        self.steps: list[list[int]] = []
        """The sampling seeds of what each step computed."""

        def dies_of_poison() -> StepResult:
            plan = self.harness.executor._submitted[0]
            fake_ranks = self.harness.executor.sequences
            poisoned = [new for new in plan.new_sequences if POISON in new.token_ids]
            seeds = {new.seq_id: new.sampling.seed for new in plan.new_sequences}
            seeds |= {seq_id: sequence.sampling.seed for seq_id, sequence in fake_ranks.items()}
            self.steps.append([seeds[row.seq_id] for row in plan.rows])
            if poisoned:
                raise GroupFailedError("rank 1 died")
            return collect()

        self.harness.executor.collect = dies_of_poison  # type: ignore[method-assign]
        self._task = asyncio.create_task(self._run())

    @property
    def is_lost(self) -> bool:
        return self.harness.engine.failure is not None

    def add(self, requests: Sequence[EngineRequest], queue: "asyncio.Queue[EngineOutput]") -> None:
        self.harness.engine.add(*requests)
        self.queues.update(dict.fromkeys([request.request_id for request in requests], queue))

    async def _run(self) -> None:
        while True:
            for output in self.harness.engine.step() if self.harness.engine.has_work else []:
                self.queues[output.request_id].put_nowait(output)
            await asyncio.sleep(0)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class OneGroup(FakeBackend):
    """A backend of one group, which is replaced as soon as it is lost."""

    def __init__(self) -> None:
        super().__init__(cards=[card()])
        self.groups: list[Group] = []

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        if not self.groups or self.groups[-1].is_lost:
            self.groups.append(Group())
        queue: asyncio.Queue[EngineOutput] = asyncio.Queue()
        try:
            self.groups[-1].add(requests, queue)
        except GroupFailedError as error:
            raise GroupUnavailableError(str(error), may_have_run=False) from error
        engine = f"g{len(self.groups)}"
        yield GroupOutputs(engine, ())
        num_open = len(requests)
        while num_open:
            output = await queue.get()
            num_open -= output.finish_reason is not None
            yield GroupOutputs(engine, (output,))


def query(prompt: Sequence[int], seed: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="tiny",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
        sampling=pb.Sampling(max_tokens=NUM_TOKENS, seed=seed, ignore_eos=True),
    )


def solo(prompt: Sequence[int], seed: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


async def test_its_neighbours_finish_with_their_tokens_and_it_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 0.0)
    backend = OneGroup()
    poisoned_seed = 1000
    async with serve(backend) as gateway:
        calls: list[Any] = []
        for seed in range(NUM_NEIGHBOURS):
            calls.append(gateway.stub.Generate(query([1, 2, seed], seed), timeout=60))
        poisoned = gateway.stub.Generate(query([POISON, 1], poisoned_seed), timeout=60)
        answers = await asyncio.gather(*calls)
        assert await poisoned.code() is grpc.StatusCode.INTERNAL
    for seed, answer in enumerate(answers):
        assert list(answer.choices[0].token_ids) == solo([1, 2, seed], seed)
    lost = [group for group in backend.groups if group.is_lost]
    assert len(lost) == 3
    assert lost[-1].steps[-1] == [poisoned_seed], "it died alone"
    for group in backend.groups:
        group.harness.engine.check_integrity()
        await group.close()
