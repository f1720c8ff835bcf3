import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from model_parallel.errors import ConfigError
from serving.contracts.accounts import UsageRecord
from serving.tenants.store import migrations
from serving.tenants.store.database import Database
from serving.tenants.store.schema import Base, UsageRow
from serving.tenants.store.store import Store

SCRIPTS = ScriptDirectory(str(Path(migrations.__file__).parent))


def test_the_steps_make_what_the_schema_says(store: Store) -> None:
    options = {"compare_type": True, "compare_server_default": True}
    with store.database.write() as session:
        context = MigrationContext.configure(session.connection(), opts=options)
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == SCRIPTS.get_current_head()


def test_the_steps_are_one_line() -> None:
    revisions = [script.revision for script in SCRIPTS.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True)
    assert len(SCRIPTS.get_heads()) == 1


def test_the_comparison_would_find_a_difference(store: Store) -> None:
    with store.database.write() as session:
        session.execute(sa.text("ALTER TABLE plans DROP COLUMN priority"))
        [(kind, *_)] = compare_metadata(MigrationContext.configure(session.connection()), Base.metadata)
        assert kind == "add_column"
        session.rollback()


def test_opening_again_changes_nothing(store: Store, url: str) -> None:
    database = Database(url)
    assert Store(database).snapshot() == store.snapshot()
    database.close()


def test_every_database_has_a_secret_of_its_own(tmp_path: Path) -> None:
    secrets = set()
    for name in ("a", "b"):
        database = Database(f"sqlite:///{tmp_path / name}")
        with database.read() as session:
            secrets.add(session.execute(sa.text("SELECT salt_secret FROM deployment")).scalar_one())
        database.close()
    assert {len(secret) for secret in secrets} == {32} and len(secrets) == 2


def test_a_database_of_a_later_version_is_left_alone(store: Store, url: str) -> None:
    with store.database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer version"):
        Database(url)


def test_an_upgrade_that_fails_leaves_nothing_behind(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = command.upgrade

    def fail_at_the_end(config: Config, revision: str) -> None:
        upgrade(config, revision)
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", fail_at_the_end)
        with pytest.raises(OSError, match="power cut"):
            Database(url)
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    Database(url).close()


def test_a_usage_record_has_a_column_for_each_of_its_fields() -> None:
    assert list(UsageRow.__table__.columns.keys()) == list(UsageRecord.__struct_fields__)


def test_a_change_of_the_schema_is_logged_once_and_an_opening_is_not(tmp_path: Path) -> None:
    """In a process of its own, which has the logging of a server."""
    program = (
        "import sys; from serving.observability.log import configure_logging;"
        "from serving.tenants.store.database import Database;"
        "configure_logging('authority'); Database(sys.argv[1]).close(); Database(sys.argv[1]).close()"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'new.db'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    [line] = ended.stderr.splitlines()
    assert f"new.db has schema {SCRIPTS.get_current_head()} now (before: none)" in line
