"""The real quota authority and the gateways' lease books in virtual time; only the messages between them are ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.quota import QuotaAuthority
from serving.tenants.client.accounts import LINGER_S, reservation_cost
from serving.tenants.client.leases import LeaseBook
from serving.tenants.messages import Costs, Decision
from serving.tenants.records import Limits

EXCHANGE_S = 0.003
"""From a gateway's message to the authority's reply."""
RECALL_PAUSE_S = 0.01
"""After "wait" a gateway asks again so much later, as TenantAccounts does."""
RETURN_IDLE_S = 1.0

Schedule = Callable[[float, Callable[[], None]], None]
"""Calls back so many seconds later."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a running request has reserved."""

    tenant: str
    gateway: str
    costs: Costs


@dataclass(slots=True)
class _Line:
    """One gateway's conversation with the authority."""

    book: LeaseBook
    is_in_flight: bool = False
    is_due: bool = False


class Quotas:
    """Of all tenants of a simulation that have limits."""

    def __init__(
        self,
        limits: Mapping[str, Limits],
        gateways: Sequence[str],
        clock: Callable[[], float],
        schedule: Schedule,
    ) -> None:
        """`limits` are by tenant."""
        self._limits = dict(limits)
        self._clock = clock
        self._schedule = schedule
        self._authority = QuotaAuthority({}, {}, clock)
        self._authority.set_limits({_subject(tenant): limit for tenant, limit in limits.items()})
        self._lines = {gateway: _Line(LeaseBook(gateway)) for gateway in gateways}
        self._num_records = 0
        schedule(RETURN_IDLE_S, self._return_idle)

    def has_limits(self, tenant: str) -> bool:
        """Whether the tenant has to ask."""
        return tenant in self._limits

    def reserve(
        self,
        gateway: str,
        tenant: str,
        num_tokens: int,
        on_granted: Callable[[Grant], None],
        on_refused: Callable[[Decision], None],
    ) -> None:
        """Ask for the most that a request can use. One of the two is called, now or later."""
        costs: Costs = ((_subject(tenant), reservation_cost(self._limits[tenant], num_tokens)),)
        grant, line = Grant(tenant, gateway, costs), self._lines[gateway]
        if line.book.take(costs):
            on_granted(grant)
            return

        def decided(decision: Decision) -> None:
            if decision.kind == "granted":
                on_granted(grant)
            else:
                on_refused(decision)

        line.book.ask(costs, self._clock(), decided)
        self._talk(line)

    def settle(self, grant: Grant, *, num_prompt_tokens: int, num_completion_tokens: int, outcome: str) -> None:
        """The request has ended and has used so much."""
        self._num_records += 1
        record = UsageRecord(
            request_id=f"record-{self._num_records}",
            tenant_id=grant.tenant,
            key_id="",
            model="",
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=0,
            num_completion_tokens=num_completion_tokens,
            outcome=outcome,
            started_unix_s=self._clock(),
            gateway_s=0.0,
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=0.0,
            total_s=0.0,
        )
        line = self._lines[grant.gateway]
        is_urgent = line.book.settle(grant.costs, record, (_subject(grant.tenant),), lambda: None)
        if is_urgent:
            self._talk(line)
        elif not line.is_due:
            line.is_due = True
            self._schedule(LINGER_S, lambda: self._talk(line))

    def charged(self, tenant: str) -> int:
        """Tokens of the tenant that the authority has in its books."""
        account = self._authority.accounts.get(_subject(tenant))
        return 0 if account is None else account.charged

    def _talk(self, line: _Line) -> None:
        """Send what there is to say, unless a reply is awaited."""
        line.is_due = False
        if line.is_in_flight:
            return
        exchange = line.book.next_exchange(self._clock())
        if exchange is None:
            return
        line.is_in_flight = True

        def answered() -> None:
            line.is_in_flight = False
            reply = self._authority.exchange(exchange, recorded={})
            self._authority.take_changes()
            for gateway, subjects in self._authority.take_recalls().items():
                self._lines[gateway].book.recall(subjects)
                self._talk(self._lines[gateway])
            line.book.take_reply(reply, self._clock())
            if line.book.num_waiting:
                has_to_wait = any(decision.kind == "wait" for decision in reply.decisions)
                self._schedule(RECALL_PAUSE_S if has_to_wait else 0.0, lambda: self._talk(line))
            elif line.book.num_unrecorded and not line.is_due:
                line.is_due = True
                self._schedule(LINGER_S, lambda: self._talk(line))

        self._schedule(EXCHANGE_S, answered)

    def _return_idle(self) -> None:
        for line in self._lines.values():
            line.book.return_idle()
            self._talk(line)
        self._schedule(RETURN_IDLE_S, self._return_idle)


def _subject(tenant: str) -> str:
    return f"tenant:{tenant}"
