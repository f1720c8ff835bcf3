"""What tests of every executor use."""

from model_parallel.engine.executor import Executor
from model_parallel.engine.messages import StepPlan, StepResult


def execute(executor: Executor, step: StepPlan) -> StepResult:
    """Run one step to its end."""
    executor.submit(step)
    return executor.collect()
