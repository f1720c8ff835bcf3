import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sqlite3 import ProgrammingError
from typing import Any

import pytest
from sqlalchemy import make_url, text

from model_parallel.errors import ConfigError
from serving.config import TenancyConfig
from serving.contracts.errors import AlreadyExistsError, NotFoundError, StoreUnavailableError, ValidationError
from serving.tenants.records import MAX_UNIX_S, KeyGrant, Plan, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import MAX_OVERLAP_S, Store, database_url
from serving.tenants.store.url import secrets_of, without_secrets
from tests.support.waiting import PATIENCE_S
from tests.unit.tenants.conftest import NOON_UNIX_S, Clock


@pytest.fixture
def gold(store: Store) -> Store:
    """With a plan and a tenant."""
    store.create_plan(Plan(name="gold", tokens_per_minute=1000))
    store.create_tenant(Tenant(id="acme", plan="gold", name="Acme"))
    return store


def test_a_new_database_has_one_plan_without_limits(store: Store) -> None:
    assert store.list_plans() == [Plan(name="unlimited")]
    assert store.list_tenants() == store.list_keys() == []


def test_what_is_made_is_found_by_another_process(gold: Store, url: str) -> None:
    issued = gold.create_key(
        "acme", KeyGrant(label="web", models=("a",), token_budget=0, expires_unix_s=NOON_UNIX_S + 9)
    )
    database = Database(url)
    other = Store(database)
    assert other.list_plans() == [Plan(name="gold", tokens_per_minute=1000), Plan(name="unlimited")]
    assert other.get_tenant("acme") == Tenant(id="acme", plan="gold", name="Acme", created_unix_s=NOON_UNIX_S)
    assert other.list_keys(tenant_id="acme") == [issued.key]
    database.close()


def test_names_are_taken_once_and_must_exist(gold: Store) -> None:
    for taken in (
        lambda: gold.create_plan(Plan(name="gold")),
        lambda: gold.create_tenant(Tenant(id="acme", plan="gold")),
    ):
        with pytest.raises(AlreadyExistsError, match="already"):
            taken()
    for unknown in (
        lambda: gold.create_tenant(Tenant(id="other", plan="none")),
        lambda: gold.update_plan("none", {"weight": 2.0}),
        lambda: gold.get_tenant("none"),
        lambda: gold.update_tenant("none", {"name": ""}),
        lambda: gold.update_tenant("acme", {"plan": "none"}),
        lambda: gold.set_tenant_disabled("none", True),
        lambda: gold.create_key("none", KeyGrant()),
        lambda: gold.list_keys(tenant_id="none"),
        lambda: gold.rotate_key("none", overlap_s=0),
        lambda: gold.revoke_key("none"),
    ):
        with pytest.raises(NotFoundError, match="'none'"):
            unknown()


def test_a_key_that_is_rotated_without_overlap_ends_whatever_the_clocks_say(gold: Store) -> None:
    old = gold.create_key("acme", KeyGrant()).key
    new = gold.rotate_key(old.id, overlap_s=0).key
    assert [key.id for key in gold.snapshot().keys] == [new.id]
    assert {key.id: key.revoked_unix_s for key in gold.list_keys()} == {old.id: NOON_UNIX_S, new.id: None}


def test_nothing_has_a_name_with_a_nul_character(gold: Store) -> None:
    """PostgreSQL takes none."""
    for unknown in (
        lambda: gold.create_tenant(Tenant(id="other", plan="gold")) and gold.update_tenant("other\0", {"name": ""}),
        lambda: gold.update_plan("gold\0", {"weight": 2.0}),
        lambda: gold.get_tenant("acme\0"),
        lambda: gold.set_tenant_disabled("acme\0", True),
        lambda: gold.create_key("acme\0", KeyGrant()),
        lambda: gold.list_keys(tenant_id="acme\0"),
        lambda: gold.rotate_key("a\0", overlap_s=0),
        lambda: gold.revoke_key("a\0"),
    ):
        with pytest.raises(NotFoundError, match=r"there is no (plan|tenant|key) '\w+\\x00'"):
            unknown()


def test_a_whole_key_is_not_repeated_by_errors(gold: Store) -> None:
    issued = gold.create_key("acme", KeyGrant())
    for refused in (
        lambda: gold.rotate_key(issued.text, overlap_s=0),
        lambda: gold.revoke_key(issued.text),
        lambda: gold.list_keys(tenant_id=issued.text),
        lambda: gold.create_key(issued.text, KeyGrant()),
        lambda: gold.get_tenant(issued.text),
        lambda: gold.set_tenant_disabled(issued.text, True),
        lambda: gold.update_tenant(issued.text, {"name": ""}),
        lambda: gold.update_plan(issued.text, {"weight": 2.0}),
    ):
        with pytest.raises((NotFoundError, ValidationError), match=issued.key.id) as caught:
            refused()
        assert issued.text[20:30] not in str(caught.value)
    assert gold.list_keys() == [issued.key], "it was not revoked"


def test_an_update_changes_what_it_names(gold: Store) -> None:
    assert gold.update_plan("gold", {"weight": 3.0, "tokens_per_minute": None}) == Plan(name="gold", weight=3.0)
    changed = gold.update_tenant("acme", {"token_budget": 5, "priority": 2})
    assert (changed.name, changed.token_budget, changed.priority) == ("Acme", 5, 2)
    assert gold.get_tenant("acme") == changed
    assert gold.update_tenant("acme", {"token_budget": None}).token_budget is None


def test_every_change_and_nothing_else_moves_the_generation(gold: Store) -> None:
    key_id = gold.create_key("acme", KeyGrant()).key.id
    changes: list[Any] = [
        lambda: gold.create_plan(Plan(name="silver")),
        lambda: gold.update_plan("gold", {"priority": 1}),
        lambda: gold.create_tenant(Tenant(id="other", plan="gold")),
        lambda: gold.update_tenant("acme", {"name": "A"}),
        lambda: gold.set_tenant_disabled("other", True),
        lambda: gold.create_key("acme", KeyGrant()),
        lambda: gold.rotate_key(key_id, overlap_s=5),
        lambda: gold.revoke_key(key_id),
    ]
    for change in changes:
        before = gold.generation()
        change()
        assert gold.generation() == gold.snapshot().generation == before + 1
    before = gold.generation()
    for failing in (lambda: gold.create_plan(Plan(name="gold")), lambda: gold.update_plan("gold", {"weight": -1.0})):
        with pytest.raises((AlreadyExistsError, ValidationError)):
            failing()
    gold.list_plans(), gold.list_tenants(), gold.list_keys(), gold.snapshot()
    assert gold.generation() == before


def test_lists_come_in_pages(gold: Store) -> None:
    for index in range(7):
        gold.create_tenant(Tenant(id=f"t{index}", plan="gold"))
        gold.create_key(f"t{index % 2}" if index > 1 else "acme", KeyGrant())
    ids = [tenant.id for tenant in gold.list_tenants()]
    assert [tenant.id for tenant in gold.list_tenants(limit=3)] == ids[:3]
    assert [tenant.id for tenant in gold.list_tenants(after=ids[2], limit=100)] == ids[3:]
    keys = gold.list_keys()
    assert gold.list_keys(after=keys[3].id, limit=2) == keys[4:6]
    assert gold.list_keys(tenant_id="acme") == [key for key in keys if key.tenant_id == "acme"]


def ends(store: Store, key_id: str) -> float | None:
    """When a key expires."""
    [key] = [key for key in store.list_keys() if key.id == key_id]
    return key.expires_unix_s


def test_a_rotated_key_allows_the_same_for_as_long(gold: Store, clock: Clock) -> None:
    grant = KeyGrant(label="web", models=("a",), requests_per_minute=3, expires_unix_s=NOON_UNIX_S + 100)
    old = gold.create_key("acme", grant).key
    clock.unix_s += 40
    new = gold.rotate_key(old.id, overlap_s=10).key
    assert (new.label, new.models, new.requests_per_minute, new.quota_id) == ("web", ("a",), 3, old.id)
    assert new.expires_unix_s == NOON_UNIX_S + 140
    assert ends(gold, old.id) == NOON_UNIX_S + 50
    late = gold.rotate_key(new.id, overlap_s=1000)
    assert ends(gold, new.id) == NOON_UNIX_S + 140  # no later than it would have
    clock.unix_s += 1000
    for ended in (old.id, new.id, late.key.id):
        with pytest.raises(ValidationError, match="still good"):
            gold.rotate_key(ended, overlap_s=10)


@pytest.mark.parametrize("lifetime_s", [None, 90 * 86400.0])
def test_a_key_that_is_rotated_again_in_its_overlap_gives_one_for_as_long(
    gold: Store, clock: Clock, url: str, lifetime_s: float | None
) -> None:
    def expected() -> float | None:
        return None if lifetime_s is None else clock.unix_s + lifetime_s

    old = gold.create_key("acme", KeyGrant(expires_unix_s=expected())).key
    other = Store(Database(url), wall_clock=clock)
    for store in (gold, other, gold):  # another process knows it, too
        clock.unix_s += 60
        new = store.rotate_key(old.id, overlap_s=3600).key
        assert (new.expires_unix_s, new.quota_id) == (expected(), old.id)
        assert ends(store, old.id) == NOON_UNIX_S + 60 + 3600, "the overlap does not begin anew"
    clock.unix_s += 60
    assert gold.rotate_key(new.id, overlap_s=0).key.expires_unix_s == expected()
    other.database.close()


def test_a_key_that_ends_with_the_year_9999_can_be_rotated(gold: Store, clock: Clock) -> None:
    key = gold.create_key("acme", KeyGrant(expires_unix_s=MAX_UNIX_S - 30)).key
    for _ in range(3):
        clock.unix_s += 60
        key = gold.rotate_key(key.id, overlap_s=0).key
        assert key.expires_unix_s == MAX_UNIX_S


@pytest.mark.parametrize("overlap_s", [-1.0, float("nan"), MAX_OVERLAP_S + 1])
def test_an_overlap_is_up_to_a_year(gold: Store, overlap_s: float) -> None:
    key_id = gold.create_key("acme", KeyGrant()).key.id
    with pytest.raises(ValidationError, match="a year"):
        gold.rotate_key(key_id, overlap_s=overlap_s)


def test_revoking_again_changes_nothing(gold: Store, clock: Clock) -> None:
    key_id = gold.create_key("acme", KeyGrant()).key.id
    first = gold.revoke_key(key_id)
    clock.unix_s += 5
    assert gold.revoke_key(key_id) == first
    with pytest.raises(ValidationError):
        gold.rotate_key(key_id, overlap_s=5)


def test_a_key_cannot_be_made_expired(gold: Store) -> None:
    with pytest.raises(ValidationError, match=r"after now, 2027-01-15T08:00:00\+00:00"):
        gold.create_key("acme", KeyGrant(expires_unix_s=NOON_UNIX_S))


def test_the_database_holds_no_key(gold: Store, tmp_path: Path) -> None:
    issued = gold.create_key("acme", KeyGrant())
    gold.database.close()
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert issued.key.id.encode() in held
    assert issued.text[20:].encode() not in held


def test_the_file_is_for_its_owner_alone(store: Store, tmp_path: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_writers_on_one_file_wait_for_each_other(gold: Store, url: str) -> None:
    """Two connections pools, as two processes have, and several threads on each."""
    databases = [Database(url), gold.database]
    stores = [Store(database) for database in databases]
    start = threading.Barrier(8)
    before = gold.generation()

    def work(worker: int) -> None:
        start.wait(PATIENCE_S)
        for index in range(5):
            stores[worker % 2].create_tenant(Tenant(id=f"w{worker}-{index}", plan="gold"))
            stores[worker % 2].snapshot()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(gold.list_tenants()) == 41
    assert gold.generation() == before + 40
    databases[0].close()


def test_a_name_is_taken_once_however_many_ask(gold: Store) -> None:
    start = threading.Barrier(8)

    def work(_: int) -> bool:
        start.wait(PATIENCE_S)
        try:
            gold.create_tenant(Tenant(id="wanted", plan="gold"))
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nonsense", "is not a URL"),
        ("postgresql://u@one:5432,two:5432/db", "is not a URL"),
        ("postgresql://u@db:abc/db", "is not a URL"),
        ("postgresql://u@[::1/db", "is not a URL"),
        ("postgresql://u@db:65536/db", "the URL has the port 65536"),
        ("postgresql://u@/db?host=one:5432&host=two:65536", "the URL has the port 65536"),
        ("postgresql://u@/db?port=abc", "hosts and ports of the URL are not right"),
        ("postgresql://u@/db?host=one,two&port=1,2,3", "hosts and ports of the URL are not right"),
        ("mysql://u:hunter2@host/db", "not mysql://"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:////proc/nowhere/x.db", "/proc/nowhere"),
        ("sqlite:////tmp/x.db?mode=hunter2", "no parameters, and this one has mode"),
        ("sqlite:////tmp/x.db?timeout=abc", "no parameters, and this one has timeout"),
        ("sqlite://u:hunter2@host/x.db", "names no host"),
        ("postgresql://u:p@hunter2@db/x", "more than one @"),
        ("postgresql://u:p@a/hunter2@db/x", "more than one @"),
        ("postgresql://u@/x?host=u:hunter2@db", "more than one @"),
        ("postgresql://u@db/x?foo=hunter2", "the parameter 'foo'"),
        ("postgresql://u@db/x?PASSWORD=hunter2", "the parameter 'PASSWORD'"),
        ("postgresql://u@db/x?client_encoding=latin1", "the parameter 'client_encoding'"),
        ("postgresql://u@db/x?password=hunter2&password=hunter2", "password 2 times"),
        ("postgresql://u@db/x?connect_timeout=abc", "connect_timeout must be from 1 to 600 seconds, not 'abc'"),
        ("postgresql://u@db/x?connect_timeout=0", "connect_timeout must be"),
    ],
)
def test_a_url_that_can_never_work(url: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, only some text that is long enough to be looked at by SQLite" * 10)
    with pytest.raises(ConfigError, match="not an SQLite database"):
        Database(f"sqlite:///{path}")
    assert path.read_text().startswith("not a database")


def test_a_file_that_was_damaged_is_unavailable_until_it_is_mended(gold: Store, tmp_path: Path) -> None:
    gold.database.close()
    path = tmp_path / "tenants.db"
    good = path.read_bytes()
    path.write_bytes(good[:4096] + b"\xff" * (len(good) - 4096))
    with pytest.raises(StoreUnavailableError, match="malformed"):
        gold.snapshot()
    gold.database.close()
    path.write_bytes(good)
    assert [tenant.id for tenant in gold.snapshot().tenants] == ["acme"]


def test_nothing_is_written_to_a_file_that_is_not_there_any_more(gold: Store, url: str, tmp_path: Path) -> None:
    """It was confirmed, and nobody would have seen it."""
    copy = tmp_path / "backup.db"
    shutil.copy(tmp_path / "tenants.db", copy)
    for path in tmp_path.glob("tenants.db*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="the file is not there"):
            gold.create_tenant(Tenant(id="lost", plan="gold"))
    assert not (tmp_path / "tenants.db").exists()
    copy.rename(tmp_path / "tenants.db")
    gold.create_tenant(Tenant(id="kept", plan="unlimited"))
    other = Database(url)
    assert "kept" in [tenant.id for tenant in Store(other).list_tenants()]
    other.close()


def test_a_table_that_is_missing_is_named(gold: Store) -> None:
    with gold.database.write() as session:
        session.execute(text("ALTER TABLE deployment RENAME TO other"))
    with pytest.raises(StoreUnavailableError, match="deployment"):
        gold.generation()


SECRETS = ("password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://packtrain:hunter2@127.0.0.1:1/tenants",
        *(f"postgresql://packtrain@127.0.0.1:1/tenants?sslmode=prefer&{name}=hunter2" for name in SECRETS),
    ],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(url: str) -> None:
    with pytest.raises(
        StoreUnavailableError, match=r"postgresql\+psycopg://packtrain@127\.0\.0\.1:1/tenants"
    ) as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


def test_every_parameter_of_the_client_library_that_it_hides_is_a_secret_here() -> None:
    pq = pytest.importorskip("psycopg.pq")
    known = {option.keyword.decode(): option.dispchar == b"*" for option in pq.Conninfo.get_defaults()}
    for name, is_hidden in known.items():
        url = f"postgresql://u@db/x?{name}=1"
        try:
            secrets = secrets_of(url)
        except ConfigError as error:
            assert name in ("client_encoding", "replication", "fallback_application_name"), error
        else:
            assert secrets == ((name,) if is_hidden or name in SECRETS else ())
            assert without_secrets(url).endswith("x" if secrets else f"x?{name}=1")


def test_a_url_is_shown_as_it_was_written_but_for_its_secrets() -> None:
    url = "postgresql://u:a%40b@db:6432/x?sslmode=require&options=-c+search_path%3Da&sslpassword=hunter2"
    assert secrets_of(url) == ("password", "sslpassword")
    assert without_secrets(url) == "postgresql://u@db:6432/x?options=-c+search_path%3Da&sslmode=require"
    assert without_secrets("sqlite:////srv/x.db") == "sqlite:////srv/x.db"


def test_a_connection_in_use_is_closed_when_its_transaction_ends(gold: Store) -> None:
    with gold.database.read() as session:
        connection = session.connection().connection.dbapi_connection
        assert connection is not None
        gold.database.close()
        assert session.execute(text("SELECT 1")).scalar() == 1
    with pytest.raises(ProgrammingError, match="closed"):
        connection.cursor()


def test_a_database_that_went_away_is_unavailable(gold: Store, tmp_path: Path) -> None:
    gold.database.close()
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "tenants.db").mkdir()
    with pytest.raises(StoreUnavailableError, match="cannot be used now"):
        gold.generation()


def test_the_default_is_a_file_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", "/srv/packtrain?")
    assert make_url(database_url(TenancyConfig())).database == "/srv/packtrain?/tenants.db"
    assert database_url(TenancyConfig(database="postgresql://host/db")) == "postgresql://host/db"
