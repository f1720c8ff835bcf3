"""What may end for good while a stack serves: the guard and Ray's own processes of a private cluster, and actors that Ray
restarts whenever they end. Where an actor's process fails before the actor is made, Ray takes it for broken and gives it up."""

import logging
import threading
from collections.abc import Callable, Sequence

from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster.ray_api import ended_processes, has_actor

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
NUM_LOOKS = 3
"""At which Serve's controller must be missing, one after the other."""
CLOSE_TIMEOUT_S = 10.0


def has_controller() -> bool:
    """Whether there is one, or Ray will start it. Raises RayError."""
    return has_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)


class Caretaker:
    """Looks whether they are there. Guard and autoscaler are begun anew. Without Serve's controller, or a process of Ray's, it is
    over: no group that is lost comes back, and gateways that run would not hear another controller."""

    def __init__(
        self,
        revive: Sequence[Callable[[], None]],
        *,
        has_controller: Callable[[], bool] = has_controller,
        ended_processes: Callable[[], Sequence[str]] = ended_processes,
        period_s: float = PERIOD_S,
    ) -> None:
        """Looks from now on, until `close`. Each of `revive` begins one thing anew where it has ended for good, and is called
        while Serve's controller is there."""
        self._revive, self._has_controller, self._period_s = revive, has_controller, period_s
        self._ended_processes = ended_processes
        self._stop = threading.Event()
        self._num_missing = 0
        self.is_over = threading.Event()
        self.what_ended = ""
        """Set when it is over."""
        self._thread = threading.Thread(target=self._run, name="caretaker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Begin nothing any more."""
        self._stop.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s) and not self.is_over.is_set():
            try:
                self._look()
            except (RayError, RuntimeError, ValueError, OSError) as error:  # OSError: TimeoutError too
                logger.warning("it cannot be told whether everything is there: %s: %s", type(error).__name__, error)
            except Exception:  # the thread must outlive whatever the control store answers
                logger.exception("it cannot be told whether everything is there")

    def _look(self) -> None:
        if ended := self._ended_processes():  # first: whoever asks such a cluster may get no answer
            self._end(f"Ray's {' and '.join(ended)}")
            return
        self._num_missing = 0 if self._has_controller() else self._num_missing + 1
        if self._num_missing == NUM_LOOKS:
            self._end("Serve's controller")
        elif not self._num_missing:
            for revive in self._revive:
                revive()

    def _end(self, what: str) -> None:
        self.what_ended = what
        logger.error("%s ended for good, and no group that is lost would come back", what)
        self.is_over.set()
