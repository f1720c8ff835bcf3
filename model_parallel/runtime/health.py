"""Is a replica group alive? Judged by its progress, not by whether its process answers."""

import threading
import time
from collections.abc import Callable

MAX_COUNTED_S = 0.5
"""The most that counts between two looks. Whoever has not looked for longer was held up itself, and perhaps the ranks with it."""


class GroupHealth:
    """Healthy unless the group is lost, or a step is outstanding and nothing has moved for longer than step_timeout_s.

    The one place that keeps why a group is lost and since when nothing has moved. Safe to use from any thread.
    """

    def __init__(self, step_timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._moved_s: float | None = None
        """When something last moved; None while no step is outstanding."""
        self._silent_s = self._starved_s = 0.0
        self._looked_s = 0.0
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the group is lost; None while it is not."""
        return self._failure

    def moved(self) -> None:
        """A step is outstanding, and it has just begun or gone on."""
        with self._lock:
            self._moved_s = self._looked_s = self._clock()
            self._silent_s = self._starved_s = 0.0

    def step_ended(self) -> None:
        """No step is outstanding."""
        with self._lock:
            self._moved_s = None

    def fail(self, reason: str) -> bool:
        """For good: a lost group does not recover, it is replaced. The first reason is kept; returns whether this is it."""
        with self._lock:
            is_first = self._failure is None
            if is_first:
                self._failure = reason
            return is_first

    def look(self) -> float:
        """Seconds for which nothing has moved in the outstanding step, as far as somebody looked often enough to know. Raises
        RuntimeError when there is no step."""
        with self._lock:
            if self._moved_s is None:
                raise RuntimeError("no step is outstanding")
            now_s = self._clock()
            self._silent_s += min(now_s - self._looked_s, MAX_COUNTED_S)
            self._looked_s = now_s
            return self._silent_s

    def starved(self, seconds: float) -> float:
        """Other work has had the processors of a rank for so long; in all since something moved."""
        with self._lock:
            self._starved_s += seconds
            return self._starved_s

    def problem(self) -> str | None:
        """What is wrong, or None."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            if self._moved_s is not None and (silent_s := self._clock() - self._moved_s) > self._step_timeout_s:
                return f"nothing has moved in a step for {silent_s:.1f} s; the limit is {self._step_timeout_s:g} s"
            return None
