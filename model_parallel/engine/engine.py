"""The loop of one replica group: schedule, execute, update."""

import threading

from model_parallel.engine.executor import Executor
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.scheduler import Scheduler, SchedulerStats
from model_parallel.errors import GroupFailedError


class Engine:
    """One replica group as its owner drives it: one thread calls `step` while `has_work`; the rest may be called from any.

    Every request that `add` accepted ends in exactly one output with a finish_reason, also when the group is lost. The lock is
    not held while the ranks compute, so that a request is accepted, refused or aborted at once.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._failure: str | None = None
        self._lock = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why the group is lost; None while it is not."""
        return self._failure

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats

    def add(self, request: EngineRequest) -> None:
        """Accept a request. Raises RequestError when it is refused, GroupFailedError when the group is lost."""
        with self._lock:
            if self._failure is not None:
                raise GroupFailedError(self._failure)
            self._scheduler.add(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a request now; the next `step` returns its last output. False when it has ended already."""
        with self._lock:
            return self._scheduler.abort(request_id, reason)

    def step(self) -> list[EngineOutput]:
        """Run one step. After a failure of the group, only the last outputs of its requests are left to return."""
        if self._failure is None:
            with self._lock:
                plan = self._scheduler.schedule()
            try:
                result = self._executor.execute(plan)
                with self._lock:
                    return self._scheduler.update(plan, result)
            except GroupFailedError as error:
                self.fail(str(error))
        with self._lock:
            return self._scheduler.take_outputs()

    def fail(self, reason: str) -> None:
        """Treat the group as lost, as when the executor reports a dead rank between steps. The first reason is kept."""
        with self._lock:
            if self._failure is None:
                self._failure = reason
                self._scheduler.fail_all("the replica group that served this request was lost")

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the KV blocks are accounted for."""
        with self._lock:
            self._scheduler.check_integrity()
