"""What a leader tells the autoscaler of its group: its load now, and what it has measured of its steps and answers lately."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.policy import GroupLoad
from cluster.policy.step_line import fit_step_line
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.answer_lengths import ENOUGH_ENDED, AnswerLengths
from model_parallel.engine.stats import SchedulerStats
from model_parallel.engine.step_times import StepSample

MAX_STEPS = 512
"""The last ones, which the line of step times is fitted to."""


@dataclass(frozen=True, slots=True)
class _Totals:
    num_ended: int
    num_looked_up: int
    num_found: int


class LoadMeter:
    """Of one group. Called by one thread."""

    def __init__(self, scheduler: SchedulerConfig, cache: CacheConfig, clock: Callable[[], float] = time.time) -> None:
        self._max_num_seqs, self._kv_cache_tokens = scheduler.max_num_seqs, cache.num_tokens
        self._clock = clock
        self._totals: deque[_Totals] = deque([_Totals(0, 0, 0)])
        """Oldest first: the last ENOUGH_ENDED sequences have ended since the first, or all there were."""

    def load(self, stats: SchedulerStats, lengths: AnswerLengths, samples: Sequence[StepSample]) -> GroupLoad:
        """From the scheduler's numbers, its answers and the last steps."""
        now = _Totals(
            num_ended=stats.num_finished_stop + stats.num_finished_length,
            num_looked_up=stats.num_prefix_query_tokens,
            num_found=stats.num_prefix_hit_tokens,
        )
        while len(self._totals) > 1 and now.num_ended - self._totals[1].num_ended >= ENOUGH_ENDED:
            self._totals.popleft()
        first = self._totals[0]
        if now.num_ended > self._totals[-1].num_ended:
            self._totals.append(now)
        num_looked_up = now.num_looked_up - first.num_looked_up
        steps = [(s.work.num_decodes, s.work.num_tokens - s.work.num_decodes, s.seconds) for s in samples[-MAX_STEPS:]]
        return GroupLoad(
            measured_s=self._clock(),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            kv_usage=stats.kv_usage,
            max_num_seqs=self._max_num_seqs,
            kv_cache_tokens=self._kv_cache_tokens,
            line=fit_step_line(steps),
            mean_output_tokens=lengths.mean(),
            num_ended_answers=lengths.num_ended,
            cached_share=(now.num_found - first.num_found) / num_looked_up if num_looked_up else 0.0,
        )
