"""What the authority decides, and when it says to come back. Its clock stands where a test puts it."""

import pytest

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.quota import (
    BUSY_RETRY_S,
    MAX_RESUMPTIONS,
    RECALL_TIMEOUT_S,
    QuotaAuthority,
    StaleExchangeError,
)
from serving.tenants.messages import RESUMPTIONS, Amounts, Decision, Exchange, LeaseRequest, Reply, Report, Settlement
from serving.tenants.records import Limits
from tests.support.usage import usage_record

T = "tenant:t"


class World:
    """An authority with one limited tenant, and gateways that talk to it in order."""

    def __init__(self, **limits: int) -> None:
        self.now_s = 1000.0
        self.numbers: dict[str, int] = {}
        self.authority = QuotaAuthority({}, {}, lambda: self.now_s)
        self.set_limits(**limits)

    def set_limits(self, **limits: int) -> None:
        self.authority.set_limits({T: Limits(**limits)})

    def exchange(
        self,
        gateway: str,
        *asks: Amounts,
        reports: tuple[Report, ...] = (),
        settlements: tuple[Settlement, ...] = (),
        waited_s: float = 0.0,
    ) -> Reply:
        number = self.numbers[gateway] = self.numbers.get(gateway, 0) + 1
        return self.authority.exchange(
            Exchange(
                gateway, number, settlements, reports, tuple(LeaseRequest(((T, cost),), waited_s) for cost in asks)
            ),
            {},
        )

    def ask(self, gateway: str, cost: Amounts, *, waited_s: float = 0.0) -> Decision:
        return self.exchange(gateway, cost, waited_s=waited_s).decisions[0]


def outcome(decision: Decision) -> tuple[str, str, float | None]:
    return decision.kind, decision.limit, decision.retry_after_s


def settlement(request_id: str, num_tokens: int) -> Settlement:
    record = usage_record(request_id, num_prompt_tokens=num_tokens - 1, num_completion_tokens=1)
    return Settlement(record, (T, "key:k"))


@pytest.mark.parametrize(("limit", "field"), [("requests_per_minute", "requests"), ("tokens_per_minute", "tokens")])
def test_a_rate_refills_evenly_up_to_one_minutes_worth(limit: str, field: str) -> None:
    world = World(**{limit: 60})
    world.now_s += 3600  # of rest give no more than a minute
    assert world.ask("g", Amounts(**{field: 60})).kind == "granted"
    assert outcome(world.ask("g", Amounts(**{field: 1}))) == ("refused", limit, 1.0)
    world.now_s += 7.5
    assert outcome(world.ask("g", Amounts(**{field: 8}))) == ("refused", limit, 0.5)
    assert world.ask("g", Amounts(**{field: 7})).kind == "granted"


def test_what_is_more_than_a_minutes_worth_never_fits() -> None:
    world = World(tokens_per_minute=100)
    assert outcome(world.ask("g", Amounts(tokens=101))) == ("refused", "tokens_per_minute", None)


def test_a_budget_that_is_spent_does_not_come_back_but_one_that_is_reserved_may() -> None:
    world = World(token_budget=100)
    assert world.ask("g", Amounts(budget=90)).kind == "granted"
    assert outcome(world.ask("g", Amounts(budget=11))) == ("refused", "token_budget", BUSY_RETRY_S)
    used = Report(T, held=Amounts(), free=Amounts(), returned=Amounts())
    world.exchange("g", reports=(used,), settlements=(settlement("r", 90),))
    assert outcome(world.ask("g", Amounts(budget=11))) == ("refused", "token_budget", None)
    assert world.ask("g", Amounts(budget=10)).kind == "granted"


def test_running_requests_are_limited() -> None:
    world = World(max_concurrent_requests=2)
    reply = world.exchange("g", *[Amounts(slots=1)] * 3)
    assert [decision.kind for decision in reply.decisions] == ["granted", "granted", "refused"]
    assert outcome(reply.decisions[2]) == ("refused", "max_concurrent_requests", BUSY_RETRY_S)


def test_the_longest_delay_is_told() -> None:
    world = World(requests_per_minute=60, tokens_per_minute=60, max_concurrent_requests=1)
    world.ask("g", Amounts(requests=60, tokens=60, slots=1))
    decision = world.ask("g", Amounts(requests=30, tokens=45, slots=1))
    assert outcome(decision) == ("refused", "tokens_per_minute", 45.0)


def test_a_small_request_passes_a_large_one_that_does_not_fit() -> None:
    reply = World(token_budget=100).exchange("g", Amounts(budget=101), Amounts(budget=100))
    assert [decision.kind for decision in reply.decisions] == ["refused", "granted"]


def test_leases_are_a_share_of_what_is_left_and_none_near_the_edge() -> None:
    world = World(token_budget=1000)
    assert [lease.amounts.budget for lease in world.exchange("a", Amounts(budget=10)).leases] == [240]
    assert world.exchange("b", Amounts(budget=100)).leases == ()
    assert world.exchange("b", Amounts(budget=600)).leases == ()


def test_a_lease_counts_as_still_in_the_bucket() -> None:
    """Or a tenant could send more than a minute's worth at once: from the bucket, and from the lease."""
    world = World(requests_per_minute=60)
    (lease,) = world.exchange("a", Amounts(requests=1)).leases
    world.now_s += 3600
    room = 60 - lease.amounts.requests
    assert world.ask("b", Amounts(requests=room + 1), waited_s=RECALL_TIMEOUT_S).kind == "refused"
    assert world.ask("b", Amounts(requests=room)).kind == "granted"


def test_what_others_do_not_use_is_called_back_before_a_request_is_refused() -> None:
    world = World(max_concurrent_requests=40)
    (lease,) = world.exchange("a", Amounts(slots=1)).leases
    left = 39 - lease.amounts.slots
    assert world.ask("b", Amounts(slots=left)).kind == "granted"
    assert world.ask("b", Amounts(slots=1)).kind == "wait"
    assert world.authority.take_recalls() == {"a": {T}}
    world.exchange("a", reports=(Report(T, held=Amounts(slots=1), free=Amounts(), returned=Amounts()),))
    assert world.ask("b", Amounts(slots=lease.amounts.slots)).kind == "granted"
    # Now nobody has any to spare, so the answer comes at once.
    assert world.ask("b", Amounts(slots=1)).kind == "refused"


def test_nobody_waits_for_what_would_not_be_enough_or_does_not_come() -> None:
    world = World(max_concurrent_requests=40)
    world.exchange("a", Amounts(slots=1))
    assert world.ask("b", Amounts(slots=40)).kind == "refused"
    assert world.ask("b", Amounts(slots=39), waited_s=RECALL_TIMEOUT_S).kind == "refused"
    assert world.ask("b", Amounts(slots=39)).kind == "wait"


def test_the_same_exchange_again_gets_the_same_reply_and_changes_nothing() -> None:
    world = World(token_budget=100)
    message = Exchange("g", 1, (settlement("r", 40),), (), (LeaseRequest(((T, Amounts(budget=60)),), 0.0),))
    first = world.authority.exchange(message, {})
    world.authority.take_changes()
    assert world.authority.exchange(message, {}) == first
    assert world.authority.take_changes().is_empty
    assert world.authority.accounts[T].charged == 40
    world.numbers["g"] = 1
    world.exchange("g")
    with pytest.raises(StaleExchangeError):
        world.authority.exchange(message, {})


def test_a_record_that_the_ledger_has_is_not_charged_again() -> None:
    world = World(token_budget=100)
    message = Exchange("g", 1, (settlement("old", 40), settlement("new", 2)), (), ())
    world.authority.exchange(message, {"old": settlement("old", 40).record})
    assert world.authority.accounts[T].charged == world.authority.accounts["key:k"].charged == 2
    changes = world.authority.take_changes()
    assert list(changes.settlements) == ["new"]


@pytest.mark.parametrize("is_durable", [True, False], ids=["in another transaction", "in one"])
def test_of_a_stream_that_was_resumed_nothing_is_charged_twice(is_durable: bool) -> None:
    """The first gateway has seen 10 tokens of it, the second all 25, and a late record of the first tells nothing new."""
    world, recorded = World(token_budget=100), dict[str, UsageRecord]()

    def take(number: int, gateway: str, num_tokens: int, outcome: str) -> None:
        record = usage_record("r", num_prompt_tokens=5, num_completion_tokens=num_tokens, outcome=outcome)
        world.authority.exchange(Exchange(gateway, number, (Settlement(record, (T, "key:k")),), (), ()), recorded)
        if is_durable:
            recorded.update((name, each.record) for name, each in world.authority.take_changes().settlements.items())

    for number, gateway, num_tokens, outcome, charged in (
        (1, "a", 10, "cancelled", 15),
        (1, "b", 25, "length", 30),
        (2, "a", 10, "cancelled", 30),
        (3, "a", 25, "cancelled", 30),
    ):
        take(number, gateway, num_tokens, outcome)
        assert world.authority.accounts[T].charged == world.authority.accounts["key:k"].charged == charged
    if not is_durable:
        recorded = {name: each.record for name, each in world.authority.take_changes().settlements.items()}
    assert recorded["r"] == usage_record("r", num_prompt_tokens=5, num_completion_tokens=25, outcome="length")


@pytest.mark.parametrize("is_durable", [True, False], ids=["in another transaction", "in one"])
def test_of_a_stream_that_goes_on_only_what_is_not_counted_is_set_aside(is_durable: bool) -> None:
    world, record = World(token_budget=100, max_concurrent_requests=9), settlement("r", 60).record
    world.exchange("a", settlements=(Settlement(record, (T,)),))
    recorded = {}
    if is_durable:
        world.authority.take_changes()
        recorded = {"r": record}

    def ask(number: int, begun_id: str, budget: int) -> Decision:
        request = LeaseRequest(((T, Amounts(slots=1, budget=budget)),), RECALL_TIMEOUT_S, begun_id)
        return world.authority.exchange(Exchange("b", number, (), (), (request,)), recorded).decisions[0]

    assert outcome(ask(1, "", 90)) == outcome(ask(2, "another", 90)) == ("refused", "token_budget", None)
    assert outcome(ask(3, "r", 101)) == ("refused", "token_budget", None)
    decision = ask(4, "r", 90)
    assert (decision.kind, decision.num_counted) == ("granted", 60)
    assert world.authority.accounts[T].holdings["b"].held == Amounts(slots=1, budget=30)
    assert ask(5, "r", 60).kind == "granted", "all is counted"
    assert world.authority.accounts[T].holdings["b"].held == Amounts(slots=2, budget=30)


def test_a_stream_goes_on_only_so_often_under_a_budget() -> None:
    """Whatever it has been charged: what is computed again is not. Requests of its tenant and other streams are let in."""
    world = World(token_budget=10**6)
    number = 0

    def ask(begun_id: str) -> Decision:
        nonlocal number
        number += 1
        request = LeaseRequest(((T, Amounts(budget=1)),), RECALL_TIMEOUT_S, begun_id)
        return world.authority.exchange(Exchange("g", number, (), (), (request,)), {}).decisions[0]

    for _ in range(MAX_RESUMPTIONS):
        assert ask("r").kind == "granted"
    for _ in range(2):
        assert outcome(ask("r")) == ("refused", RESUMPTIONS, None)
    assert ask("").kind == ask("another").kind == "granted"
    world.now_s += 2 * 86_400
    assert ask("another").kind == "granted"
    assert ask("r").kind == "granted", "nobody has a token that is so old"


def test_a_dead_gateways_places_are_free_and_its_budget_stays_withheld() -> None:
    world = World(token_budget=100, max_concurrent_requests=1)
    assert world.ask("dead", Amounts(slots=1, budget=60)).kind == "granted"
    world.authority.expire("dead")
    world.authority.forget("dead")
    assert outcome(world.ask("g", Amounts(slots=1, budget=41))) == ("refused", "token_budget", None)
    assert world.ask("g", Amounts(slots=1, budget=40)).kind == "granted"


def test_a_gateway_that_was_only_cut_off_goes_on_where_it_was() -> None:
    world = World(token_budget=100)
    world.ask("g", Amounts(budget=60))
    world.authority.expire("g")
    left = Report(T, held=Amounts(), free=Amounts(), returned=Amounts())
    world.exchange("g", reports=(left,), settlements=(settlement("late", 7),))
    assert world.ask("g", Amounts(budget=93)).kind == "granted"


def test_limits_change_while_requests_run() -> None:
    world = World(max_concurrent_requests=3)
    for _ in range(3):
        assert world.ask("g", Amounts(slots=1)).kind == "granted"
    world.set_limits(max_concurrent_requests=1, tokens_per_minute=10)
    assert world.ask("g", Amounts(slots=1)).kind == "refused"
    assert world.ask("g", Amounts(tokens=10)).kind == "granted"  # a new limit starts full
    world.set_limits()
    assert world.ask("g", Amounts(slots=1, tokens=1000)).kind == "granted"


def test_who_is_gone_gets_nothing() -> None:
    world = World(token_budget=100)
    world.authority.set_limits({})
    assert outcome(world.ask("g", Amounts(budget=1))) == ("refused", "", None)


def test_a_clock_that_is_put_back_gives_nothing_and_takes_nothing() -> None:
    world = World(requests_per_minute=60)
    world.ask("g", Amounts(requests=60))
    world.now_s -= 500
    assert world.ask("g", Amounts(requests=1)).kind == "refused"
    world.now_s += 1
    assert world.ask("g", Amounts(requests=1)).kind == "granted"


def test_a_revoked_key_of_a_tenant_that_nobody_has_asked_about_is_refused() -> None:
    world = World(requests_per_minute=5)
    ask = LeaseRequest(((T, Amounts(requests=1)), ("key:gone", Amounts(requests=1))), 0.0)
    reply = world.authority.exchange(Exchange("g", 1, (), (), (ask,)), {})
    assert reply.decisions == (Decision(kind="refused", subject="key:gone"),)
    assert reply.balances == ()
