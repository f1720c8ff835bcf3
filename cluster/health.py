"""Is a replica group alive? Judged by its progress, not by whether its process answers."""

import threading
import time
from collections.abc import Callable


class GroupHealth:
    """Healthy unless the group is lost, or a step has been outstanding for longer than step_timeout_s.

    Marked by the thread that runs steps, asked by any other.
    """

    def __init__(self, step_timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._step_began: float | None = None
        self._failure: str | None = None

    def step_began(self) -> None:
        """From now on a step is outstanding, and no other than this one."""
        with self._lock:
            self._step_began = self._clock()

    def step_ended(self) -> None:
        with self._lock:
            self._step_began = None

    def failed(self, reason: str) -> None:
        """For good: a lost group does not recover, it is replaced. The first reason is kept."""
        with self._lock:
            self._failure = self._failure or reason

    def problem(self) -> str | None:
        """What is wrong, or None."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            if self._step_began is not None and (waited_s := self._clock() - self._step_began) > self._step_timeout_s:
                return f"a step has been running for {waited_s:.1f} s; the limit is {self._step_timeout_s:g} s"
            return None
