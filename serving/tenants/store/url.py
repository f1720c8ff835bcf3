"""The URL of a database: what may stand in it, and what of it may be shown. No error repeats a password."""

from collections.abc import Mapping, Sequence

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from model_parallel.errors import ConfigError

MAX_CONNECT_TIMEOUT_S = 600

_SECRETS = ("password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret")
"""Parameters of PostgreSQL that must not be shown."""
_SHOWN = (
    "application_name", "channel_binding", "connect_timeout", "dbname", "gssdelegation", "gssencmode", "gsslib", "host",
    "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "krbsrvname",
    "load_balance_hosts", "max_protocol_version", "min_protocol_version", "oauth_client_id", "oauth_issuer",
    "oauth_scope", "options", "passfile", "port", "require_auth", "requirepeer", "service", "ssl_max_protocol_version",
    "ssl_min_protocol_version", "sslcert", "sslcertmode", "sslcompression", "sslcrl", "sslcrldir", "sslkey",
    "sslkeylogfile", "sslmode", "sslnegotiation", "sslrootcert", "sslsni", "target_session_attrs", "tcp_user_timeout",
    "user",
)  # fmt: skip
"""Those that may; others are refused. `client_encoding` and `replication` are not for the URL to say."""
_REPEATED = ("host", "port")


def checked_url(url: str) -> URL:
    """With the driver that we use. Raises ConfigError for a URL that can never work."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        # ValueError: of a port that is no number, or of several hosts before the name
        raise ConfigError(
            "database is not a URL; write sqlite:////directory/file.db or postgresql://user@host:port/name; several hosts of "
            "PostgreSQL are postgresql://user@/name?host=one:5432&host=two:5432"
        ) from error
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
        _check_postgresql(parsed)
    elif parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        _check_sqlite(parsed)
    else:
        raise ConfigError(f"database must be a sqlite:// or postgresql:// URL, not {parsed.drivername}://")
    return parsed


def secrets_of(url: str) -> tuple[str, ...]:
    """Names of what must not be shown in a URL. Raises ConfigError for what is not one."""
    parsed = checked_url(url)
    return tuple(
        name for name in _SECRETS if name in parsed.query or (name == "password" and parsed.password is not None)
    )


def without_secrets(url: str) -> str:
    """The URL that may be shown. Raises ConfigError for what is not one."""
    return shown(checked_url(url).set(drivername=url.partition(":")[0]))


def shown(url: URL) -> str:
    """The same of a URL that was checked."""
    return url._replace(password=None).difference_update_query(_SECRETS).render_as_string(hide_password=False)


def _check_postgresql(url: URL) -> None:
    for name, value in url.query.items():
        if name not in (*_SHOWN, *_SECRETS):
            raise ConfigError(f"database: the URL has the parameter {name[:40]!r}, and may have {', '.join(_SHOWN)}")
        if isinstance(value, tuple) and name not in _REPEATED:
            raise ConfigError(f"database: the URL has the parameter {name} {len(value)} times, and may have it once")
    try:
        _, arguments = url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"database: hosts and ports of the URL are not right: {error}") from error
    # An unescaped @ in a password ends it, and its rest would be taken for a part of what may be shown. (@ begins the name of an
    # abstract socket.)
    hosts = str(arguments.get("host") or "").split(",")
    if any("@" in part[1:] for part in hosts) or "@" in (url.database or ""):
        raise ConfigError(
            "database: the URL has more than one @; in a user, a password or a name write @ as %40, : as %3A and / as %2F"
        )
    for port in str(arguments.get("port") or "").split(","):
        if port and not 1 <= int(port) <= 65535:
            raise ConfigError(f"database: the URL has the port {port}, and ports are from 1 to 65535")
    connect_timeout_s(url.query)


def connect_timeout_s(query: Mapping[str, Sequence[str] | str]) -> int | None:
    """That of a URL's parameters. Raises ConfigError."""
    text = query.get("connect_timeout")
    if text is None:
        return None
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_CONNECT_TIMEOUT_S):
        raise ConfigError(f"database: connect_timeout must be from 1 to {MAX_CONNECT_TIMEOUT_S} seconds, not {text!r}")
    return int(text)


def _check_sqlite(url: URL) -> None:
    if url.query:
        raise ConfigError(
            f"database: the URL of an SQLite file has no parameters, and this one has {', '.join(url.query)}"
        )
    if url.host or url.username or url.password:
        raise ConfigError("database: the URL of an SQLite file names no host; write sqlite:////directory/file.db")
    if url.database in (None, "", ":memory:"):
        raise ConfigError("database must name a file (sqlite:////directory/file.db): several processes share it")
