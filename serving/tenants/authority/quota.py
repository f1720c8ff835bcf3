"""The rules of quotas, without I/O: one authority decides, gateways hold leases of what it has set aside for them.

A *subject* is a tenant or a key (`tenant:ID`, `key:ID`); a request counts against one of each, and both must have room.

    budget    charged + held by gateways <= token_budget
    slots     held by gateways <= max_concurrent_requests
    rates     a bucket a limit: holds one minute's worth, refills steadily, gives when something is taken or leased, and counts
              what is on lease and unused as still in it

A gateway talks to the authority in numbered exchanges, one at a time. The same number again gets the same reply, so that a
message may be lost or repeated anywhere. What a gateway holds it says absolutely, not as a change.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.buckets import Bucket
from serving.tenants.messages import (
    NOTHING,
    RESUMPTIONS,
    WAIT,
    Amounts,
    Balance,
    Decision,
    Exchange,
    Lease,
    LeaseRequest,
    Reply,
    Report,
    Settlement,
    uncounted,
)
from serving.tenants.records import LIMITS, Limits

RECALL_TIMEOUT_S = 0.5
"""How long a request may wait for other gateways to give back what they do not use."""
BUSY_RETRY_S = 1.0
"""When to come back for what running requests hold: nobody can know when they end."""
_SHARE = 4
"""Of what is left, a gateway gets at most 1 / (_SHARE · number of gateways) ahead of its need."""
_MAX_LEASED_REQUESTS = 64
MAX_RESUMPTIONS = 32
"""How often a stream may go on that counts against a budget: what its client has is computed again each time, and not charged."""
_RESUMPTIONS_KEPT_S = 86_400.0
_MAX_RESUMED_KEPT = 100_000
"""Streams of which it is known how often they went on."""

NO_LIMITS = Limits()


class StaleExchangeError(Exception):
    """An exchange that is older than the last one. Nobody waits for its reply any more."""


@dataclass(slots=True)
class Holding:
    """What one gateway has of one subject."""

    held: Amounts = NOTHING
    """Reserved by its requests, or free."""
    free: Amounts = NOTHING
    """Not used by any request when it last said so. It may have used some since; it cannot have more."""
    is_lost: bool = False
    """The gateway seems to be dead, so that this will not come back."""


@dataclass(slots=True)
class Gateway:
    """How far the conversation with one gateway has come."""

    number: int = 0
    reply: Reply | None = None
    is_silent: bool = False


@dataclass(slots=True)
class Account:
    """The balance of one subject."""

    limits: Limits = NO_LIMITS
    charged: int = 0
    """Tokens in all of its usage records."""
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    holdings: dict[str, Holding] = field(default_factory=dict)
    """By gateway."""

    def refill(self, now_s: float) -> None:
        self.requests.refill(
            self.limits.requests_per_minute, sum(h.free.requests for h in self.holdings.values()), now_s
        )
        self.tokens.refill(self.limits.tokens_per_minute, sum(h.free.tokens for h in self.holdings.values()), now_s)

    def available(self, limit: str) -> float:
        """What can still be given out of a limit that is set."""
        match limit:
            case "requests_per_minute":
                return self.requests.level
            case "tokens_per_minute":
                return self.tokens.level
            case "max_concurrent_requests":
                assert self.limits.max_concurrent_requests is not None
                return self.limits.max_concurrent_requests - sum(h.held.slots for h in self.holdings.values())
            case _:
                assert self.limits.token_budget is not None
                return self.limits.token_budget - self.charged - sum(h.held.budget for h in self.holdings.values())

    def give(self, gateway_id: str, amounts: Amounts, *, is_ahead: bool) -> None:
        """To a request that waits for it, or ahead of need."""
        holding = self.holdings.setdefault(gateway_id, Holding())
        holding.held += amounts
        if is_ahead:
            holding.free += amounts
        self.requests.level -= amounts.requests
        self.tokens.level -= amounts.tokens

    def balance(self, subject: str) -> Balance:
        """What is left of the rates."""
        holdings = self.holdings.values()
        return Balance(
            subject=subject,
            requests=self.requests.level + sum(holding.free.requests for holding in holdings),
            tokens=self.tokens.level + sum(holding.free.tokens for holding in holdings),
        )

    def shortages(self, cost: Amounts) -> list["_Shortage"]:
        """One for each limit that leaves too little room for `cost`."""
        short = []
        for name, needed in zip(LIMITS, cost, strict=True):
            limit: int | None = getattr(self.limits, name)
            if limit is not None and needed > max(available := self.available(name), 0):
                short.append(_Shortage(name, needed, available, self._retry_after_s(name, limit, needed, available)))
        return short

    def _retry_after_s(self, name: str, limit: int, needed: int, available: float) -> float | None:
        match name:
            case "max_concurrent_requests":
                return BUSY_RETRY_S
            case "token_budget":
                lost = sum(holding.held.budget for holding in self.holdings.values() if holding.is_lost)
                return BUSY_RETRY_S if needed <= limit - self.charged - lost else None
            case _:
                return (needed - available) * 60 / limit if needed <= limit else None


@dataclass(frozen=True, slots=True)
class _Shortage:
    limit: str
    needed: int
    available: float
    retry_after_s: float | None


@dataclass(slots=True)
class Changes:
    """What has to be durable before any reply goes out."""

    settlements: dict[str, Settlement] = field(default_factory=dict)
    """By the id of the record, which is new or says more than the one before."""
    accounts: set[str] = field(default_factory=set)
    holdings: set[tuple[str, str]] = field(default_factory=set)
    """(gateway, subject). One that is no longer there is to be deleted."""
    gateways: set[str] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        return not (self.settlements or self.accounts or self.holdings or self.gateways)


class QuotaAuthority:
    """Decides alone what may be used. Its state is what `ledger` loads, plus which part of the leases is unused."""

    def __init__(
        self,
        accounts: Mapping[str, Account],
        gateways: Mapping[str, Gateway],
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds that go on through a restart. A step back in it stops the refill for a moment, no more."""
        self.accounts = dict(accounts)
        self.gateways = dict(gateways)
        self._clock = clock
        self._limits: Mapping[str, Limits] = {}
        self._changes = Changes()
        self._recalls: dict[str, set[str]] = {}
        self._resumed: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """How often, and when last. Not durable: after a restart of the authority streams count anew."""

    def set_limits(self, limits: Mapping[str, Limits]) -> None:
        """By subject. A subject that is no longer there keeps its last limits for what it still runs."""
        self._limits = limits
        for subject, account in self.accounts.items():
            account.limits = limits.get(subject, account.limits)

    def exchange(self, message: Exchange, recorded: Mapping[str, UsageRecord]) -> Reply:
        """Charge, take back, give. `recorded` has those records, by id, that are in the ledger already, of what the message is
        about. Raises StaleExchangeError."""
        gateway = self.gateways.setdefault(message.gateway_id, Gateway())
        gateway.is_silent = False
        if message.number == gateway.number and gateway.reply is not None:
            return gateway.reply
        if message.number <= gateway.number:
            raise StaleExchangeError(f"exchange {message.number} comes after {gateway.number}")
        for settlement in message.settlements:
            self._charge(settlement, recorded)
        for report in message.reports:
            self._take_report(message.gateway_id, report)
        decisions = tuple(self._decide(message.gateway_id, request, recorded) for request in message.lease_requests)
        leases = self._give_ahead(message.gateway_id, message.lease_requests, decisions)
        gateway.number = message.number
        gateway.reply = Reply(
            number=message.number, decisions=decisions, leases=leases, balances=self._balances(message)
        )
        self._changes.gateways.add(message.gateway_id)
        return gateway.reply

    def expire(self, gateway_id: str) -> None:
        """A gateway has been silent for too long. What its requests may have used of budgets stays withheld, since nobody knows;
        the rest can be given to others."""
        self.gateways[gateway_id].is_silent = True
        for subject, account in self.accounts.items():
            holding = account.holdings.get(gateway_id)
            if holding is not None:
                self._account(subject)  # refilled while the lease still counts as inside
                self._set_holding(gateway_id, subject, Holding(Amounts(budget=holding.held.budget), is_lost=True))

    def forget(self, gateway_id: str) -> None:
        """The gateway will not come back. What is withheld for it stays withheld."""
        if not any(gateway_id in account.holdings for account in self.accounts.values()):
            self.gateways.pop(gateway_id, None)
            self._changes.gateways.add(gateway_id)

    def take_changes(self) -> Changes:
        """All since the last call."""
        changes, self._changes = self._changes, Changes()
        return changes

    def take_recalls(self) -> dict[str, set[str]]:
        """By gateway, the subjects of which others need what it does not use."""
        recalls, self._recalls = self._recalls, {}
        return recalls

    def _account(self, subject: str) -> Account:
        account = self.accounts.get(subject)
        if account is None:
            account = self.accounts[subject] = Account(limits=self._limits.get(subject, NO_LIMITS))
        account.refill(self._clock())
        self._changes.accounts.add(subject)
        return account

    def _charge(self, settlement: Settlement, recorded: Mapping[str, UsageRecord]) -> None:
        """Of a stream that was resumed, each gateway that had a part in it sends a record under the same id, of all that it knows
        to be used: only what no record before has counted is charged."""
        record, request_id = settlement.record, settlement.record.request_id
        before, num_charged = self._record(request_id, recorded), self._num_counted(request_id, recorded)
        if before is not None:
            record = _joined(before, record)
            if record == before:
                return
        for subject in settlement.subjects:
            self._account(subject).charged += record.num_prompt_tokens + record.num_completion_tokens - num_charged
        self._changes.settlements[request_id] = Settlement(record, settlement.subjects)

    def _record(self, request_id: str, recorded: Mapping[str, UsageRecord]) -> UsageRecord | None:
        changed = self._changes.settlements.get(request_id)
        return recorded.get(request_id) if changed is None else changed.record

    def _num_counted(self, request_id: str, recorded: Mapping[str, UsageRecord]) -> int:
        """Tokens of a request that are charged already."""
        record = self._record(request_id, recorded)
        return 0 if record is None else record.num_prompt_tokens + record.num_completion_tokens

    def _take_report(self, gateway_id: str, report: Report) -> None:
        account = self._account(report.subject)
        self._set_holding(gateway_id, report.subject, Holding(report.held, report.free))
        account.requests.level += report.returned.requests
        account.tokens.level += report.returned.tokens
        account.refill(self._clock())  # which takes away what no longer fits into the buckets

    def _set_holding(self, gateway_id: str, subject: str, holding: Holding) -> None:
        holdings = self.accounts[subject].holdings
        if holding.held:
            holdings[gateway_id] = holding
        else:
            holdings.pop(gateway_id, None)
        self._changes.holdings.add((gateway_id, subject))

    def _decide(self, gateway_id: str, request: LeaseRequest, recorded: Mapping[str, UsageRecord]) -> Decision:
        if gone := [subject for subject, _ in request.costs if subject not in self._limits]:
            return Decision(kind="refused", subject=gone[0])
        num_counted = self._num_counted(request.begun_id, recorded) if request.begun_id else 0
        costs = uncounted(request.costs, num_counted)
        if request.begun_id and self._num_resumed(request.begun_id) >= MAX_RESUMPTIONS:
            subject = next((subject for subject, cost in request.costs if cost.budget), "")
            return Decision(kind="refused", subject=subject, limit=RESUMPTIONS)
        accounts = [(subject, self._account(subject), cost) for subject, cost in costs]
        short = [(subject, account, s) for subject, account, cost in accounts for s in account.shortages(cost)]
        if not short:
            self._give(gateway_id, costs, is_ahead=False)
            if request.begun_id:
                self._count_resumption(request.begun_id)
            return Decision(kind="granted", num_counted=num_counted)
        if request.waited_s < RECALL_TIMEOUT_S and all(
            self._can_recall(gateway_id, account, s) for _, account, s in short
        ):
            for subject, account, _ in short:
                self._recall(gateway_id, subject, account)
            return WAIT
        # The sender hears of the one that keeps it waiting longest.
        subject, _, worst = max(
            short, key=lambda item: math.inf if item[2].retry_after_s is None else item[2].retry_after_s
        )
        return Decision(kind="refused", subject=subject, limit=worst.limit, retry_after_s=worst.retry_after_s)

    def _num_resumed(self, begun_id: str) -> int:
        return self._resumed.get(begun_id, (0, 0.0))[0]

    def _count_resumption(self, begun_id: str) -> None:
        now_s = self._clock()
        self._resumed[begun_id] = self._num_resumed(begun_id) + 1, now_s
        self._resumed.move_to_end(begun_id)
        while (
            len(self._resumed) > _MAX_RESUMED_KEPT
            or next(iter(self._resumed.values()))[1] < now_s - _RESUMPTIONS_KEPT_S
        ):
            self._resumed.popitem(last=False)

    def _can_recall(self, gateway_id: str, account: Account, short: _Shortage) -> bool:
        """Whether it would be enough if all others gave back what they do not use."""
        index = LIMITS.index(short.limit)
        unused = sum(tuple(h.free)[index] for other, h in account.holdings.items() if other != gateway_id)
        return short.available + unused >= short.needed

    def _recall(self, gateway_id: str, subject: str, account: Account) -> None:
        for other, holding in account.holdings.items():
            if other != gateway_id and holding.free:
                self._recalls.setdefault(other, set()).add(subject)

    def _give(self, gateway_id: str, costs: Sequence[tuple[str, Amounts]], *, is_ahead: bool) -> None:
        for subject, cost in costs:
            self.accounts[subject].give(gateway_id, cost, is_ahead=is_ahead)
            self._changes.holdings.add((gateway_id, subject))

    def _balances(self, message: Exchange) -> tuple[Balance, ...]:
        """Of those that the exchange is about, with what it has changed."""
        subjects = {report.subject for report in message.reports}
        subjects.update(subject for request in message.lease_requests for subject, _ in request.costs)
        accounts = {subject: self.accounts[subject] for subject in sorted(subjects & self.accounts.keys())}
        return tuple(account.balance(subject) for subject, account in accounts.items() if account.limits.has_rate)

    def _give_ahead(
        self, gateway_id: str, requests: Sequence[LeaseRequest], decisions: Sequence[Decision]
    ) -> tuple[Lease, ...]:
        """For each pair of tenant and key, room for some more requests like the largest that was granted; near the edge none, so
        that one gateway does not sit on what another needs."""
        largest: dict[tuple[str, ...], LeaseRequest] = {}
        for request, decision in zip(requests, decisions, strict=True):
            if decision.kind == "granted":
                pair = tuple(subject for subject, _ in request.costs)
                largest[pair] = max(
                    request, largest.get(pair, request), key=lambda request: max(max(cost) for _, cost in request.costs)
                )
        leases = []
        for request in largest.values():
            num_requests = self._num_ahead(request)
            if num_requests:
                costs = tuple((subject, cost * num_requests) for subject, cost in request.costs)
                self._give(gateway_id, costs, is_ahead=True)
                leases += [Lease(subject=subject, amounts=amounts) for subject, amounts in costs]
        return tuple(leases)

    def _num_ahead(self, request: LeaseRequest) -> int:
        num_gateways = sum(not gateway.is_silent for gateway in self.gateways.values())
        num_requests = _MAX_LEASED_REQUESTS
        for subject, cost in request.costs:
            account = self.accounts[subject]
            for name, needed in zip(LIMITS, cost, strict=True):
                if needed and getattr(account.limits, name) is not None:
                    share = account.available(name) / (_SHARE * num_gateways)
                    num_requests = min(num_requests, max(0, int(share // needed)))
        return num_requests


def _joined(before: UsageRecord, record: UsageRecord) -> UsageRecord:
    """One record of what two say of one request: the one that has seen more of it says how it ended."""
    further = max(before, record, key=lambda each: (each.num_completion_tokens, each.outcome in ("stop", "length")))
    return msgspec.structs.replace(
        further,
        tenant_id=before.tenant_id,
        key_id=before.key_id,
        num_prompt_tokens=max(before.num_prompt_tokens, record.num_prompt_tokens),
        num_cached_tokens=before.num_cached_tokens if before.num_prompt_tokens else record.num_cached_tokens,
        started_unix_s=before.started_unix_s,
    )
