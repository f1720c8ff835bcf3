"""Where files may be put: the cache for what is kept, a temporary directory for what is not.

Both must work where there is no home, no user name, or nothing but a read-only root. Read from the environment here, because
rank processes need it and import nothing of `serving`.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TEMPORARY_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Unusable:
    """A directory that was asked for, and why it is not used."""

    setting: str
    """The environment variable that names it, or "home"."""
    path: str
    reason: str


def expand_home(path: str | Path) -> Path:
    """With a leading `~` or `~user` replaced. Where there is no such home the path stays as it is. (Path.expanduser raises.)"""
    return Path(os.path.expanduser(path))


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where fetched models and compiled code are kept: $PACKTRAIN_CACHE, else $XDG_CACHE_HOME/packtrain, else
    ~/.cache/packtrain. When the last two cannot be written, a directory of this user's in the temporary directory."""
    return cache_choice(environment)[0]


def cache_choice(environment: Mapping[str, str] = os.environ) -> tuple[Path, Unusable | None]:
    """The cache directory, and what should have been it but cannot be written. $PACKTRAIN_CACHE is taken as it is: who names
    it wants an error, not another place."""
    if own := environment.get("PACKTRAIN_CACHE"):
        path = expand_home(own) if own.startswith("~") and environment.get("HOME") else Path(own)
        return path.absolute(), None
    wanted = _home_cache(environment)
    if not isinstance(wanted, Unusable):
        setting = "XDG_CACHE_HOME" if environment.get("XDG_CACHE_HOME") else "HOME"
        if not (reason := why_not_writable(wanted)):
            return wanted, None
        wanted = Unusable(setting, str(wanted), reason)
    fallback = next(private_directories(environment), None)
    return fallback or Path(tempfile.gettempdir()) / f"packtrain-cache-{os.getuid()}", wanted


def readable_caches(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where to look for what is kept, the one to write to first: a home that is read-only may hold models all the same."""
    first, unusable = cache_choice(environment)
    return [first, Path(unusable.path)] if unusable is not None and unusable.path else [first]


def _home_cache(environment: Mapping[str, str]) -> "Path | Unusable":
    if base := environment.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "packtrain"
    if home := environment.get("HOME"):
        return Path(home) / ".cache" / "packtrain"
    try:
        return Path.home() / ".cache" / "packtrain"
    except RuntimeError:  # a user id that no user database knows
        return Unusable("HOME", "", "is not set")


def private_directories(environment: Mapping[str, str] = os.environ, *, create: bool = True) -> Iterator[Path]:
    """Directories in the temporary ones that only this user can write, by names that the next start finds again. Without
    `create`, those that are there."""
    for parent in temporary_parents(environment):
        path = parent / f"packtrain-cache-{os.getuid()}"
        with suppress(OSError):
            if create:
                path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            # A name that can be guessed: somebody else may have put something there.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
                yield path


def temporary_parents(environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Directories to try for temporary files, $TMPDIR first; only those that can be written. Their paths are absolute, as Ray
    wants them."""
    for name in (environment.get("TMPDIR", ""), *_TEMPORARY_PARENTS):
        if name and not why_not_writable(Path(name), create=False):
            yield Path(name).absolute()


def why_not_writable(path: Path, *, create: bool = True) -> str:
    """ "" when a file of some bytes can be written there; `create` makes missing directories."""
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "is full"
        return {errno.ENOENT: "does not exist", errno.EROFS: "is read-only"}.get(
            error.errno or 0, f"cannot be written ({error.strerror})"
        )
    return ""
