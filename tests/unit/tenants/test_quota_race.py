"""Gateways, the authority and a real SQLite file in one process: races, refunds, losses and restarts."""

import asyncio
import itertools
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from model_parallel.errors import ConfigError
from serving.contracts.accounts import Reservation, UsageRecord
from serving.contracts.errors import (
    AccountsUnavailableError,
    QuotaExceededError,
    StoreUnavailableError,
    UnauthenticatedError,
)
from serving.tenants.authority import service as authority_module
from serving.tenants.authority.ledger import Ledger, SupersededError
from serving.tenants.authority.quota import BUSY_RETRY_S, Changes, QuotaAuthority
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client import accounts as accounts_module
from serving.tenants.client.accounts import AuthorityUnreachableError, TenantAccounts
from serving.tenants.messages import Exchange
from serving.tenants.records import KeyGrant, Tenant, UsageFilter
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
from tests.support.effort import by_day
from tests.support.usage import usage_record
from tests.support.waiting import PATIENCE_S, until

NUM_TOKENS = 50
"""Reserved by a request; it uses 20."""
BUDGET = 100 * NUM_TOKENS


class Network:
    """Calls an AuthorityService, and loses some of the calls and of the answers."""

    def __init__(self, url: str, loss: float = 0.0, seed: int = 0) -> None:
        self._url = url
        self._loss = loss
        self._random = random.Random(seed)
        self.service = AuthorityService(url, owner="here", refresh_s=0.05)
        self.is_cut = False
        self._life = 0

    async def exchange(self, data: bytes) -> bytes:
        return await self._call(lambda service: service.exchange(data))

    async def sync(self, data: bytes) -> bytes:
        return await self._call(lambda service: service.sync(data))

    async def restart(self) -> None:
        """Nobody hears any more what the old one has still decided."""
        self._life += 1
        await self.service.close()
        self.service = AuthorityService(self._url, owner="here", refresh_s=0.05)

    async def _call(self, call: Callable[[AuthorityService], Awaitable[bytes]]) -> bytes:
        life = self._life
        await asyncio.sleep(0)
        if self.is_cut or self._random.random() < self._loss:
            raise AuthorityUnreachableError("lost on the way there")
        try:
            answer = await call(self.service)
        except Exception as error:
            raise AuthorityUnreachableError(str(error)) from error
        if life != self._life or self._random.random() < self._loss:
            raise AuthorityUnreachableError("lost on the way back")
        return answer


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "_FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(accounts_module, "_LAST_RETRY_S", 0.01)


def new_tenant(store: Store, tenant_id: str, **limits: int) -> list[str]:
    """Its credentials."""
    store.create_tenant(Tenant(id=tenant_id, plan="unlimited", **limits))  # type: ignore[arg-type]
    return [f"Bearer {store.create_key(tenant_id, KeyGrant()).text}"]


@asynccontextmanager
async def gateways(network: Network, count: int = 2) -> AsyncIterator[list[TenantAccounts]]:
    started = [TenantAccounts(network, refresh_s=0.05) for _ in range(count)]
    for gateway in started:
        await gateway.start()
    try:
        yield started
    finally:
        for gateway in started:
            await gateway.stop()
        await network.service.close()


async def reserve(gateway: TenantAccounts, headers: list[str], num_tokens: int = NUM_TOKENS) -> Reservation:
    principal = gateway.authenticate(headers)
    return await gateway.reserve(principal, request_id="", model="m", num_tokens=num_tokens)


async def one_request(gateway: TenantAccounts, headers: list[str], name: str, release: asyncio.Event) -> str:
    """Reserves, runs until it is released, uses 20 tokens. Returns how it ended."""
    try:
        reservation = await reserve(gateway, headers)
    except QuotaExceededError as error:
        assert (error.quota, error.retry_after_s) == ("token_budget", BUSY_RETRY_S)
        return "refused"
    await release.wait()
    reservation.settle(usage(name, 20))
    await reservation.recorded()
    return "served"


async def race(pair: list[TenantAccounts], headers: list[str], *, num_requests: int, num_places: int) -> None:
    """Requests that all come before one of them ends: as many as there are places get one."""
    release = asyncio.Event()
    tasks = [
        asyncio.create_task(one_request(pair[i % 2], headers, uuid.uuid4().hex, release)) for i in range(num_requests)
    ]
    while (num_ended := sum(task.done() for task in tasks)) < num_requests - num_places:
        await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    assert num_ended == num_requests - num_places
    release.set()
    assert Counter(await asyncio.gather(*tasks)) == {"served": num_places, "refused": num_requests - num_places}


def check_books(store: Store, charged: dict[str, int]) -> None:
    """Nothing is held any more, and what was charged is what the records say."""
    stored, _ = Ledger(store.database, "books").open()
    assert {subject: stored[subject].charged for subject in charged} == charged
    assert not any(account.holdings for account in stored.values())


async def test_a_thousand_requests_race_for_a_hundred_places(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", token_budget=BUDGET)
    async with gateways(Network(url)) as pair:
        await race(pair, headers, num_requests=1000, num_places=100)
    check_books(store, {"tenant:t": 100 * 20})
    assert len(list(all_usage(store.database, UsageFilter()))) == 100


async def test_a_race_follows_another(store: Store, url: str) -> None:
    """Each for a budget of its own, between the leases that others left."""
    num_races = by_day(40, by_night=100)
    senders = [new_tenant(store, f"t{i}", token_budget=10 * NUM_TOKENS) for i in range(num_races)]
    async with gateways(Network(url)) as pair:
        for headers in senders:
            await race(pair, headers, num_requests=50, num_places=10)
    check_books(store, {f"tenant:t{i}": 10 * 20 for i in range(num_races)})


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_a_hundred_large_races_with_losses_and_restarts(store: Store, url: str) -> None:
    senders = [new_tenant(store, f"t{i}", token_budget=BUDGET) for i in range(100)]
    network = Network(url, loss=0.1)
    async with gateways(network) as pair:
        for headers in senders:
            racing = asyncio.create_task(race(pair, headers, num_requests=1000, num_places=100))
            await asyncio.sleep(0.03)
            await network.restart()
            await racing
    check_books(store, {f"tenant:t{i}": 100 * 20 for i in range(100)})


@pytest.mark.parametrize("seed", range(3))
async def test_losses_and_restarts_change_nothing(store: Store, url: str, seed: int) -> None:
    headers = new_tenant(store, "t", token_budget=BUDGET)
    network = Network(url, loss=0.3, seed=seed)
    async with gateways(network) as pair:
        racing = asyncio.create_task(race(pair, headers, num_requests=300, num_places=100))
        for _ in range(3):
            await asyncio.wait([racing], timeout=0.01)  # must expire
            await network.restart()
        await racing
    check_books(store, {"tenant:t": 100 * 20})


async def test_refunds_are_exact(store: Store, url: str) -> None:
    """What a request does not use can be used by the next, to the last token."""
    headers = new_tenant(store, "t", token_budget=100)
    async with gateways(Network(url)) as (a, b):
        for i, (gateway, used) in enumerate([(a, 30), (b, 0), (a, 69)]):
            reservation = await reserve(gateway, headers, 70)
            reservation.settle(usage(f"r{i}", used))
            await reservation.recorded()
        await (await settled(b, headers, 1, "last")).recorded()
        with pytest.raises(QuotaExceededError, match="this tenant has a budget of 100 tokens") as refused:
            await reserve(a, headers, 1)
        assert refused.value.retry_after_s is None
    check_books(store, {"tenant:t": 100})


async def settled(gateway: TenantAccounts, headers: list[str], num_tokens: int, name: str) -> Reservation:
    reservation = await reserve(gateway, headers, num_tokens)
    reservation.settle(usage(name, num_tokens))
    return reservation


async def test_an_unused_lease_comes_back_when_another_gateway_needs_it(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", max_concurrent_requests=40)
    network = Network(url)
    async with gateways(network) as (a, b):
        await reserve(a, headers)
        assert a.num_asked == 1
        await reserve(a, headers)  # out of the lease that came with the first
        assert a.num_asked == 1
        for _ in range(38):
            await reserve(b, headers)
        with pytest.raises(QuotaExceededError, match="this tenant may run 40 requests at a time") as refused:
            await reserve(b, headers)
        assert refused.value.quota == "max_concurrent_requests"


async def test_a_key_and_its_tenant_must_both_have_room(store: Store, url: str) -> None:
    store.create_tenant(Tenant(id="t", plan="unlimited", max_concurrent_requests=3))
    small, large = ([f"Bearer {store.create_key('t', KeyGrant(max_concurrent_requests=n)).text}"] for n in (1, 5))
    async with gateways(Network(url), 1) as (a,):
        held = await reserve(a, small)
        with pytest.raises(QuotaExceededError, match="this key may run 1 request"):
            await reserve(a, small)
        await reserve(a, large)
        await reserve(a, large)
        with pytest.raises(QuotaExceededError, match="this tenant may run 3 request"):
            await reserve(a, large)
        held.settle(usage("r", 1))
        await reserve(a, large)


async def test_without_the_authority_leases_still_serve(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = new_tenant(store, "t", max_concurrent_requests=40)
    network = Network(url)
    async with gateways(network, 1) as (a,):
        first = await reserve(a, headers)
        monkeypatch.setattr(accounts_module, "ASK_TIMEOUT_S", 0.05)
        monkeypatch.setattr(accounts_module, "RECORD_TIMEOUT_S", 0.05)
        network.is_cut = True
        for _ in range(39 // 4):
            await reserve(a, headers)
        with pytest.raises(AccountsUnavailableError):
            await reserve(a, headers)
        first.settle(usage("first", 7))
        with pytest.raises(AccountsUnavailableError, match="its usage cannot be recorded now"):
            await first.recorded()
        assert a.num_unrecorded == 1
        network.is_cut = False
        monkeypatch.setattr(accounts_module, "RECORD_TIMEOUT_S", PATIENCE_S)
        await first.recorded()
        assert a.num_unrecorded == 0
    check = list(all_usage(store.database, UsageFilter()))
    assert [(item.request_id, item.num_prompt_tokens) for item in check] == [("first", 7)]


async def test_a_grant_that_nobody_waits_for_is_given_back(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", max_concurrent_requests=1)
    network = Network(url)
    async with gateways(network, 1) as (a,):
        network.is_cut = True
        asking = asyncio.create_task(reserve(a, headers))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        network.is_cut = False
        for _ in range(2):
            (await reserve(a, headers)).settle(usage(uuid.uuid4().hex, 1))


async def test_stopping_delivers_what_is_left(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", token_budget=BUDGET)
    async with gateways(Network(url)) as (a, _):
        await settled(a, headers, 5, "r")
    check_books(store, {"tenant:t": 5})


async def test_with_too_many_records_unwritten_no_request_is_taken(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "MAX_UNRECORDED", 3)
    headers = new_tenant(store, "t")
    network = Network(url)
    async with gateways(network, 1) as (a,):
        network.is_cut = True
        for i in range(3):
            await settled(a, headers, 1, f"r{i}")
        with pytest.raises(AccountsUnavailableError, match="usage cannot be recorded now"):
            await reserve(a, headers)
        network.is_cut = False


async def test_changes_of_keys_and_limits_arrive(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", token_budget=10)
    network = Network(url)
    async with gateways(network, 1) as (a,):
        with pytest.raises(QuotaExceededError):
            await reserve(a, headers, 11)
        store.update_tenant("t", {"token_budget": 11})
        while True:
            try:
                await reserve(a, headers, 11)
                break
            except QuotaExceededError:
                await asyncio.sleep(0.01)
        store.revoke_key(a.authenticate(headers).key_id)
        with pytest.raises(UnauthenticatedError):
            while True:
                a.authenticate(headers)
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"max_concurrent_requests": 100}, {"max_concurrent_requests": 1}),
        ({"token_budget": 10**6}, {"token_budget": 0}),
    ],
)
async def test_a_limit_that_is_lowered_holds_while_requests_run(
    store: Store, url: str, before: dict[str, int], after: dict[str, int]
) -> None:
    """Also of a gateway whose traffic never ends, so that its lease is never idle."""
    headers = new_tenant(store, "t", **before)
    async with gateways(Network(url), 1) as (a,):
        running = [await reserve(a, headers) for _ in range(20)]
        store.update_tenant("t", after)
        names = itertools.count()

        async def is_refused() -> bool:
            running.pop(0).settle(usage(f"r{next(names)}", 1))
            try:
                running.append(await reserve(a, headers))
            except QuotaExceededError as error:
                return error.quota in after
            running.append(await reserve(a, headers))
            return False

        async with asyncio.timeout(PATIENCE_S):
            while not await is_refused():
                await asyncio.sleep(0.01)
        num_running = len(running)
        while len(running) > 1:
            assert await is_refused()
            assert len(running) < num_running
            num_running = len(running)
        running.pop().settle(usage("last", 1))


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), ConfigError("damaged"), RuntimeError("a bug")])
async def test_changes_arrive_after_looks_that_failed_however_they_failed(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    headers = new_tenant(store, "t")
    num_failed = 0

    def failing(self: Store) -> int:
        nonlocal num_failed
        num_failed += 1
        raise error

    async with gateways(Network(url), 1) as (a,):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "generation", failing)
            await until(lambda: num_failed >= 3)
        store.revoke_key(a.authenticate(headers).key_id)

        def is_refused() -> bool:
            try:
                a.authenticate(headers)
            except UnauthenticatedError:
                return True
            return False

        await until(is_refused)


async def test_an_authority_that_answers_too_late_is_told(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(url)
    async with gateways(network, 1) as (a,):
        monkeypatch.setattr(accounts_module, "CALL_TIMEOUT_S", -1.0)
        await until(lambda: "does not answer: timed out" in caplog.text)
        monkeypatch.undo()
        assert a.num_unrecorded == 0


async def test_a_transaction_that_fails_has_not_happened(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = new_tenant(store, "t", token_budget=BUDGET)
    commit, failures = Ledger.commit, iter([True, False, True, False, True])

    def commit_sometimes(self: Ledger, changes: Changes, authority: QuotaAuthority) -> None:
        if next(failures, False):
            raise StoreUnavailableError("the disk is full")
        commit(self, changes, authority)

    monkeypatch.setattr(Ledger, "commit", commit_sometimes)
    async with gateways(Network(url)) as pair:
        await race(pair, headers, num_requests=200, num_places=100)
    check_books(store, {"tenant:t": 100 * 20})


async def test_what_a_dead_gateway_held_is_given_to_others(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "SILENT_AFTER_S", 2.0)  # the living one must not seem silent
    headers = new_tenant(store, "t", max_concurrent_requests=1)
    network = Network(url)
    async with gateways(network, 1) as (a,):
        dead = TenantAccounts(network, refresh_s=0.05)
        await dead.start()
        await reserve(dead, headers)
        with pytest.raises(QuotaExceededError):
            await reserve(a, headers)
        for task in dead._tasks:
            task.cancel()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await reserve(a, headers)
                    break
                except QuotaExceededError:
                    await asyncio.sleep(0.05)


async def test_an_authority_that_was_replaced_decides_nothing_more(store: Store, url: str) -> None:
    headers = new_tenant(store, "t", token_budget=BUDGET)
    network = Network(url)
    old = network.service
    async with gateways(network, 1) as (a,):
        await settled(a, headers, 5, "r0")
        network.service = AuthorityService(url, owner="here", refresh_s=0.05)
        await (await settled(a, headers, 5, "r1")).recorded()
        exchange = Exchange(gateway_id="other", number=1, settlements=(), reports=(), lease_requests=())
        with pytest.raises(SupersededError):
            await old.exchange(msgspec.msgpack.encode(exchange))
        await old.close()
    check_books(store, {"tenant:t": 10})


def usage(name: str, num_tokens: int) -> UsageRecord:
    return usage_record(name, num_prompt_tokens=num_tokens)
