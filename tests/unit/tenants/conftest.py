from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    """On a new SQLite file."""
    database = Database(url)
    yield Store(database, wall_clock=clock)
    database.close()
