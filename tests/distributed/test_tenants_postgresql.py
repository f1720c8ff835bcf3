"""The rules of tests/unit/tenants on a PostgreSQL server, which is started where its programs are installed."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa

from model_parallel.errors import ConfigError
from serving.contracts.errors import StoreUnavailableError
from serving.tenants.records import KeyGrant, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store

# ruff: noqa: F401, F811
from tests.unit.tenants.conftest import Clock, clock
from tests.unit.tenants.test_directory import test_both_keys_are_good_while_a_rotation_overlaps
from tests.unit.tenants.test_ledger import (
    test_grants_and_leases_are_there_after_a_restart,
    test_records_and_charges_go_together_and_once,
    test_what_has_ended_leaves_no_rows,
)
from tests.unit.tenants.test_migrations import (
    test_a_database_of_a_later_version_is_left_alone,
    test_an_upgrade_that_fails_leaves_nothing_behind,
    test_opening_again_changes_nothing,
    test_the_steps_make_what_the_schema_says,
)
from tests.unit.tenants.test_owner import (
    _impatient,
    _quick,
    test_a_database_is_free_again_when_its_server_was_killed,
    test_a_second_server_is_refused_and_does_not_disturb_the_first,
    test_a_server_that_seemed_dead_leaves_the_database_to_its_successor,
    test_of_many_that_wait_for_a_dead_one_the_database_has_one,
)
from tests.unit.tenants.test_quota_race import (
    _quick_retries,
    test_a_race_follows_another,
    test_an_authority_that_was_replaced_decides_nothing_more,
    test_changes_arrive_after_looks_that_failed_however_they_failed,
    test_losses_and_restarts_change_nothing,
)
from tests.unit.tenants.test_store import (
    gold,
    test_a_name_is_taken_once_however_many_ask,
    test_a_rotated_key_allows_the_same_for_as_long,
    test_a_table_that_is_missing_is_named,
    test_an_update_changes_what_it_names,
    test_every_change_and_nothing_else_moves_the_generation,
    test_lists_come_in_pages,
    test_names_are_taken_once_and_must_exist,
    test_nothing_has_a_name_with_a_nul_character,
    test_what_is_made_is_found_by_another_process,
    test_writers_on_one_file_wait_for_each_other,
)
from tests.unit.tenants.test_usage import (
    test_filters_narrow,
    test_pages_join_without_gap_or_repeat,
    test_records_come_back_as_they_were_in_the_order_of_their_start,
    test_sums_are_by_tenant_key_and_model,
    used,
)

TIMEOUT_S = 60


@dataclass
class Server:
    """One that listens on a Unix socket alone."""

    programs: Path
    directory: Path
    user: str | None

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.directory / "data"), *arguments]
        log = self.directory / f"{program}.log"
        with log.open("a") as output:  # a pipe would be held open by the server that pg_ctl leaves behind
            done = subprocess.run(
                command, user=self.user, cwd="/", stdout=output, stderr=output, timeout=TIMEOUT_S, check=False
            )
        assert done.returncode == 0, log.read_text()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c fsync=off -k {self.directory}"
        self.run("pg_ctl", "-w", "-o", options, "-l", str(self.directory / "server.log"), "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-m", "immediate", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://packtrain@/{database}?host={self.directory}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), shutil.which("initdb")]
    if not (initdb := next(filter(None, found), None)):
        pytest.skip("no PostgreSQL server is installed")
    is_root = os.geteuid() == 0  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(prefix="packtrain-pg-") as directory:
        if is_root:
            shutil.chown(directory, "nobody")
        server = Server(Path(initdb).parent, Path(directory), "nobody" if is_root else None)
        server.run("initdb", "--username", "packtrain", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def url(server: Server) -> str:
    """Of a new, empty database."""
    return new_database(server)


def new_database(server: Server, options: str = "") -> str:
    """Its URL."""
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(
        server.url("postgres").replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} {options}"))
    engine.dispose()
    return server.url(name)


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    database = Database(url)
    yield Store(database, wall_clock=clock)
    database.close()


def test_a_server_that_restarts_is_unavailable_meanwhile_and_then_found_again(gold: Store, server: Server) -> None:
    issued = gold.create_key("acme", KeyGrant())
    server.stop()
    with pytest.raises(StoreUnavailableError, match="cannot be used now"):
        gold.snapshot()
    with pytest.raises(StoreUnavailableError):
        gold.create_tenant(Tenant(id="late", plan="gold"))
    server.start()
    assert [key.id for key in gold.snapshot().keys] == [issued.key.id]


def test_a_server_that_may_only_be_read_is_unavailable_for_changes(gold: Store) -> None:
    with gold.database.write() as session:
        name = session.execute(sa.text("SELECT current_database()")).scalar_one()
        session.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    gold.database.close()
    with pytest.raises(StoreUnavailableError, match="read-only transaction"):
        gold.create_tenant(Tenant(id="late", plan="gold"))
    assert [tenant.id for tenant in gold.list_tenants()] == ["acme"]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_cannot_hold_every_name_is_refused(server: Server, encoding: str) -> None:
    url = new_database(server, f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(ConfigError, match=f"has the encoding {encoding}"):
        Database(url)


def test_rights_that_are_missing_are_named(gold: Store, url: str) -> None:
    with gold.database.write() as session:
        session.execute(sa.text("CREATE ROLE reader LOGIN"))
    with pytest.raises(StoreUnavailableError, match="permission denied"):
        Database(url.replace("packtrain@", "reader@"))


def test_settings_of_the_url_count_besides_ours(url: str) -> None:
    options = "-c statement_timeout=7s -c application_name=billing"
    database = Database(f"{url}&connect_timeout=9&{urlencode({'options': options})}")
    with database.read() as session:
        found = {
            name: session.execute(sa.text(f"SHOW {name}")).scalar_one()
            for name in ("statement_timeout", "lock_timeout", "application_name", "client_encoding")
        }
    database.close()
    assert found == {
        "statement_timeout": "7s", "lock_timeout": "5s", "application_name": "billing", "client_encoding": "UTF8",
    }  # fmt: skip
