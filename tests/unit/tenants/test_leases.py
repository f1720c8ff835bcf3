"""A gateway's half of the conversation, message by message."""

from serving.tenants.client.leases import LeaseBook
from serving.tenants.messages import GRANTED, NOTHING, Amounts, Costs, Decision, Lease, Reply, Report
from tests.support.usage import usage_record

COSTS: Costs = (("tenant:t", Amounts(requests=1, tokens=50, slots=1, budget=50)),)


def granted_book(*leases: Lease) -> tuple[LeaseBook, list[Decision]]:
    """One request was asked for and granted."""
    book, decisions = LeaseBook("g"), list[Decision]()
    book.ask(COSTS, 0.0, decisions.append)
    assert book.next_exchange(0.0) is not None
    book.take_reply(Reply(number=1, decisions=(GRANTED,), leases=leases), 0.0)
    return book, decisions


def test_a_grant_that_comes_too_late_goes_back_whole() -> None:
    """The request went away between the decision and its next step."""
    book, decisions = LeaseBook("g"), list[Decision]()
    request = book.ask(COSTS, 0.0, decisions.append)
    book.next_exchange(0.0)
    book.take_reply(Reply(number=1, decisions=(GRANTED,), leases=()), 0.0)
    assert decisions == [GRANTED]
    book.withdraw(request)
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports == (Report("tenant:t", NOTHING, NOTHING, Amounts(requests=1, tokens=50)),)


def test_of_a_stream_that_goes_on_what_is_counted_is_neither_set_aside_nor_given_back() -> None:
    """Also where a lease would serve it."""
    book, decisions = granted_book(Lease("tenant:t", COSTS[0][1]))
    request = book.ask(COSTS, 0.0, decisions.append, begun_id="r")
    exchange = book.next_exchange(0.0)
    assert exchange is not None and [each.begun_id for each in exchange.lease_requests] == ["r"]
    book.take_reply(Reply(2, (Decision(kind="granted", num_counted=45),), ()), 0.0)
    rest = Amounts(requests=1, tokens=50, slots=1, budget=5)
    assert request.costs == (("tenant:t", rest),)
    book.settle(
        request.costs, usage_record("r", num_prompt_tokens=10, num_completion_tokens=38), ("tenant:t",), lambda: None
    )
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports == (Report("tenant:t", COSTS[0][1], NOTHING, Amounts(tokens=2)),), (
        "the other one still runs"
    )


def test_a_request_that_was_withdrawn_is_not_asked_for() -> None:
    book = LeaseBook("g")
    book.withdraw(book.ask(COSTS, 0.0, lambda decision: None))
    assert book.next_exchange(0.0) is None
    assert book.num_waiting == 0


def test_a_reply_that_comes_again_is_not_applied_again() -> None:
    """It would hand out the lease twice, or tell a request what was said about another."""
    lease = Lease("tenant:t", COSTS[0][1])
    book, decisions = granted_book(lease)
    reply = Reply(number=1, decisions=(GRANTED,), leases=(lease,))
    book.take_reply(reply, 0.0)
    assert book.take(COSTS)
    assert not book.take(COSTS)
    book.ask(COSTS, 0.0, decisions.append)
    book.next_exchange(0.0)
    book.take_reply(reply, 0.0)
    assert decisions == [GRANTED]
    assert book.num_waiting == 1


def test_under_other_limits_nothing_is_kept_until_the_authority_gives_again() -> None:
    cost = COSTS[0][1]
    book, decisions = granted_book(Lease("tenant:t", cost * 5))
    assert book.take(COSTS)
    book.change_limits(["tenant:t", "tenant:other"])
    assert not book.take(COSTS)
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports == (Report("tenant:t", cost * 2, NOTHING, Amounts(requests=4, tokens=200)),)
    book.take_reply(Reply(2, (), ()), 0.0)
    assert book.settle(COSTS, usage_record("r", num_prompt_tokens=20), ("tenant:t",), lambda: None)
    assert not book.take(COSTS), "the place that is free now is the authority's to give"
    book.ask(COSTS, 0.0, decisions.append)
    book.next_exchange(0.0)
    book.take_reply(Reply(3, (GRANTED,), (Lease("tenant:t", cost),)), 0.0)
    assert book.take(COSTS)


def test_a_lease_under_limits_that_have_changed_since_goes_back() -> None:
    """The authority may have answered before it knew of the change, or answers a repeated exchange as it did then."""
    cost = COSTS[0][1]
    book = LeaseBook("g")
    book.ask(COSTS, 0.0, lambda decision: None)
    book.next_exchange(0.0)
    book.change_limits(["tenant:t"])
    book.take_reply(Reply(1, (GRANTED,), (Lease("tenant:t", cost * 5),)), 0.0)
    assert not book.take(COSTS)
    assert book.settle(COSTS, usage_record("r", num_prompt_tokens=20), ("tenant:t",), lambda: None)
    assert not book.take(COSTS)
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports == (Report("tenant:t", NOTHING, NOTHING, Amounts(requests=5, tokens=280)),)


def test_an_exchange_stays_as_it_is_until_it_is_answered() -> None:
    book = LeaseBook("g")
    book.ask(COSTS, 0.0, lambda decision: None)
    first = book.next_exchange(0.0)
    book.ask(COSTS, 0.0, lambda decision: None)
    assert book.next_exchange(9.0) is first


def test_an_idle_lease_goes_back_and_a_used_one_does_not() -> None:
    book, _ = granted_book(Lease("tenant:t", COSTS[0][1] * 3))
    book.return_idle()
    assert book.take(COSTS)
    book.return_idle()
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports[0].free == COSTS[0][1] * 2
    book.take_reply(Reply(number=exchange.number, decisions=(), leases=()), 0.0)
    book.return_idle()
    exchange = book.next_exchange(0.0)
    assert exchange is not None
    assert exchange.reports[0].free == NOTHING
