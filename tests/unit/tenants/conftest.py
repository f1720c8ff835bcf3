import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import make_url

from serving.tenants.store.database import Database
from serving.tenants.store.store import Store

NOON_UNIX_S = 1_800_000_000.0


@dataclass
class Clock:
    """A wall clock that a test sets."""

    unix_s: float = NOON_UNIX_S

    def __call__(self) -> float:
        return self.unix_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tenants.db'}"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file that has the schema and nothing in it."""
    path = tmp_path_factory.mktemp("migrated") / "tenants.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def store(url: str, clock: Clock, migrated: Path) -> Iterator[Store]:
    """On an SQLite file of its own."""
    shutil.copy(migrated, make_url(url).database or "")
    database = Database(url)
    yield Store(database, wall_clock=clock)
    database.close()
