"""What a request is recorded with, whichever way it ends."""

import asyncio
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.request import EngineOutput, FinishReason, Timings
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import DeadlineExceededError, GroupUnavailableError
from serving.contracts.group_link import GroupOutputs
from serving.gateway.core.call import Call
from serving.gateway.core.metering import Meter


class Books:
    """A reservation that keeps the record."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []

    def settle(self, record: UsageRecord) -> None:
        self.records.append(record)

    async def recorded(self) -> None: ...


def meter_of(books: Books, *, num_prompt_tokens: int = 400, num_choices: int = 1) -> Meter:
    call = Call(request_id="r", arrived_s=0.0, timeout_s=None)
    return Meter(call, "m", num_prompt_tokens, books, lambda: 9.0, lambda: 100.0, num_choices=num_choices)


def output(choice: int = 0, *, cached: int = 0, queue_s: float = 0.0, decode_s: float = 0.0) -> EngineOutput:
    timings = Timings(queue_s=queue_s, prefill_s=0.5, decode_s=decode_s)
    return EngineOutput(request_id="r", choice=choice, token_ids=(1,), num_cached_tokens=cached, timings=timings)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (DeadlineExceededError("late"), "deadline"),
        (GroupUnavailableError("lost"), "unavailable"),
        (RuntimeError("a bug"), "error"),
    ],
)
def test_a_request_that_ends_early_is_recorded_with_what_it_took_until_then(error: BaseException, outcome: str) -> None:
    books = Books()
    with pytest.raises(type(error)), meter_of(books) as meter:
        meter.received(GroupOutputs(engine="g", outputs=()))
        meter.took(output(cached=384, queue_s=0.25, decode_s=1.0))
        meter.took(output(cached=384, queue_s=0.25, decode_s=2.0))
        meter.took(EngineOutput(request_id="r", error="lost", finish_reason=FinishReason.ERROR))  # it knows no times
        raise error
    (record,) = books.records
    assert (record.outcome, record.num_prompt_tokens, record.num_cached_tokens) == (outcome, 400, 384)
    assert (record.queue_s, record.prefill_s, record.decode_s) == (0.25, 0.5, 2.0)


@given(
    num_choices=st.integers(1, 4),
    cached=st.lists(st.lists(st.integers(0, 100), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_what_is_cached_counts_once_a_prompt_as_the_prompt_does(num_choices: int, cached: list[list[int]]) -> None:
    books = Books()
    meter = meter_of(books, num_prompt_tokens=100 * len(cached), num_choices=num_choices)
    for prompt, choice in product(range(len(cached)), range(num_choices)):
        meter.took(output(prompt * num_choices + choice, cached=cached[prompt][choice]))
    summary = asyncio.run(meter.close(FinishReason.STOP))
    assert summary.num_cached_tokens == sum(min(of_prompt[:num_choices]) for of_prompt in cached)
    assert books.records[0].num_cached_tokens == summary.num_cached_tokens <= summary.num_prompt_tokens
