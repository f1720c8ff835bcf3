"""Streams on one side, the engine's thread on the other."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import GroupFailedError, RequestError
from serving.replica.async_engine import AsyncEngine
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture
async def harness() -> Harness:
    harness = Harness(max_num_seqs=4, max_waiting_requests=32)
    harness.executor.during_step = lambda: time.sleep(0.002)  # so that a stream of 100 tokens can be left half way
    return harness


@pytest.fixture
async def engine(harness: Harness) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(harness.engine, asyncio.get_running_loop())
    yield engine
    engine.close(PATIENCE_S)


def _request(request_id: str, max_tokens: int) -> EngineRequest:
    return make_request(request_id, [1, 2, 3], max_tokens=max_tokens, seed=1)


class Sink:
    """Keeps what comes."""

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []
        self.came = asyncio.Event()

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        self.outputs += outputs
        self.came.set()

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs if output.request_id == request_id for token in output.token_ids]


class Run:
    """A client request."""

    def __init__(self, engine: AsyncEngine, sink: Sink, *requests: EngineRequest) -> None:
        self._ended = asyncio.Event()
        engine.start(requests, sink, on_end=self._end)

    def _end(self) -> None:
        assert not self.has_ended, "it is told once"
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._ended.wait()


async def _collect(engine: AsyncEngine, *request_ids: str, max_tokens: int = 6) -> list[EngineOutput]:
    sink = Sink()
    await Run(engine, sink, *(_request(request_id, max_tokens) for request_id in request_ids)).end()
    return sink.outputs


async def _start(engine: AsyncEngine, sink: Sink, *requests: EngineRequest) -> Run:
    """A request whose first output has come."""
    run = Run(engine, sink, *requests)
    async with asyncio.timeout(PATIENCE_S):
        await sink.came.wait()
    return run


async def _until_asleep(harness: Harness) -> None:
    await until(lambda: not harness.engine.has_work)


async def _until_idle(engine: AsyncEngine, harness: Harness) -> None:
    await until(lambda: not (engine.num_open or harness.engine.has_work))
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


async def test_what_is_cancelled_frees_its_blocks_and_gives_no_more(engine: AsyncEngine, harness: Harness) -> None:
    sink = Sink()
    run = await _start(engine, sink, _request("a", 100), _request("b", 100))
    other = Run(engine, Sink(), _request("c", 20))
    engine.cancel(["b", "nobody"])
    assert run.has_ended
    num_outputs = len(sink.outputs)
    await other.end()
    await _until_idle(engine, harness)
    assert len(sink.outputs) == num_outputs
    engine.cancel(["a"])


async def test_one_sink_gets_a_steps_outputs_in_one_call_and_only_its_own(engine: AsyncEngine) -> None:
    calls: list[set[str]] = []

    class Counting(Sink):
        def send(self, outputs: Sequence[EngineOutput]) -> None:
            calls.append({output.request_id for output in outputs})

    ours, other = Counting(), Sink()
    runs = [Run(engine, ours, _request(name, 20)) for name in ("a", "b")]
    runs.append(Run(engine, other, _request("c", 20)))
    await asyncio.gather(*(run.end() for run in runs))
    assert {"a", "b"} in calls and len(calls) < 40
    assert other.tokens("c") == solo_output(_request("c", 20))
    assert "c" not in set.union(*calls)


async def test_what_is_paused_stays_so_until_it_is_resumed(engine: AsyncEngine, harness: Harness) -> None:
    sink = Sink()
    run = await _start(engine, sink, _request("a", 90), _request("b", 90))
    engine.set_paused(["a", "b", "nobody"], is_paused=True)
    await _until_asleep(harness)
    assert harness.engine.num_paused == 2
    assert harness.engine.stats.kv_usage == 0
    assert (await _collect(engine, "c", max_tokens=90))[-1].finish_reason is FinishReason.LENGTH
    engine.set_paused(["a", "b"], is_paused=False)
    await run.end()
    for request_id in ("a", "b"):
        assert sink.tokens(request_id) == solo_output(_request(request_id, 90))
    engine.set_paused(["a"], is_paused=True)
    await _until_idle(engine, harness)


async def test_a_sink_that_is_full_pauses_all_that_is_its_own(engine: AsyncEngine, harness: Harness) -> None:
    sink, other = Sink(), Sink()
    runs = [await _start(engine, sink, _request("a", 90))]
    engine.set_sink_paused(sink, is_paused=True)
    runs.append(Run(engine, sink, _request("b", 90)))
    await Run(engine, other, _request("c", 20)).end()
    await _until_asleep(harness)
    assert harness.engine.num_paused == 2
    engine.set_paused(["a"], is_paused=True)
    engine.set_sink_paused(sink, is_paused=False)
    await runs[1].end()
    assert harness.engine.num_paused == 1
    engine.set_paused(["a"], is_paused=False)
    await runs[0].end()
    assert sink.tokens("b") == solo_output(_request("b", 90))
    await _until_idle(engine, harness)


async def test_a_sink_that_is_gone_ends_all_that_is_its_own(engine: AsyncEngine, harness: Harness) -> None:
    sink, other = Sink(), Sink()
    lost = [await _start(engine, sink, _request(name, 100)) for name in ("a", "b")]
    kept = Run(engine, other, _request("c", 20))
    assert (engine.num_open, engine.num_open_of(sink)) == (3, 2)
    engine.drop(sink)
    assert all(run.has_ended for run in lost)
    await kept.end()
    assert other.tokens("c") == solo_output(_request("c", 20))
    await _until_idle(engine, harness)


async def test_a_paused_sequence_expires_while_nothing_else_runs(
    engine: AsyncEngine, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.async_engine.LOOK_AFTER_PAUSED_S", 0.01)
    sink = Sink()
    run = await _start(engine, sink, make_request("a", [1], max_tokens=90, deadline_s=10.0))
    engine.set_paused(["a"], is_paused=True)
    await _until_asleep(harness)
    harness.clock.now_s += 11
    await run.end()
    assert sink.outputs[-1].finish_reason is FinishReason.DEADLINE


async def test_a_refusal_of_one_choice_takes_the_others_back(engine: AsyncEngine, harness: Harness) -> None:
    with pytest.raises(RequestError, match="in use"):
        await _collect(engine, "a", "b", "a")
    await _until_idle(engine, harness)


async def test_a_lost_group_ends_every_stream(engine: AsyncEngine, harness: Harness) -> None:
    readers = [asyncio.create_task(_collect(engine, f"r{i}", max_tokens=100)) for i in range(6)]
    await until(lambda: harness.engine.stats.num_running == 4 and harness.engine.stats.num_waiting == 2)
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
