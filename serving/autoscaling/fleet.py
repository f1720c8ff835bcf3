"""Groups and gateways as the autoscaler sees them through Ray Serve, and how it starts and stops groups."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from cluster.autoscaler import LoggedDecision, Mode
from cluster.policy import (
    GatewayLoad,
    GatewayObservation,
    GroupObservation,
    ModelDecision,
    ModelObservation,
    Observation,
    Phase,
)
from serving.autoscaling.retirement import Control, Deployed, Replica, Retirements, ask_loads
from serving.autoscaling.settings import AutoscalerSettings
from serving.contracts.fleet import Fleet, FleetDecision, FleetGroup, FleetModel, GatewayDemand, ModelDemand

MAX_TOLD = 200
"""Decisions that gateways are told."""
_encode = msgspec.msgpack.Encoder().encode
_decode_demand = msgspec.msgpack.Decoder(GatewayDemand).decode


@dataclass(frozen=True, slots=True)
class _Life:
    """What was seen of a group's life so far."""

    phase: Phase
    since_s: float
    begun_s: float = 0.0
    """When its start began, on the clock that nobody sets."""
    start_s: float | None = None


class ServeFleet:
    """Implements cluster.autoscaler's Observer and Actuator. All times are of this process's wall clock: what answers now was
    measured now, and clocks of other nodes do not matter."""

    def __init__(
        self,
        settings: AutoscalerSettings,
        control: Control,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._control, self._clock, self._steady_clock = settings, control, clock, steady_clock
        self._looked_s: float | None = None
        """The last look, on the steady clock."""
        self._retirements = {
            model: Retirements(control=control, deployment=scaled.deployment)
            for model, scaled in settings.models.items()
        }
        self._given_up = dict.fromkeys(settings.models, False)
        self._lives: dict[str, _Life] = {}
        self._last = Fleet(at_s=0.0)
        """What gateways are told at the next look."""
        self._num_decisions: dict[str, Counter[str]] = {model: Counter() for model in settings.models}
        self._log: Callable[[float], list[LoggedDecision]] = lambda since_s: []

    def show_decisions(self, log: Callable[[float], list[LoggedDecision]]) -> None:
        """Gateways are told of these decisions."""
        self._log = log

    def observe(self) -> Observation:
        """Raises ScalingError."""
        deployed = self._control.deployed()
        gateways = self._observe_gateways(deployed.get(self._settings.gateway, Deployed(target=0, replicas=())))
        models: dict[str, ModelObservation] = {}
        lives: dict[str, _Life] = {}
        for model, scaled in self._settings.models.items():
            if (found := deployed.get(scaled.deployment)) is None:
                continue
            groups = self._observe_groups(model, found, lives)
            self._given_up[model] = bool(found.given_up)
            loads = tuple(
                GatewayObservation(gateway=gateway, load=None if demands is None else _load_of(demands[model], at_s))
                for gateway, (demands, at_s) in gateways.items()
                if demands is None or model in demands  # one that does not serve the model yet gets no requests of it
            )
            target = self._retirements[model].target(found)
            models[model] = ModelObservation(target=target, groups=groups, gateways=loads)
        self._lives, self._looked_s = lives, self._steady_clock()
        self._last = self._seen(models, deployed)
        return Observation(models=models, num_accelerators=self._settings.max_ranks)

    def scale(self, model: str, target: int, victims: tuple[str, ...]) -> None:
        """Raises ScalingError."""
        self._retirements[model].scale(target, victims)

    def settle(self) -> None:
        """Raises ScalingError."""
        for model, retirements in self._retirements.items():
            if self._settings.models[model].scaled.mode is Mode.ON:
                retirements.settle()
                if self._given_up[model]:
                    retirements.begin_anew()

    def count(self, model: str, mode: Mode, decision: ModelDecision) -> None:
        """Another number of groups was decided."""
        self._num_decisions[model][decision.cause] += 1

    def _observe_gateways(self, deployed: Deployed) -> dict[str, tuple[Mapping[str, ModelDemand] | None, float]]:
        """(demands by model, when they were asked for) of each gateway that takes requests; None for one that is silent."""
        at_s = self._clock()
        running = [replica.id for replica in deployed.replicas if _phase(replica) is Phase.RUNNING]
        fleet = msgspec.structs.replace(self._last, decisions=self._told())
        answers = map(_decode_demand, self._control.ask_all(self._settings.gateway, "take_fleet", _encode(fleet)))
        demands = {answer.gateway: answer.models for answer in answers}
        return {gateway: (demands.get(gateway), at_s) for gateway in running}

    def _observe_groups(self, model: str, deployed: Deployed, lives: dict[str, _Life]) -> tuple[GroupObservation, ...]:
        at_s = self._clock()
        answers = ask_loads(self._control, self._settings.models[model].deployment)
        loads = {group: load for group, load, _ in answers}
        retirements = self._retirements[model]
        retirements.learn(deployed, {group: departure for group, _, departure in answers})
        groups = []
        for replica in deployed.replicas:
            phase = Phase.DRAINING if replica.id in retirements.retiring else _phase(replica)
            life = lives[replica.id] = self._live(replica, phase, at_s)
            load = loads.get(replica.id)
            if load is not None:
                load = msgspec.structs.replace(load, measured_s=at_s)
            groups.append(
                GroupObservation(
                    group=replica.id,
                    phase=life.phase,
                    since_s=life.since_s,
                    load=load,
                    start_s=life.start_s,
                    num_beside=deployed.num_beside(replica),
                )
            )
        return tuple(groups)

    def _live(self, replica: Replica, phase: Phase, now_s: float) -> _Life:
        """Moments are of the wall clock, and how long a start took is not: that clock may be set while one is under way."""
        before, steady_s = self._lives.get(replica.id), self._steady_clock()
        if before is not None and before.phase is phase:
            return before
        if phase is Phase.STARTING:
            # It began after the last look, if there was one; Serve's clock says when, unless it was set.
            longest_s = math.inf if self._looked_s is None else steady_s - self._looked_s
            age_s = min(max(0.0, now_s - replica.started_s), longest_s) if replica.started_s else 0.0
            return _Life(phase, now_s - age_s, begun_s=steady_s - age_s)
        if before is None:
            return _Life(phase, now_s)
        start_s = steady_s - before.begun_s if before.phase is Phase.STARTING else before.start_s
        return _Life(phase, now_s, start_s=start_s)

    def _seen(self, models: Mapping[str, ModelObservation], deployed: Mapping[str, Deployed]) -> Fleet:
        gateways = sorted(
            replica.id
            for replica in deployed.get(self._settings.gateway, Deployed(target=0, replicas=())).replicas
            if _phase(replica) is Phase.RUNNING
        )
        return Fleet(
            at_s=self._clock(),
            shown_by=gateways[0] if gateways else "",
            models={model: self._model(model, observed) for model, observed in models.items()},
        )

    def _model(self, model: str, observed: ModelObservation) -> FleetModel:
        scaled = self._settings.models[model].scaled
        return FleetModel(
            mode=scaled.mode,
            target=observed.target,
            min_groups=scaled.policy.min_groups,
            max_groups=scaled.policy.max_groups,
            groups=tuple(
                FleetGroup(
                    group=group.group,
                    state=group.phase,
                    since_s=group.since_s,
                    num_running=group.load.num_running if group.load else None,
                    num_waiting=group.load.num_waiting if group.load else None,
                    kv_usage=group.load.kv_usage if group.load else None,
                )
                for group in observed.groups
            ),
            num_decisions=dict(self._num_decisions[model]),
        )

    def _told(self) -> tuple[FleetDecision, ...]:
        return tuple(_told_of(self._log(0.0)[-MAX_TOLD:]))


def _phase(replica: Replica) -> Phase:
    """Whatever else Serve names, such as RECOVERING, runs."""
    if replica.is_starting:
        return Phase.STARTING
    return Phase.DRAINING if replica.is_stopping else Phase.RUNNING


def _load_of(demand: ModelDemand, at_s: float) -> GatewayLoad:
    return GatewayLoad(
        measured_s=at_s,
        num_sequences=demand.num_sequences,
        num_prompt_tokens=demand.num_prompt_tokens,
        num_held=demand.num_held,
        num_held_tokens=demand.num_held_tokens,
    )


def _told_of(log: Iterable[LoggedDecision]) -> Iterable[FleetDecision]:
    for entry in log:
        made = entry.decision
        yield FleetDecision(
            first_s=entry.first_s,
            last_s=entry.last_s,
            model=entry.model,
            mode=entry.mode,
            before=made.before,
            target=made.target,
            cause=made.cause,
            reason=made.reason,
            warnings=made.warnings,
            error=entry.error,
        )
