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
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from model_parallel.errors import ConfigError
from serving.contracts.errors import StoreUnavailableError

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30
"""How long a lock, a connection and a statement may take. SQLite knows the first of them alone."""

_MIGRATIONS = Path(__file__).with_name("migrations")
_UPGRADE_LOCK = 0x7061636B
"""Of PostgreSQL's advisory locks: two servers that start together upgrade one after the other."""
_IS_WRITE = "packtrain_is_write"


class Database:
    """Transactions on one database, whose schema is brought up to date when it is opened. Safe to use from many threads."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL, or a database, that can never work; StoreUnavailableError for one that may later."""
        self._url = _checked(url)
        self.shown_url = _without_password(self._url).render_as_string(hide_password=True)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _sqlite(self._url) if self._is_sqlite else _postgresql(self._url)
        self._writer = self._engine.execution_options(**{_IS_WRITE: True})
        self._reader = (
            self._engine if self._is_sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        try:
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


def check_url(url: str) -> None:
    """Raises ConfigError for a URL that can never work."""
    _checked(url)


def has_password(url: str) -> bool:
    """Whether a URL must not be shown. Raises ConfigError for what is not one."""
    parsed = _checked(url)
    return parsed.password is not None or "password" in parsed.query


def without_password(url: str) -> str:
    """The URL that may be shown. Raises ConfigError for what is not one."""
    shown = _without_password(_checked(url))
    return shown.set(drivername=url.partition(":")[0]).render_as_string(hide_password=False)


def _without_password(url: URL) -> URL:
    return url._replace(password=None).difference_update_query(["password"])


def _checked(url: str) -> URL:
    """With the driver that we use. Raises ConfigError, which never holds the URL's password."""
    try:
        parsed = make_url(url)
    except (
        ArgumentError,
        ValueError,
    ) as error:  # ValueError: of a port that is no number, or of several hosts before the name
        raise ConfigError(
            "database is not a URL; write sqlite:////directory/file.db or postgresql://user@host:port/name; several hosts of "
            "PostgreSQL are postgresql://user@/name?host=one:5432&host=two:5432"
        ) from error
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
        try:
            _, arguments = parsed.get_dialect()().create_connect_args(parsed)
        except (ArgumentError, ValueError) as error:
            raise ConfigError(f"database: hosts and ports of the URL are not right: {error}") from error
        for port in str(arguments.get("port") or "").split(","):
            if port and not 1 <= int(port) <= 65535:
                raise ConfigError(f"database: the URL has the port {port}, and ports are from 1 to 65535")
        return parsed
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"database must be a sqlite:// or postgresql:// URL, not {parsed.drivername}://")
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError("database must name a file (sqlite:////directory/file.db): several processes share it")
    return parsed


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

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin transactions by its own rules
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    def begun(connection: Connection) -> None:
        # A transaction that starts as a reader cannot always become a writer: it would fail instead of waiting.
        is_write = connection.get_execution_options().get(_IS_WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    return engine


def _postgresql(url: URL) -> Engine:
    settings = {"statement_timeout": STATEMENT_TIMEOUT_S, "lock_timeout": BUSY_TIMEOUT_S}
    try:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_timeout=BUSY_TIMEOUT_S,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "options": " ".join(f"-c {name}={seconds}s" for name, seconds in settings.items()),
            },
        )
    except ModuleNotFoundError as error:
        raise ConfigError("a postgresql:// database needs psycopg: pip install 'packtrain[postgres]'") from error
