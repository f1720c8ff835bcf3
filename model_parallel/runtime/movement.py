"""A rank in a long step tells its leader that it moves.

A process that answers can hang in a collective, and one that is silent can be in the middle of a long prompt. So what counts is
work: a thread looks a few times a second whether the rank has done more of the step that it is in, and says so. Steps that are
shorter than that cost nothing, and a rank that is stopped or waits for a peer says nothing.
"""

import threading
from typing import Protocol

from model_parallel.runtime.rank_link import Connection, LeaderMessage, Moved, RankMessage
from model_parallel.transport.frames import LinkError

PERIOD_S = 0.2
"""Between two looks."""
CLOSE_TIMEOUT_S = 5.0
"""A leader that reads nothing can hold the thread up."""


class Worker(Protocol):
    """What is looked at."""

    @property
    def num_done(self) -> int:
        """Grows while a step is computed."""
        ...

    @property
    def is_compiling(self) -> bool:
        """What it does now can take long without anything that could be counted."""
        ...


class MovementReports:
    """Sends all messages of a rank that runs steps, from the thread that runs them and from the one that looks."""

    def __init__(self, connection: Connection[LeaderMessage], worker: Worker) -> None:
        self._connection = connection
        self._worker = worker
        self._lock = threading.Lock()
        self._step_id: int | None = None
        """Of the step that is computed now."""
        self._seen: tuple[int, int, bool] | None = None
        """Step, work done and whether it compiled, at the last look."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_until_closed, name="packtrain-movement", daemon=True)
        self._thread.start()

    def begin(self, step_id: int) -> None:
        """The step is computed from now on."""
        self._step_id = step_id

    def end(self, answer: RankMessage) -> None:
        """It is done. Raises LinkError."""
        self._step_id = None
        with self._lock:
            self._connection.send(answer)

    def close(self) -> None:
        """Look no more: whoever calls may send by itself afterwards."""
        self._closed.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def look(self) -> None:
        """Tell the leader of what has moved since the last look, if the same step was computed then. Raises LinkError."""
        step_id = self._step_id
        if step_id is None:
            self._seen = None
            return
        before, self._seen = self._seen, (step_id, self._worker.num_done, self._worker.is_compiling)
        if before is None or before[0] != step_id:
            return
        _, num_done, is_compiling = self._seen
        if num_done != before[1] or is_compiling > before[2]:
            with self._lock:
                self._connection.send(Moved(step_id, is_compiling))

    def _look_until_closed(self) -> None:
        while not self._closed.wait(PERIOD_S):
            try:
                self.look()
            except LinkError:
                return  # the leader is gone; another thread ends the process
