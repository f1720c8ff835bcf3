"""Ends everything that belongs to a private Ray cluster when the process that started it dies without a word.

Ray's head and raylet end with their starter (PR_SET_PDEATHSIG), but a killed raylet's agents linger for a minute, and a stopped
worker for ever. So the cluster gets a directory of its own, in which each of its processes keeps files open, and a guard
sleeps on a pipe from the starter: when the pipe closes, it kills whatever has files of that directory open.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILL_TIMEOUT_S = 10.0
_POLL_S = 0.05


class Guard:
    """The directory of one private cluster, and the process that watches over it."""

    def __init__(self) -> None:
        # Short: Ray puts sockets below it, whose paths may have 107 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="packtrain-"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.guard", str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the starter
        )

    def dismiss(self) -> None:
        """End what is left of the cluster, remove its directory and the guard. Safe to call twice.

        After an unclean end nobody calls this, and the directory stays, because its logs may tell why.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(2 * KILL_TIMEOUT_S)
        shutil.rmtree(self.directory, ignore_errors=True)


def processes_in(directory: Path, *, spare: int) -> list[int]:
    """Process ids of all living processes, but `spare`, that have a file below `directory` open."""
    prefix = f"{directory}/"
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == spare:
            continue
        try:
            if any(os.readlink(fd).startswith(prefix) for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue  # it or the file went away meanwhile, or it belongs to somebody else
    return found


def kill_processes_in(directory: Path, *, spare: int) -> None:
    """SIGKILL them all, again and again until none is left or the time is up."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (pids := processes_in(directory, spare=spare)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_S)


def main() -> None:
    """Sleep until the starter closes the pipe or dies."""
    starter = os.getppid()
    sys.stdin.buffer.read()
    kill_processes_in(Path(sys.argv[1]), spare=starter)


if __name__ == "__main__":
    main()
