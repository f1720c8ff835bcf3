"""One server alone decides on quotas in a database; another one may when that has stopped, or is dead."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import make_url, text

from model_parallel.errors import ConfigError
from serving.tenants.authority import ledger as ledger_module
from serving.tenants.authority import service as service_module
from serving.tenants.authority.ledger import Ledger, SupersededError
from serving.tenants.authority.service import AuthorityService
from serving.tenants.messages import Exchange, SyncRequest
from serving.tenants.store import owner as owner_module
from serving.tenants.store.owner import InUseError, check_not_in_use
from serving.tenants.store.store import Store
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats come often, and nobody is taken to be dead by chance."""
    monkeypatch.setattr(ledger_module, "BEAT_PERIOD_S", 0.0)
    monkeypatch.setattr(owner_module, "LOOK_PERIOD_S", 0.01)
    monkeypatch.setattr(owner_module, "DEAD_AFTER_S", PATIENCE_S)
    monkeypatch.setattr(service_module, "DEAD_AFTER_S", 0.0)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those that are dead for certain."""
    monkeypatch.setattr(owner_module, "DEAD_AFTER_S", 0.05)


@asynccontextmanager
async def serving(url: str, owner: str) -> AsyncIterator[AuthorityService]:
    service = AuthorityService(url, owner=owner, refresh_s=0.05)
    try:
        await service.open()
        yield service
    finally:
        await service.close()


async def exchange(service: AuthorityService, number: int) -> None:
    message = Exchange(gateway_id="g", number=number, settlements=(), reports=(), lease_requests=())
    await service.exchange(msgspec.msgpack.encode(message))


async def test_a_second_server_is_refused_and_does_not_disturb_the_first(store: Store, url: str) -> None:
    async with serving(url, "one") as first:
        await exchange(first, 1)
        for _ in range(2):
            with pytest.raises(
                InUseError, match=r"in use by the server on one, .* give this one a database of its own"
            ):
                async with serving(url, "two"):
                    pass
        await exchange(first, 2)
    async with serving(url, "two") as second:
        await exchange(second, 3)


async def test_another_life_of_the_same_server_takes_over_at_once(store: Store, url: str) -> None:
    async with serving(url, "one") as old, serving(url, "one") as new:
        await exchange(new, 1)
        with pytest.raises(SupersededError):
            await exchange(old, 2)
        with pytest.raises(SupersededError):  # a gateway that asks for nothing must not stay with it
            await old.sync(msgspec.msgpack.encode(SyncRequest("g", -1)))
        await exchange(new, 3)


@pytest.mark.usefixtures("_impatient")
async def test_a_server_that_seemed_dead_leaves_the_database_to_its_successor(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Ledger(store.database, "one")
    stopped.open()
    async with serving(url, "two") as second:
        monkeypatch.setattr(owner_module, "DEAD_AFTER_S", PATIENCE_S)
        for number in range(1, 4):
            with pytest.raises(InUseError, match="server on two"):  # started again by Ray, again and again
                async with serving(url, "one"):
                    pass
            await exchange(second, number)
    async with serving(url, "one") as first:
        await exchange(first, 4)


async def test_an_idle_server_finds_out_that_it_was_replaced(store: Store, url: str) -> None:
    async with serving(url, "one") as first:
        with store.database.write() as session:
            session.execute(text("UPDATE quota_authority SET epoch = epoch + 1"))
        await until(lambda: first._core.superseded is not None)


@pytest.mark.usefixtures("_impatient")
def test_of_many_that_wait_for_a_dead_one_the_database_has_one(store: Store) -> None:
    Ledger(store.database, "dead").open()
    start = threading.Barrier(6)

    def take(number: int) -> bool:
        start.wait(PATIENCE_S)
        try:
            Ledger(store.database, f"s{number}").open()
        except InUseError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 1


async def test_a_start_looks_first_and_names_the_database(store: Store, url: str) -> None:
    await asyncio.to_thread(check_not_in_use, url)
    async with serving(url, "one"):
        with pytest.raises(
            ConfigError, match=r"tenancy\.database: the database sqlite:.*tenants\.db is in use by the server on one"
        ):
            await asyncio.to_thread(check_not_in_use, url)
    await asyncio.to_thread(check_not_in_use, url)


@pytest.mark.usefixtures("_impatient")
async def test_a_database_is_free_again_when_its_server_was_killed(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(store.database, "killed").open()
    await asyncio.to_thread(check_not_in_use, url)
    monkeypatch.setattr(owner_module, "DEAD_AFTER_S", PATIENCE_S)
    async with serving(url, "next") as service:  # the start that has looked does not wait again
        await exchange(service, 1)


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    check_not_in_use(f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_created_is_told_before_a_start() -> None:
    """It was told after Ray had been imported, and doctor said that all was well."""
    with pytest.raises(ConfigError, match=r"tenancy\.database: /proc/none\.db cannot be created: /proc "):
        check_not_in_use("sqlite:////proc/none.db")


def test_a_database_of_an_older_schema_is_not_in_use(store: Store, url: str) -> None:
    with store.database.write() as session:
        session.execute(text("ALTER TABLE quota_authority DROP COLUMN beat"))
    check_not_in_use(url)
    assert Path(make_url(url).database or "").exists()
