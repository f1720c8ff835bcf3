"""Groups are lost at any token; the client gets what one group alone would have sent, and is charged once."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import FakeBackend, card
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from protos import inference_pb2 as pb
from serving.contracts.errors import (
    GroupCallLostError,
    GroupDrainingError,
    GroupRefusedError,
    GroupSilentError,
    GroupUnavailableError,
)
from serving.contracts.group_link import GroupOutputs
from serving.gateway.core import generation
from serving.gateway.core.resumption import Resumption
from tests.unit.gateway.conftest import Serve

PROMPT = (1, 2, 3)


def drawn(choice: int, position: int) -> int:
    """What any group draws there: a function of choice and position alone."""
    return 97 + (7 * choice + position * position) % 26


def solo(choice: int, num_tokens: int) -> list[int]:
    return [drawn(choice, position) for position in range(num_tokens)]


class MortalBackend(FakeBackend):
    """Groups that die after so many tokens, in the way that is asked for; the one after the last lives."""

    def __init__(self, lives: Sequence[int], death: str = "connection", refusals: int = 0) -> None:
        super().__init__(cards=[card(num_groups=2)])
        self._lives = list(lives)
        self._death = death
        self._num_refusals = refusals
        self.asked: list[list[EngineRequest]] = []

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        if self.asked and self._num_refusals:
            self._num_refusals -= 1
            raise GroupRefusedError("full", kind="overloaded", engine="g-full", retry_after_s=0.1)
        self.asked.append(list(requests))
        engine = f"g{len(self.asked)}"
        life = self._lives.pop(0) if self._lives else 10**9
        yield GroupOutputs(engine, ())
        delivered = {request.choice: list(request.output_token_ids) for request in requests}
        while any(len(tokens) < requests[0].sampling.max_tokens for tokens in delivered.values()):
            outputs = []
            for request in requests:
                tokens = delivered[request.choice]
                if len(tokens) == request.sampling.max_tokens:
                    continue
                if life == 0:
                    if self._death != "connection":
                        error: dict[str, Any] = {
                            "finish_reason": FinishReason.ERROR,
                            "error": "lost",
                            "error_kind": "unavailable",
                            "was_waiting": self._death == "waiting",
                        }
                        yield GroupOutputs(
                            engine, (EngineOutput(request_id=request.request_id, choice=request.choice, **error),)
                        )
                    raise GroupUnavailableError("the replica group was lost")
                life -= 1
                tokens.append(drawn(request.choice, len(tokens)))
                is_last = len(tokens) == request.sampling.max_tokens
                outputs.append(
                    EngineOutput(
                        request_id=request.request_id,
                        choice=request.choice,
                        token_ids=(tokens[-1],),
                        finish_reason=FinishReason.LENGTH if is_last else None,
                    )
                )
            yield GroupOutputs(engine, tuple(outputs))


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 0.0)


def query(max_tokens: int, n: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="tiny",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT)),
        sampling=pb.Sampling(max_tokens=max_tokens, n=n, seed=5, ignore_eos=True),
    )


@pytest.mark.parametrize("death", ["connection", "output"])
@pytest.mark.parametrize(("lives", "n"), [([0], 1), ([1], 1), ([7], 2), ([3, 0], 1), ([2, 9], 3)])
async def test_a_stream_goes_on_where_the_lost_group_stopped(
    serve: Serve, lives: list[int], n: int, death: str
) -> None:
    backend = MortalBackend(lives, death)
    async with serve(backend) as gateway:
        tokens: dict[int, list[int]] = {choice: [] for choice in range(n)}
        summary: Any = None
        async for chunk in gateway.stub.GenerateStream(query(12, n), timeout=60):
            tokens[chunk.index] += chunk.token_ids
            summary = chunk
    assert tokens == {choice: solo(choice, 12) for choice in range(n)}
    assert summary.usage.completion_tokens == 12 * n
    assert len(backend.asked) == len(lives) + 1
    ids = [request.request_id for requests in backend.asked for request in requests]
    assert len(set(ids)) == len(ids), "what a lost group still sends belongs to nobody"


async def test_a_group_that_is_full_is_asked_again(serve: Serve) -> None:
    backend = MortalBackend([4], refusals=5)
    async with serve(backend) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)


async def test_a_request_that_ends_group_after_group_runs_alone_and_then_ends(serve: Serve) -> None:
    backend = MortalBackend([1] * 20)
    async with serve(backend) as gateway:
        call = gateway.stub.Generate(query(12, 1), timeout=60)
        assert await call.code() is grpc.StatusCode.INTERNAL
        assert "3 replica groups were lost while they ran it" in await call.details()
    assert [[request.runs_alone for request in requests] for requests in backend.asked] == [[False], [False], [True]]


async def test_a_request_that_only_waited_where_groups_were_lost_goes_on(serve: Serve) -> None:
    """However many they were: it is not what ended them."""
    backend = MortalBackend([1] * 20, death="waiting")
    async with serve(backend) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)
    assert not any(request.runs_alone for requests in backend.asked for request in requests)


@pytest.mark.parametrize("error", [GroupSilentError, GroupDrainingError])
async def test_a_request_that_no_group_answers_or_takes_now_is_offered_again(
    serve: Serve, error: type[GroupUnavailableError]
) -> None:
    class SilentBackend(MortalBackend):
        async def generate(
            self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
        ) -> AsyncIterator[GroupOutputs]:
            if len(self.asked) < 4:
                self.asked.append(list(requests))
                raise error("not now")
            async for step in super().generate(model, requests, trace_context):
                yield step

    backend = SilentBackend([])
    async with serve(backend) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)
    ids = [request.request_id for requests in backend.asked for request in requests]
    assert len(ids) == 5
    if error is GroupSilentError:  # which may have begun, so that nobody else may have its name
        assert len(set(ids)) == 5


class LostCalls(MortalBackend):
    """So many leaders die before they have answered."""

    def __init__(self, num_lost: int) -> None:
        super().__init__([])
        self._num_lost = num_lost

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        if self._num_lost:
            self._num_lost -= 1
            self.asked.append(list(requests))
            raise GroupCallLostError("the leader died")
        async for step in super().generate(model, requests, trace_context):
            yield step


@pytest.mark.parametrize("num_lost", [1, 2])
async def test_a_request_whose_leader_dies_before_it_answers_goes_elsewhere(serve: Serve, num_lost: int) -> None:
    backend = LostCalls(num_lost)
    async with serve(backend) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)
    ids = [request.request_id for requests in backend.asked for request in requests]
    assert len(set(ids)) == len(ids) == num_lost + 1, "it may have begun there"


async def test_a_request_that_ends_leaders_before_they_answer_ends_too(serve: Serve) -> None:
    backend = LostCalls(20)
    async with serve(backend) as gateway:
        call = gateway.stub.Generate(query(12, 1), timeout=60)
        assert await call.code() is grpc.StatusCode.INTERNAL
    assert len(backend.asked) == 3


async def test_another_group_is_asked_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 1000.0)
    async with serve(MortalBackend([4, 3])) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)


async def test_the_pauses_of_a_request_that_waits_grow_to_a_second(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []

    async def sleep(delay_s: float) -> None:
        pauses_s.append(delay_s)

    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 0.1)
    monkeypatch.setattr(generation, "asyncio", SimpleNamespace(sleep=sleep, timeout=asyncio.timeout))
    backend = MortalBackend([4], refusals=12)
    async with serve(backend) as gateway:
        answer = await gateway.stub.Generate(query(12, 1), timeout=60)
    assert list(answer.choices[0].token_ids) == solo(0, 12)
    assert pauses_s == [0.1, 0.2, 0.4, 0.8, *[1.0] * (len(pauses_s) - 4)]


async def test_without_a_group_that_goes_on_the_wait_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "RECOVERY_TIMEOUT_S", 0.05)
    backend = MortalBackend([1], refusals=10**9)
    async with serve(backend) as gateway:
        assert await gateway.stub.Generate(query(12, 1), timeout=60).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("is_another", [False, True])
async def test_a_request_of_a_model_that_was_removed_does_not_wait_for_a_group(serve: Serve, is_another: bool) -> None:
    """Nor is it for another model that has its name meanwhile."""
    offered: list[str] = []

    class RemovedBackend(MortalBackend):
        async def generate(
            self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
        ) -> AsyncIterator[GroupOutputs]:
            offered.append(self.models[model].weights)
            async for step in super().generate(model, requests, trace_context):
                yield step
                if is_another:
                    self.models[model] = msgspec.structs.replace(self.models[model], weights="other")
                else:
                    self.models.pop(model, None)

    async with serve(RemovedBackend([4], refusals=10**9)) as gateway:
        assert await gateway.stub.Generate(query(12, 1), timeout=60).code() is grpc.StatusCode.UNAVAILABLE
    assert offered == [""]


@given(
    num_delivered=st.integers(0, 5),
    num_logprobs=st.integers(0, 3),
    start=st.integers(0, 3),
    before=st.lists(st.integers(0, 9), max_size=3),
)
def test_the_rest_is_what_was_not_delivered(
    num_delivered: int, num_logprobs: int, start: int, before: list[int]
) -> None:
    sampling = SamplingParams(max_tokens=10, prompt_logprobs=1, prompt_logprobs_start=start)
    request = EngineRequest(
        request_id="r-0", prompt_token_ids=(1, 2, 3, 4, 5, 6, 7), sampling=sampling, output_token_ids=tuple(before)
    )
    rest = Resumption([request])
    assert rest.requests(3.0) == [request.__class__(**{**as_dict(request), "deadline_s": 3.0})]
    for token in range(num_delivered):
        rest.take(EngineOutput(request_id="r-0", token_ids=(token,)))
    rest.take(EngineOutput(request_id="r-0", prompt_logprobs=(TokenLogprobs(1, -1.0),) * num_logprobs))
    (left,) = rest.requests(None)
    assert left.output_token_ids == (*before, *range(num_delivered))
    assert left.sampling.prompt_logprobs_start == max(1, start) + num_logprobs
    assert (left.deadline_s, left.sampling.max_tokens, left.choice) == (None, 10, 0)
    rest.take(EngineOutput(request_id="r-0", finish_reason=FinishReason.STOP))
    assert rest.requests(None) == []


def as_dict(request: EngineRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}
