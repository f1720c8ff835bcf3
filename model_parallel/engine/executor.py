"""The seam between scheduling and computing."""

from collections.abc import Callable
from typing import Protocol

from model_parallel.engine.messages import StepPlan, StepResult


class Executor(Protocol):
    """All ranks of one group. In-process, spawned and Ray versions implement it.

    One thread submits and collects. Both raise GroupFailedError when a rank is dead, hung past step_timeout_s, or answers
    out of turn; the executor is of no use afterwards, but `shutdown` must still be called.
    """

    def submit(self, plan: StepPlan) -> None:
        """Give every rank a step to run after those submitted before."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step not collected yet, and return rank 0's result."""
        ...

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` once, from any thread, when a rank is lost while no step is in flight."""
        ...

    def shutdown(self) -> None:
        """End every rank and free what they held. Safe to call twice, and after a failure."""
        ...
