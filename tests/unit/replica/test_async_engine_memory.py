"""Requests that have ended leave nothing behind in the leader, however they ended."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.messages import RowResult, StepPlan, StepResult
from model_parallel.engine.request import EngineOutput
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import RequestError
from serving.replica.async_engine import AsyncEngine
from tests.support.effort import by_day
from tests.support.engine import make_request
from tests.support.live_objects import LiveObjects
from tests.support.waiting import PATIENCE_S, until

NUM_REQUESTS = by_day(900, by_night=1000)


class CountingExecutor:
    """Ranks that answer token 7 and remember nothing."""

    def __init__(self) -> None:
        self._submitted: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._submitted.append(plan)

    def collect(self) -> StepResult:
        plan = self._submitted.popleft()
        rows = [RowResult(row.seq_id, 7 if row.sample else None) for row in plan.rows]
        return StepResult(plan.epoch, plan.step_id, tuple(rows))

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        """None ever fails."""

    def shutdown(self) -> None:
        """Nothing is held."""


class FirstOutput:
    """A sink that tells when something has come."""

    def __init__(self) -> None:
        self.came = asyncio.Event()

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        self.came.set()


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=1024, max_waiting_requests=16),
        CacheConfig(num_blocks=24, block_size=64),
        epoch=1,
    )
    engine = AsyncEngine(Engine(CountingExecutor(), scheduler), asyncio.get_running_loop())
    yield engine
    engine.close(PATIENCE_S)


async def _serve(engine: AsyncEngine, first: int) -> None:
    """NUM_REQUESTS requests: answered, cancelled when their first token is there, expired, and refused."""
    for index in range(first, first + NUM_REQUESTS):
        sink = FirstOutput()
        is_cancelled = index % 3 == 1
        request = make_request(
            f"r{index}",
            [index % 50] * (2 + index % 30),
            max_tokens=900 if is_cancelled else 5,
            tenant=f"tenant {index % 5}",
            deadline_s=1e-9 if index % 7 == 0 else 60.0,
        )
        ended = asyncio.Event()
        engine.start([request], sink, on_end=ended.set)
        async with asyncio.timeout(PATIENCE_S):
            if is_cancelled:
                await sink.came.wait()
                engine.cancel([request.request_id])
            await ended.wait()
        with pytest.raises(RequestError, match="empty"):
            engine.start([make_request(f"x{index}", [])], sink)
    await until(lambda: not (engine.num_open or engine._engine.has_work))
    await asyncio.sleep(0)  # outputs that nobody wants wait in the event loop


async def test_requests_leave_nothing_behind(engine: AsyncEngine) -> None:
    await _serve(engine, 0)  # the prefix cache fills up
    before = LiveObjects()
    await _serve(engine, NUM_REQUESTS)
    assert before.leaked(NUM_REQUESTS) == {}
