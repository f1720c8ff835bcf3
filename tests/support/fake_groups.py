"""A backend of several groups that can be killed: real schedulers and engines on fake ranks, all in one event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from bench.chaos.history import Answer
from bench.support.fake_backend import FakeBackend, card
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.engine.request import EngineOutput, EngineRequest
from model_parallel.errors import GroupFailedError
from serving.contracts.errors import GroupUnavailableError
from serving.contracts.group_link import GroupOutputs
from tests.support.engine import Harness
from tests.support.fake_executor import next_token
from tests.support.waiting import until

FINISHED_BY_LENGTH = 2
"""packtrain.v1.FinishReason."""


class FakeGroup:
    """One incarnation of a group."""

    def __init__(self, name: str, survives: Callable[[StepPlan], bool] = lambda plan: True) -> None:
        """Its ranks die in the first step that they do not survive, or when they are killed."""
        self.name = name
        self.harness = Harness(num_blocks=256, max_num_seqs=16, max_num_batched_tokens=256, max_model_len=256)
        self.seeds_of_steps: list[list[int]] = []
        """Of each step: the sampling seeds of the sequences in it."""
        self._queues: dict[str, asyncio.Queue[EngineOutput]] = {}
        self._survives = survives
        self._is_killed = False
        self._collect = self.harness.executor.collect
        self.harness.executor.collect = self._collect_or_die  # type: ignore[method-assign]
        self._task = asyncio.create_task(self._run())

    @property
    def is_lost(self) -> bool:
        return self.harness.engine.failure is not None

    def kill(self) -> None:
        """Its ranks die in the next step."""
        self._is_killed = True

    async def steps(self, num_steps: int) -> None:
        """Until it has made so many more, or nothing is left to do."""
        target = len(self.seeds_of_steps) + num_steps
        await until(lambda: len(self.seeds_of_steps) >= target or not self.harness.engine.has_work)

    def add(self, requests: Sequence[EngineRequest], queue: "asyncio.Queue[EngineOutput]") -> None:
        self.harness.engine.add(*requests)
        self._queues.update(dict.fromkeys([request.request_id for request in requests], queue))

    async def close(self) -> None:
        self.harness.engine.check_integrity()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _collect_or_die(self) -> StepResult:
        plan = self.harness.executor._submitted[0]
        seeds = {seq_id: sequence.sampling.seed for seq_id, sequence in self.harness.executor.sequences.items()}
        seeds |= {new.seq_id: new.sampling.seed for new in plan.new_sequences}
        self.seeds_of_steps.append([seeds[row.seq_id] for row in plan.rows])
        if self._is_killed or not self._survives(plan):
            raise GroupFailedError("rank 1 died")
        return self._collect()

    async def _run(self) -> None:
        while True:
            for output in self.harness.engine.step() if self.harness.engine.has_work else []:
                self._queues[output.request_id].put_nowait(output)
            await asyncio.sleep(0)


class FakeGroups(FakeBackend):
    """Groups that are replaced when the next request comes after they are lost."""

    def __init__(self, num_groups: int, survives: Callable[[StepPlan], bool] = lambda plan: True) -> None:
        super().__init__(cards=[card(num_groups=num_groups, max_model_len=256)])
        self.incarnations: list[FakeGroup] = []
        """All that have ever been."""
        self.living: list[FakeGroup | None] = [None] * num_groups
        self._survives = survives
        self._next = 0

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        group = self._choose()
        queue: asyncio.Queue[EngineOutput] = asyncio.Queue()
        try:
            group.add(requests, queue)
        except GroupFailedError as error:
            raise GroupUnavailableError(str(error), may_have_run=False) from error
        yield GroupOutputs(group.name, ())
        num_open = len(requests)
        while num_open:
            output = await queue.get()
            num_open -= output.finish_reason is not None
            yield GroupOutputs(group.name, (output,))

    def _choose(self) -> FakeGroup:
        """One after the other; a lost one is replaced."""
        place = self._next = (self._next + 1) % len(self.living)
        group = self.living[place]
        if group is None or group.is_lost:
            group = self.living[place] = FakeGroup(f"group-{len(self.incarnations)}", self._survives)
            self.incarnations.append(group)
        return group

    async def close(self) -> None:
        for group in self.incarnations:
            await group.close()


def solo_answer(prompt: Sequence[int], seed: int, num_tokens: int) -> Answer:
    """What the fake ranks answer, worked out without any engine."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seed))
    return Answer(token_ids=tuple(tokens[len(prompt) :]), finish_reason=FINISHED_BY_LENGTH)
