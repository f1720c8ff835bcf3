"""Is a replica group alive? Judged by its progress, not by whether its process answers."""

import threading
import time
from collections.abc import Callable


class GroupHealth:
    """Healthy unless the group is lost, or a step has been outstanding for longer than step_timeout_s.

    The one place that keeps why a group is lost and when its oldest step began. Safe to use from any thread.
    """

    def __init__(self, step_timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._step_began_s: float | None = None
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the group is lost; None while it is not."""
        return self._failure

    def step_began(self) -> None:
        """From now on a step is outstanding, and no other than this one."""
        with self._lock:
            self._step_began_s = self._clock()

    def step_ended(self) -> None:
        """No step is outstanding."""
        with self._lock:
            self._step_began_s = None

    def fail(self, reason: str) -> bool:
        """For good: a lost group does not recover, it is replaced. The first reason is kept; returns whether this is it."""
        with self._lock:
            is_first = self._failure is None
            if is_first:
                self._failure = reason
            return is_first

    def seconds_left(self) -> float:
        """Of the outstanding step's time. Raises RuntimeError when there is none."""
        with self._lock:
            if self._step_began_s is None:
                raise RuntimeError("no step is outstanding")
            return self._step_began_s + self._step_timeout_s - self._clock()

    def problem(self) -> str | None:
        """What is wrong, or None."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            if self._step_began_s is not None and (ran_s := self._clock() - self._step_began_s) > self._step_timeout_s:
                return f"a step has been running for {ran_s:.1f} s; the limit is {self._step_timeout_s:g} s"
            return None
