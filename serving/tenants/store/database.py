"""One SQLAlchemy engine: SQLite in a file, or PostgreSQL. The one place where their errors become ours.

SQLite runs in WAL mode with synchronous=FULL: a transaction that was committed survives a power cut.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, DisconnectionError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from model_parallel.errors import ConfigError
from serving.contracts.errors import StoreUnavailableError
from serving.tenants.store.url import checked_url, connect_timeout_s, shown

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30
"""How long a lock, a connection and a statement may take. SQLite knows the first of them alone."""

_MIGRATIONS = Path(__file__).with_name("migrations")
_UPGRADE_LOCK = 0x7061636B
"""Of PostgreSQL's advisory locks: two servers that start together upgrade one after the other."""
_IS_WRITE = "packtrain_is_write"
_FILE = "packtrain_file"
"""Which one a connection to SQLite has open."""


class Database:
    """Transactions on one database, whose schema is brought up to date when it is opened, unless it is only to be looked at. Safe
    to use from many threads."""

    def __init__(self, url: str, *, is_upgraded: bool = True) -> None:
        """Raises ConfigError for a URL, or a database, that can never work; StoreUnavailableError for one that may later."""
        self._url = checked_url(url)
        self.shown_url = shown(self._url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _sqlite(self._url) if self._is_sqlite else _postgresql(self._url)
        self._writer = self._engine.execution_options(**{_IS_WRITE: True})
        self._reader = (
            self._engine if self._is_sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        try:
            if is_upgraded:
                self._upgrade()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the database, and changes nothing."""
        with self._errors(), Session(self._reader) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed when the block ends well. On SQLite it excludes other writers from the start."""
        with self._errors(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections: those in use as soon as their transactions end."""
        event.listen(self._engine.pool, "checkin", lambda connection, record: record.invalidate())
        self._engine.dispose()

    def _upgrade(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        try:
            with self._errors(), self._writer.begin() as connection:
                if not self._is_sqlite:
                    self._check_encoding(connection)
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
                config.attributes["connection"] = connection
                before = _schema_of(connection)
                command.upgrade(config, "head")
                after = _schema_of(connection)
        except CommandError as error:
            raise ConfigError(
                f"the database {self.shown_url} is of a newer version than this program: {error}"
            ) from error
        if after != before:
            logger.info("the database %s has schema %s now (before: %s)", self.shown_url, after, before or "none")

    def _check_encoding(self, connection: Connection) -> None:
        encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
        if encoding != "UTF8":
            raise ConfigError(
                f"the database {self.shown_url} has the encoding {encoding}, and names need UTF8: make it with ENCODING 'UTF8'"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeoutError as error:
            raise StoreUnavailableError(f"all connections to the database {self.shown_url} are in use") from error
        except (DataError, IntegrityError):
            raise  # of what we write, and so our own fault
        except DBAPIError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            if self._is_sqlite and "not a database" in reason:
                raise ConfigError(f"the database {self.shown_url}: the file is not an SQLite database") from error
            # A server that may only be read, rights that are missing, a table that was taken away, a damaged file: all of it can
            # be mended while programs go on.
            raise StoreUnavailableError(f"the database {self.shown_url} cannot be used now: {reason}") from error


def _schema_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _sqlite(url: URL) -> Engine:
    assert url.database is not None
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # For the owner alone. SQLite gives the files that it puts beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(f"database {path}: {error.strerror}") from error
    engine = create_engine(
        url, hide_parameters=True, pool_timeout=BUSY_TIMEOUT_S, connect_args={"timeout": BUSY_TIMEOUT_S}
    )

    def connecting(*_: Any) -> None:
        if not path.exists():  # SQLite would make an empty one, that others can read
            raise StoreUnavailableError(f"the database {path} cannot be used now: the file is not there")

    def checked_out(connection: Any, record: Any, proxy: Any) -> None:
        """What is written to a file that was removed, or that another one has replaced, nobody would see."""
        if _identity(path) != record.info[_FILE]:
            raise DisconnectionError("the file is another one")  # the pool connects anew

    def connected(connection: Any, record: Any) -> None:
        record.info[_FILE] = _identity(path)
        connection.isolation_level = None  # the driver would otherwise begin transactions by its own rules
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    def begun(connection: Connection) -> None:
        # A transaction that starts as a reader cannot always become a writer: it would fail instead of waiting.
        is_write = connection.get_execution_options().get(_IS_WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")

    event.listen(engine, "do_connect", connecting)
    event.listen(engine, "connect", connected)
    event.listen(engine, "checkout", checked_out)
    event.listen(engine, "begin", begun)
    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file that has this path now."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql(url: URL) -> Engine:
    limits = {"statement_timeout": STATEMENT_TIMEOUT_S, "lock_timeout": BUSY_TIMEOUT_S}
    ours = " ".join(f"-c {name}={seconds}s" for name, seconds in limits.items())
    try:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_timeout=BUSY_TIMEOUT_S,
            connect_args={
                "client_encoding": "utf8",
                "connect_timeout": connect_timeout_s(url.query) or CONNECT_TIMEOUT_S,
                "options": f"{ours} {url.query.get('options', '')}".strip(),  # of a setting that comes twice the last counts
            },
        )
    except ModuleNotFoundError as error:
        raise ConfigError("a postgresql:// database needs psycopg: pip install 'packtrain[postgres]'") from error
