"""The seam between scheduling and computing."""

from collections.abc import Callable
from typing import Protocol

from model_parallel.engine.messages import StepPlan, StepResult


class Executor(Protocol):
    """All ranks of one group. In-process, spawned and Ray versions implement it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on every rank and return rank 0's result.

        Raises GroupFailedError when a rank is dead, hung past step_timeout_s, or answers out of turn; the executor is of no
        use afterwards, but `shutdown` must still be called.
        """
        ...

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` once, from any thread, when a rank is lost between steps."""
        ...

    def shutdown(self) -> None:
        """End every rank and free what they held. Safe to call twice, and after a failure."""
        ...
