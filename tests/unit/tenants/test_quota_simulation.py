"""The authority and two gateways over a network that loses, repeats and delays, with restarts and deaths at any moment.

What was admitted is counted here, apart from the code under test: real use and running reservations never exceed a limit.
A seed is one history; a failing one fails again.
"""

import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.quota import Account, Changes, Gateway, Holding, QuotaAuthority, StaleExchangeError
from serving.tenants.client.leases import LeaseBook, WaitingRequest
from serving.tenants.messages import Amounts, Costs, Decision, Exchange, Reply
from serving.tenants.records import Limits
from tests.support.effort import by_day
from tests.support.usage import usage_record

TENANT, KEYS = "tenant:t", ("key:a", "key:b")
GATEWAYS = ("g0", "g1")
FATES = ("answered", "answered", "answered", "answer is lost", "lost", "crash before commit", "crash after commit")


T = TypeVar("T")


def copy_of(value: T) -> T:
    """As copy.deepcopy, in a fifth of the time."""
    copied: T = pickle.loads(pickle.dumps(value))
    return copied


def some_limits(rng: random.Random) -> Limits:
    """Often of one kind alone, so that it is the one that decides."""
    share = rng.choice([0.25, 0.5, 1.0])
    most = {"requests_per_minute": 100, "tokens_per_minute": 3000, "max_concurrent_requests": 30, "token_budget": 3000}
    return Limits(**{name: rng.randint(1, limit) for name, limit in most.items() if rng.random() < share})


def usage(request_id: str, num_tokens: int) -> UsageRecord:
    return usage_record(request_id, key_id="a", num_prompt_tokens=num_tokens)


@dataclass
class Disk:
    """What was committed."""

    accounts: dict[str, Account] = field(default_factory=dict)
    gateways: dict[str, Gateway] = field(default_factory=dict)
    records: dict[str, UsageRecord] = field(default_factory=dict)
    """Tokens by request id."""

    def commit(self, authority: QuotaAuthority) -> None:
        changes: Changes = authority.take_changes()
        for settlement in changes.settlements.values():
            assert settlement.record.request_id not in self.records
            self.records[settlement.record.request_id] = settlement.record
        # What the changes do not name is not written: forgetting to name something shows after a restart.
        for subject in changes.accounts:
            holdings = self.accounts[subject].holdings if subject in self.accounts else {}
            self.accounts[subject] = copy_of(authority.accounts[subject])
            self.accounts[subject].holdings = holdings
        for gateway_id, subject in changes.holdings:
            self.accounts[subject].holdings.pop(gateway_id, None)
            if holding := authority.accounts[subject].holdings.get(gateway_id):
                self.accounts[subject].holdings[gateway_id] = Holding(holding.held, free=holding.held)
        for gateway_id in changes.gateways:
            self.gateways.pop(gateway_id, None)
            if gateway_id in authority.gateways:
                self.gateways[gateway_id] = copy_of(authority.gateways[gateway_id])


@dataclass
class Request:
    gateway_id: str
    subjects: tuple[str, str]
    costs: Costs
    num_tokens: int
    used: int | None = None


class IdealBucket:
    """A textbook token bucket without leases, which is told of refunds when the authority is."""

    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.at_s = limit, float(limit), 0.0

    def change(self, amount: float, now_s: float) -> None:
        refilled = min(self.limit, self.level + (now_s - self.at_s) * self.limit / 60)
        self.level, self.at_s = min(self.limit, refilled + amount), now_s


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.limits = {subject: some_limits(self.rng) for subject in (TENANT, *KEYS)}
        self.most_tokens = self.rng.choice([20, 200])
        self.now_s = 0.0
        self.disk = Disk()
        self.books = {gateway_id: LeaseBook(gateway_id) for gateway_id in GATEWAYS}
        self.num_gateways = len(GATEWAYS)
        self.admitted: dict[str, Request] = {}
        self.waiting: list[tuple[str, WaitingRequest]] = []
        self.durable: set[str] = set()
        self.dead: set[str] = set()
        self.sent: list[Exchange] = []
        self.replies: list[tuple[str, Reply]] = []
        self.num_requests = 0
        self.is_in_reply = False
        self.is_changed = False
        """Other limits hold than in the beginning."""
        self.requests_bucket = {
            s: IdealBucket(x.requests_per_minute) for s, x in self.limits.items() if x.requests_per_minute
        }
        self.tokens_bucket = {
            s: IdealBucket(x.tokens_per_minute) for s, x in self.limits.items() if x.tokens_per_minute
        }
        self.restart()

    def restart(self) -> None:
        """kill -9 of the authority."""
        self.authority = QuotaAuthority(copy_of(self.disk.accounts), copy_of(self.disk.gateways), lambda: self.now_s)
        self.authority.set_limits(self.limits)

    def some_gateway(self) -> str:
        return self.rng.choice(list(self.books))

    def arrive(self) -> None:
        gateway_id, key, num_tokens = self.some_gateway(), self.rng.choice(KEYS), self.rng.randint(0, self.most_tokens)
        for _ in range(self.rng.randint(1, 10)):
            self.num_requests += 1
            costs = tuple((s, cost) for s in (TENANT, key) if (cost := cost_of(self.limits[s], num_tokens)))
            request = Request(gateway_id, (TENANT, key), costs, num_tokens)
            request_id = f"r{self.num_requests}"
            book = self.books[gateway_id]
            if not costs or book.take(costs):
                self.admit(request_id, request)
            else:
                self.waiting.append((request_id, book.ask(costs, self.now_s, self.verdict_taker(request_id, request))))

    def verdict_taker(self, request_id: str, request: Request):  # type: ignore[no-untyped-def]
        def take(decision: Decision) -> None:
            self.waiting = [item for item in self.waiting if item[0] != request_id]
            if decision.kind == "granted":
                self.admit(request_id, request)

        return take

    def admit(self, request_id: str, request: Request) -> None:
        self.admitted[request_id] = request
        if self.is_changed:
            for subject, taken in request.costs:
                self.check_limits(subject, taken)
        if not self.is_in_reply:  # then it was counted when the authority granted it
            self.take_from_buckets(request.costs)

    def take_from_buckets(self, costs: Costs) -> None:
        for subject, cost in costs:
            for buckets, amount in ((self.requests_bucket, cost.requests), (self.tokens_bucket, cost.tokens)):
                if subject in buckets:
                    buckets[subject].change(-amount, self.now_s)
                    assert buckets[subject].level > -1e-6, f"{subject} is over its rate"

    def finish(self) -> None:
        running = [name for name, r in self.admitted.items() if r.used is None and r.gateway_id not in self.dead]
        for name in self.rng.sample(running, self.rng.randint(0, len(running))):
            self.end(name, self.rng.randint(0, self.admitted[name].num_tokens))

    def end(self, name: str, used: int) -> None:
        request = self.admitted[name]
        request.used = used
        self.books[request.gateway_id].settle(
            request.costs, usage(name, used), request.subjects, lambda: self.durable.add(name)
        )

    def give_up_waiting(self) -> None:
        if self.waiting:
            item = self.rng.choice(self.waiting)
            self.waiting.remove(item)
            gateway_id = next(g for g, book in self.books.items() if item[1] in everything_waiting(book))
            self.books[gateway_id].withdraw(item[1])

    def send(self) -> None:
        exchange = self.books[self.some_gateway()].next_exchange(self.now_s)
        if exchange is not None:
            self.sent.append(exchange)
            self.reach_authority(exchange, self.rng.choice(FATES))

    def reach_again(self) -> None:
        """A message that came, or did not come, before."""
        if self.sent:
            self.reach_authority(self.rng.choice(self.sent[-5:]), self.rng.choice(FATES))

    def reach_authority(self, exchange: Exchange, fate: str) -> None:
        if fate == "lost":
            return
        last = self.disk.gateways.get(exchange.gateway_id, Gateway()).number
        try:
            reply = self.authority.exchange(exchange, self.disk.records)
        except StaleExchangeError:
            return
        if fate == "crash before commit":
            self.restart()
            return
        self.disk.commit(self.authority)
        if exchange.number > last:
            self.refund(exchange)
            for ask, decision in zip(exchange.lease_requests, reply.decisions, strict=True):
                if decision.kind == "granted":
                    self.take_from_buckets(ask.costs)
        if fate == "crash after commit":
            self.restart()
        if fate == "answered":
            self.replies.append((exchange.gateway_id, reply))
            self.answer(exchange.gateway_id, reply)

    def answer(self, gateway_id: str, reply: Reply) -> None:
        if gateway_id not in self.dead:
            self.is_in_reply = True
            self.books[gateway_id].take_reply(reply, self.now_s)
            self.is_in_reply = False

    def answer_again(self) -> None:
        if self.replies:
            self.answer(*self.rng.choice(self.replies[-5:]))

    def refund(self, exchange: Exchange) -> None:
        for report in exchange.reports:
            for buckets, amount in (
                (self.requests_bucket, report.returned.requests),
                (self.tokens_bucket, report.returned.tokens),
            ):
                if report.subject in buckets:
                    buckets[report.subject].change(amount, self.now_s)

    def recall(self, *, is_lost: bool | None = None) -> None:
        for gateway_id, subjects in self.authority.take_recalls().items():
            if gateway_id in self.books and not (self.rng.random() < 0.3 if is_lost is None else is_lost):
                self.books[gateway_id].recall(subjects)

    def idle(self) -> None:
        self.books[self.some_gateway()].return_idle()

    def time_passes(self) -> None:
        self.now_s += self.rng.choice([0.1, 1.0, 5.0, 60.0])

    def gateway_dies(self) -> None:
        """kill -9 of a gateway; another takes its place, and the authority notices."""
        gateway_id = self.some_gateway()
        self.kill(gateway_id)
        self.books[f"g{self.num_gateways}"] = LeaseBook(f"g{self.num_gateways}")
        self.num_gateways += 1
        if gateway_id in self.authority.gateways:
            self.authority.expire(gateway_id)
            self.authority.forget(gateway_id)
            self.disk.commit(self.authority)

    def kill(self, gateway_id: str) -> None:
        book = self.books.pop(gateway_id)
        mine = everything_waiting(book)
        self.waiting = [item for item in self.waiting if item[1] not in mine]
        self.dead.add(gateway_id)
        self.sent = [exchange for exchange in self.sent if exchange.gateway_id != gateway_id]

    def lower_limits(self) -> None:
        """Of places and budgets. The gateways hear of it at once, but what they had sent is answered by the limits of before."""
        for book in self.books.values():
            exchange = book.next_exchange(self.now_s)
            if exchange is not None:
                self.sent.append(exchange)
                self.reach_authority(exchange, "answer is lost")
        self.limits = {subject: self.lowered(limits) for subject, limits in self.limits.items()}
        self.authority.set_limits(self.limits)
        for book in self.books.values():
            book.change_limits([TENANT, *KEYS])
            exchange = book.next_exchange(self.now_s)
            if exchange is not None:
                self.reach_authority(exchange, "answered")
        self.is_changed = True

    def lowered(self, limits: Limits) -> Limits:
        names = ("max_concurrent_requests", "token_budget")
        known = {name: limit for name in names if (limit := getattr(limits, name)) is not None}
        return replace(limits, **{name: self.rng.randint(1, limit) for name, limit in known.items()})

    def nothing_is_overspent(self) -> None:
        for subject in self.limits:
            self.check_limits(subject, Amounts(slots=1, budget=1))

    def check_limits(self, subject: str, taken: Amounts) -> None:
        """Of what was `taken`."""
        limits = self.limits[subject]
        mine = [r for r in self.admitted.values() if subject in r.subjects]
        if taken.budget and limits.token_budget is not None:
            spent = sum(r.num_tokens if r.used is None else r.used for r in mine)
            assert spent <= limits.token_budget
        if taken.slots and limits.max_concurrent_requests is not None:
            running = sum(r.used is None and r.gateway_id not in self.dead for r in mine)
            assert running <= limits.max_concurrent_requests

    def ledger_and_quota_agree(self) -> None:
        for subject in self.limits:
            charged = sum(
                r.num_prompt_tokens for name, r in self.disk.records.items() if subject in self.admitted[name].subjects
            )
            assert charged == (self.disk.accounts[subject].charged if subject in self.disk.accounts else 0)
        assert self.durable <= self.disk.records.keys()

    def come_to_rest(self) -> None:
        """Everything ends, everything arrives. Every record is there once, and nothing is held but by the dead."""
        while any(self.end_all() or book.num_unrecorded or book.num_waiting for book in self.books.values()):
            self.exchange_everything()
        self.exchange_everything()
        assert not self.waiting
        alive = {name: r.used for name, r in self.admitted.items() if r.gateway_id not in self.dead}
        assert {name: r.num_prompt_tokens for name, r in self.disk.records.items() if name in alive} == alive
        assert alive.keys() <= self.durable
        for account in self.authority.accounts.values():
            assert not account.holdings.keys() & self.books.keys()
            self.fits_exactly(account)

    def end_all(self) -> bool:
        running = [name for name, r in self.admitted.items() if r.used is None and r.gateway_id not in self.dead]
        for name in running:
            self.end(name, self.admitted[name].num_tokens // 2)
        return bool(running)

    def exchange_everything(self) -> None:
        self.now_s += 1  # so that nobody waits for a recall for ever
        for book in self.books.values():
            book.return_all()
            exchange = book.next_exchange(self.now_s)
            if exchange is not None:
                self.sent.append(exchange)
                self.reach_authority(exchange, "answered")
        self.recall(is_lost=False)

    def fits_exactly(self, account: Account) -> None:
        """After a rest, as much as is left can be had, and one token more cannot."""
        budget = account.limits.token_budget
        if budget is not None:
            self.now_s += 100
            account.refill(self.now_s)
            withheld = sum(holding.held.budget for holding in account.holdings.values())
            left = budget - account.charged - withheld
            assert left >= 0 or self.is_changed, "more is spent than may be"
            assert not account.shortages(Amounts(budget=max(0, left)))
            assert [s.limit for s in account.shortages(Amounts(budget=max(0, left) + 1))] == ["token_budget"]


def everything_waiting(book: LeaseBook) -> list[WaitingRequest]:
    sent = book._sent.waiting if book._sent else []
    return [*book._waiting, *sent]


def cost_of(of: Limits, num_tokens: int) -> Amounts:
    return Amounts(
        requests=of.requests_per_minute is not None,
        tokens=num_tokens if of.tokens_per_minute is not None else 0,
        slots=of.max_concurrent_requests is not None,
        budget=num_tokens if of.token_budget is not None else 0,
    )


def actions_of(world: World) -> dict[Callable[[], None], float]:
    """What can happen, and how often."""
    return {
        world.arrive: 8,
        world.finish: 4,
        world.send: 12,
        world.reach_again: 3,
        world.answer_again: 2,
        world.recall: 4,
        world.give_up_waiting: 2,
        world.idle: 1,
        world.time_passes: 3,
        world.restart: 1,
        world.gateway_dies: 0.3,
    }


@pytest.mark.parametrize("seed", range(by_day(25, by_night=1500)))
def test_nothing_is_overspent_and_nothing_is_lost(seed: int) -> None:
    world = World(seed)
    actions = actions_of(world)
    for action in world.rng.choices(list(actions), list(actions.values()), k=300):
        action()
        world.nothing_is_overspent()
        world.ledger_and_quota_agree()
    world.come_to_rest()
    world.nothing_is_overspent()
    world.ledger_and_quota_agree()


@pytest.mark.parametrize("seed", range(by_day(25, by_night=1500)))
def test_limits_that_were_lowered_hold_for_every_request_that_comes_after(seed: int) -> None:
    """Each is compared with them when it is let in; those that ran before may be more than they allow."""
    world = World(seed)
    actions = actions_of(world)
    for action in world.rng.choices(list(actions), list(actions.values()), k=100):
        action()
    world.lower_limits()
    for action in world.rng.choices(list(actions), list(actions.values()), k=200):
        action()
        world.ledger_and_quota_agree()
    world.come_to_rest()
    world.ledger_and_quota_agree()
