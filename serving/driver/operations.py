"""Changing what is served while it runs: models that come, change and go, numbers of groups, groups that are replaced.

Each change is checked whole before anything is done. Then the record in Ray's control store says what is under way, Serve does
it, and the record says what holds from now on. A change that fails is taken back. The driver that comes after one that was lost
in the middle finishes or takes back what it finds (`ClusterOperations.finish_interrupted`).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from cluster.placement import GroupPlacement, GroupRequest
from model_parallel.errors import EngineError
from serving.autoscaling.actor import has_autoscaler, start_autoscaler, stop_autoscaler
from serving.autoscaling.settings import AutoscalerSettings, settings_of
from serving.config import ModelEntry, ServingConfig
from serving.contracts.errors import ChangeError, NotFoundError, UnknownModelError, ValidationError
from serving.contracts.models import AdapterCard
from serving.contracts.operations import ModelStatus, Progress, Report
from serving.contracts.served import Replacement, Served, ServedModel, app_name, deployment_name
from serving.contracts.start_failure import StartError, plain_reason
from serving.driver import adapter_changes, applications, changes, joined
from serving.driver.preflight import check_model
from serving.driver.record import read_served, served_model, with_added_adapters, write_served
from serving.driver.waits import SERVE_ERRORS, TELL_TIMEOUT_S, Tell, Waits
from serving.gateway.deployment import Gateway
from serving.models.fetch import KNOWN_MODELS, FetchError, fetch_model
from serving.models.group_spec import GroupSpec, describe_card, held_bytes, resolve_models
from serving.models.sizes import STACK_BYTES, Host

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
"""For a change that is under way to end: what cannot be interrupted goes on by itself."""


class ClusterOperations:
    """Implements contracts.operations.Operations on Ray Serve."""

    def __init__(self, config: ServingConfig, served: Served, look_at_host: Callable[[], Host]) -> None:
        """`config` is the stack's own; which models there are, `served` says, which is what the record holds."""
        self._config = config
        self._served = served
        self._look_at_host = look_at_host
        self._is_private = config.ray.address is None
        self._lock = threading.Lock()
        self._autoscaler_lock = threading.Lock()
        self._autoscaled: AutoscalerSettings | None = None
        """What the autoscaler was started with last; None when there is to be none."""
        self._waits = Waits()
        self._changing = ""
        """The model that is being changed."""
        self._progress = ""

    @property
    def entries(self) -> list[ModelEntry]:
        """As they were given."""
        return [changes.entry_of(model.given) for model in self._served.models.values()]

    def close(self) -> None:
        """A change that is under way ends at its next look, with a ChangeError. Returns when it has, and no other one begins."""
        self._waits.stop()
        if self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            self._lock.release()
        else:
            logger.warning("the change of %s has not ended in time", self._changing)

    def status(self) -> Sequence[ModelStatus]:
        """Raises ChangeError when Serve does not answer."""
        return [self._status(name, model) for name, model in self._served.models.items()]

    def _status(self, name: str, model: ServedModel) -> ModelStatus:
        try:
            found = applications.deployed(name)
        except StartError as error:
            raise ChangeError(str(error)) from error
        return ModelStatus(
            name=name,
            state=model.state,
            num_groups=found.target if found else 0,
            num_running=len(found.running) if found else 0,
            config=model.given,
            change=self._progress if name == self._changing else "",
        )

    def deploy(self, entry: str, max_unavailable: int, report: Report, *, only_check: bool) -> None:
        with _explained():
            given = changes.parse_entry(entry, self._running_config(), "the model")
        with self._change(given.name, report) as tell, _explained():
            adapter_changes.check_names(given, self._served)
            if (before := self._served.models.get(given.name)) is None:
                self._add(given, tell, only_check=only_check)
            else:
                self._alter(self._find_whole(before.card.name), given, max_unavailable, tell, only_check=only_check)

    def undeploy(self, model: str, report: Report) -> None:
        with self._change(model, report) as tell:
            served = self._find(model)
            if len(self._served.models) == 1:
                raise ChangeError(
                    f"{model} is the only model that is served; deploy another one first, or stop the server"
                )
            self._write(model, msgspec.structs.replace(served, state="removing"))
            self._restart_autoscaler()
            # From here on it goes: whatever does not answer any more does not keep it.
            tell("draining", "new requests are refused; those that run may finish")
            self._tell_gateways()
            if not self._waits.unused(model, tell, self._config.gateway.drain_timeout_s):
                self._drain_all(model)
            tell("stopping", "its groups end")
            self._delete(model)
            self._write(model, None)
            self._tell_gateways()
            tell("done", f"{model} is not served any more")

    def scale(
        self, model: str, report: Report, *, num_groups: int | None, min_groups: int | None, max_groups: int | None
    ) -> None:
        with self._change(model, report) as tell, _explained():
            served = self._find_whole(model)
            data = changes.scaled(
                changes.entry_of(served.given), num_groups=num_groups, min_groups=min_groups, max_groups=max_groups
            )
            given = changes.parse_entry(msgspec.json.encode(data).decode(), self._running_config(), "the model")
            self._alter(served, given, 1, tell, only_check=False)

    def restart(self, model: str, max_unavailable: int, report: Report) -> None:
        with self._change(model, report) as tell, _explained():
            served = self._find_whole(model)
            target = self._deployed(model).target
            changes.check_max_unavailable(max_unavailable, target)
            self._replace(served, self._spec_of(served), served.given, target, max_unavailable, tell)
            tell("done", f"all groups of {model} are new", target, target)

    def drain(self, group: str, grace_s: float | None, report: Report) -> None:
        longest_s = self._config.gateway.drain_timeout_s
        grace_s = longest_s if grace_s is None else grace_s
        if not 0 <= grace_s <= longest_s:
            raise ValidationError(
                "grace", f"grace is {grace_s:g} s; it must be from 0 to gateway.drain_timeout_s, {longest_s:g} s"
            )
        with self._change(self._model_of(group), report) as tell:
            name = self._model_of(group)
            served = self._served.models[name]
            target = self._deployed(name).target
            try:
                if target == 1:
                    tell("draining", f"{name} has one group: what comes meanwhile waits for the next one")
                    self._write(name, msgspec.structs.replace(served, state="replacing"))
                    self._waits.gateways(self._served.generation)
                self._begin_drain(name, group, grace_s)
                self._waits.rollout(name, frozenset((group,)), 0, tell, self._start_timeout_s(served), what="run")
            finally:
                if target == 1:
                    self._write(name, served)
                    self._tell_gateways()
            tell("done", f"{group} is replaced", target, target)

    def adapters(self) -> Sequence[AdapterCard]:
        return sorted(adapter_changes.all_adapters(self._served), key=lambda card: card.name)

    def add_adapter(self, name: str, model: str, source: str, tenants: tuple[str, ...] | None) -> AdapterCard:
        wanted = adapter_changes.checked_entry(name, source, tenants)
        with self._change(model, lambda _: None) as tell:
            served = self._find_whole(model)
            adapter_changes.check_name(name, self._served)
            tell("checking", f"adapter {name} of {model}")
            with _explained("source"):
                spec = self._spec_of(served)
                card = describe_card(wanted, model, spec.model, spec.parallel, spec.adapter_config, is_configured=False)
            is_known = adapter_changes.is_served(card, self._served)
            if self._deployed(model).running:
                tell("starting", f"all groups of {model} load adapter {name}")
                groups = adapter_changes.Groups(self._handle(model))
                try:
                    groups.load(card)
                    self._write_adapters(served, (*served.adapters, card))
                except BaseException:
                    if not is_known:
                        groups.unload(card)
                    raise
            else:  # the next group loads it for the first request that names it
                self._write_adapters(served, (*served.adapters, card))
            self._waits.gateways(self._served.generation, model)
        return card

    def remove_adapter(self, name: str) -> AdapterCard:
        with self._change(f"adapter {name}", lambda _: None) as tell:
            card = adapter_changes.find_added(name, self._served)
            served = self._served.models[card.parent]
            tell("stopping", f"adapter {name} of {card.parent}")
            self._write_adapters(served, tuple(other for other in served.adapters if other.name != name))
            self._waits.gateways(self._served.generation)
            if not adapter_changes.is_served(card, self._served):
                adapter_changes.Groups(self._handle(card.parent)).unload(card)
        return card

    def _write_adapters(self, served: ServedModel, adapters: tuple[AdapterCard, ...]) -> None:
        self._write(served.card.name, msgspec.structs.replace(served, adapters=adapters), keeps_adapters=False)

    def _add(self, given: ModelEntry, tell: Tell, *, only_check: bool) -> None:
        name = given.name
        tell("checking", f"{name} comes to {', '.join(self._served.models)}")
        spec = self._checked(given, None, tell)
        if only_check:
            tell("done", f"{name} can be deployed")
            return
        revision = self._served.generation + 1
        text = changes.entry_text(given)
        self._write(name, served_model(spec, text, revision, "starting"))
        try:
            self._run(spec, spec.card.num_groups, revision, 1, tell)
            timeout_s = self._start_timeout_s(self._served.models[name])
            self._waits.rollout(name, frozenset(), spec.card.num_groups, tell, timeout_s, what="run")
            self._write(name, served_model(spec, text, revision, "serving"))
            tell("telling", "gateways learn of it")
            self._waits.gateways(self._served.generation, name)
        except (StartError, EngineError, *SERVE_ERRORS) as error:
            tell("stopping", "it did not start, and is taken away")
            self._write(name, None)
            self._delete(name)
            self._tell_gateways()
            raise ChangeError(f"{name} was not deployed: {plain_reason(str(error))}") from error
        self._restart_autoscaler()
        tell("done", f"{name} is served", spec.card.num_groups, spec.card.num_groups)

    def _alter(
        self, before: ServedModel, given: ModelEntry, max_unavailable: int, tell: Tell, *, only_check: bool
    ) -> None:
        name, old = given.name, changes.entry_of(before.given)
        differs = changes.difference(old, given)
        if not differs.fields:
            tell("done", f"{name} is served like that already")
            return
        tell("checking", f"{name}: {differs}")
        found = self._deployed(name)
        follows_load = changes.follows_load(given)
        target = max(1, found.target) if follows_load else given.num_groups
        if differs.replaces_groups:
            changes.check_max_unavailable(max_unavailable, target)
        spec = self._checked(changes.with_sizes_kept(given, old, changes.entry_of(before.chosen)), before, tell)
        changes.check_same_files(before.card, spec.card)
        if differs.replaces_groups:
            adapter_changes.check_still_fit(before, spec)
        if only_check:
            tell("done", f"{name} can be changed: {differs}")
            return
        text = changes.entry_text(given)
        if differs.replaces_groups:
            self._replace(before, spec, text, target, max_unavailable, tell)
        else:
            self._write(name, served_model(spec, text, before.revision, "serving"))
            self._restart_autoscaler()  # first: the one of before would order another number at once
            if not follows_load and target != (old_target := self._deployed(name).target):
                self._set_target(before, old_target, target, tell)
            self._waits.gateways(self._served.generation, name)
        tell("done", f"{name} is served with {differs}", target, target)

    def _set_target(self, before: ServedModel, old_target: int, target: int, tell: Tell) -> None:
        """Raises ChangeError, and then there are as many groups as before."""
        name = before.card.name
        try:
            if target < old_target:
                tell("stopping", f"{old_target - target} groups end, those with the least to move")
                applications.shrink(name, target, self._start_timeout_s(before), self._waits.sleep)
            else:
                applications.set_num_groups(name, target)
            self._waits.number(name, target, tell, self._start_timeout_s(before))
        except StartError as error:
            self._write(name, before)
            self._restart_autoscaler()
            applications.set_num_groups(name, old_target)
            raise ChangeError(f"{name} has {old_target} groups as before: {error}") from error

    def _replace(
        self, before: ServedModel, spec: GroupSpec, given: str, target: int, max_unavailable: int, tell: Tell
    ) -> None:
        """All groups of a model by others. Raises ChangeError, and then it is served as before."""
        name = spec.card.name
        if target <= 1:
            tell("replacing", f"{name} has one group: what comes meanwhile waits for the new one")
        else:
            tell("replacing", f"{name}: {target} groups are replaced, {max_unavailable} at a time", 0, target)
        # Until all groups are new, no request may be longer than the shortest of them allows.
        shortest = min(before.card.max_model_len, spec.card.max_model_len)
        during = msgspec.structs.replace(spec.card, max_model_len=shortest)
        revision = self._served.generation + 1
        after = served_model(spec, given, revision, "serving")
        old = self._deployed(name)
        num_groups = max(1, target)
        timeout_s = self._rollout_timeout_s(before, num_groups, max_unavailable)
        replacement = Replacement(before=before, after=after)
        self._write(name, msgspec.structs.replace(before, card=during, state="replacing", replacement=replacement))
        self._restart_autoscaler()
        try:
            self._waits.gateways(self._served.generation, name)
            self._run(spec, num_groups, revision, max_unavailable, tell)
            self._waits.rollout(name, old.present, num_groups, tell, timeout_s, what="replaced", stale=old.message)
        except (StartError, EngineError, *SERVE_ERRORS) as error:
            reason = plain_reason(str(error))
            tell("replacing", f"taken back, since a new group did not start: {reason}")
            self._take_back(before, max(1, old.target), max_unavailable, tell)
            raise ChangeError(f"{name} is served as before; a new group did not start: {reason}") from error
        self._write(name, after)
        self._waits.gateways(self._served.generation, name)

    def _take_back(self, before: ServedModel, target: int, max_unavailable: int, tell: Tell) -> None:
        """The groups that are left of the old configuration stay; the others are started again."""
        name = before.card.name
        max_unavailable = min(max_unavailable, max(1, target - 1))
        timeout_s = self._rollout_timeout_s(before, target, max_unavailable)
        try:
            self._run(self._spec_of(before), target, before.revision, max_unavailable, tell)
            self._waits.number(name, target, tell, timeout_s)
        except (StartError, *SERVE_ERRORS, EngineError) as error:
            logger.error("%s could not be brought back whole: %s", name, error)
        self._write(name, before)
        self._restart_autoscaler()
        self._tell_gateways()

    def _checked(self, entry: ModelEntry, before: ServedModel | None, tell: Tell) -> GroupSpec:
        """Everything that `serve` checks before it starts a model. Raises ConfigError, CheckpointError, FetchError,
        StartRefusedError."""
        if entry.source in KNOWN_MODELS:
            fetch_model(entry.source)
        host = self._look_at_host()
        if self._is_private:
            # What runs already has its memory, and groups that are replaced give theirs back.
            freed = STACK_BYTES
            if before is not None:
                old = self._spec_of(before)
                freed += held_bytes(old, self._deployed(entry.name).target) if old.parallel.device == "cpu" else 0
            memory = host.machine.available_memory_bytes + freed
            host = replace(host, machine=replace(host.machine, available_memory_bytes=memory))
        checked = check_model(entry, host, is_private=self._is_private)
        for line in (*checked.notes, *checked.warnings):
            tell("checking", line)
        spec = checked.specs[0]
        others = [changes.entry_of(model.chosen) for name, model in self._served.models.items() if name != entry.name]
        self._wait_for_places(_requests(spec), tell, others=joined.requests_of(others))
        return spec

    def _wait_for_places(
        self, requests: Sequence[GroupRequest], tell: Tell, others: Sequence[GroupRequest] = ()
    ) -> list[GroupPlacement]:
        """Raises ConfigError."""
        return joined.wait_for_places(
            requests,
            self._config.ray.wait_for_nodes_s,
            lambda text: tell("checking", text),
            others=others,
            sleep=self._waits.sleep,
        )

    def _spec_of(self, served: ServedModel) -> GroupSpec:
        """Raises ConfigError, CheckpointError: its files may have changed."""
        host = Host(machine=self._look_at_host().machine)
        (spec,) = resolve_models([changes.entry_of(served.chosen)], host)
        changes.check_same_files(served.card, spec.card)
        return spec

    def _running_config(self) -> ServingConfig:
        return changes.with_models(self._config, self.entries, "what is served")

    def _find(self, name: str) -> ServedModel:
        if (found := self._served.models.get(name)) is None:
            raise UnknownModelError(
                f"model {name!r:.130} is not served; served: {', '.join(sorted(self._served.models))}"
            )
        return found

    def _find_whole(self, name: str) -> ServedModel:
        """The same for what needs a model that clients may ask for. Raises ChangeError for one whose coming or going has stopped
        halfway."""
        found = self._find(name)
        if not found.is_shown:
            raise ChangeError(f"{name} is {found.state}, and that has not ended; undeploy it, which ends what is left")
        return found

    def _model_of(self, group: str) -> str:
        known = []
        for name in self._served.models:
            running = self._deployed(name).running
            if group in running:
                return name
            known += sorted(running)
        raise NotFoundError(f"no group {group!r:.80} runs; running: {', '.join(known)}")

    def _run(self, spec: GroupSpec, num_groups: int, revision: int, max_unavailable: int, tell: Tell) -> None:
        (placement,) = self._wait_for_places(_requests(spec)[:1], tell)
        target = applications.model_target(
            self._config,
            spec,
            placement,
            num_groups=num_groups,
            revision=revision,
            max_unavailable=max_unavailable,
        )
        applications.run([target], wait=False)

    def _delete(self, name: str) -> None:
        try:
            applications.delete(
                [app_name(name)],
                self._config.gateway.drain_timeout_s + 2 * applications.STOP_TIMEOUT_S,
                sleep=self._waits.sleep,
            )
        except SERVE_ERRORS as error:
            logger.error("the groups of %s did not end in time: %s", name, error)

    def _deployed(self, name: str) -> applications.Deployed:
        try:
            found = applications.deployed(name)
        except StartError as error:
            raise ChangeError(str(error)) from error
        if found is None:
            raise ChangeError(f"{name} is not deployed")
        return found

    def _start_timeout_s(self, served: ServedModel) -> float:
        """Of one group, from the order to stop another one."""
        entry = changes.entry_of(served.chosen)
        return self._config.gateway.drain_timeout_s + entry.start_timeout_s + 2 * applications.STOP_TIMEOUT_S

    def _rollout_timeout_s(self, served: ServedModel, num_groups: int, max_unavailable: int) -> float:
        return -(-num_groups // max_unavailable) * self._start_timeout_s(served)

    def _handle(self, name: str) -> DeploymentHandle[Any]:
        """Raises RayError."""
        return applications.handle(deployment_name(name), app_name(name))

    def _begin_drain(self, name: str, group: str, grace_s: float) -> None:
        """Raises ChangeError."""
        arguments: list[Any] = [group, grace_s]
        try:
            answers = self._handle(name).broadcast("begin_drain", *arguments)
            is_told = True in answers.results(timeout_s=TELL_TIMEOUT_S, return_exceptions=True)
        except SERVE_ERRORS as error:
            raise ChangeError(f"the group cannot be told to drain: {plain_reason(str(error))}") from error
        if not is_told:
            raise ChangeError(f"{group} cannot be told to drain: it does not run any more")

    def _drain_all(self, name: str) -> None:
        """What the groups of a model run ends at once. A group that cannot be told is lost, or will be ended all the same."""
        try:
            for group in self._deployed(name).running:
                self._begin_drain(name, group, 0.0)
        except ChangeError as error:
            logger.warning("not every group of %s drains: %s", name, error)

    def _tell_gateways(self) -> None:
        """A gateway that is not reached looks by itself."""
        try:
            self._waits.gateways(self._served.generation)
        except StartError as error:
            logger.warning("%s", error)

    def _write(self, name: str, model: ServedModel | None, *, keeps_adapters: bool = True) -> None:
        """The record, with `model` in place of what it had under this name; None takes it away. Adapters that were added stay,
        unless `model` has all that there are to be. Raises ChangeError."""
        models = {other: served for other, served in self._served.models.items() if other != name or model is not None}
        if model is not None:
            models[name] = with_added_adapters(model, self._served.models.get(name)) if keeps_adapters else model
        self._write_models(models)

    def _write_models(self, models: dict[str, ServedModel]) -> None:
        """Raises ChangeError."""
        served = msgspec.structs.replace(self._served, generation=self._served.generation + 1, models=models)
        self._require_current()
        try:
            write_served(served)
        except RayError as error:
            raise ChangeError(f"it cannot be written down: {plain_reason(str(error))}") from error
        self._served = served

    def _require_current(self) -> None:
        """Raises ChangeError when the record is not what this driver wrote or found: another one has taken over."""
        try:
            found = read_served()
        except (RayError, msgspec.DecodeError) as error:
            raise ChangeError(f"what is served cannot be read: {plain_reason(str(error))}") from error
        if found is not None and found.generation != self._served.generation:
            raise ChangeError("another packtrain serve has taken over what this cluster serves; ask that one")

    def start_autoscaler(self) -> None:
        """The one for the models as they are now, in place of any other; none where no model needs it. Raises RayError,
        RuntimeError, TimeoutError, and ValueError where the one of before does not go."""
        with self._autoscaler_lock:
            self._autoscaled = autoscaler_settings(self._config, self._served)
            run_autoscaler(self._autoscaled)

    def _restart_autoscaler(self) -> None:
        """The same, where the models have become others to it. It goes on with what the last one has learned."""
        if autoscaler_settings(self._config, self._served) == self._autoscaled:
            return
        try:
            self.start_autoscaler()
        except (*SERVE_ERRORS, ValueError) as error:  # `revive_autoscaler` tries again
            logger.error("the autoscaler does not start: %s", plain_reason(str(error)))

    def revive_autoscaler(self) -> None:
        """Begin it anew where it should be and has ended for good. Raises RayError, RuntimeError, TimeoutError."""
        with self._autoscaler_lock:
            if self._autoscaled is not None and not has_autoscaler():
                logger.error("the autoscaler has ended for good, and is begun anew")
                run_autoscaler(self._autoscaled)

    def finish_interrupted(self, report: Callable[[str], None]) -> None:
        """What a driver that was lost in the middle of a change has left: models that were to come or to go are taken away, and
        groups that were being replaced are Serve's to finish. Where it could not, those of before come back. Raises ChangeError,
        StartError, RayError, TimeoutError."""
        if all(model.state == "serving" for model in self._served.models.values()):
            return
        models: dict[str, ServedModel] = {}
        away, failed = [], []
        for name, model in self._served.models.items():
            if model.state != "serving":
                goes_on = "it goes on" if model.state == "replacing" else "it is taken away"
                report(f"{name} was {model.state} when the last command ended; {goes_on}")
            if not model.is_shown:
                away.append(name)
            elif model.replacement is None:
                models[name] = msgspec.structs.replace(model, state="serving")
            else:
                before, after = model.replacement.before, model.replacement.after
                revision = applications.revision(name)
                if revision == before.revision:
                    models[name] = with_added_adapters(before, model)
                elif revision == after.revision and not self._deployed(name).failure:
                    models[name] = with_added_adapters(after, model)
                else:
                    models[name] = model
                    failed.append(before)
        self._write_models(models)
        applications.delete(map(app_name, away), 2 * applications.STOP_TIMEOUT_S)
        for before in failed:
            entry = changes.entry_of(before.given)
            num_now = self._deployed(before.card.name).target
            target = max(1, num_now) if changes.follows_load(entry) else entry.num_groups
            self._take_back(before, target, 1, lambda stage, text, *numbers: report(text))

    @contextmanager
    def _change(self, name: str, report: Report) -> Iterator[Tell]:
        """One change at a time. Raises ChangeError when there is another."""
        if not self._lock.acquire(blocking=False):
            raise ChangeError(f"{self._changing} is being changed ({self._progress}); one change is made at a time")
        try:
            self._waits.sleep(0)  # raises when the server stops
            self._require_current()
            self._changing, self._progress = name, ""

            def tell(stage: str, text: str, num_done: int = 0, num_total: int = 0) -> None:
                self._progress = text
                logger.info("%s: %s", name, text)
                report(Progress(stage=stage, text=text, num_done=num_done, num_total=num_total))

            yield tell
        except StartError as error:
            raise ChangeError(str(error)) from error
        finally:
            self._changing = self._progress = ""
            self._lock.release()


def run_autoscaler(settings: AutoscalerSettings | None) -> None:
    """One with these settings, in place of any other; none where there are none."""
    if settings is None:
        stop_autoscaler(applications.STOP_TIMEOUT_S)
    else:
        start_autoscaler(settings, applications.STOP_TIMEOUT_S)


def autoscaler_settings(config: ServingConfig, served: Served) -> AutoscalerSettings | None:
    """None where no model needs one. It leaves alone what is still coming, or going."""
    entries = [changes.entry_of(model.settled.chosen) for model in served.shown.values()]
    return settings_of(entries, config.autoscaler, Gateway.__name__)


def _requests(spec: GroupSpec) -> list[GroupRequest]:
    return joined.requests_of_specs([spec])


@contextmanager
def _explained(field: str = "config") -> Iterator[None]:
    """What is wrong with what was asked for becomes the caller's to correct."""
    try:
        yield
    except (EngineError, FetchError) as error:
        raise ValidationError(field, str(error)) from error
    except OSError as error:
        if error.filename is None:  # no file is meant
            raise
        raise ValidationError(field, f"{error.filename!s:.200}: {error.strerror}") from error
