"""A rank ends a leader that hangs.

A leader that is stopped keeps its sockets open and its actor alive. Ray Serve replaces it only after its health checks have
failed and the time for an end in good order is over: some 50 s. So a leader on which nothing but its group depends says
several times a second that its event loop runs (LifeLocks.beat), and each rank on its host looks whether it still does. A
leader that is killed takes its ranks along, and Serve starts the group anew.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Protocol

from model_parallel.runtime.starvation import Starvation

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 0.25
"""How often the leader says that it goes on."""
LOOK_PERIOD_S = 0.5
"""Between two looks of a rank."""
SILENCE_S = 4.0
"""The longest that a leader may say nothing while it has a processor: twice what its gateways wait before they give its requests
to another group."""
MAX_COUNTED_S = 1.0
"""The most that counts between two looks. A rank that has not looked for longer was held up itself, perhaps with its leader."""


class Leader(Protocol):
    """What is known of the leader; `HeldLifeLock` is the real one."""

    @property
    def leader_pid(self) -> int:
        """Process id, on this host."""
        ...

    @property
    def num_beats(self) -> int:
        """Grows while the leader goes on; 0 of a leader that is not to be watched."""
        ...


class LeaderWatch:
    """One rank's look at its leader. To be made while the leader is known to live."""

    def __init__(self, leader: Leader, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._leader = leader
        self._clock = clock
        self._process = os.pidfd_open(leader.leader_pid)
        self._starvation = Starvation([leader.leader_pid])
        self._num_beats = 0
        self._silent_s = 0.0
        self._looked_s = clock()

    def look(self) -> bool:
        """Kill the leader if it has been silent for too long; whether it was."""
        now_s, num_beats = self._clock(), self._leader.num_beats
        if num_beats == self._num_beats:
            passed_s = min(now_s - self._looked_s, MAX_COUNTED_S)
            self._silent_s += max(passed_s - self._starvation.look(), 0.0)
        else:
            self._silent_s = 0.0
            self._starvation.forget()
        self._num_beats, self._looked_s = num_beats, now_s
        if num_beats == 0 or self._silent_s <= SILENCE_S:
            return False
        logger.error(
            "the leader (pid %d) has done nothing for %.1f s and is killed; the limit is %g s",
            self._leader.leader_pid,
            self._silent_s,
            SILENCE_S,
        )
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        return True
