"""Which server decides on quotas in a database: one at a time. It writes that it is alive again and again; when that stops, the
next one may take its place. No clocks of two machines are compared."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update

from model_parallel.directories import why_not_writable
from model_parallel.errors import ConfigError
from serving.contracts.errors import StoreUnavailableError
from serving.tenants.store.database import Database
from serving.tenants.store.schema import AuthorityRow
from serving.tenants.store.url import checked_url

BEAT_PERIOD_S = 2.0
DEAD_AFTER_S = 10.0
"""A server of which nothing new is written for so long is taken to be dead."""
LOOK_PERIOD_S = 0.25


class InUseError(StoreUnavailableError):
    """Another server decides on quotas in this database."""


@dataclass(frozen=True, slots=True)
class _Seen:
    owner: str | None
    epoch: int
    beat: int | None


def wait_until_free(database: Database, mine: str = "") -> None:
    """Returns when no other server than `mine` has the database, or when the one that has it was silent for DEAD_AFTER_S. Raises
    InUseError as soon as it is heard of, and StoreUnavailableError."""
    seen = first = _look(database)
    deadline_s = time.monotonic() + DEAD_AFTER_S
    while seen.owner not in (None, mine):
        if seen != first:
            raise in_use(database, seen.owner)
        if time.monotonic() > deadline_s:
            _forget(database, seen)
            return
        time.sleep(LOOK_PERIOD_S)
        seen = _look(database)


def in_use(database: Database, owner: str | None) -> InUseError:
    """What to do about it."""
    return InUseError(
        f"the database {database.shown_url} is in use by the server on {owner}, and one alone decides on quotas: stop that one, "
        "or give this one a database of its own"
    )


def check_not_in_use(url: str) -> None:
    """Before a start, which creates the database and brings its schema up to date, and tells what is wrong with it. Raises
    ConfigError for one that another server uses, and for a file that cannot be created."""
    parsed = checked_url(url)
    if parsed.get_backend_name() == "sqlite" and not (path := Path(parsed.database or "")).exists():
        if reason := why_not_writable(path.parent):
            raise ConfigError(f"tenancy.database: {path} cannot be created: {path.parent} {reason}")
        return
    try:
        with closing(Database(url, is_upgraded=False)) as database:
            wait_until_free(database)
    except InUseError as error:
        raise ConfigError(f"tenancy.database: {error}") from error
    except StoreUnavailableError:
        return


def _look(database: Database) -> _Seen:
    with database.read() as session:
        return _Seen(*session.execute(select(AuthorityRow.owner, AuthorityRow.epoch, AuthorityRow.beat)).one())


def _forget(database: Database, dead: _Seen) -> None:
    """Unless it has come back just now."""
    is_same = (AuthorityRow.owner == dead.owner) & (AuthorityRow.epoch == dead.epoch) & (AuthorityRow.beat == dead.beat)
    with database.write() as session:
        session.execute(update(AuthorityRow).where(is_same).values(owner=None))
