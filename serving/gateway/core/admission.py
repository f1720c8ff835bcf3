"""How many requests run at a time, what need not be asked of a full group, and the end of running ones when the gateway
stops."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from model_parallel.engine.overload import SHARE_OF_ROOM
from model_parallel.engine.request import EngineRequest
from serving.contracts.errors import DrainingError, GroupRefusedError, OverloadedError

REMEMBERED_SHARE = 0.2
"""How long a refusal holds for the next request, as a part of the time after which the group expects to have room: so much of
its queue is gone by then. Half as long at least, so that gateways do not ask in time."""
REMEMBERED_S = 0.1
"""The same where the group cannot tell. As much later may be a deadline that is taken for the same."""
MAX_REMEMBERED_S = 1.0
MAX_REMEMBERED = 1024


class Admission:
    """Permits, at most `limit` at a time. A request without one is refused at once rather than queued: the queue that
    counts is the replica group's."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._ended = False

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Hold a permit for the current task. Raises OverloadedError or DrainingError, the latter also when a drain
        ends the task."""
        if self._draining:
            raise DrainingError("this gateway is stopping")
        if len(self._tasks) >= self._limit:
            raise OverloadedError(f"{self._limit} requests are running, which is the most at a time")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a permit belongs to a task")
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._ended:
                raise
            task.uncancel()
            raise DrainingError("this gateway stopped before the answer was complete") from None
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Give no more permits, wait for the held ones, and after `timeout_s` end what still runs. Returns when all are
        back, or a second after they were told to end."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._ended = True
        for task in self._tasks:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._idle.wait()


class SharedRoom:
    """Places that no tenant can fill: one may have SHARE_OF_ROOM times as many as there is room left, as in a group's queue."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_taken: Counter[str] = Counter()

    def take(self, tenant: str) -> bool:
        """Whether there is a place for it. One that is taken is given back."""
        room = self._limit - self._num_taken.total()
        if room < 1 or self._num_taken[tenant] + 1 > SHARE_OF_ROOM * room:
            return False
        self._num_taken[tenant] += 1
        return True

    def give_back(self, tenant: str) -> None:
        """One place."""
        self._num_taken[tenant] -= 1
        if not self._num_taken[tenant]:
            del self._num_taken[tenant]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """What one client request asks of a group."""

    num_choices: int
    num_prompt_tokens: int
    num_output_tokens: int
    deadline_s: float

    @classmethod
    def of(cls, requests: Sequence[EngineRequest]) -> "_Demand":
        deadline_s = requests[0].deadline_s
        return cls(
            num_choices=len(requests),
            num_prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
            num_output_tokens=max(request.sampling.max_tokens for request in requests),
            deadline_s=math.inf if deadline_s is None else deadline_s,
        )

    def is_no_easier_than(self, other: "_Demand") -> bool:
        return (
            self.num_choices >= other.num_choices
            and self.num_prompt_tokens >= other.num_prompt_tokens
            and self.num_output_tokens >= other.num_output_tokens
            and self.deadline_s <= other.deadline_s + REMEMBERED_S
        )


@dataclass(frozen=True, slots=True)
class _Refused:
    demand: _Demand
    until_s: float
    reason: str
    retry_after_s: float | None


class RecentRefusals:
    """Who has just been refused by every group of a model is refused again without asking any, for a moment.

    A refusal by a group costs several times as much as one here, and under overload all but a few requests are refused. A
    tenant's refusal is nobody else's, and holds only for what asks for as much: the group decides by the tenant's own part of
    its queue, by size and by deadline. Room that comes free is seen a little later.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self._refused: dict[tuple[str, str, int], dict[str, _Refused]] = {}
        """By model, tenant and priority: the latest of each group."""

    def check(self, model: str, num_groups: int, requests: Sequence[EngineRequest]) -> None:
        """Raises the GroupRefusedError of a group when all groups have refused what is no harder."""
        now_s, demand = self._clock(), _Demand.of(requests)
        groups = self._refused.get(_key(model, requests), {})
        holding = [
            refused
            for refused in groups.values()
            if now_s < refused.until_s and demand.is_no_easier_than(refused.demand)
        ]
        if len(holding) >= num_groups:
            raise GroupRefusedError(holding[0].reason, kind="overloaded", retry_after_s=holding[0].retry_after_s)

    def remember(self, model: str, engine: str, requests: Sequence[EngineRequest], error: GroupRefusedError) -> None:
        """The group `engine` has refused because it is full."""
        now_s, demand = self._clock(), _Demand.of(requests)
        if len(self._refused) >= MAX_REMEMBERED:
            self._refused = {key: groups for key, groups in self._refused.items() if _is_held(groups, now_s)}
        groups = self._refused.setdefault(_key(model, requests), {})
        before = groups.get(engine)
        if before is None or now_s >= before.until_s or before.demand.is_no_easier_than(demand):
            until_s = now_s + self._uniform(0.5, 1.0) * _remembered_s(error)
            groups[engine] = _Refused(demand, until_s, str(error), error.retry_after_s)


def _remembered_s(error: GroupRefusedError) -> float:
    if error.retry_after_s is None:
        return REMEMBERED_S
    return min(REMEMBERED_SHARE * error.retry_after_s, MAX_REMEMBERED_S)


def _key(model: str, requests: Sequence[EngineRequest]) -> tuple[str, str, int]:
    return model, requests[0].tenant, requests[0].priority


def _is_held(groups: dict[str, _Refused], now_s: float) -> bool:
    return any(now_s < refused.until_s for refused in groups.values())
