"""How long the ranks of a group may be silent in a step before the group is taken to be lost."""

import math
from collections import deque

from model_parallel.engine.messages import StepPlan

MIN_LIMIT_S = 1.0
"""However short the steps are: processes of a busy machine stand still for tenths of a second."""
STEPS_A_LIMIT = 4.0
"""The limit, in the length of the longest steps (the 99th percentile)."""
NUM_SAMPLES = 256
"""Steps of a size that are remembered."""
NUM_FIRST_STEPS = 2
"""Steps of a size that are not learned from: they may compile, record, or touch memory for the first time."""


class SilenceLimits:
    """Learned from the steps of one group, by their size: the power of two below the number of tokens."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s` is the limit of a step that is as large as none before, and the cap of all others."""
        self._longest_s = longest_s
        self._steps_s: dict[int, deque[float]] = {}
        """Times of the last steps, by size."""
        self._num_seen: dict[int, int] = {}

    def learn(self, plan: StepPlan, step_s: float) -> None:
        """A step has taken so long."""
        size = _size(plan)
        num_seen = self._num_seen[size] = self._num_seen.get(size, 0) + 1
        if num_seen > NUM_FIRST_STEPS:
            self._steps_s.setdefault(size, deque(maxlen=NUM_SAMPLES)).append(step_s)

    def of(self, plan: StepPlan) -> float:
        """Seconds of silence in this step that a group survives. An unknown size has the limit of the next larger one."""
        size = min((size for size in self._steps_s if size >= _size(plan)), default=None)
        if size is None:
            return self._longest_s
        steps_s = sorted(self._steps_s[size])
        p99_s = steps_s[math.ceil(0.99 * len(steps_s)) - 1]
        return min(max(MIN_LIMIT_S, STEPS_A_LIMIT * p99_s), self._longest_s)


def _size(plan: StepPlan) -> int:
    num_tokens = sum(row.num_tokens for row in plan.rows) + sum(request.num_tokens for request in plan.draft_requests)
    return num_tokens.bit_length()
