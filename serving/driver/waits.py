"""What a change waits for: groups that come and go, and gateways that learn of it. Every wait has a deadline and ends early when
the server stops."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serving.contracts.errors import ChangeError
from serving.contracts.served import APP_NAME, GatewayModels
from serving.contracts.start_failure import StartError
from serving.driver import applications, changes
from serving.gateway.deployment import Gateway

logger = logging.getLogger(__name__)

TELL_TIMEOUT_S = 60.0
"""For gateways to go by what is served now: they load a tokenizer for it."""
APPEAR_TIMEOUT_S = 30.0
"""For Serve to take a new deployment up."""
STALE_S = 5.0
"""For so long Serve may still tell how a change before ended."""
SERVE_ERRORS = (RayError, RayServeException, RuntimeError, TimeoutError)
_POLL_S = 0.25

Tell = Callable[..., None]
"""(stage, text, num_done, num_total); the numbers may be left out."""


class Waits:
    """Those of one driver. The methods raise StartError when what they wait for does not come in time, or cannot come any more,
    and ChangeError when the server stops."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._gateways: DeploymentHandle[Any] | None = None
        """One for all looks: each handle has a router of its own."""

    def stop(self) -> None:
        """All waits end at their next look."""
        self._stop.set()

    def sleep(self, seconds: float) -> None:
        """Raises ChangeError when the server stops."""
        if self._stop.wait(seconds):
            raise ChangeError("the server stops")

    def _looks(self, timeout_s: float, what: str) -> Iterator[float]:
        """Seconds since the first look, until the time is up or the server stops. Raises StartError, ChangeError."""
        begin_s = time.monotonic()
        while (since_s := time.monotonic() - begin_s) < timeout_s:
            yield since_s
            self.sleep(_POLL_S)
        raise StartError(f"{what} within {timeout_s:g} s")

    def _seen(self, name: str, timeout_s: float, what: str) -> Iterator[tuple[float, applications.Deployed]]:
        """The same with what Serve says of a model, whose controller may be starting again."""
        for since_s in self._looks(timeout_s, what):
            try:
                found = applications.deployed(name)
            except StartError as error:
                logger.warning("%s", error)
                continue
            if found is not None:
                yield since_s, found
            elif since_s > APPEAR_TIMEOUT_S:
                raise StartError(f"{name} has gone")

    def rollout(
        self,
        name: str,
        old: frozenset[str],
        num_wanted: int,
        tell: Tell,
        timeout_s: float,
        *,
        what: str,
        stale: str | None = None,
    ) -> None:
        """Until none of the `old` groups is left and as many run as there are to be; those that do `what`, is told. Until a new
        one has run, Serve may not have taken up that `num_wanted` are to be. A failure with the message `stale` may be that of
        a change before. Raises StartError."""
        told = ""
        has_run = False
        for since_s, found in self._seen(name, timeout_s, "not all groups were running"):
            if found.failure and (found.message != stale or since_s > STALE_S):
                raise StartError(found.failure)
            state = changes.rollout(old, found.replicas, found.target if has_run else max(found.target, num_wanted))
            has_run = has_run or state.num_new > 0
            if (text := state.told(what)) != told:
                told = text
                tell("replacing" if old else "starting", told, state.num_new, state.num_target)
            if state.is_over:
                return

    def number(self, name: str, target: int, tell: Tell, timeout_s: float) -> None:
        """Until so many groups run, and no other. Raises StartError."""
        told = -1
        for since_s, found in self._seen(name, timeout_s, f"{target} groups were not running"):
            if found.failure and since_s > STALE_S:
                raise StartError(found.failure)
            num_running = len(found.running)
            if num_running != told:
                told = num_running
                tell("starting", f"{num_running} of {target} groups run", num_running, target)
            if num_running == target == len(found.replicas):
                return

    def unused(self, name: str, tell: Tell, timeout_s: float) -> bool:
        """Until no gateway has a request of the model open, which is told, or the time is up."""
        told = -1
        try:
            for _ in self._looks(timeout_s, "requests did not end"):
                num_open = sum(gateway.num_open.get(name, 0) for gateway in self._ask_gateways())
                if num_open != told:
                    told = num_open
                    tell("draining", f"{num_open} requests are open")
                if not num_open:
                    return True
        except StartError:
            tell("draining", f"{told} requests are open still, and are ended")
        return False

    def gateways(self, generation: int, model: str | None = None) -> None:
        """Until all gateways go by the record of this generation. Raises StartError when one cannot serve `model`, or does not
        answer in time."""
        for _ in self._looks(TELL_TIMEOUT_S, "not every gateway has learned what is served"):
            answers = self._ask_gateways()
            if answers and all(answer.generation >= generation for answer in answers):
                problems = {answer.problems[model] for answer in answers if model in answer.problems}
                if problems:
                    raise StartError(f"a gateway cannot serve {model}: {'; '.join(sorted(problems))}")
                return

    def _ask_gateways(self) -> list[GatewayModels]:
        """Those that answer."""
        try:
            if self._gateways is None:
                self._gateways = applications.handle(Gateway.__name__, APP_NAME)
            asked = self._gateways.broadcast("take_models")
            items = asked.results(timeout_s=TELL_TIMEOUT_S, return_exceptions=True)
        except SERVE_ERRORS as error:
            logger.warning("the gateways cannot be asked: %s", error)
            return []
        return [msgspec.msgpack.decode(item, type=GatewayModels) for item in items if isinstance(item, bytes)]
