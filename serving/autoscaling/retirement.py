"""How the groups that were chosen are the ones that end, although Serve chooses by itself.

When a deployment is to have fewer replicas, Serve stops those first that do not run, then those on nodes with the fewest
replicas, then the newest; it has no hook. But it also stops a replica whose health check fails. So a group that was chosen
retires: it takes nothing new, lets what it runs end or gives it to others, and waits. Then it gets its leave: its health check
fails, and Serve stops it. In the same moment Serve begins a replacement, which does not run, and so is what Serve stops when the
number is lowered right after. The other order would be wrong: with the number lowered first, Serve would stop a group of its own
choice.

What is under way is known to the groups themselves, so an autoscaler that comes after one that was lost learns of it. One that
was forgotten is replaced by Serve, and the number is what it was.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cluster.autoscaler import ScalingError
from cluster.policy import GroupLoad, GroupObservation, Phase
from cluster.policy.victims import choose_victims
from serving.contracts.fleet import Departure

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 15.0
"""For Serve to see that a group has left: three health checks, and a controller that is busy."""
POLL_S = 0.1
"""Shorter than what Serve's controller waits between two looks, so that the replacement is gone before it has begun."""
_encode = msgspec.msgpack.encode
_decode_id = msgspec.msgpack.Decoder(str).decode
_decode_answer = msgspec.msgpack.Decoder(tuple[str, GroupLoad | None, Departure]).decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One replica of a deployment."""

    id: str
    state: str
    """Serve's name of it."""
    started_s: float
    """Wall clock, when Serve began to start it, or found it again after a restart of its own."""
    node_id: str = ""
    """Of the leader; "" where it is not placed yet."""
    actor: str = ""
    """Name of its actor."""

    @property
    def is_starting(self) -> bool:
        return self.state == "STARTING"

    @property
    def is_stopping(self) -> bool:
        """Serve does not count it any more."""
        return self.state in ("STOPPING", "STOPPED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """One deployment."""

    target: int
    """Replicas that there should be."""
    replicas: tuple[Replica, ...]
    given_up: str = ""
    """Why Serve starts no more replicas; "" while it does."""

    @property
    def counted(self) -> frozenset[str]:
        """Ids of replicas that run and that Serve counts."""
        return frozenset(r.id for r in self.replicas if not r.is_starting and not r.is_stopping)

    def num_beside(self, replica: Replica) -> int:
        """Other replicas on its node."""
        if not replica.node_id:
            return 0
        on_node = [
            r for r in self.replicas if r.node_id == replica.node_id and not r.is_stopping and r.id != replica.id
        ]
        return len(on_node)


Answer = tuple[str, GroupLoad | None, Departure]
"""(id, load, how far its end is) of a group."""


class Control(Protocol):
    """Ray Serve; see serve_control.py."""

    def deployed(self) -> Mapping[str, Deployed]:
        """Raises ScalingError."""
        ...

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        """What the running replicas answer in time, in no order."""
        ...

    def set_target(self, deployment: str, num_replicas: int) -> None:
        """Raises ScalingError."""
        ...

    def kill(self, replica: Replica) -> None:
        """Nothing happens when it is dead. Raises ScalingError."""
        ...


def ask_loads(control: Control, deployment: str) -> list[Answer]:
    """Of the groups that answer."""
    return list(map(_decode_answer, control.ask_all(deployment, "load")))


@dataclass(kw_only=True)
class Retirements:
    """Those of one deployment, and its number of groups."""

    control: Control
    deployment: str
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _departures: dict[str, Departure] = field(default_factory=dict)
    """Of groups that Serve counts and that are to end."""

    def learn(self, found: Deployed, told: Mapping[str, Departure]) -> None:
        """What the groups tell of themselves. One that does not answer is as it was."""
        before = self._departures
        self._departures = {
            group: departure
            for group in found.counted
            if (departure := told.get(group, before.get(group, Departure.NONE))) is not Departure.NONE
        }

    @property
    def retiring(self) -> Collection[str]:
        """Ids of groups that Serve counts, and that are none of those that there should be."""
        return self._departures.keys()

    def target(self, found: Deployed) -> int:
        """Groups that there should be."""
        return found.target - len(self._departures)

    def scale(self, target: int, victims: Iterable[str]) -> None:
        """Have so many groups; when that is fewer, the victims retire, and those of them that do not run end at once. Raises
        ScalingError when nothing, or not all of it, could be ordered."""
        found = self._found()
        self._departures = {group: how for group, how in self._departures.items() if group in found.counted}
        if target == 0:  # all of them end, and nothing is to be chosen
            self._lower(found, found.target)
            return
        if target >= self.target(found):
            self.control.set_target(self.deployment, target + len(self._departures))
            return
        num_fewer = self.target(found) - target
        chosen = [group for group in victims if group not in self._departures][:num_fewer]
        asked = [group for group in chosen if group in found.counted]
        num_absent = min(num_fewer - len(asked), sum(replica.is_starting for replica in found.replicas))
        if num_absent > 0:
            self._lower(found, num_absent)
        if not asked:
            return
        answers = map(_decode_id, self.control.ask_all(self.deployment, "retire", _encode(asked)))
        retiring = set(answers) & set(asked)
        self._departures |= dict.fromkeys(retiring, Departure.RETIRING)
        if silent := [group for group in asked if group not in retiring]:
            raise ScalingError(f"{', '.join(silent)} did not answer when told to retire")

    def begin_anew(self) -> None:
        """Serve gives a deployment up when the first start fails, and after a restart of its controller every start is the first:
        a node that was lost in the wrong moment would leave a model without groups for good. It forgets at zero. Raises
        ScalingError."""
        found = self._found()
        if not found.given_up or not found.target or any(not replica.is_stopping for replica in found.replicas):
            return
        logger.warning("%s has no group, and is started again: %s", self.deployment, found.given_up)
        self.control.set_target(self.deployment, 0)
        deadline_s = self.clock() + LEAVE_TIMEOUT_S
        while self._found().given_up and self.clock() < deadline_s:
            self.sleep(POLL_S)
        self.control.set_target(self.deployment, found.target)

    def settle(self) -> None:
        """Give those their leave that have retired, and lower the number with each that goes. Raises ScalingError."""
        waiting = {group for group, how in self._departures.items() if how is Departure.RETIRED}
        if not waiting:
            return
        self.control.ask_all(self.deployment, "leave", _encode(sorted(waiting)))
        deadline_s = self.clock() + LEAVE_TIMEOUT_S
        while waiting:
            found = self._found()
            if left := waiting - found.counted:
                waiting -= left
                for group in left:
                    self._departures.pop(group, None)
                self._lower(found, len(left))
            elif self.clock() > deadline_s:
                raise ScalingError(f"{', '.join(sorted(waiting))} did not end within {LEAVE_TIMEOUT_S:g} s")
            if waiting:
                self.sleep(POLL_S)

    def _lower(self, found: Deployed, num_fewer: int) -> None:
        """Lower the number, and kill those that Serve stops while they start. It asks them to end, which they cannot do before
        they have started, and gives them a minute for it."""
        starting = {replica.id for replica in found.replicas if replica.is_starting}
        self.control.set_target(self.deployment, found.target - num_fewer)
        num_left = min(num_fewer, len(starting))
        deadline_s = self.clock() + LEAVE_TIMEOUT_S
        while num_left > 0 and self.clock() < deadline_s:
            replicas = {replica.id: replica for replica in self._found().replicas}
            for group in sorted(starting):
                if (now := replicas.get(group)) is None or now.is_stopping:
                    if now is not None:
                        self.control.kill(now)
                    starting.remove(group)
                    num_left -= 1
            if num_left > 0:
                self.sleep(POLL_S)

    def shrink(self, target: int, timeout_s: float) -> None:
        """Have so many groups, and return when the others have gone: those with the least to move. Raises ScalingError."""
        deadline_s = self.clock() + timeout_s
        found, answers = self._look()
        loads = {group: load for group, load, _ in answers}
        standing = [
            GroupObservation(
                group=replica.id,
                phase=Phase.STARTING if replica.is_starting else Phase.RUNNING,
                since_s=replica.started_s,
                load=loads.get(replica.id),
                num_beside=found.num_beside(replica),
            )
            for replica in found.replicas
            if not replica.is_stopping and replica.id not in self.retiring
        ]
        self.scale(target, choose_victims(standing, self.target(found) - target))
        while self.retiring:
            self.settle()
            if self.clock() > deadline_s:
                raise ScalingError(f"{', '.join(sorted(self.retiring))} did not end within {timeout_s:g} s")
            self.sleep(POLL_S)
            self._look()

    def _look(self) -> tuple[Deployed, list[Answer]]:
        found, answers = self._found(), ask_loads(self.control, self.deployment)
        self.learn(found, {group: departure for group, _, departure in answers})
        return found, answers

    def _found(self) -> Deployed:
        found = self.control.deployed().get(self.deployment)
        if found is None:
            raise ScalingError(f"{self.deployment} is not deployed")
        return found
