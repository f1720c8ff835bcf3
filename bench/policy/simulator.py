"""One policy on one trace."""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from bench.policy.fleet import Group, GroupModel, Request
from bench.policy.workload import Trace
from cluster.policy import GroupObservation, Phase

PERIOD_S = 5.0
TTFT_S, TPOT_S = 3.0, 0.1
MIN_GROUPS, MAX_GROUPS = 1, 24


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What policies are shown."""

    now_s: float
    target: int
    groups: tuple[GroupObservation, ...]
    num_requests: int
    """That have arrived since the beginning, refused and held ones included."""
    num_prompt_tokens: int
    num_held: int
    num_held_tokens: int


class Scaler(Protocol):
    """A policy with its state."""

    name: str
    grace_s: float
    """How long a group that is stopped may finish what it has; after that it is killed."""

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        """(groups that there should be, whom to stop first)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What users and the bill saw."""

    policy: str
    trace: str
    attainment: float
    """Share of all requests that were answered within the service level."""
    group_hours: float
    """From being ordered to being gone."""
    num_reversals: int
    """Changes of the target's direction."""
    num_aborted: int
    num_refused: int
    most_groups: int
    targets: tuple[tuple[float, int], ...]


class Simulation:
    """Runs once."""

    def __init__(self, trace: Trace, scaler: Scaler, model: GroupModel, *, first_groups: int) -> None:
        self._trace, self._scaler, self._model = trace, scaler, model
        self._groups: list[Group] = []
        self._routable: list[Group] = []
        self._events: list[tuple[float, int, str, Group]] = []
        self._held: deque[Request] = deque()
        self._target = first_groups
        self._num_named = 0
        self._group_s = 0.0
        self._num_requests = self._num_prompt_tokens = 0
        self.targets: list[tuple[float, int]] = [(0.0, first_groups)]
        self.requests: list[Request] = []
        for _ in range(first_groups):
            group = self._order(-1.0)
            group.ready_s = 0.0
            self._bring_up(group, 0.0)

    def run(self) -> Outcome:
        """To the end of the trace, and until all that arrived is over or an hour has passed."""
        trace = self._trace
        arrivals = list(
            zip(
                trace.arrivals_s.tolist(),
                trace.num_prompt_tokens.tolist(),
                trace.num_output_tokens.tolist(),
                strict=True,
            )
        )
        next_tick_s, index, end_s = 0.0, 0, trace.duration_s
        while True:
            arrival_s = arrivals[index][0] if index < len(arrivals) else math.inf
            event_s = self._events[0][0] if self._events else math.inf
            now_s = min(arrival_s, event_s, next_tick_s)
            if now_s > end_s:
                break
            if event_s <= now_s:
                self._handle_event()
            elif arrival_s <= now_s:
                at_s, num_prompt, num_output = arrivals[index]
                index += 1
                request = Request(at_s, num_prompt, num_output)
                self.requests.append(request)
                self._num_requests += 1
                self._num_prompt_tokens += num_prompt
                self._route(request, at_s)
            else:
                self._tick(next_tick_s)
                next_tick_s += PERIOD_S
        self._finish(end_s)
        return self._outcome()

    def _finish(self, end_s: float) -> None:
        while self._events and self._events[0][0] < end_s + 3600:
            self._handle_event()
        for group in self._groups:
            self._bill(group, end_s)

    def _outcome(self) -> Outcome:
        num_within = sum(request.is_within(TTFT_S, TPOT_S) for request in self.requests)
        counts = [count for _, count in self.targets]
        changes = [after - before for before, after in pairwise(counts) if after != before]
        return Outcome(
            policy=self._scaler.name,
            trace=self._trace.name,
            attainment=num_within / len(self.requests),
            group_hours=self._group_s / 3600,
            num_reversals=sum(a * b < 0 for a, b in pairwise(changes)),
            num_aborted=sum(request.is_aborted for request in self.requests),
            num_refused=sum(request.is_refused for request in self.requests),
            most_groups=max(counts),
            targets=tuple(self.targets),
        )

    def _order(self, now_s: float) -> Group:
        self._num_named += 1
        group = Group(f"g{self._num_named}", self._model, now_s, now_s + self._model.start_s, phase_since_s=now_s)
        group.now_s = now_s
        self._groups.append(group)
        self._schedule(group, group.ready_s)
        return group

    def _bring_up(self, group: Group, now_s: float) -> None:
        group.phase, group.phase_since_s, group.now_s = Phase.RUNNING, now_s, now_s
        self._routable.append(group)
        while self._held:
            self._route(self._held.popleft(), now_s)
        self._schedule(group, group.next_event_s())

    def _schedule(self, group: Group, at_s: float) -> None:
        group.version += 1
        if at_s < math.inf:
            heapq.heappush(self._events, (at_s, group.version, group.name, group))

    def _handle_event(self) -> None:
        at_s, version, _, group = heapq.heappop(self._events)
        if version != group.version:
            return
        if group.phase is Phase.STARTING:
            self._bring_up(group, at_s)
            return
        group.advance(at_s)
        group.settle()
        if group.phase is Phase.DRAINING and (not group.num_open or at_s >= group.abort_at_s):
            self._remove(group, at_s)
        else:
            self._schedule(group, self._next_s(group))

    def _next_s(self, group: Group) -> float:
        return min(group.next_event_s(), group.abort_at_s)

    def _route(self, request: Request, now_s: float) -> None:
        if not self._routable:
            self._held.append(request)
            return
        best = self._routable[0]
        least = best.num_open
        for group in self._routable:
            if group.num_open < least:
                best, least = group, group.num_open
        best.advance(now_s)
        if best.offer(request):
            best.settle()
            self._schedule(best, self._next_s(best))
        else:
            request.is_refused = True

    def _tick(self, now_s: float) -> None:
        for group in self._routable:
            group.advance(now_s)
        seen = Seen(
            now_s=now_s,
            target=self._target,
            groups=tuple(group.observe() for group in self._groups),
            num_requests=self._num_requests,
            num_prompt_tokens=self._num_prompt_tokens,
            num_held=len(self._held),
            num_held_tokens=sum(request.num_prompt for request in self._held),
        )
        target, victims = self._scaler(seen)
        target = min(max(target, MIN_GROUPS), MAX_GROUPS)
        if target == self._target:
            return
        self.targets.append((now_s, target))
        for _ in range(target - self._target):
            self._order(now_s)
        if target < self._target:
            self._stop(victims, self._target - target, now_s)
        self._target = target

    def _stop(self, victims: Sequence[str], num: int, now_s: float) -> None:
        standing = [group for group in self._groups if group.phase is not Phase.DRAINING]
        # Without a choice: those that do not run yet, then the newest, as Ray Serve and Kubernetes do.
        standing.sort(key=lambda g: (g.phase is Phase.RUNNING, -g.ordered_s))
        rank = {name: place for place, name in enumerate(victims)}
        standing.sort(key=lambda g: rank.get(g.name, len(rank)))
        for group in standing[:num]:
            if group.phase is Phase.STARTING or not group.num_open:
                if group in self._routable:
                    self._routable.remove(group)
                self._remove(group, now_s)
                continue
            self._routable.remove(group)
            group.phase, group.phase_since_s = Phase.DRAINING, now_s
            group.abort_at_s = now_s + self._scaler.grace_s
            self._schedule(group, self._next_s(group))

    def _remove(self, group: Group, now_s: float) -> None:
        group.abort_all()
        group.version += 1
        self._groups.remove(group)
        self._bill(group, now_s)

    def _bill(self, group: Group, gone_s: float) -> None:
        """Each group once, and nothing after the end of the trace, when no policy decides any more."""
        self._group_s += min(gone_s, self._trace.duration_s) - max(group.ordered_s, 0.0)


def simulate(trace: Trace, scaler: Scaler, model: GroupModel | None = None, *, first_groups: int = 3) -> Outcome:
    """Run one policy on one trace."""
    return Simulation(trace, scaler, model or GroupModel(), first_groups=first_groups).run()
