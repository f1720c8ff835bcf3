"""The quota authority as a Ray actor: two gateways race for one budget while it is killed."""

import asyncio
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import ray
from ray.exceptions import RayError

from cluster.ray_api import has_actor
from model_parallel.errors import ConfigError
from serving.contracts.errors import QuotaExceededError, UnauthenticatedError
from serving.tenants.authority.actor import start_authority, stop_authority
from serving.tenants.authority.ledger import Ledger
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client import accounts as accounts_module
from serving.tenants.client.accounts import TenantAccounts
from serving.tenants.client.link import NAME, NAMESPACE, ActorLink
from serving.tenants.records import KeyGrant, Tenant, UsageFilter
from serving.tenants.store.database import Database
from serving.tenants.store.owner import check_not_in_use
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
from tests.support.usage import usage_record

NUM_TOKENS, NUM_USED = 50, 20
REFRESH_S = 0.2


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tenancy') / 'tenants.db'}"


@pytest.fixture(scope="module")
def store(url: str) -> Iterator[Store]:
    database = Database(url)
    yield Store(database)
    database.close()


@pytest.fixture(scope="module", autouse=True)
def _authority(url: str) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    start_authority(url, refresh_s=REFRESH_S)
    yield
    stop_authority(10)
    ray.shutdown()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the authority may take longer to come back."""
    monkeypatch.setattr(accounts_module, "ASK_TIMEOUT_S", 60.0)
    monkeypatch.setattr(accounts_module, "RECORD_TIMEOUT_S", 60.0)


@asynccontextmanager
async def two_gateways() -> AsyncIterator[tuple[TenantAccounts, TenantAccounts]]:
    pair = TenantAccounts(ActorLink(), refresh_s=REFRESH_S), TenantAccounts(ActorLink(), refresh_s=REFRESH_S)
    for gateway in pair:
        await gateway.start()
    try:
        yield pair
    finally:
        for gateway in pair:
            await gateway.stop()


def new_tenant(store: Store, token_budget: int) -> tuple[str, list[str]]:
    tenant_id = f"t-{uuid.uuid4().hex}"
    store.create_tenant(Tenant(id=tenant_id, plan="unlimited", token_budget=token_budget))
    return tenant_id, [f"Bearer {store.create_key(tenant_id, KeyGrant()).text}"]


def authority_pid() -> int:
    """As soon as it is there."""
    actor = ray.get_actor(NAME, NAMESPACE)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            pid: int = ray.get(actor.pid.remote(), timeout=30)
            return pid
        except RayError:  # it is coming back from the kill before
            time.sleep(0.05)
    raise TimeoutError("the authority did not come back")


async def kill(pid: int, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)


async def one_request(gateway: TenantAccounts, tenant_id: str, headers: list[str], release: asyncio.Event) -> str:
    principal = gateway.authenticate(headers)
    name = uuid.uuid4().hex
    try:
        reservation = await gateway.reserve(principal, request_id=name, model="m", num_tokens=NUM_TOKENS)
    except QuotaExceededError:
        return "refused"
    await release.wait()
    reservation.settle(usage_record(name, tenant_id=tenant_id, key_id=principal.key_id, num_prompt_tokens=NUM_USED))
    await reservation.recorded()
    return "served"


async def race(
    store: Store, *, kill_after_s: float | None = None, num_requests: int = 1000, num_places: int = 100
) -> None:
    """As many as there are places get one, whoever dies meanwhile, and exactly what they used is charged."""
    async with two_gateways() as pair:
        # Made while the gateways run: its key must reach them.
        tenant_id, headers = new_tenant(store, num_places * NUM_TOKENS)
        while not all(knows(gateway, headers) for gateway in pair):
            await asyncio.sleep(0.02)
        release = asyncio.Event()
        killing = []
        if kill_after_s is not None:
            pid = await asyncio.to_thread(authority_pid)
            killing = [asyncio.create_task(kill(pid, kill_after_s))]
        tasks = [
            asyncio.create_task(one_request(pair[i % 2], tenant_id, headers, release)) for i in range(num_requests)
        ]
        while sum(task.done() for task in tasks) < num_requests - num_places:
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*killing)
        release.set()
        served = Counter(await asyncio.gather(*tasks))
        assert served == {"served": num_places, "refused": num_requests - num_places}
    records = list(all_usage(store.database, UsageFilter(tenant_id=tenant_id)))
    assert [record.num_prompt_tokens for record in records] == [NUM_USED] * num_places


def knows(gateway: TenantAccounts, headers: list[str]) -> bool:
    try:
        gateway.authenticate(headers)
    except UnauthenticatedError:
        return False
    return True


async def test_races_for_a_budget(store: Store) -> None:
    for _ in range(3):
        await race(store)


@pytest.mark.parametrize("kill_after_s", [0.0, 0.02, 0.08])
async def test_the_authority_is_killed_during_a_race(store: Store, kill_after_s: float) -> None:
    """Before the first message reaches it, and while it decides and commits."""
    await race(store, kill_after_s=kill_after_s)


def test_an_authority_with_other_settings_is_not_taken(url: str) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        start_authority(url, refresh_s=REFRESH_S + 1)


def test_quotas_and_ledger_agree_at_last(store: Store) -> None:
    """After all that: what was charged is what the records say, and nothing is held. Runs last: it takes the database over."""
    stop_authority(10)
    ledger = Ledger(store.database, "books")
    accounts, _ = ledger.open()
    ledger.release()
    used: Counter[str] = Counter()
    for record in all_usage(store.database, UsageFilter()):
        used[f"tenant:{record.tenant_id}"] += record.num_prompt_tokens + record.num_completion_tokens
    assert used == {subject: account.charged for subject, account in accounts.items() if subject in used}
    assert not any(account.holdings for account in accounts.values())


async def test_a_database_that_another_server_uses_is_left_alone(url: str) -> None:
    other = AuthorityService(url, owner="elsewhere", refresh_s=REFRESH_S)
    await other.open()
    with pytest.raises(ConfigError, match="in use by the server on elsewhere"):
        await asyncio.to_thread(start_authority, url, refresh_s=REFRESH_S)
    assert not has_actor(NAME, NAMESPACE), "it does not wait for the other one to end"
    await other.close()
    await asyncio.to_thread(start_authority, url, refresh_s=REFRESH_S)
    with pytest.raises(ConfigError, match=f"in use by the server on {socket.gethostname()} since"):
        await asyncio.to_thread(check_not_in_use, url)
