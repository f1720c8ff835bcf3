"""The loop of one replica group: schedule, submit, collect, update."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from model_parallel.engine.adapters import AdapterState
from model_parallel.engine.answer_lengths import AnswerLengths
from model_parallel.engine.executor import Executor
from model_parallel.engine.messages import StepPlan
from model_parallel.engine.request import AdapterRef, EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.stats import SchedulerStats
from model_parallel.errors import GroupFailedError


class Engine:
    """One replica group as its owner drives it: one thread calls `step` while `has_work`; the rest may be called from any.

    Every request that `add` accepted ends in exactly one output with a finish_reason, also when the group is lost. The lock is
    not held while the ranks compute, so that a request is accepted, refused or aborted at once.

    The ranks find the next step waiting for them when they end one, so that its results are taken in and delivered while
    they compute. It costs the row that was planned for a sequence which, as is known then, has ended.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        max_in_flight: int = 2,
        on_step: Callable[[StepPlan], None] | None = None,
    ) -> None:
        """`max_in_flight` is how many steps the ranks have at most: the one that they compute and the next. `on_step` is
        told of each step when its results are in."""
        self._executor = executor
        self._scheduler = scheduler
        self._max_in_flight = max_in_flight
        self._on_step = on_step
        self._in_flight: deque[StepPlan] = deque()
        self._failure: str | None = None
        self._lock = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why the group is lost; None while it is not."""
        return self._failure

    @property
    def scheduler(self) -> Scheduler:
        """For whoever drives the engine on a clock of its own."""
        return self._scheduler

    @property
    def in_flight(self) -> Sequence[StepPlan]:
        """Steps that the ranks have, the oldest first."""
        return self._in_flight

    def replace_in_flight(self, plan: StepPlan) -> None:
        """The ranks have this step instead of the one in flight; see stretch.py."""
        self._in_flight.clear()
        self._in_flight.append(plan)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._in_flight and self._failure is None)

    @property
    def num_paused(self) -> int:
        """Paused sequences can expire while there is no work."""
        return self._scheduler.num_paused

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats

    @property
    def answer_lengths(self) -> AnswerLengths:
        return self._scheduler.answer_lengths

    def add(self, *requests: EngineRequest) -> None:
        """Accept the choices of one client request, all or none. Raises RequestError when they are refused, GroupFailedError
        when the group is lost."""
        with self._lock:
            if self._failure is not None:
                raise GroupFailedError(self._failure)
            self._scheduler.add(*requests)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a request now; the next `step` returns its last output. False when it has ended already."""
        with self._lock:
            return self._scheduler.abort(request_id, reason)

    def pause(self, *request_ids: str) -> None:
        """Compute no more of them until `resume`, because their reader does not keep up. They hold no room meanwhile."""
        with self._lock:
            for request_id in request_ids:
                self._scheduler.pause(request_id)

    def resume(self, *request_ids: str) -> None:
        """Go on with them."""
        with self._lock:
            for request_id in request_ids:
                self._scheduler.resume(request_id)

    def know_adapter(self, ref: AdapterRef, num_bytes: int) -> None:
        """Requests may name the adapter from now on. Raises RequestError when it has no room on the ranks."""
        with self._lock:
            self._scheduler.adapters.know(ref, num_bytes)

    def knows_adapter(self, digest: str) -> bool:
        with self._lock:
            return self._scheduler.adapters.is_known(digest)

    def load_adapter(self, digest: str) -> None:
        """Have steps load a known adapter for which nobody has asked, if there is room."""
        with self._lock:
            self._scheduler.adapters.load(digest)

    def drop_adapter(self, digest: str) -> bool:
        """Have the next step drop an adapter. False while requests still need it."""
        with self._lock:
            return self._scheduler.adapters.drop(digest)

    def loaded_adapters(self) -> list[str]:
        """Digests of those that all ranks have."""
        with self._lock:
            return self._scheduler.adapters.loaded

    def adapter_state(self, digest: str) -> AdapterState:
        with self._lock:
            return self._scheduler.adapters.state_of(digest)

    def step(self) -> list[EngineOutput]:
        """Give the ranks steps to run, wait for the oldest, and return what it brought.

        After a failure of the group, only the last outputs of its requests are left to return.
        """
        self.submit()
        return self.collect()

    def submit(self) -> None:
        """The first half of a step: give the ranks as many steps as they may have. Nothing happens when the group is lost."""
        if self._failure is not None:
            return
        try:
            while len(self._in_flight) < self._max_in_flight:
                with self._lock:
                    plan = self._scheduler.schedule()
                if plan is None:
                    return
                self._executor.submit(plan)
                self._in_flight.append(plan)
        except GroupFailedError as error:
            self.fail(str(error))

    def collect(self) -> list[EngineOutput]:
        """The second half: wait for the oldest step in flight, if there is one, and return what it brought."""
        if self._failure is None and self._in_flight:
            try:
                result = self._executor.collect()
                plan = self._in_flight.popleft()
                if self._on_step is not None:
                    self._on_step(plan)
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
