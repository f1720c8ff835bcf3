"""What a gateway tells clients of their rates: the authority's word, and what it may add to it by itself."""

import random

import pytest

from serving.contracts.accounts import RateLimit, RateLimits
from serving.gateway.http.responses import rate_limit_headers
from serving.tenants.authority.quota import QuotaAuthority
from serving.tenants.client.balances import tighter
from serving.tenants.client.leases import LeaseBook
from serving.tenants.messages import Amounts, Costs, Decision
from serving.tenants.records import Limits
from tests.support.effort import by_day
from tests.support.usage import usage_record

T = "tenant:t"
LIMITS = Limits(requests_per_minute=60, tokens_per_minute=6000)


def cost(num_tokens: int) -> Costs:
    return ((T, Amounts(requests=1, tokens=num_tokens)),)


class World:
    """An authority and gateways that it answers at once. Time stands where a test puts it."""

    def __init__(self, num_gateways: int = 1, limits: Limits = LIMITS) -> None:
        self.now_s = 1000.0
        self.limits = limits
        self.authority = QuotaAuthority({}, {}, lambda: self.now_s)
        self.authority.set_limits({T: limits})
        self.books = [LeaseBook(f"g{i}") for i in range(num_gateways)]

    def exchange(self, book: LeaseBook) -> None:
        if exchange := book.next_exchange(self.now_s):
            book.take_reply(self.authority.exchange(exchange, {}), self.now_s)

    def admit(self, book: LeaseBook, costs: Costs) -> bool:
        """Out of the lease if it can be, otherwise by asking."""
        if book.take(costs):
            return True
        decisions: list[Decision] = []
        book.ask(costs, self.now_s - 60, decisions.append)  # for so long that nobody is waited for
        self.exchange(book)
        return decisions[0].kind == "granted"

    def end(self, book: LeaseBook, costs: Costs, num_used: int) -> None:
        book.settle(costs, usage_record("r", num_prompt_tokens=num_used), (T,), lambda: None)

    def remaining(self, book: LeaseBook) -> tuple[int, int]:
        rates = book.rates(T, self.limits, self.now_s)
        assert rates.requests and rates.tokens
        return rates.requests.remaining, rates.tokens.remaining


def test_nothing_is_told_before_the_authority_has_spoken() -> None:
    assert World().books[0].rates(T, LIMITS, 0.0) == RateLimits()


def test_own_requests_and_the_refill_count_at_once() -> None:
    world = World()
    (book,) = world.books
    assert world.admit(book, cost(100))
    assert world.remaining(book) == (59, 5900)
    assert book.take(cost(100)), "a lease came with the first"
    assert world.remaining(book) == (58, 5800)
    world.now_s += 1.0  # a sixtieth of a minute's worth
    assert world.remaining(book) == (59, 5900)
    world.end(book, cost(100), 30)
    assert world.remaining(book) == (59, 5970)
    world.now_s += 3600
    assert book.rates(T, LIMITS, world.now_s) == RateLimits(
        requests=RateLimit(limit=60, remaining=60, reset_s=0.0),
        tokens=RateLimit(limit=6000, remaining=6000, reset_s=0.0),
    )


def test_what_was_let_in_during_an_exchange_is_not_forgotten() -> None:
    world = World()
    (book,) = world.books
    world.admit(book, cost(100))
    book.take(cost(100))
    exchange = book.next_exchange(world.now_s)
    assert exchange is not None
    book.take(cost(50))
    assert world.remaining(book) == (57, 5750)
    book.take_reply(world.authority.exchange(exchange, {}), world.now_s)
    assert world.remaining(book) == (57, 5750)


def test_a_refusal_tells_what_is_left() -> None:
    world = World()
    (book,) = world.books
    assert world.admit(book, cost(5990))
    assert not world.admit(book, cost(20))
    assert world.remaining(book) == (59, 10)
    rates = book.rates(T, LIMITS, world.now_s)
    assert rates.tokens and rates.tokens.reset_s == pytest.approx(59.9)


def test_what_is_old_and_of_no_use_is_forgotten() -> None:
    world = World()
    (book,) = world.books
    world.admit(book, cost(5000))
    for _ in range(3):
        book.return_idle()
        world.exchange(book)
    assert world.remaining(book) == (59, 1000), "a request still runs"
    world.end(book, cost(5000), 5000)
    world.exchange(book)
    assert world.remaining(book) == (59, 1000)
    book.return_idle()
    book.return_idle()
    assert book.rates(T, LIMITS, world.now_s) == RateLimits()


@pytest.mark.parametrize("seed", range(by_day(15, by_night=300)))
def test_what_is_told_is_what_can_be_had(seed: int) -> None:
    """After any history of two gateways, as many tokens as it says fit, and not one more."""
    rng = random.Random(seed)
    world = World(num_gateways=2)
    running: list[tuple[LeaseBook, Costs]] = []
    for _ in range(60):
        book = rng.choice(world.books)
        if running and rng.random() < 0.4:
            book, costs = running.pop(rng.randrange(len(running)))
            world.end(book, costs, rng.randint(0, costs[0][1].tokens))
        elif rng.random() < 0.8:
            costs = cost(rng.randint(1, 400))
            if world.admit(book, costs):
                running.append((book, costs))
        else:
            world.now_s += rng.choice([0.1, 1.0, 5.0])
            world.exchange(book)
    asking, other = world.books
    world.exchange(other)
    world.admit(asking, cost(1))
    world.exchange(asking)  # so that it has news of the other
    num_requests, num_tokens = world.remaining(asking)
    other.return_all()
    world.exchange(other)
    assert world.remaining(asking) == (num_requests, num_tokens), "leases that go back change nothing"
    if num_requests:
        assert not world.admit(asking, cost(num_tokens + 1))
        assert world.admit(asking, cost(num_tokens))


def test_the_tighter_limit_counts() -> None:
    small, large = (RateLimit(limit=limit, remaining=left, reset_s=1.0) for limit, left in ((10, 9), (600, 8)))
    told = tighter(RateLimits(requests=small), RateLimits(requests=large, tokens=small))
    assert told == RateLimits(requests=large, tokens=small)


@pytest.mark.parametrize(
    ("reset_s", "text"),
    [(0.0, "0s"), (-1.0, "0s"), (0.0004, "1ms"), (0.12, "120ms"), (1.0, "1s"), (7.5, "7.5s"), (60, "1m0s"), (62.25, "1m2.25s")],
)  # fmt: skip
def test_headers_are_written_as_openai_does(reset_s: float, text: str) -> None:
    limits = RateLimits(tokens=RateLimit(limit=100, remaining=7, reset_s=reset_s))
    assert rate_limit_headers(limits) == [
        ("x-ratelimit-limit-tokens", "100"),
        ("x-ratelimit-remaining-tokens", "7"),
        ("x-ratelimit-reset-tokens", text),
    ]
