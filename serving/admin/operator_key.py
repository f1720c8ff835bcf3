"""The operator's key of a server without tenancy: in a file that only the user who runs the server can read."""

import hmac
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from model_parallel.directories import cache_directory, private_directories, why_not_writable
from model_parallel.errors import ConfigError
from serving.contracts.accounts import OPEN, OpenAccounts, Principal
from serving.contracts.errors import UnauthenticatedError
from serving.tenants.keys import read_bearer

_NAME = "operator.key"


def operator_key_file() -> Path:
    """Where it lies: in the cache, with fetched models; where that cannot be written, as in a read-only image, in a temporary
    directory of this user's. A key that is there already counts, wherever it is, so that server and commands find the same."""
    if (there := _key_that_is_there()) is not None:
        return there
    writable = (path for path in _places(create=True) if not why_not_writable(path.parent))
    return next(writable, cache_directory() / _NAME)


def _key_that_is_there() -> Path | None:
    return next((path for path in _places(create=False) if os.path.exists(path)), None)


def _places(*, create: bool) -> Iterator[Path]:
    yield cache_directory() / _NAME
    for directory in private_directories(create=create):
        yield directory / _NAME


def check_operator_key() -> None:
    """Raises ConfigError when `make_operator_key` would."""
    path = operator_key_file()
    if os.path.exists(path):
        _read(path)
    elif reason := why_not_writable(path.parent):
        raise ConfigError(f"admin.port: the operator's key cannot be kept: {path.parent} {reason}, nor elsewhere")


def make_operator_key() -> str:
    """The key, which is made when there is none. Raises ConfigError when it cannot be kept, or others could have read it."""
    path = operator_key_file()
    try:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        except FileExistsError:
            return _read(path)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key := secrets.token_urlsafe(32))
        return key
    except OSError as error:
        raise ConfigError(f"admin.port: the operator's key cannot be kept in {path}: {error.strerror}") from error


def read_operator_key() -> str:
    """ "" when there is none that this user can read."""
    try:
        path = _key_that_is_there()
        return "" if path is None else path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read(path: Path) -> str:
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"admin.port: {path} has the operator's key, and others can read it; remove it, and a new one is made"
        )
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError(
            f"admin.port: {path} does not hold the operator's key ({reason}); remove it, and a new one is made"
        ) from error
    if not key:
        raise ConfigError(f"admin.port: {path} is empty; remove it, and a new operator's key is made")
    return key


class KeyHolder(OpenAccounts):
    """Lets in who shows the operator's key."""

    def __init__(self, key: str) -> None:
        self._expected = key.encode()

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        """Raises UnauthenticatedError."""
        given = read_bearer(credentials) or ""
        if not hmac.compare_digest(given.encode(), self._expected):
            raise UnauthenticatedError(
                "this server has no tenancy, and lets in who shows the operator's key of the user who runs it"
            )
        return OPEN
