"""Batches on engines that take turns every few steps: ratios hold although a machine's speed changes from second to second."""

import statistics
import time
from collections.abc import Sequence

from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest


class Run:
    """A batch on its way through one engine, some steps at a time."""

    def __init__(self, engine: Engine, batch: Sequence[EngineRequest]) -> None:
        """Reads the prompts, which is not timed."""
        self._engine = engine
        self.answers: dict[str, tuple[int, ...]] = {request.request_id: () for request in batch}
        self.seconds = self.leader_cpu_s = 0.0
        self.num_steps = 0
        self.step_times_s: list[float] = []
        """Of each turn: seconds a step."""
        engine.add(*batch)
        while not all(self.answers.values()):
            self._step()
        self._drain()

    @property
    def has_ended(self) -> bool:
        return not self._engine.has_work

    def go_on(self, num_steps: int) -> None:
        """So many steps, timed. Raises RuntimeError when the group is lost."""
        began_s, began_cpu_s, num_before = time.perf_counter(), time.thread_time(), self.num_steps
        for _ in range(num_steps):
            if self.has_ended:
                break
            self._step()
            self.num_steps += 1
        self._drain()
        took_s = time.perf_counter() - began_s
        self.seconds += took_s
        self.leader_cpu_s += time.thread_time() - began_cpu_s
        if self.num_steps == num_before + num_steps:
            self.step_times_s.append(took_s / num_steps)
        if self._engine.failure is not None:
            raise RuntimeError(f"the group is lost: {self._engine.failure}")

    def _step(self) -> None:
        self._engine.submit()
        self._collect()

    def _drain(self) -> None:
        while self._engine.in_flight:
            self._collect()

    def _collect(self) -> None:
        for output in self._engine.collect():
            self.answers[output.request_id] += output.token_ids


def take_turns(runs: Sequence[Run], num_steps: int) -> None:
    """All to their ends, `num_steps` at a time, in an order that turns round each time."""
    order = list(runs)
    while not all(run.has_ended for run in order):
        for run in order:
            run.go_on(num_steps)
        order.reverse()


def ratio_of_turns(run: Run, base: Run) -> float:
    """How long a step takes beside one of `base`, of turns beside each other; the median."""
    return statistics.median(a / b for a, b in zip(run.step_times_s, base.step_times_s, strict=False))
