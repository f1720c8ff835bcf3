"""How long the ranks take for each step, beside what they had to compute: what a cost model of them is fitted to."""

import time
from collections import deque
from collections.abc import Callable

import msgspec

from model_parallel.engine.executor import Executor
from model_parallel.engine.messages import StepPlan, StepResult

MAX_SAMPLES = 4096
"""The last ones are kept."""


class StepWork(msgspec.Struct, frozen=True, array_like=True):
    """What a step has to compute."""

    num_tokens: int
    """Decode and prefill together."""
    num_decodes: int
    """Rows of one token, and drafts."""
    num_context_tokens: int
    """Tokens in the cache that those attend to, each its own included."""
    num_pairs: float
    """Of prefill: each token with each that it attends to."""

    @classmethod
    def of(cls, plan: StepPlan) -> "StepWork":
        num_tokens = num_decodes = num_context_tokens = 0
        num_pairs = 0.0
        for row in plan.rows:
            num_tokens += row.num_tokens
            if row.num_tokens == 1 or row.draft_token_ids:
                num_decodes += row.num_tokens
                num_context_tokens += sum(range(row.start + 1, row.start + row.num_tokens + 1))
            else:
                num_pairs += row.num_tokens * (row.start + (row.num_tokens + 1) / 2)
        return cls(num_tokens, num_decodes, num_context_tokens, num_pairs)


class StepSample(msgspec.Struct, frozen=True):
    """One step."""

    work: StepWork
    seconds: float
    """From when the ranks could begin, because they had it and had ended the one before, until the leader had its result."""
    ended_s: float = 0.0
    """When that was, on the clock that all processes of the leader's machine share (monotonic)."""


class TimedExecutor:
    """An executor that keeps the times of the last steps of another one."""

    def __init__(self, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = executor
        self._clock = clock
        self._begun: deque[tuple[StepPlan, float]] = deque()
        self._ended_s = 0.0
        self.samples: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        """The oldest first. Another thread may copy it."""

    def submit(self, plan: StepPlan) -> None:
        self._executor.submit(plan)
        self._begun.append((plan, self._clock()))

    def collect(self) -> StepResult:
        result = self._executor.collect()
        now_s = self._clock()
        plan, submitted_s = self._begun.popleft()
        if plan.rows:
            self.samples.append(StepSample(StepWork.of(plan), now_s - max(submitted_s, self._ended_s), now_s))
        self._ended_s = now_s
        return result

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        self._executor.set_failure_callback(callback)

    def shutdown(self) -> None:
        self._executor.shutdown()
