"""What a leader counts for its reports, and which gateway shows them.

Every gateway asks every group. A group counts in the metrics of one gateway at a time, so that sums over gateways are true.
"""

import time
from bisect import bisect_left
from collections.abc import Callable

from model_parallel.engine.messages import StepPlan
from serving.contracts.group_report import ITERATION_TOKENS_BUCKETS, PERIOD_S

READER_LEASE_S = 5 * PERIOD_S
"""How long a group waits for the gateway that it counts with, before it counts with another."""


class IterationTokens:
    """Histogram of the tokens that each step computes. Kept by the engine's thread."""

    def __init__(self) -> None:
        self.counts = [0] * (len(ITERATION_TOKENS_BUCKETS) + 1)
        self.total = 0

    def observe(self, plan: StepPlan) -> None:
        """A step has been computed. One that only forgets sequences does not count."""
        if not plan.rows:
            return
        num_tokens = sum(row.num_tokens for row in plan.rows)
        self.counts[bisect_left(ITERATION_TOKENS_BUCKETS, num_tokens)] += 1
        self.total += num_tokens


class ReaderLease:
    """Which gateway a group counts with: the first that asks, as long as it keeps asking."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reader = ""
        self._until_s = 0.0

    def is_held_by(self, reader: str) -> bool:
        """Whether `reader` is the one; it has asked now."""
        now_s = self._clock()
        if reader != self._reader and now_s < self._until_s:
            return False
        self._reader, self._until_s = reader, now_s + READER_LEASE_S
        return True
