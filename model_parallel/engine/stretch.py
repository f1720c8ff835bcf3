"""Many steps of pure decode at once: what a simulator needs to run a group faster than its scheduler would.

While nobody comes, ends, is preempted or expires, every step computes one token for the same sequences. A `Stretch` finds how
many such steps lie ahead and then changes the state of `Engine` and `Scheduler` to what `schedule` and `update` would have
left, bit for bit; tests/unit/engine/test_stretch.py compares the two. Whoever changes what a decode step does to a scheduler
changes it here too.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from operator import itemgetter
from typing import NamedTuple

from model_parallel.engine.engine import Engine
from model_parallel.engine.fair_queue import OUTPUT_PRICE, Tenant
from model_parallel.engine.messages import Row, StepPlan
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.sequence import Sequence as Run

TokensOf = Callable[[Run, int, int], Sequence[int]]
"""What the ranks draw for a sequence at the positions [start, stop)."""
_EXACT = float(1 << 50)
"""Sums of whole numbers below it are exact in whatever order they are made."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of pure decode that lie ahead. It holds as long as nobody touches the engine."""

    plan: StepPlan
    """The one step in flight."""
    runs: tuple[Run, ...]
    """In the order of its rows."""
    num_steps: int
    """So many can be taken in before something else happens than one more token for everybody."""
    num_context_tokens: int
    """Tokens that the rows of the step in flight attend to, their own included. Each step adds one a row."""
    deadline_s: float | None
    """A step may be planned before this moment only."""


class Moments(NamedTuple):
    """When steps of a stretch happened, on the scheduler's clock."""

    began_s: float
    """The step before them was collected, and the second of them planned."""
    first_s: float
    """The first of them was collected."""
    planned_s: float
    """The step after the last of them was planned: when the one before the last was collected, or `began_s` if there is one."""
    last_s: float
    """The last of them was collected."""


def find_stretch(engine: Engine, num_outputs_of: Callable[[Run], int]) -> Stretch | None:
    """Between `collect` and `submit`: what lies ahead, if it is at least one step of pure decode.

    `num_outputs_of` says how many tokens the ranks will draw for a sequence until the one that ends it, not counted that one:
    a stop token, which a scheduler does not know beforehand.
    """
    scheduler, in_flight = engine.scheduler, engine.in_flight
    running = scheduler._running
    if len(in_flight) != 1 or engine.failure is not None or not running or scheduler._finished or scheduler._outputs:
        return None
    if scheduler._drafting.is_on:  # how many tokens a step brings is not known
        return None
    plan = in_flight[0]
    if len(plan.rows) != len(running) or plan.new_sequences or scheduler._grammars.has_news:
        return None
    if scheduler._unready or scheduler._aside:
        return None
    num_steps, num_context_tokens = sys.maxsize, 0
    runs = tuple(running.values())
    block_size, shares_prefixes = scheduler._kv.block_size, scheduler._kv.shares_prefixes
    for run, row in zip(runs, plan.rows, strict=True):
        num_known = len(run.token_ids)
        if (
            row.seq_id != run.seq_id
            or row.num_tokens != 1
            or not row.sample
            or run.num_pending != 1
            or run.num_computed != num_known
            or run.admitted_step_id > plan.step_id
            or run.next_prompt_logprob < len(run.request.prompt_token_ids)
            or len(run.table.block_ids) != -(-num_known // block_size)
            or (shares_prefixes and run.table.num_published != (num_known - 1) // block_size)
        ):
            return None
        num_left = len(run.request.prompt_token_ids) + run.request.sampling.max_tokens - num_known - 1
        num_steps = min(num_steps, num_left, num_outputs_of(run))
        num_context_tokens += num_known
    num_steps = min(num_steps, _steps_until_no_block_is_free(scheduler, runs, num_steps))
    if num_steps < 1 or not _nobody_can_be_admitted(scheduler):
        return None
    heap = scheduler._deadlines._heap
    return Stretch(plan, runs, num_steps, num_context_tokens, heap[0][0] if heap else None)


def take(engine: Engine, stretch: Stretch, num_steps: int, moments: Moments, tokens_of: TokensOf) -> StepPlan:
    """Bring the engine to where it is when the first steps of a stretch have been collected at these moments. Returns the plan
    that is in flight then, which replaces the one that was.
    """
    scheduler = engine.scheduler
    if not 0 < num_steps <= stretch.num_steps:
        raise ValueError(f"{num_steps} steps are to be taken of a stretch of {stretch.num_steps}")
    pace, num_rows = scheduler._pace, len(stretch.runs)
    lasts = [run.last_token_s for run in stretch.runs if run.last_token_s is not None]
    if lasts:
        pace.record_decodes(num_rows, max(lasts), moments.first_s)
    if num_steps > 1:
        pace.record_decodes(num_rows, moments.first_s, moments.last_s, num_steps - 1)
    for planned_s in (moments.began_s, moments.planned_s):
        pace.record_step(planned_s, 0, is_backlogged=len(scheduler._queue) > 0)
    before = [len(run.token_ids) for run in stretch.runs]
    for run, num_known in zip(stretch.runs, before, strict=True):
        run.token_ids.extend(tokens_of(run, num_known, num_known + num_steps))
        run.num_computed += num_steps
        run.last_token_s = moments.last_s
        if run.first_token_s is None:
            run.first_token_s = moments.first_s
    added = _grow_and_publish(scheduler, stretch.runs, before, num_steps)
    _charge(scheduler, stretch.runs, num_steps)
    scheduler._totals.num_generation_tokens += num_steps * num_rows
    scheduler._last_step_id += num_steps
    plan = StepPlan(
        epoch=stretch.plan.epoch,
        step_id=stretch.plan.step_id + num_steps,
        rows=tuple(
            Row(seq_id=row.seq_id, start=row.start + num_steps, num_tokens=1, sample=True, new_block_ids=blocks)
            for row, blocks in zip(stretch.plan.rows, added, strict=True)
        ),
    )
    engine.replace_in_flight(plan)
    return plan


def _steps_until_no_block_is_free(scheduler: Scheduler, runs: Sequence[Run], num_steps: int) -> int:
    """Steps for which there is a block for everybody who needs one, `num_steps` at most."""
    kv = scheduler._kv
    size = kv.block_size

    def num_new(steps: int) -> int:
        return sum(kv.num_blocks_for(len(run.token_ids) + steps) - len(run.table.block_ids) for run in runs)

    if len(runs) * (num_steps // size + 1) <= kv.num_free or num_new(num_steps) <= kv.num_free:
        return num_steps
    low, high = 0, num_steps  # low fits and high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_new(middle) <= kv.num_free else (low, middle)
    return low


def _nobody_can_be_admitted(scheduler: Scheduler) -> bool:
    """Whatever the scheduler tries with those that wait fails in each step of a stretch and changes nothing."""
    queue = scheduler._queue
    if not len(queue):
        return True
    num_running, kv = len(scheduler._running), scheduler._kv
    is_full = num_running == scheduler._config.max_num_seqs
    if not is_full and kv.shares_prefixes:
        return False  # what the cache has of a prompt changes as blocks are taken and published
    for first, is_below_fair_share in queue.firsts():
        if first.request.deadline_s is not None or is_below_fair_share or first.num_pending:
            return False
        if not is_full and kv.num_blocks_for(len(first.token_ids)) + num_running <= kv.num_free:
            return False
    return True


def _grow_and_publish(
    scheduler: Scheduler, runs: Sequence[Run], before: Sequence[int], num_steps: int
) -> list[tuple[int, ...]]:
    """In the order in which steps would: each plans blocks for all who need one, and then publishes those that became full.
    Returns the blocks that the last step adds, row by row."""
    kv = scheduler._kv
    size = kv.block_size
    added: list[tuple[int, ...]] = [()] * len(runs)
    # A sequence of n tokens has just filled its last block, and needs another, when n is a multiple of the block size.
    due = [
        (step, index)
        for index, num_known in enumerate(before)
        for step in range((-num_known) % size + 1, num_steps + 1, size)
    ]
    due.sort()
    # Without sharing nothing happens between one step's blocks and the next one's.
    at_once = [list(group) for _, group in groupby(due, key=itemgetter(0))] if kv.shares_prefixes else [due]
    for some in at_once:
        new_block_ids = kv.grow_each([runs[index].table for _, index in some])
        for (step, index), block_id in zip(some, new_block_ids, strict=True):
            kv.publish(runs[index].table, runs[index].token_ids, before[index] + step - 1)
            if step == num_steps:
                added[index] = (block_id,)
    for run in runs:
        run.num_told_blocks = len(run.table.block_ids)
    return added


def _charge(scheduler: Scheduler, runs: Sequence[Run], num_steps: int) -> None:
    """Each tenant for its tokens. Multiplied where that is exact, else added one by one as steps would."""
    tenants: dict[int, tuple[Tenant, int]] = {}
    for run in runs:
        tenant = scheduler._queue.tenant_of(run.request)
        tenants[id(tenant)] = (tenant, tenants.get(id(tenant), (tenant, 0))[1] + num_steps)
    for tenant, num_tokens in tenants.values():
        price = OUTPUT_PRICE / tenant.weight
        total = tenant.counter + price * num_tokens
        if price.is_integer() and tenant.counter.is_integer() and total < _EXACT:
            tenant.counter = total
        else:
            for _ in repeat(None, num_tokens):
                tenant.charge(OUTPUT_PRICE, 1)
