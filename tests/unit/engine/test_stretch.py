"""A stretch of decode taken at once leaves exactly what equal steps leave: scheduler, queue, blocks, pace and outputs."""

import random
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.clock import to_ticks
from bench.simulation.cost import CostTable, StepCost
from bench.simulation.group import STOP_TOKEN, VirtualGroup, first_token_of
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.stretch import Moments, find_stretch, take
from model_parallel.errors import RequestError

COSTS = CostTable(
    StepCost(knots=((1, 0.018), (16, 0.021), (512, 0.09)), row_s=2e-5, context_s=2e-8, pair_s=1e-9, empty_s=1e-4)
)


@dataclass(frozen=True)
class Case:
    """Everything that two runs have in common."""

    seed: int
    num_requests: int
    rate: float
    max_num_seqs: int
    num_blocks: int
    block_size: int
    shares_prefixes: bool
    max_deadline_s: float | None
    weights: tuple[float, ...]
    priorities: tuple[int, ...]
    max_prefill_tokens: int | None
    cancels: bool


cases = st.builds(
    Case,
    seed=st.integers(0, 1 << 30),
    num_requests=st.integers(1, 25),
    rate=st.sampled_from([0.3, 2.0, 20.0]),
    max_num_seqs=st.sampled_from([1, 3, 16]),
    num_blocks=st.sampled_from([40, 90, 2000]),
    block_size=st.sampled_from([4, 16]),
    shares_prefixes=st.booleans(),
    max_deadline_s=st.sampled_from([None, 3.0, 20.0]),
    weights=st.sampled_from([(1.0,), (1.0, 3.0), (0.7, 2.5, 10.0)]),
    priorities=st.sampled_from([(0,), (0, 1)]),
    max_prefill_tokens=st.sampled_from([None, 32]),
    cancels=st.booleans(),
)


def run(case: Case, *, jumps: bool) -> tuple[VirtualGroup, list[object]]:
    """The group when all has ended, and all that anybody was told meanwhile."""
    draw = random.Random(case.seed)
    ends: dict[int, int] = {}
    group = VirtualGroup(
        "group",
        COSTS,
        SchedulerConfig(
            max_num_seqs=case.max_num_seqs,
            max_num_batched_tokens=64,
            max_prefill_tokens=case.max_prefill_tokens,
            max_waiting_requests=12,
        ),
        CacheConfig(num_blocks=case.num_blocks, block_size=case.block_size, enable_prefix_caching=case.shares_prefixes),
        end_of=ends.__getitem__,
        jumps=jumps,
    )
    told: list[object] = []

    def take_until(tick: int | None) -> None:
        before = group.clock.tick
        while group.next_tick is not None and (tick is None or group.next_tick < tick):
            told.extend(
                (output.request_id, output.finish_reason, output.timings, output.token_ids, group.clock.tick)
                for output in group.advance()
                if output.finish_reason is not None
            )
            assert group.clock.tick >= before
            before = group.clock.tick

    at_s = 0.0
    for number in range(1, case.num_requests + 1):
        at_s += draw.expovariate(case.rate)
        num_prompt, max_tokens, answer = draw.randint(1, 120), draw.randint(1, 150), draw.randint(1, 200)
        ends[number] = num_prompt + answer - 1 if answer < max_tokens else sys.maxsize
        content = number if draw.random() < 0.5 else 1000
        first = first_token_of(content)
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=tuple(range(first, first + num_prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, seed=number),
            eos_token_ids=(STOP_TOKEN,),
            tenant=f"tenant-{draw.randrange(3)}",
            weight=draw.choice(case.weights),
            priority=draw.choice(case.priorities),
            deadline_s=None if case.max_deadline_s is None else draw.uniform(0.1, case.max_deadline_s),
        )
        cancelled = str(draw.randint(1, number)) if case.cancels and draw.random() < 0.3 else None
        take_until(to_ticks(at_s))
        try:
            group.add(to_ticks(at_s), request)
        except RequestError as error:
            told.append((number, str(error), error.retry_after_s))
        if cancelled is not None:
            told.append(group.abort(to_ticks(at_s), cancelled, FinishReason.CANCELLED))
        group.engine.check_integrity()
    take_until(None)
    group.engine.check_integrity()
    return group, told


def state(group: VirtualGroup) -> dict[str, Any]:
    """All that a scheduler remembers, in plain data."""
    scheduler: Scheduler = group.engine.scheduler
    pace = vars(scheduler._pace)
    classes = scheduler._queue._classes
    return {
        "totals": scheduler._totals,
        "pace": {name: value for name, value in pace.items() if name != "_step_times"},
        "step times": vars(scheduler._pace._step_times),
        "last step": scheduler._last_step_id,
        "free blocks, in order": scheduler._kv._pool.free_blocks(),
        "published": scheduler._kv._pool._hash_of,
        "counters": {
            priority: {name: tenant.counter for name, tenant in one.tenants.items()}
            for priority, one in classes.items()
        },
        "floors": {priority: one._floor for priority, one in classes.items()},
        "time": group.clock.tick,
        "busy": group.ranks.busy_ticks,
        "steps": group.num_steps,
    }


@given(cases)
def test_jumping_equals_stepping(case: Case) -> None:
    jumping, told_jumping = run(case, jumps=True)
    stepping, told_stepping = run(case, jumps=False)
    assert told_jumping == told_stepping
    assert state(jumping) == state(stepping)
    assert stepping.num_jumped == 0


def test_most_steps_are_jumped_over() -> None:
    case = Case(1, 10, 0.3, 16, 2000, 16, False, None, (1.0,), (0,), None, False)
    group, _ = run(case, jumps=True)
    assert group.num_jumped > 0.6 * group.num_steps


def test_a_jump_that_forgets_a_block_is_found() -> None:
    """A negative control: the comparison sees a difference of one free block."""
    case = Case(2, 5, 2.0, 16, 90, 4, True, None, (1.0,), (0,), None, False)
    jumping, _ = run(case, jumps=True)
    stepping, _ = run(case, jumps=False)
    jumping.engine.scheduler._kv._pool.take(1)
    assert state(jumping) != state(stepping)


def test_a_lost_group_has_no_work_when_a_deadline_passes() -> None:
    group = VirtualGroup(
        "group", COSTS, SchedulerConfig(), CacheConfig(num_blocks=100), end_of=lambda seed: sys.maxsize
    )
    sampling = SamplingParams(max_tokens=50, seed=1)
    group.add(0, EngineRequest(request_id="1", prompt_token_ids=(1, 2, 3), sampling=sampling, deadline_s=30.0))
    assert [output.finish_reason for output in group.fail(to_ticks(0.01), "rank 1 died")] == [FinishReason.ERROR]
    assert not group.engine.has_work
    group.clock.move_to(to_ticks(31.0))
    assert not group.engine.has_work


def test_more_steps_than_lie_ahead_are_refused() -> None:
    group = VirtualGroup(
        "group", COSTS, SchedulerConfig(), CacheConfig(num_blocks=100), end_of=lambda seed: sys.maxsize, jumps=False
    )
    group.add(0, EngineRequest(request_id="1", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=5)))
    while (stretch := find_stretch(group.engine, lambda run: 1000)) is None:
        group.clock.move_to(group.next_tick or 0)
        group.engine.collect()
        if find_stretch(group.engine, lambda run: 1000) is None:
            group.engine.submit()
        group.next_tick = group.ranks.next_tick
    assert 1 <= stretch.num_steps <= 4
    with pytest.raises(ValueError, match="are to be taken of a stretch of"):
        take(group.engine, stretch, stretch.num_steps + 1, Moments(1.0, 1.0, 1.0, 1.0), group.ranks.tokens_of)
