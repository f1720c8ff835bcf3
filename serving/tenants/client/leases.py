"""A gateway's side of quotas, without I/O: what it may still give to requests, and its half of the conversation."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from serving.contracts.accounts import RateLimits, UsageRecord
from serving.tenants.client.balances import Balances
from serving.tenants.messages import (
    GRANTED,
    NOTHING,
    Amounts,
    Costs,
    Decision,
    Exchange,
    LeaseRequest,
    Reply,
    Report,
    Settlement,
    uncounted,
)
from serving.tenants.records import Limits

MAX_SETTLEMENTS = 512
MAX_LEASE_REQUESTS = 1024
"""In one exchange."""


@dataclass(slots=True)
class _Lease:
    free: Amounts = NOTHING
    reserved: Amounts = NOTHING
    """By requests that run, and used by those that have ended and whose record is not with the authority yet."""
    returned: Amounts = NOTHING
    """Of the rates. Only the authority can say whether the bucket still has room for it."""
    is_tight: bool = False
    """The authority had nothing to spare when it was asked last, or other limits hold since: what is freed is not kept here."""
    is_idle: bool = False
    """No request took from it since the last `return_idle`."""


@dataclass(eq=False, slots=True)
class WaitingRequest:
    """A request that the leases do not cover."""

    costs: Costs
    """What was set aside, once it is granted."""
    asked_s: float
    on_decision: Callable[[Decision], None]
    """Called once, unless withdrawn before: with "granted" or "refused"."""
    begun_id: str = ""
    """See LeaseRequest."""
    is_granted: bool = False
    is_withdrawn: bool = False


@dataclass(eq=False, slots=True)
class _Settled:
    settlement: Settlement
    used: Costs
    on_durable: Callable[[], None]


@dataclass(slots=True)
class _Sent:
    """What the reply will be about."""

    exchange: Exchange
    settled: list[_Settled] = field(default_factory=list)
    waiting: list[WaitingRequest] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    """Subjects of which other limits hold since it was sent: the reply may go by those of before."""


class LeaseBook:
    """Everything that one gateway has reserved, leased, and not yet told. Not for several threads."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._leases: dict[str, _Lease] = {}
        self._standings = Balances()
        self._settled: deque[_Settled] = deque()
        self._waiting: deque[WaitingRequest] = deque()
        self._recalled: set[str] = set()
        self._changed: set[str] = set()
        """Subjects of whose lease the authority does not know all."""
        self._number = 0
        self._sent: _Sent | None = None

    @property
    def num_unrecorded(self) -> int:
        """Records that are not known to be durable."""
        return len(self._settled) + (len(self._sent.settled) if self._sent else 0)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a decision."""
        return len(self._waiting) + (len(self._sent.waiting) if self._sent else 0)

    def take(self, costs: Costs) -> bool:
        """Reserve for a request out of the leases, if they cover it."""
        for subject, cost in costs:
            lease = self._leases.get(subject)
            if lease is None or not lease.free.covers(cost):
                return False
        for subject, cost in costs:
            lease = self._leases[subject]
            lease.free -= cost
            lease.reserved += cost
            lease.is_idle = False
            self._changed.add(subject)
            self._standings.take(subject, cost)
        return True

    def ask(
        self, costs: Costs, now_s: float, on_decision: Callable[[Decision], None], *, begun_id: str = ""
    ) -> WaitingRequest:
        """Have the authority decide."""
        request = WaitingRequest(costs, now_s, on_decision, begun_id)
        self._waiting.append(request)
        return request

    def withdraw(self, request: WaitingRequest) -> None:
        """Nobody uses the decision: what was granted, or will be, is given back."""
        request.is_withdrawn = True
        if request.is_granted:
            self._release_all(request.costs)

    def settle(
        self,
        costs: Costs,
        record: UsageRecord,
        subjects: tuple[str, ...],
        on_durable: Callable[[], None],
    ) -> bool:
        """A request has ended: what it did not use is free again, what it used stays reserved until the authority charges it.
        Returns whether others may be waiting for what is free now."""
        num_tokens = record.num_prompt_tokens + record.num_completion_tokens
        used = tuple((subject, _used(cost, num_tokens)) for subject, cost in costs)
        for (subject, cost), (_, taken) in zip(costs, used, strict=True):
            self._release(subject, cost - taken)
        self._settled.append(_Settled(Settlement(record, subjects), used, on_durable))
        return any(self._lease(subject).is_tight for subject, _ in costs)

    def recall(self, subjects: Iterable[str]) -> None:
        """Others need what is free of these."""
        self._recalled.update(subjects)

    def change_limits(self, subjects: Iterable[str]) -> None:
        """Other limits hold for these from now on. What was leased under those of before goes back, and so does what is freed,
        until the authority has given something under the new ones."""
        for subject in subjects:
            if lease := self._leases.get(subject):
                lease.is_tight = True
                self._give_back(subject)
            if self._sent is not None:
                self._sent.changed.add(subject)

    def return_idle(self) -> None:
        """What no request has taken from since the last call goes back."""
        for subject, lease in self._leases.items():
            if lease.is_idle and lease.free:
                self._recalled.add(subject)
            lease.is_idle = True
        self._standings.forget_old(self._leases)

    def rates(self, subject: str, limits: Limits, now_s: float) -> RateLimits:
        """What is left of a subject's rates, as far as can be told here."""
        return self._standings.rates(subject, limits, now_s)

    def return_all(self) -> None:
        """The gateway takes no more requests."""
        self._recalled.update(subject for subject, lease in self._leases.items() if lease.free)

    def next_exchange(self, now_s: float) -> Exchange | None:
        """What to send now: the last one again until it has its reply; None when there is nothing to say."""
        if self._sent is not None:
            return self._sent.exchange
        settled = [self._settled.popleft() for _ in range(min(MAX_SETTLEMENTS, len(self._settled)))]
        for item in settled:
            for subject, taken in item.used:
                self._changed_lease(subject).reserved -= taken
        waiting = self._still_waiting()
        for request in waiting:
            self._recalled.update(subject for subject, _ in request.costs)
        reports = self._reports()
        if not (settled or waiting or reports):
            return None
        self._number += 1
        exchange = Exchange(
            gateway_id=self._gateway_id,
            number=self._number,
            settlements=tuple(item.settlement for item in settled),
            reports=reports,
            lease_requests=tuple(
                LeaseRequest(request.costs, now_s - request.asked_s, request.begun_id) for request in waiting
            ),
        )
        self._sent = _Sent(exchange, settled, waiting)
        return exchange

    def take_reply(self, reply: Reply, now_s: float) -> None:
        """Apply the reply to the last exchange. One that comes twice is not applied twice."""
        sent = self._sent
        if sent is None or reply.number != sent.exchange.number:
            return
        self._sent = None
        self._standings.take_news(reply.balances, now_s)
        for lease in reply.leases:
            self._lease(lease.subject).free += lease.amounts
        with_leases = {lease.subject for lease in reply.leases}
        again = []
        for request, decision in zip(sent.waiting, reply.decisions, strict=True):
            if decision.kind == "wait":
                again.append(request)
                continue
            if decision.kind == "granted":
                request.costs = uncounted(request.costs, decision.num_counted)
                for subject, cost in request.costs:
                    self._lease(subject).reserved += cost
                    self._lease(subject).is_tight = subject not in with_leases
                if request.is_withdrawn:
                    self._release_all(request.costs)
            _tell(request, decision)
        self.change_limits(sent.changed)
        self._waiting.extendleft(reversed(again))
        for item in sent.settled:
            item.on_durable()

    def _lease(self, subject: str) -> _Lease:
        return self._leases.setdefault(subject, _Lease())

    def _changed_lease(self, subject: str) -> _Lease:
        self._changed.add(subject)
        return self._lease(subject)

    def _give_back(self, subject: str) -> None:
        """What no request uses. The next exchange tells."""
        lease = self._changed_lease(subject)
        lease.returned += Amounts(requests=lease.free.requests, tokens=lease.free.tokens)
        lease.free = NOTHING

    def _release(self, subject: str, unused: Amounts) -> None:
        lease = self._changed_lease(subject)
        lease.reserved -= unused
        if not lease.is_tight:
            lease.free += Amounts(slots=unused.slots, budget=unused.budget)
        lease.returned += Amounts(requests=unused.requests, tokens=unused.tokens)
        self._standings.give_back(subject, unused)

    def _release_all(self, costs: Costs) -> None:
        for subject, cost in costs:
            self._release(subject, cost)

    def _still_waiting(self) -> list[WaitingRequest]:
        """In order, without those that can be served by now from what others gave back."""
        waiting = []
        for request in list(islice(self._waiting, MAX_LEASE_REQUESTS)):
            self._waiting.popleft()
            if request.is_withdrawn:
                continue
            if not request.begun_id and self.take(request.costs):
                _tell(request, GRANTED)
            else:
                waiting.append(request)
        return waiting

    def _reports(self) -> tuple[Report, ...]:
        """Of what has changed. What is asked for, by a request or by others, goes back."""
        for subject in self._recalled:
            self._give_back(subject)
        self._recalled.clear()
        self._standings.sent(self._changed)
        reports = []
        for subject in self._changed:
            lease = self._lease(subject)
            reports.append(Report(subject, lease.reserved + lease.free, lease.free, lease.returned))
            lease.returned = NOTHING
            if not (lease.reserved or lease.free):
                del self._leases[subject]
        self._changed.clear()
        return tuple(reports)


def _tell(request: WaitingRequest, decision: Decision) -> None:
    if not request.is_withdrawn:
        request.is_granted = decision.kind == "granted"
        request.on_decision(decision)


def _used(cost: Amounts, num_tokens: int) -> Amounts:
    """What a request of this reservation has used up for good; a limit that was not set then stays untouched."""
    return Amounts(
        requests=cost.requests,
        tokens=min(num_tokens, cost.tokens),
        budget=min(num_tokens, cost.budget),
    )
