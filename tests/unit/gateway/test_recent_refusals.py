"""What a gateway does not ask a full group again, and what it does."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, card
from model_parallel.engine.request import EngineOutput, EngineRequest, SamplingParams
from protos import inference_pb2 as pb
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import ModelCard
from serving.gateway.core import admission
from serving.gateway.core.admission import (
    MAX_REMEMBERED,
    MAX_REMEMBERED_S,
    REMEMBERED_S,
    REMEMBERED_SHARE,
    RecentRefusals,
)
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve

FULL = GroupRefusedError("64 requests are waiting; at most 64 may", kind="overloaded", retry_after_s=3.0)


def demand(
    num_prompt: int = 10, max_tokens: int = 20, deadline_s: float | None = 5.0, tenant: str = "a", priority: int = 0
) -> list[EngineRequest]:
    sampling = SamplingParams(max_tokens=max_tokens)
    return [
        EngineRequest(
            request_id="r",
            prompt_token_ids=(1,) * num_prompt,
            sampling=sampling,
            deadline_s=deadline_s,
            tenant=tenant,
            priority=priority,
        )
    ]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def is_asked(refusals: RecentRefusals, requests: Sequence[EngineRequest], num_groups: int = 1) -> bool:
    try:
        refusals.check("m", num_groups, requests)
    except GroupRefusedError as error:
        assert (str(error), error.kind, error.retry_after_s) == (str(FULL), "overloaded", 3.0)
        return False
    return True


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (demand(), False),
        (demand(num_prompt=11, max_tokens=21, deadline_s=4.0), False),
        (demand(deadline_s=5.05), False),  # as good as the same moment
        (demand() * 2, False),
        (demand(num_prompt=9), True),
        (demand(max_tokens=19), True),
        (demand(deadline_s=6.0), True),
        (demand(deadline_s=None), True),
        (demand(tenant="b"), True),
        (demand(priority=-1), True),
    ],
)
def test_a_refusal_holds_for_what_asks_for_as_much(requests: list[EngineRequest], expected: bool) -> None:
    refusals = RecentRefusals(Clock())
    assert is_asked(refusals, requests)
    refusals.remember("m", "group-1", demand(), FULL)
    assert is_asked(refusals, requests) is expected


@pytest.mark.parametrize(
    ("retry_after_s", "held_s"),
    [(3.0, 3.0 * REMEMBERED_SHARE), (0.01, 0.01 * REMEMBERED_SHARE), (100.0, MAX_REMEMBERED_S), (None, REMEMBERED_S)],
)
def test_it_holds_for_a_part_of_the_time_until_there_is_room(retry_after_s: float | None, held_s: float) -> None:
    clock = Clock()
    refusals = RecentRefusals(clock)
    error = GroupRefusedError(str(FULL), kind="overloaded", retry_after_s=retry_after_s)
    refusals.remember("m", "group-1", demand(), error)
    clock.now_s += 0.49 * held_s
    with pytest.raises(GroupRefusedError):
        refusals.check("m", 1, demand())
    clock.now_s += 0.52 * held_s
    refusals.check("m", 1, demand())


def test_all_groups_have_to_be_full() -> None:
    refusals = RecentRefusals(Clock())
    for _ in range(2):
        refusals.remember("m", "group-1", demand(), FULL)
    assert is_asked(refusals, demand(), num_groups=2)
    refusals.remember("m", "group-2", demand(), FULL)
    assert not is_asked(refusals, demand(), num_groups=2)


def test_what_is_easier_takes_the_place() -> None:
    refusals = RecentRefusals(Clock())
    for max_tokens in (30, 10, 20):
        refusals.remember("m", "group-1", demand(max_tokens=max_tokens), FULL)
    assert not is_asked(refusals, demand(max_tokens=10))


def test_old_refusals_are_forgotten() -> None:
    clock = Clock()
    refusals = RecentRefusals(clock)
    for number in range(3 * MAX_REMEMBERED):
        clock.now_s += MAX_REMEMBERED_S
        refusals.remember("m", "group-1", demand(tenant=str(number)), FULL)
    assert len(refusals._refused) <= MAX_REMEMBERED


async def test_a_burst_asks_a_full_group_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REMEMBERED_SHARE", "REMEMBERED_S", "MAX_REMEMBERED_S"):  # however slow the machine is
        monkeypatch.setattr(admission, name, 1000.0)
    num_asked = 0

    async def refuse(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        nonlocal num_asked
        num_asked += 1
        raise GroupRefusedError(str(FULL), kind="overloaded", engine="group-1", retry_after_s=3.0)
        yield ()  # makes it a generator

    async with serve(FakeBackend(refuse)) as gateway:
        request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(max_tokens=5))

        async def code() -> grpc.StatusCode:
            return await gateway.stub.Generate(request, timeout=PATIENCE_S).code()

        assert await code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert num_asked == 1
        codes = await asyncio.gather(*(code() for _ in range(20)))
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert num_asked == 1


REFUSED = GroupUnavailableError("the replica group was lost", may_have_run=False)
LOST = GroupUnavailableError("the replica group was lost")


@pytest.mark.parametrize(
    ("answers", "expected", "num_asked"),
    [
        ([FULL, None], "OK", 2),
        ([REFUSED, FULL, None], "OK", 3),
        ([FULL, REFUSED, FULL], "RESOURCE_EXHAUSTED", 3),
        ([FULL, FULL, REFUSED], "UNAVAILABLE", 3),
        ([LOST, None], "UNAVAILABLE", 1),
        ([GroupRefusedError("the prompt is empty", kind="invalid"), None], "INVALID_ARGUMENT", 1),
    ],
)
async def test_one_group_after_the_other_is_asked_until_one_takes_the_request(
    serve: Serve, answers: Sequence[Exception | None], expected: str, num_asked: int
) -> None:
    cards = [card(num_groups=3)]
    backend = RefusingBackend(answers, cards)
    async with serve(backend) as gateway:
        request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(max_tokens=5))
        assert (await gateway.stub.Generate(request, timeout=PATIENCE_S).code()).name == expected
    assert backend.num_asked == num_asked


class RefusingBackend(FakeBackend):
    """Answers in order; None is a real answer. Each comes from another group."""

    def __init__(self, answers: Sequence[Exception | None], cards: Sequence[ModelCard]) -> None:
        super().__init__(cards=cards)
        self._answers = answers
        self.num_asked = 0

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        self.num_asked += 1
        engine, error = f"group-{self.num_asked}", self._answers[self.num_asked - 1]
        if isinstance(error, GroupRefusedError):
            raise GroupRefusedError(str(error), kind=error.kind, engine=engine, retry_after_s=error.retry_after_s)
        if error is not None:
            raise error
        async for step in super().generate(model, requests, trace_context):
            yield step
