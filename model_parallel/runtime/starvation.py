"""How long processes of this host could not go on because other work had the processors.

A process that does nothing may hang, or wait for a processor. Linux tells the two apart for each of its threads: one that hangs
sleeps, is stopped, or runs; one that waits is runnable and does not run. /proc/PID/task/TID/stat has a thread's state, and
/proc/PID/task/TID/schedstat, in nanoseconds, how long it has run and how long it has waited to run, counted when a wait is over
(Documentation/scheduler/sched-stats.rst).
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class _Thread(NamedTuple):
    is_runnable: bool
    """It runs, or waits for a processor."""
    ran_ns: int
    waited_ns: int


class Starvation:
    """Of some processes, from look to look."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._looked_s = 0.0
        self._threads: dict[tuple[int, str], _Thread] | None = None
        """At the last look, by process and thread."""

    def forget(self) -> None:
        """The next look is a first one."""
        self._threads = None

    def look(self) -> float:
        """Seconds since the last look for which the thread that waited most has waited for a processor. 0 at a first look, and
        where Linux does not count."""
        now_s = time.monotonic()
        before, self._threads = self._threads, {key: thread for pid in self._pids for key, thread in _threads(pid)}
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        if before is None:
            return 0.0
        waits = (_waited_s(before[key], thread, passed_s) for key, thread in self._threads.items() if key in before)
        return max(waits, default=0.0)


def _waited_s(before: _Thread, now: _Thread, passed_s: float) -> float:
    """Of `passed_s`. A wait that goes on is not counted by Linux yet."""
    if now.is_runnable and before.is_runnable:
        return max(passed_s - (now.ran_ns - before.ran_ns) / 1e9, 0.0)
    return min((now.waited_ns - before.waited_ns) / 1e9, passed_s)


def _threads(pid: int) -> list[tuple[tuple[int, str], _Thread]]:
    tasks = _PROC / str(pid) / "task"
    found = []
    try:
        names = os.listdir(tasks)
    except OSError:
        return []
    for name in names:
        try:
            ran_ns, waited_ns, *_ = map(int, (tasks / name / "schedstat").read_bytes().split())
            state = (tasks / name / "stat").read_bytes().rpartition(b")")[2].split()[0]
        except (OSError, ValueError):
            continue  # it has ended, or nothing is counted here
        found.append(((pid, name), _Thread(state == b"R", ran_ns, waited_ns)))
    return found
