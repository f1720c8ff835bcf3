"""What is committed is there after a restart: nothing less, and nothing that was not committed."""

import msgspec

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.ledger import Ledger
from serving.tenants.authority.quota import QuotaAuthority
from serving.tenants.messages import NOTHING, Amounts, Exchange, LeaseRequest, Reply, Report, Settlement
from serving.tenants.records import Limits, UsageFilter
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
from tests.support.usage import usage_record

LIMITS = {
    "tenant:t": Limits(requests_per_minute=60, tokens_per_minute=600, max_concurrent_requests=40, token_budget=1000)
}
COST = Amounts(requests=1, tokens=100, slots=1, budget=100)


def opened(store: Store) -> tuple[Ledger, QuotaAuthority]:
    ledger = Ledger(store.database, "here")
    authority = QuotaAuthority(*ledger.open(), lambda: 1000.0)
    authority.set_limits(LIMITS)
    return ledger, authority


def exchanged(store: Store, message: Exchange) -> Reply:
    """With an authority that has just started."""
    ledger, authority = opened(store)
    ids = [settlement.record.request_id for settlement in message.settlements]
    reply = authority.exchange(message, ledger.recorded(ids))
    ledger.commit(authority.take_changes(), authority)
    return reply


def ask(gateway_id: str, number: int, cost: Amounts) -> Exchange:
    return Exchange(gateway_id, number, (), (), (LeaseRequest((("tenant:t", cost),), 0.0),))


def settled(number: int, *records: UsageRecord) -> Exchange:
    settlements = tuple(Settlement(record, ("tenant:t", "key:k")) for record in records)
    return Exchange("g", number, settlements, (Report("tenant:t", NOTHING, NOTHING, NOTHING),), ())


def usage(request_id: str) -> UsageRecord:
    return usage_record(
        request_id,
        num_prompt_tokens=3,
        num_cached_tokens=1,
        num_completion_tokens=4,
        outcome="length",
        started_unix_s=1.5,
        gateway_s=0.1,
        queue_s=0.2,
        prefill_s=0.3,
        decode_s=0.4,
        total_s=1.0,
    )


def test_grants_and_leases_are_there_after_a_restart(store: Store) -> None:
    (lease,) = exchanged(store, ask("g", 1, COST)).leases
    _, authority = opened(store)
    account = authority.accounts["tenant:t"]
    held = COST + lease.amounts
    assert account.holdings["g"].held == held
    assert (account.requests.level, account.tokens.level) == (60 - held.requests, 600 - held.tokens)


def test_after_a_restart_any_part_of_a_lease_may_be_unused_until_its_gateway_says_so(store: Store) -> None:
    (lease,) = exchanged(store, ask("g", 1, COST)).leases
    rest = 1000 - 100 - lease.amounts.budget
    assert exchanged(store, ask("h", 1, Amounts(budget=rest + 1))).decisions[0].kind == "wait"
    assert exchanged(store, ask("h", 2, Amounts(budget=rest))).decisions[0].kind == "granted"


def test_a_reply_that_was_lost_with_the_authority_is_given_again(store: Store) -> None:
    assert exchanged(store, ask("g", 1, COST)) == exchanged(store, ask("g", 1, COST))


def test_records_and_charges_go_together_and_once(store: Store) -> None:
    exchanged(store, settled(1, usage("a"), usage("b")))
    exchanged(store, settled(2, usage("b"), usage("c")))
    _, authority = opened(store)
    assert {subject: account.charged for subject, account in authority.accounts.items()} == {
        "tenant:t": 21,
        "key:k": 21,
    }
    assert list(all_usage(store.database, UsageFilter())) == [usage("a"), usage("b"), usage("c")]


def test_a_record_that_says_more_takes_the_place_of_the_one_before(store: Store) -> None:
    more = msgspec.structs.replace(usage("b"), num_completion_tokens=9, outcome="stop")
    exchanged(store, settled(1, usage("a"), usage("b")))
    exchanged(store, settled(2, more, usage("c")))
    assert opened(store)[1].accounts["tenant:t"].charged == 7 + 12 + 7
    assert list(all_usage(store.database, UsageFilter())) == [usage("a"), more, usage("c")]


def test_what_has_ended_leaves_no_rows(store: Store) -> None:
    exchanged(store, ask("g", 1, COST))
    exchanged(store, settled(2, usage("a")))
    ledger, authority = opened(store)
    assert not authority.accounts["tenant:t"].holdings
    authority.forget("g")
    ledger.commit(authority.take_changes(), authority)
    assert opened(store)[1].gateways == {}
