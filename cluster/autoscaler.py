"""Looks at all groups and gateways, asks the policy, and has its answer carried out: one loop, one writer.

It keeps nothing of its own that matters: what groups there should be is known to the actuator, and what the policy has learned to
the store. So it may die at any time, and its successor goes on from there.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

import msgspec

from cluster.policy import Decision, ModelDecision, ModelPolicy, Observation, PolicyConfig, PolicyState, decide

logger = logging.getLogger(__name__)

MAX_LOGGED = 4096
"""Decisions that are remembered for whoever asks why."""
MAX_KEPT = 128
"""Of those, what a successor inherits."""


class Mode(StrEnum):
    """What becomes of decisions about a model."""

    OFF = "off"
    """None is made."""
    ADVISE = "advise"
    """They are told, and not carried out."""
    ON = "on"


class ScaledModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as the autoscaler has to treat it."""

    policy: ModelPolicy
    mode: Mode = Mode.ON


class LoggedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision, and from when to when it was the same."""

    first_s: float
    last_s: float
    model: str
    mode: Mode
    decision: ModelDecision
    error: str = ""
    """Why it was not carried out."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a successor needs."""

    state: PolicyState
    log: tuple[LoggedDecision, ...] = ()


class ScalingError(Exception):
    """Groups or gateways could not be observed, or an order not be given. It is tried again at the next look."""


class SupersededError(Exception):
    """Another autoscaler has taken over. This one must not act any more."""


class Observer(Protocol):
    """Sees all groups and gateways. What does not answer within its own deadline is told as not answering."""

    def observe(self) -> Observation:
        """Raises ScalingError."""
        ...


class Actuator(Protocol):
    """Starts and stops groups."""

    def scale(self, model: str, target: int, victims: tuple[str, ...]) -> None:
        """Order that there be so many groups from now on; when there are to be fewer, `victims` are those to drain and end.

        The same order may come again. Raises ScalingError.
        """
        ...

    def settle(self) -> None:
        """Bring what was ordered before, and is not done yet, as far as it can be now. Raises ScalingError."""
        ...


class Store(Protocol):
    """Keeps the memory of the one autoscaler that may write: the last that has opened it."""

    def open(self) -> bytes | None:
        """Become the writer, and read what the one before wrote. Raises ScalingError."""
        ...

    def save(self, memory: bytes) -> None:
        """Raises SupersededError when somebody has opened it since, ScalingError when it cannot be written."""
        ...


class Autoscaler:
    """One for a cluster. `tick` is called by one thread; `log` may be read by others."""

    def __init__(
        self,
        models: Mapping[str, ScaledModel],
        observer: Observer,
        actuator: Actuator,
        store: Store,
        *,
        clock: Callable[[], float],
        on_change: Callable[[str, Mode, ModelDecision], None] = lambda model, mode, decision: None,
    ) -> None:
        """`clock` is the wall clock, which the times of observations are from. `on_change` is told of each decision for another
        number of groups, once however often it is repeated. Raises ScalingError when the store cannot be opened."""
        self._models = {name: scaled for name, scaled in models.items() if scaled.mode is not Mode.OFF}
        self._config = PolicyConfig(
            models={name: scaled.policy for name, scaled in self._models.items()},
            advised=frozenset(name for name, scaled in self._models.items() if scaled.mode is Mode.ADVISE),
        )
        self._observer, self._actuator, self._store = observer, actuator, store
        self._clock, self._on_change = clock, on_change
        self._lock = threading.Lock()
        memory = _decoded(store.open())
        self._state = memory.state
        self._log: deque[LoggedDecision] = deque(memory.log, maxlen=MAX_LOGGED)

    def tick(self) -> Decision | None:
        """Look, decide, remember, act, in this order: an order that is given is one that a successor knows of.

        None when nothing could be observed. Raises SupersededError.
        """
        try:
            observation = self._observer.observe()
        except ScalingError as error:
            logger.warning("nothing is scaled, because nothing could be observed: %s", error)
            return None
        decision, self._state = decide(observation, self._state, self._config, self._clock())
        try:
            self._store.save(_encode(Memory(state=self._state, log=tuple(self._log)[-MAX_KEPT:])))
        except ScalingError as error:
            logger.warning("nothing is scaled, because it could not be written down: %s", error)
            return decision
        for model, made in decision.models.items():
            self._carry_out(model, made, decision.now_s)
        try:
            self._actuator.settle()
        except ScalingError as error:
            logger.warning("an order is not carried out yet: %s", error)
        return decision

    def run(self, stop: threading.Event, period_s: float) -> None:
        """Tick until `stop` is set or another autoscaler has taken over."""
        while not stop.wait(period_s):
            try:
                self.tick()
            except SupersededError as error:
                logger.warning("another autoscaler has taken over: %s", error)
                return

    def log(self, since_s: float) -> list[LoggedDecision]:
        """Decisions that were made, or still held, after that time; oldest first."""
        with self._lock:
            return [entry for entry in self._log if entry.last_s >= since_s]

    def _carry_out(self, model: str, made: ModelDecision, now_s: float) -> None:
        mode, error = self._models[model].mode, ""
        if made.target != made.before and mode is Mode.ON:
            try:
                self._actuator.scale(model, made.target, made.victims)
            except ScalingError as failure:
                error = str(failure)
        entry = LoggedDecision(first_s=now_s, last_s=now_s, model=model, mode=mode, decision=made, error=error)
        if not self._remember(entry) or made.target == made.before:
            return
        logger.info("%s%s: %s (%s)", "" if mode is Mode.ON else "advice for ", model, made.reason, made.cause)
        if error:
            logger.warning("%s could not be scaled to %d groups: %s", model, made.target, error)
        self._on_change(model, mode, made)

    def _remember(self, entry: LoggedDecision) -> bool:
        """As one with the last of its model where that one says the same; whether it says something new."""
        with self._lock:
            for place in range(len(self._log) - 1, max(-1, len(self._log) - 1 - 2 * len(self._models)), -1):
                last = self._log[place]
                if last.model != entry.model:
                    continue
                if _is_same(last, entry):
                    self._log[place] = msgspec.structs.replace(entry, first_s=last.first_s)
                    return False
                break
            self._log.append(entry)
            return True


def _is_same(one: LoggedDecision, other: LoggedDecision) -> bool:
    """Nothing has come of it, and the same is said again. What has been carried out and is decided anew is another decision."""
    before, after = one.decision, other.decision
    is_without_effect = before.target == before.before or one.mode is Mode.ADVISE or one.error != ""
    return (
        is_without_effect
        and (before.target, before.before, before.cause) == (after.target, after.before, after.cause)
        and (one.mode, one.error) == (other.mode, other.error)
    )


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Memory)


def _decoded(encoded: bytes | None) -> Memory:
    """An empty memory when there is none, or when it is damaged or of another version: then the policy measures anew."""
    if encoded is not None:
        try:
            memory = _decoder.decode(encoded)
        except msgspec.DecodeError as error:
            logger.warning("what the last autoscaler wrote cannot be read, and is measured anew: %s", error)
        else:
            if memory.state.version == PolicyState().version:
                return memory
            logger.warning(
                "what the last autoscaler wrote is of version %d, and is measured anew", memory.state.version
            )
    return Memory(state=PolicyState())
