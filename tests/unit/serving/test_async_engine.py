"""Streams on one side, the engine's thread on the other."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import GroupFailedError, RequestError
from serving.async_engine import AsyncEngine
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output


@pytest.fixture
async def harness() -> Harness:
    harness = Harness(max_num_seqs=4, max_waiting_requests=32)
    harness.executor.during_step = lambda: time.sleep(0.002)  # so that a stream of 100 tokens can be left half way
    return harness


@pytest.fixture
async def engine(harness: Harness) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(harness.engine, asyncio.get_running_loop())
    yield engine
    engine.close(5)


def _request(request_id: str, max_tokens: int) -> EngineRequest:
    return make_request(request_id, [1, 2, 3], max_tokens=max_tokens, seed=1)


async def _collect(engine: AsyncEngine, *request_ids: str, max_tokens: int = 6) -> list[EngineOutput]:
    requests = [_request(request_id, max_tokens) for request_id in request_ids]
    return [output async for outputs in engine.generate(requests) for output in outputs]


async def _until_idle(engine: AsyncEngine, harness: Harness) -> None:
    async with asyncio.timeout(5):
        while engine.num_open or harness.engine.has_work:
            await asyncio.sleep(0.005)
    harness.engine.check_integrity()
    assert harness.engine.stats.kv_usage == 0


async def test_each_choice_ends_once(engine: AsyncEngine, harness: Harness) -> None:
    outputs = await _collect(engine, "a", "b", "c")
    ends = [output.request_id for output in outputs if output.finish_reason is not None]
    assert sorted(ends) == ["a", "b", "c"]
    await _until_idle(engine, harness)


async def test_many_streams_at_a_time(engine: AsyncEngine, harness: Harness) -> None:
    results = await asyncio.gather(*(_collect(engine, f"r{i}") for i in range(12)))
    assert all(result[-1].finish_reason is FinishReason.LENGTH for result in results)
    await _until_idle(engine, harness)


async def test_closing_a_stream_frees_its_blocks(engine: AsyncEngine, harness: Harness) -> None:
    async with aclosing(engine.generate([_request("a", 100), _request("b", 100)])) as outputs:
        async for _ in outputs:
            break
    await _until_idle(engine, harness)


async def test_cancelling_the_reader_frees_its_blocks(engine: AsyncEngine, harness: Harness) -> None:
    reader = asyncio.create_task(_collect(engine, "a", max_tokens=100))
    await asyncio.sleep(0.02)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await _until_idle(engine, harness)


async def test_a_reader_that_falls_behind_pauses_its_own_sequences_alone(
    engine: AsyncEngine, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.async_engine.MAX_UNREAD_STEPS", 5)
    slow = engine.generate([_request("a", 90), _request("b", 90)])
    read = [*await anext(slow)]
    async with asyncio.timeout(5):
        while harness.engine.num_paused < 2 or harness.engine.has_work:
            await asyncio.sleep(0.005)
    assert harness.engine.stats.kv_usage == 0
    assert (await _collect(engine, "c", max_tokens=90))[-1].finish_reason is FinishReason.LENGTH
    unread = await anext(slow)
    assert len(unread) < 2 * 10, "what was unread at the pause, and what was under way then"
    read += [*unread, *[output async for outputs in slow for output in outputs]]
    for request_id in ("a", "b"):
        tokens = [token for output in read if output.request_id == request_id for token in output.token_ids]
        assert tokens == solo_output(_request(request_id, 90))
    await _until_idle(engine, harness)


async def test_what_a_gateway_holds_is_paused_until_it_is_held_no_more(engine: AsyncEngine, harness: Harness) -> None:
    stream = engine.generate([_request("a", 90), _request("b", 90)])
    read = [*await anext(stream)]
    engine.hold(["a", "b", "nobody"], is_held=True)
    async with asyncio.timeout(5):
        while harness.engine.has_work:
            await asyncio.sleep(0.005)
    assert harness.engine.num_paused == 2
    engine.hold(["a", "b"], is_held=False)
    read += [output async for outputs in stream for output in outputs]
    tokens = [token for output in read if output.request_id == "a" for token in output.token_ids]
    assert tokens == solo_output(_request("a", 90))
    engine.hold(["a"], is_held=True)
    await _until_idle(engine, harness)


async def test_a_stream_is_closed_whose_end_has_come_and_is_unread(engine: AsyncEngine, harness: Harness) -> None:
    stream = engine.generate([_request("a", 3)])
    await anext(stream)
    async with asyncio.timeout(5):
        while engine.num_open:
            await asyncio.sleep(0.005)
    await stream.aclose()
    await _until_idle(engine, harness)


async def test_a_paused_sequence_expires_while_nothing_else_runs(
    engine: AsyncEngine, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.async_engine.MAX_UNREAD_STEPS", 5)
    monkeypatch.setattr("serving.async_engine.LOOK_AFTER_PAUSED_S", 0.01)
    slow = engine.generate([make_request("a", [1], max_tokens=90, deadline_s=10.0)])
    await anext(slow)
    async with asyncio.timeout(5):
        while not harness.engine.num_paused:
            await asyncio.sleep(0.005)
        harness.clock.now_s += 11
        while engine.num_open:
            await asyncio.sleep(0.005)
    rest = [output async for outputs in slow for output in outputs]
    assert rest[-1].finish_reason is FinishReason.DEADLINE


async def test_a_refusal_of_one_choice_takes_the_others_back(engine: AsyncEngine, harness: Harness) -> None:
    with pytest.raises(RequestError, match="in use"):
        await _collect(engine, "a", "b", "a")
    await _until_idle(engine, harness)


async def test_a_lost_group_ends_every_stream(engine: AsyncEngine, harness: Harness) -> None:
    readers = [asyncio.create_task(_collect(engine, f"r{i}", max_tokens=100)) for i in range(6)]
    await asyncio.sleep(0.02)
    engine.fail("rank 1 is gone")
    for reader in readers:
        last = (await reader)[-1]
        assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "unavailable")
    with pytest.raises(GroupFailedError, match="rank 1"):
        await _collect(engine, "late")


async def test_a_bug_in_a_step_ends_every_stream(
    engine: AsyncEngine, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(harness.scheduler, "update", broken)
    assert (await _collect(engine, "a"))[-1].error_kind == "unavailable"
