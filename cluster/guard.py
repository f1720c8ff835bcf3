"""Ends everything that belongs to a private Ray cluster when the process that started it dies without a word.

Ray's head and raylet end with their starter (PR_SET_PDEATHSIG), but a killed raylet's agents linger for a minute, and a stopped
worker for ever. So the cluster gets a directory of its own, in which each of its processes keeps files open, and a guard
sleeps on a pipe from the starter: when the pipe closes, it kills whatever has files of that directory open,
and removes the directory.
"""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from model_parallel.python_process import module_command

logger = logging.getLogger(__name__)

KILL_TIMEOUT_S = 30.0
PREFIX = "packtrain-"
_POLL_S = 0.05
_LOCK_FILE = "alive.lock"
"""Locked for as long as the starter or the guard lives."""
_MAX_SOCKET_PATH_BYTES = 107
"""Of a Unix socket on Linux (sun_path, without the final zero)."""
_LONGEST_BELOW = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray puts below a cluster's directory; 4194304 is the largest process id."""
MAX_PARENT_BYTES = _MAX_SOCKET_PATH_BYTES - len(_LONGEST_BELOW) - len(f"/{PREFIX}12345678")
"""Longest path of a directory that a cluster's directory can be made in."""


class Guard:
    """The directory of one private cluster, and the process that watches over it."""

    def __init__(self, parent: Path, *, keep_directory: bool = False) -> None:
        """Makes a directory in `parent`, whose path has at most MAX_PARENT_BYTES. It is removed at the end unless it is to be
        kept, for its logs. What was left in `parent` when a starter and its guard were both killed is removed now. Raises
        OSError."""
        remove_left_over(parent)
        self._keep = keep_directory
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _locked(self.directory)
        try:
            self._process = self._begun()
        except BaseException:
            self._lock.close()
            raise

    def _begun(self) -> "subprocess.Popen[bytes]":
        """The process. It keeps the same lock as we do."""
        return subprocess.Popen(
            module_command("cluster.guard", str(self.directory), str(int(self._keep))),
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the starter
            pass_fds=[self._lock.fileno()],
        )

    def revive(self) -> None:
        """Begin another process where the one that watches has died. Raises OSError."""
        if (status := self._process.poll()) is not None:
            logger.error("the guard of %s has died (status %d), and another one begins", self.directory, status)
            self._process = self._begun()

    def dismiss(self) -> None:
        """End what is left of the cluster, remove its directory and the guard. Safe to call twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.wait(2 * KILL_TIMEOUT_S):  # it has died before it could
            kill_processes_in(self.directory, spare=os.getpid())
        if not self._keep:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()


def _locked(directory: Path) -> IO[bytes]:
    """A file of the directory that appears locked: who finds it unlocked knows that all who had it open are dead."""
    unfinished = directory / f".{_LOCK_FILE}"
    unfinished.touch(0o600)
    lock = unfinished.open("r+b")
    fcntl.flock(lock, fcntl.LOCK_EX)
    unfinished.rename(directory / _LOCK_FILE)
    return lock


def remove_left_over(parent: Path) -> None:
    """Remove the directories of this user in `parent` whose starters and guards were killed before they could."""
    for lock_path in parent.glob(f"{PREFIX}*/{_LOCK_FILE}"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if lock_path.stat().st_uid != os.getuid():
                continue
            with lock_path.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kill_processes_in(lock_path.parent, spare=os.getpid())
                shutil.rmtree(lock_path.parent, ignore_errors=True)


def processes_in(directory: Path, *, spare: int) -> list[int]:
    """Process ids of all living processes, but `spare`, that have a file below `directory` open."""
    prefix = f"{directory}/"
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) in (spare, os.getpid()):
            continue
        try:
            if any(os.readlink(fd).startswith(prefix) for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue  # it or the file went away meanwhile, or it belongs to somebody else
    return found


def kill_processes_in(directory: Path, *, spare: int) -> None:
    """SIGKILL them all, again and again until none is left or the time is up. On a machine so busy that looking takes all the
    time, what was found is killed all the same."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while pids := processes_in(directory, spare=spare):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def main() -> None:
    """Sleep until the starter closes the pipe or dies."""
    starter = os.getppid()
    directory, keep = Path(sys.argv[1]), sys.argv[2] == "1"
    sys.stdin.buffer.read()
    kill_processes_in(directory, spare=starter)
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
