"""The autoscaler's memory in a file, on the host that runs it. The last who opened it may write, and nobody before."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from cluster.autoscaler import ScalingError, SupersededError

_EPOCH_BYTES = 8


class FileStore:
    """Two files: the memory, replaced as a whole, and the number of times that it was opened.

    `open` counts that number up under a lock, and `save` compares under the same lock, so a writer that was superseded never
    replaces what its successor has written, however long it was stopped in between.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._epoch_path = path.with_name(path.name + ".epoch")
        self._epoch = 0

    def open(self) -> bytes | None:
        """Raises ScalingError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _Locked(self._epoch_path) as epoch_file:
                self._epoch = _epoch_in(epoch_file) + 1
                os.pwrite(epoch_file, self._epoch.to_bytes(_EPOCH_BYTES, "big"), 0)
                os.fsync(epoch_file)
                return self._path.read_bytes() if self._path.exists() else None
        except OSError as error:
            raise ScalingError(f"{self._path}: {error.strerror}") from error

    def save(self, memory: bytes) -> None:
        """Raises SupersededError, ScalingError."""
        try:
            with _Locked(self._epoch_path) as epoch_file:
                epoch = _epoch_in(epoch_file)
                if epoch != self._epoch:
                    raise SupersededError(
                        f"{self._path} was opened as number {self._epoch}, and number {epoch} came after"
                    )
                _replace(self._path, memory)
        except OSError as error:
            raise ScalingError(f"{self._path}: {error.strerror}") from error


class _Locked:
    """A file, open and locked (flock). The system unlocks it when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._file)
            raise
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _epoch_in(epoch_file: int) -> int:
    """0 in a new file."""
    return int.from_bytes(os.pread(epoch_file, _EPOCH_BYTES, 0), "big")


def _replace(path: Path, content: bytes) -> None:
    """All or nothing, also when the host stops in the middle."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
