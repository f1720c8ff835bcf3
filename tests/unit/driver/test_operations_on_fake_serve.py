"""Changes of what is served, on a Serve that does what the test says: what is written down, ordered and taken back."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import ray
from ray.exceptions import GetTimeoutError, RayError

from bench.support.fake_backend import card
from cluster.placement import GroupPlacement
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import ConfigError
from model_parallel.machine import Machine
from serving.autoscaling.settings import AutoscalerSettings
from serving.config import ModelEntry, parse_config
from serving.contracts.errors import AlreadyExistsError, ChangeError, NotFoundError, UnknownModelError, ValidationError
from serving.contracts.models import AdapterCard
from serving.contracts.operations import Progress
from serving.contracts.served import GatewayModels, Owner, Served, State, app_name, deployment_name, is_ours
from serving.contracts.start_failure import StartError
from serving.driver import applications, joined, operations, waits
from serving.driver.applications import Deployed
from serving.driver.changes import entry_of, entry_text
from serving.driver.operations import ClusterOperations, autoscaler_settings
from serving.driver.record import served_model
from serving.models.sizes import Host
from tests.support.waiting import PATIENCE_S, wait_until

MACHINE = Machine(num_cpus=2, num_host_cpus=2, total_memory_bytes=1 << 34, available_memory_bytes=1 << 33)


def spec_of(entry: ModelEntry) -> Any:
    """As much of a GroupSpec as operations look at."""
    return SimpleNamespace(
        card=card(
            entry.name, source=entry.source, max_model_len=entry.max_model_len or 100, num_groups=entry.num_groups
        ),
        entry=entry.model_copy(update={"device": "cuda", "kv_cache_tokens": entry.kv_cache_tokens or 4096}),
        parallel=SimpleNamespace(tp_size=1, device="cuda"),
        cpus_per_rank=0.0,
        model=None,
        adapter_config=None,
        adapters=(),
    )


@dataclass
class FakeServe:
    """Groups are running as soon as Serve is asked, unless the model's revision is one that fails."""

    models: dict[str, Deployed] = field(default_factory=dict)
    revisions: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """(revision, entry) of each group, by model."""
    runs: list[tuple[str, int, int]] = field(default_factory=list)
    """(model, groups, revision) in the order in which Serve was told."""
    shrunk: list[tuple[str, int]] = field(default_factory=list)
    failing: str = ""
    """Part of an entry (JSON) whose groups do not start."""
    places: int = 100
    records: list[Served] = field(default_factory=list)
    gateway_problems: dict[str, str] = field(default_factory=dict)
    num_open: dict[str, int] = field(default_factory=dict)
    is_down: bool = False
    blocked: threading.Event | None = None
    late: int = 0
    """Looks at which Serve still tells what was before an order."""
    silent_gateways: bool = False
    before: Deployed | None = None
    revision_told: dict[str, int] = field(default_factory=dict)
    """Of the groups of each model, as Serve was told last."""
    autoscaler: AutoscalerSettings | None = None
    """What the one that runs was started with. It orders the most groups of a model at once, whatever anybody else orders."""

    def deployed(self, model: str) -> Deployed | None:
        if self.is_down:
            raise StartError("Serve's controller does not answer")
        if self.before is not None and self.late:
            self.late -= 1
            return self.before
        return self.models.get(model)

    def model_target(self, config: object, spec: Any, placement: object, **about: int) -> Any:
        return SimpleNamespace(spec=spec, about=about)

    def run(self, targets: list[Any], *, wait: bool) -> None:
        if self.blocked is not None:
            assert self.blocked.wait(PATIENCE_S)
        (target,) = targets
        name, number = target.spec.card.name, target.about["num_groups"]
        revision = target.about["revision"]
        self.runs.append((name, number, revision))
        self.revision_told[name] = revision
        self.before = before = self.models.get(name)
        old = dict(before.replicas) if before else {}
        if self.failing and self.failing in entry_text(target.spec.entry):
            kept = dict(list(old.items())[1:])
            message = "The deployment failed to start. Error:\nTraceback (most recent call last):\nno memory"
            self.models[name] = Deployed(status="DEPLOY_FAILED", message=message, target=number, replicas=kept)
            return
        kept = {group: state for group, state in old.items() if group.startswith(f"{revision}-")}
        new = {f"{revision}-{len(self.runs)}-{i}": "RUNNING" for i in range(number - len(kept))}
        self.models[name] = Deployed(status="HEALTHY", message="", target=number, replicas={**kept, **new})

    def run_autoscaler(self, settings: AutoscalerSettings | None) -> None:
        self.autoscaler = settings

    def set_num_groups(self, model: str, number: int) -> None:
        if self.autoscaler is not None and model in self.autoscaler.models:
            number = self.autoscaler.models[model].scaled.policy.max_groups
        before = self.models[model]
        groups = [*before.replicas, *(f"more-{i}" for i in range(number))][: min(number, self.places)]
        self.models[model] = replace(before, target=number, replicas=dict.fromkeys(groups, "RUNNING"))

    def shrink(self, model: str, number: int, timeout_s: float, sleep: object) -> None:
        self.set_num_groups(model, number)
        self.shrunk.append((model, number))

    def delete(self, apps: Any, timeout_s: float, *, sleep: object = None) -> None:
        for app in list(apps):
            self.models = {name: found for name, found in self.models.items() if app_name(name) != app}

    def write(self, served: Served) -> None:
        self.records.append(msgspec.msgpack.decode(msgspec.msgpack.encode(served), type=Served))

    def ask_gateways(self) -> list[GatewayModels]:
        if self.silent_gateways:
            return []
        generation = self.records[-1].generation
        return [
            GatewayModels(gateway="g", generation=generation, num_open=self.num_open, problems=self.gateway_problems)
        ]

    @property
    def states(self) -> list[dict[str, str]]:
        """Of the models, in each record that was written."""
        return [{name: model.state for name, model in served.models.items()} for served in self.records]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    for name in ("deployed", "model_target", "run", "set_num_groups", "shrink", "delete"):
        monkeypatch.setattr(applications, name, getattr(fake, name))
    monkeypatch.setattr(operations, "write_served", fake.write)
    monkeypatch.setattr(operations, "read_served", lambda: fake.records[-1] if fake.records else None)
    monkeypatch.setattr(waits.Waits, "_ask_gateways", lambda self: fake.ask_gateways())
    monkeypatch.setattr(waits, "_POLL_S", 0.001)
    monkeypatch.setattr(waits, "STALE_S", 0.0)
    monkeypatch.setattr(applications, "revision", lambda model: fake.revision_told[model])
    monkeypatch.setattr(operations, "run_autoscaler", fake.run_autoscaler)
    monkeypatch.setattr(operations, "has_autoscaler", lambda: fake.autoscaler is not None)
    monkeypatch.setattr(operations, "resolve_models", lambda entries, host: [spec_of(entry) for entry in entries])

    def check(entry: ModelEntry, host: Host, *, is_private: bool) -> Any:
        if entry.max_model_len == 13:
            raise ConfigError("models.m.max_model_len is 13, but the model's own length is 12 tokens")
        return SimpleNamespace(notes=[f"{entry.name}: sizes"], warnings=[], specs=[spec_of(entry)])

    def places(
        requests: list[Any], timeout_s: float, report: object, *, others: list[Any], sleep: object
    ) -> list[GroupPlacement]:
        if (needed := len(requests) + len(others)) > fake.places:
            raise ConfigError(f"all groups together need {needed} GPUs and the cluster has {fake.places}")
        return [GroupPlacement(bundles=(), strategy="STRICT_PACK")] * len(requests)

    monkeypatch.setattr(operations, "check_model", check)
    monkeypatch.setattr(joined, "wait_for_places", places)
    return fake


class Log(list[Progress]):
    def __call__(self, progress: Progress) -> None:
        self.append(progress)

    @property
    def texts(self) -> str:
        return "\n".join(progress.text for progress in self)


@pytest.fixture
def log() -> Log:
    return Log()


FIRST: dict[str, object] = {"name": "a", "source": "/a", "num_groups": 2, "max_model_len": 50}


@pytest.fixture
def cluster(serve: FakeServe) -> ClusterOperations:
    config = parse_config({"models": [FIRST], "gateway": {"drain_timeout_s": 0.05}}, origin="test")
    (entry,) = config.models
    served = Served(generation=7, models={"a": served_model(spec_of(entry), entry_text(entry), 7, "serving")})
    serve.records.append(served)
    serve.run([serve.model_target(config, spec_of(entry), None, num_groups=2, revision=7)], wait=True)
    serve.runs.clear()
    return ClusterOperations(config, served, lambda: Host(machine=MACHINE))


def text(**entry: object) -> str:
    return msgspec.json.encode(entry).decode()


def changed(**fields: object) -> str:
    return text(**{**FIRST, **fields})


def test_one_more_model(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    assert serve.states[1:] == [{"a": "serving", "b": "starting"}, {"a": "serving", "b": "serving"}]
    assert serve.records[-1].models["b"].revision == 8
    assert serve.runs == [("b", 1, 8)]
    assert (log[0].stage, log[-1].stage) == ("checking", "done")
    found = {model.name: (model.state, model.num_groups, model.num_running) for model in cluster.status()}
    assert found == {"a": ("serving", 2, 2), "b": ("serving", 1, 1)}


def test_what_is_only_checked_changes_nothing(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=True)
    cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=True)
    assert "max_num_seqs: unset → 8" in log[-1].text
    assert (serve.runs, len(serve.records)) == ([], 1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (text(name="b", source="/b", num_groops=1), "num_groops"),
        (text(name="b", source="/b", max_model_len=13), "max_model_len is 13"),
        (text(name="b", source="/b", device="cuda", num_groups=99), "need 101 GPUs and the cluster has 100"),
        (changed(max_model_len=13), "max_model_len is 13"),
        (changed(source="/elsewhere"), "another name"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_changes(
    cluster: ClusterOperations, serve: FakeServe, log: Log, entry: str, said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        cluster.deploy(entry, 1, log, only_check=False)
    assert (serve.runs, len(serve.records)) == ([], 1)


def test_a_model_that_does_not_start_is_taken_away(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    serve.failing = '"/b"'
    with pytest.raises(ChangeError, match="b was not deployed: no memory"):
        cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    assert serve.states[1:] == [{"a": "serving", "b": "starting"}, {"a": "serving"}]
    assert set(serve.models) == {"a"}


def test_a_model_that_a_gateway_cannot_serve_is_taken_away(
    cluster: ClusterOperations, serve: FakeServe, log: Log
) -> None:
    serve.gateway_problems["b"] = "FileNotFoundError: tokenizer.model"
    with pytest.raises(ChangeError, match=r"tokenizer\.model"):
        cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    assert serve.states[-1] == {"a": "serving"}
    assert set(serve.models) == {"a"}


def test_a_change_replaces_groups_and_the_shorter_length_holds_meanwhile(
    cluster: ClusterOperations, serve: FakeServe, log: Log
) -> None:
    cluster.deploy(changed(max_model_len=80), 1, log, only_check=False)
    assert serve.runs == [("a", 2, 8)]
    lengths = [(served.models["a"].state, served.models["a"].card.max_model_len) for served in serve.records]
    assert lengths == [("serving", 50), ("replacing", 50), ("serving", 80)]
    cluster.deploy(changed(max_model_len=60), 1, log, only_check=False)
    assert serve.records[-2].models["a"].card.max_model_len == 60


def test_sizes_that_were_chosen_stay(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=False)
    model = serve.records[-1].models["a"]
    assert entry_of(model.chosen).kv_cache_tokens == 4096
    assert entry_of(model.given).kv_cache_tokens is None


def test_a_change_that_does_not_start_is_taken_back(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    before = serve.records[-1].models["a"]
    serve.failing = '"max_num_seqs":8'
    with pytest.raises(ChangeError, match="a is served as before; a new group did not start: no memory"):
        cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=False)
    assert serve.runs == [("a", 2, 8), ("a", 2, 7)]
    assert serve.records[-1].models["a"] == before
    survivors = [group for group in serve.models["a"].replicas if group.startswith("7-1-")]
    assert len(survivors) == 1, "the group that was left stayed"
    assert len(serve.models["a"].running) == 2


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_change_that_is_taken_back_leaves_the_number_of_groups(
    cluster: ClusterOperations, serve: FakeServe, log: Log, num_groups: int
) -> None:
    """The record said two, and as many ran as the change had asked for."""
    serve.failing = '"max_num_seqs":8'
    with pytest.raises(ChangeError, match="a is served as before"):
        cluster.deploy(changed(max_num_seqs=8, num_groups=num_groups), 1, log, only_check=False)
    assert entry_of(serve.records[-1].models["a"].given).num_groups == 2
    assert serve.models["a"].target == len(serve.models["a"].running) == 2


def test_who_was_taken_over_changes_nothing_any_more(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    """It went by what it knew, and what the next command had changed was undone."""
    following = ClusterOperations(cluster._config, serve.records[-1], lambda: Host(machine=MACHINE))
    following.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    before = (list(serve.records), list(serve.runs), serve.models)
    with pytest.raises(
        ChangeError, match="another packtrain serve has taken over what this cluster serves; ask that one"
    ):
        cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=False)
    with pytest.raises(ChangeError, match="another packtrain serve"):
        cluster.scale("a", log, num_groups=2, min_groups=None, max_groups=None)
    assert (serve.records, serve.runs, serve.models) == before


def test_what_gateways_alone_go_by_touches_no_group(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.deploy(changed(allow_parse_special=True), 1, log, only_check=False)
    assert serve.runs == []
    assert serve.records[-1].models["a"].revision == 7
    cluster.deploy(changed(allow_parse_special=True), 1, log, only_check=False)
    assert "already" in log[-1].text
    assert len(serve.records) == 2


def test_all_groups_but_one_may_be_away(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    with pytest.raises(ValidationError, match="of 2 groups 1 to 1 may be replaced"):
        cluster.restart("a", 2, log)
    cluster.restart("a", 1, log)
    assert serve.runs == [("a", 2, 8)]
    assert "2 of 2 groups replaced" in log.texts


def test_the_only_group_is_replaced_while_requests_wait(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.scale("a", log, num_groups=1, min_groups=None, max_groups=None)
    cluster.restart("a", 1, log)
    assert "one group: what comes meanwhile waits" in log.texts
    assert {"a": "replacing"} in serve.states


def test_numbers_of_groups(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.scale("a", log, num_groups=4, min_groups=None, max_groups=None)
    assert serve.models["a"].target == 4
    assert entry_of(serve.records[-1].models["a"].given).num_groups == 4
    assert serve.records[-1].models["a"].card.num_groups == 4
    assert not serve.shrunk
    cluster.scale("a", log, num_groups=3, min_groups=None, max_groups=None)
    assert serve.shrunk == [("a", 3)]
    with pytest.raises(ValidationError, match="num_groups"):
        cluster.scale("a", log, num_groups=0, min_groups=None, max_groups=None)
    with pytest.raises(ValidationError, match="no autoscaling"):
        cluster.scale("a", log, num_groups=None, min_groups=1, max_groups=None)


def test_more_groups_than_start_are_taken_back(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_start_timeout_s", lambda served: 0.05)
    monkeypatch.setattr(joined, "wait_for_places", lambda *arguments, **options: [])
    serve.places = 3
    with pytest.raises(ChangeError, match="a has 2 groups as before"):
        cluster.scale("a", log, num_groups=5, min_groups=None, max_groups=None)
    assert serve.models["a"].target == 2
    assert entry_of(serve.records[-1].models["a"].given).num_groups == 2


def test_a_model_goes_when_its_requests_have_ended(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ChangeError, match="only model"):
        cluster.undeploy("a", log)
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    serve.num_open["b"] = 3  # for longer than they may
    ended: list[tuple[str, str, float]] = []
    monkeypatch.setattr(cluster, "_begin_drain", lambda *asked: ended.append(asked))
    cluster.undeploy("b", log)
    assert ended == [("b", "8-1-0", 0.0)]
    assert serve.states[-2:] == [{"a": "serving", "b": "removing"}, {"a": "serving"}]
    assert "3 requests are open still" in log.texts
    assert set(serve.models) == {"a"}
    with pytest.raises(UnknownModelError, match="served: a"):
        cluster.undeploy("b", log)


SLEEPY: dict[str, object] = {**FIRST, "num_groups": 1, "autoscaling": {"mode": "on", "min_groups": 0, "max_groups": 2}}


@pytest.fixture
def asleep(cluster: ClusterOperations, serve: FakeServe, log: Log) -> ClusterOperations:
    """The model has an autoscaler, which has ended its last group."""
    cluster.deploy(text(**SLEEPY), 1, log, only_check=False)
    serve.models["a"] = Deployed(status="HEALTHY", message="", target=0, replicas={})
    return cluster


@pytest.mark.parametrize("late", [0, 1, 5])
def test_a_change_of_a_model_that_sleeps_is_tried(
    asleep: ClusterOperations, serve: FakeServe, log: Log, late: int
) -> None:
    serve.late = late
    asleep.deploy(text(**SLEEPY, max_num_seqs=8), 1, log, only_check=False)
    assert serve.runs[-1][:2] == ("a", 1)
    assert serve.late == 0, "the change was over before Serve had taken it up"
    assert "1 of 1 groups replaced" in log.texts and "0 of 0" not in log.texts


@pytest.mark.parametrize("late", [0, 1, 5])
def test_a_change_of_a_model_that_sleeps_is_taken_back_when_no_group_starts(
    asleep: ClusterOperations, serve: FakeServe, log: Log, late: int
) -> None:
    before = serve.records[-1].models["a"]
    serve.failing, serve.late = '"max_num_seqs":8', late
    with pytest.raises(ChangeError, match="a is served as before; a new group did not start: no memory"):
        asleep.deploy(text(**SLEEPY, max_num_seqs=8), 1, log, only_check=False)
    assert serve.records[-1].models["a"] == before


def test_a_group_that_cannot_be_told_to_drain_does_not_keep_a_model(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    serve.num_open["b"] = 3

    def begin_drain(*asked: object) -> None:
        raise ChangeError("the group cannot be told to drain: TimeoutError")

    monkeypatch.setattr(cluster, "_begin_drain", begin_drain)
    cluster.undeploy("b", log)
    assert serve.states[-1] == {"a": "serving"}
    assert set(serve.models) == {"a"}


@pytest.mark.parametrize("is_down", [False, True], ids=["gateways", "controller"])
def test_who_does_not_answer_does_not_keep_a_model(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch, is_down: bool
) -> None:
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    monkeypatch.setattr(waits, "TELL_TIMEOUT_S", 0.01)
    serve.silent_gateways, serve.is_down = True, is_down
    cluster.undeploy("b", log)
    assert serve.states[-1] == {"a": "serving"}
    assert set(serve.models) == {"a"}


def test_a_replacement_that_gateways_do_not_learn_of_is_taken_back(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.scale("a", log, num_groups=1, min_groups=None, max_groups=None)
    before = serve.records[-1].models["a"]
    monkeypatch.setattr(waits, "TELL_TIMEOUT_S", 0.01)
    serve.silent_gateways = True
    with pytest.raises(ChangeError, match="not every gateway has learned"):
        cluster.restart("a", 1, log)
    assert serve.records[-1].models["a"] == before
    with pytest.raises(ChangeError, match="not every gateway has learned"):
        cluster.drain(next(iter(serve.models["a"].running)), 0.0, log)
    assert serve.records[-1].models["a"] == before


def test_what_is_half_gone_is_not_served(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    cluster._write("b", msgspec.structs.replace(serve.records[-1].models["b"], state="removing"))
    for change in (
        lambda: cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False),
        lambda: cluster.scale("b", log, num_groups=2, min_groups=None, max_groups=None),
        lambda: cluster.restart("b", 1, log),
    ):
        with pytest.raises(ChangeError, match="b is removing, and that has not ended; undeploy it"):
            change()
    cluster.undeploy("b", log)
    assert serve.states[-1] == {"a": "serving"}


def test_a_file_that_the_system_refuses_is_the_callers_to_correct(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(entry: ModelEntry, host: Host, *, is_private: bool) -> Any:
        Path(entry.source).stat()

    monkeypatch.setattr(operations, "check_model", check)
    for source in ("/" + "x" * 300, "/" + "x/" * 3000):
        with pytest.raises(ValidationError, match=rf"{source[:100]}.*: File name too long"):
            cluster.deploy(text(name="b", source=source), 1, log, only_check=False)
    assert (serve.runs, len(serve.records)) == ([], 1)


@pytest.mark.parametrize("only_check", [False, True])
def test_weights_that_were_replaced_at_their_place_are_another_model(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch, only_check: bool
) -> None:
    """Groups that are started anew would answer in other words than those that run."""
    before = serve.records[-1]
    cluster._write("a", msgspec.structs.replace(before.models["a"], card=card("a", source="/a", weights="old")))
    num_records = len(serve.records)
    with pytest.raises(ValidationError, match="the weights at /a are not those that are served"):
        cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=only_check)
    with pytest.raises(ValidationError, match="the weights at /a are not those that are served"):
        cluster.restart("a", 1, log)
    assert (serve.runs, len(serve.records)) == ([], num_records)


def test_places_of_other_models_are_counted_by_what_is_written_down(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files may be gone."""

    def resolve(entries: list[ModelEntry], host: Host) -> list[Any]:
        if any(entry.name == "a" for entry in entries):
            raise ConfigError("/a does not exist")
        return [spec_of(entry) for entry in entries]

    monkeypatch.setattr(operations, "resolve_models", resolve)
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    serve.places = 3
    with pytest.raises(ValidationError, match="need 4 GPUs and the cluster has 3"):
        cluster.deploy(text(name="c", source="/c"), 1, log, only_check=False)


@pytest.mark.parametrize(
    "entry",
    [
        text(name="x", source="/x"),
        text(name="b", source="/b", lora={"adapters": [{"name": "x", "source": "/y"}]}),
    ],
    ids=["model", "configured adapter"],
)
def test_no_model_takes_the_name_of_an_adapter_that_was_added(
    cluster: ClusterOperations, serve: FakeServe, log: Log, entry: str
) -> None:
    added = AdapterCard(name="x", parent="a", ref=AdapterRef("digest", "/x"), num_bytes=1, rank=1)
    cluster._write("a", msgspec.structs.replace(serve.records[-1].models["a"], adapters=(added,)), keeps_adapters=False)
    num_records = len(serve.records)
    with pytest.raises(AlreadyExistsError, match="there is an adapter 'x' of a already"):
        cluster.deploy(entry, 1, log, only_check=False)
    assert (serve.runs, len(serve.records)) == ([], num_records)


def test_an_added_adapter_must_fit_the_changed_model(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    added = AdapterCard(name="x", parent="a", ref=AdapterRef("digest", "/x"), num_bytes=1, rank=1)
    cluster._write("a", msgspec.structs.replace(serve.records[-1].models["a"], adapters=(added,)), keeps_adapters=False)
    with pytest.raises(ValidationError, match=r"adapter 'x', which was added, does not fit; remove it first.*lora"):
        cluster.deploy(changed(max_num_seqs=8), 1, log, only_check=False)
    assert serve.runs == []
    cluster.deploy(changed(allow_parse_special=True), 1, log, only_check=False)


def test_a_change_has_ended_when_the_server_has_stopped(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    """What it goes on with afterwards would find no cluster, and start one."""
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    serve.num_open["b"] = 1
    cluster._config = cluster._config.model_copy(
        update={"gateway": cluster._config.gateway.model_copy(update={"drain_timeout_s": PATIENCE_S})}
    )
    ended = threading.Event()

    def undeploy() -> None:
        with pytest.raises(ChangeError, match="the server stops"):
            cluster.undeploy("b", log)
        ended.set()

    thread = threading.Thread(target=undeploy)
    thread.start()
    assert wait_until(lambda: "1 requests are open" in log.texts)
    cluster.close()
    assert not cluster._lock.locked()
    assert ended.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    with pytest.raises(ChangeError, match="the server stops"):
        cluster.restart("a", 1, log)


async def test_without_a_cluster_nothing_asks_serve() -> None:
    """Serve would start another cluster, which nobody ends."""
    _expect_nothing_asked("Ray has been shut down")
    assert waits.Waits()._ask_gateways() == []
    assert not ray.is_initialized()


def test_nobody_is_asked_when_a_process_of_ray_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer would not come."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    node = SimpleNamespace(dead_processes=lambda: [("raylet", None)])
    monkeypatch.setattr("ray._private.worker._global_node", node)
    _expect_nothing_asked("Ray's raylet ended")
    assert waits.Waits()._ask_gateways() == []


def test_a_controller_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own calls wait for it without a deadline, and so did a command that was to stop."""

    def get(ref: object, *, timeout: float | None = None) -> None:
        assert timeout is not None
        raise GetTimeoutError("Get timed out")

    silent: Any = SimpleNamespace(remote=lambda *arguments: None)
    controller = SimpleNamespace(check_alive=silent, get_serve_instance_details=silent)
    client = SimpleNamespace(_controller=controller, get_handle=lambda *arguments, check_exists: check_exists)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(applications, "_get_global_client", lambda **options: client)
    monkeypatch.setattr("ray.serve.api._get_global_client", lambda **options: client)
    for ask in (
        applications.our_applications,
        lambda: applications.delete(["packtrain-model-a"], 1.0),
        lambda: applications.deployed("a"),
    ):
        with pytest.raises((RayError, StartError), match="Get timed out"):
            ask()
    assert applications.messages() == ""
    handle: Any = applications.handle("a", "packtrain-model-a")
    assert handle is False, "it would have asked"


def _expect_nothing_asked(problem: str) -> None:
    asked: list[Callable[[], object]] = [
        lambda: applications.deployed("a"),
        lambda: applications.set_num_gateways(1),
        lambda: applications.delete(["packtrain-model-a"], 1.0),
        applications.our_applications,
        lambda: applications.run([], wait=True),
    ]
    for ask in asked:
        with pytest.raises((RayError, StartError), match=problem):
            ask()


def test_one_change_at_a_time(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    serve.blocked = threading.Event()
    thread = threading.Thread(target=cluster.restart, args=("a", 1, log))
    thread.start()
    assert wait_until(lambda: any(model.change for model in cluster.status()))
    with pytest.raises(ChangeError, match="a is being changed"):
        cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)
    serve.blocked.set()
    thread.join(PATIENCE_S)
    cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)


def test_waits_end_when_the_server_stops(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    serve.is_down = True
    cluster.close()
    with pytest.raises(ChangeError):
        cluster.deploy(text(name="b", source="/b"), 1, log, only_check=False)


def test_only_a_group_that_runs_can_be_drained(cluster: ClusterOperations, serve: FakeServe, log: Log) -> None:
    with pytest.raises(NotFoundError, match="no group 'x' runs; running: 7-1-0, 7-1-1"):
        cluster.drain("x", None, log)
    with pytest.raises(ValidationError, match=r"grace is 9 s; it must be from 0 to gateway.drain_timeout_s, 0.05 s"):
        cluster.drain("7-1-0", 9.0, log)


SCALED = {"mode": "on", "min_groups": 2, "max_groups": 3}


@pytest.mark.parametrize("others", [{}, {"max_num_seqs": 8}], ids=["number", "groups replaced too"])
def test_the_autoscaler_does_not_fight_against_being_turned_off(
    cluster: ClusterOperations, serve: FakeServe, log: Log, others: dict[str, object]
) -> None:
    cluster.deploy(changed(autoscaling=SCALED), 1, log, only_check=False)
    assert serve.autoscaler is not None and set(serve.autoscaler.models) == {"a"}
    cluster.deploy(changed(num_groups=1, **others), 1, log, only_check=False)
    assert serve.autoscaler is None
    assert serve.models["a"].target == 1
    assert len(serve.models["a"].running) == 1


@pytest.mark.parametrize("others", [{}, {"max_num_seqs": 8}], ids=["number", "groups replaced too"])
def test_the_autoscaler_is_back_when_turning_it_off_fails(
    cluster: ClusterOperations, serve: FakeServe, log: Log, monkeypatch: pytest.MonkeyPatch, others: dict[str, object]
) -> None:
    cluster.deploy(changed(autoscaling=SCALED), 1, log, only_check=False)
    before, scaled = serve.records[-1].models["a"], serve.autoscaler
    monkeypatch.setattr(cluster, "_start_timeout_s", lambda served: 0.05)
    monkeypatch.setattr(joined, "wait_for_places", lambda requests, *rest, **options: [None] * len(requests))
    serve.failing, serve.places = '"max_num_seqs":8', 3
    with pytest.raises(ChangeError, match="as before"):
        cluster.deploy(changed(num_groups=5, **others), 1, log, only_check=False)
    assert serve.records[-1].models["a"] == before
    assert serve.autoscaler == scaled is not None


def test_no_autoscaler_looks_after_a_model_that_still_starts(
    cluster: ClusterOperations, serve: FakeServe, log: Log
) -> None:
    """What looks whether the autoscaler is there began one in the middle of a start, and that ended the model's only group."""
    serve.blocked = threading.Event()
    entry = text(name="b", source="/b", autoscaling={"mode": "on", "min_groups": 0, "max_groups": 1})
    thread = threading.Thread(target=cluster.deploy, args=(entry, 1, log), kwargs={"only_check": False})
    thread.start()
    assert wait_until(lambda: serve.states[-1] == {"a": "serving", "b": "starting"})
    cluster.revive_autoscaler()
    assert serve.autoscaler is None
    serve.blocked.set()
    thread.join(PATIENCE_S)
    assert serve.autoscaler is not None and set(serve.autoscaler.models) == {"b"}
    serve.autoscaler = None  # it has ended for good
    cluster.revive_autoscaler()
    assert serve.autoscaler is not None and set(serve.autoscaler.models) == {"b"}
    cluster.undeploy("b", log)
    assert serve.autoscaler is None
    cluster.revive_autoscaler()
    assert serve.autoscaler is None


@pytest.mark.parametrize(
    ("state", "is_scaled"), [("starting", False), ("serving", True), ("replacing", True), ("removing", False)]
)
def test_models_that_the_autoscaler_looks_after(cluster: ClusterOperations, state: State, is_scaled: bool) -> None:
    entry = ModelEntry.model_validate({"name": "b", "source": "/b", "num_groups": 2, "autoscaling": SCALED})
    served = Served(generation=1, models={"b": served_model(spec_of(entry), entry_text(entry), 1, state)})
    assert (autoscaler_settings(cluster._config, served) is not None) == is_scaled


@pytest.fixture
def interrupted(cluster: ClusterOperations, serve: FakeServe) -> ClusterOperations:
    """The driver before was lost in the middle of changes."""
    models = {}
    states: dict[str, State] = {"a": "serving", "b": "starting", "c": "removing", "d": "replacing"}
    for name, state in states.items():
        entry = ModelEntry(name=name, source=f"/{name}")
        models[name] = served_model(spec_of(entry), entry_text(entry), 1, state)
    serve.records[:] = [Served(generation=4, models=models, owner=Owner(job="1", is_detached=True))]
    return ClusterOperations(cluster._config, serve.records[-1], lambda: Host(machine=MACHINE))


def test_the_next_driver_finishes_what_it_finds(interrupted: ClusterOperations, serve: FakeServe) -> None:
    told: list[str] = []
    interrupted.finish_interrupted(told.append)
    _, after = serve.records
    assert {name: model.state for name, model in after.models.items()} == {"a": "serving", "d": "serving"}
    assert (after.generation, after.owner) == (5, Owner(job="1", is_detached=True))
    assert [line.split()[0] for line in told] == ["b", "c", "d"]
    interrupted.finish_interrupted(told.append)
    assert (len(told), len(serve.records)) == (3, 2)


class LostError(Exception):
    """The driver ends here."""


@pytest.mark.parametrize(
    ("lost_in", "becomes_new"),
    [("gateways", False), ("rollout", True), ("failed", False), ("taken back", False)],
)
def test_a_replacement_that_lost_its_driver_is_what_serve_has(
    cluster: ClusterOperations,
    serve: FakeServe,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    lost_in: str,
    becomes_new: bool,
) -> None:
    """The record said of groups with 80 tokens that they had 50, and their configuration was nowhere."""
    before = serve.records[-1].models["a"]

    def lose(*arguments: object, **named: object) -> None:
        raise LostError

    lost_at = {"gateways": "gateways", "rollout": "rollout", "failed": "rollout", "taken back": "number"}[lost_in]
    if lost_in in ("failed", "taken back"):
        serve.failing = '"max_num_seqs":8'
    another_number = {} if becomes_new else {"num_groups": 3}
    with monkeypatch.context() as lost, pytest.raises(LostError):
        lost.setattr(cluster._waits, lost_at, lose)
        cluster.deploy(changed(max_model_len=80, max_num_seqs=8, **another_number), 1, log, only_check=False)
    assert serve.states[-1] == {"a": "replacing"}
    told: list[str] = []
    following = ClusterOperations(cluster._config, serve.records[-1], lambda: Host(machine=MACHINE))
    following.finish_interrupted(told.append)
    assert "a was replacing" in told[0]
    after = serve.records[-1].models["a"]
    if becomes_new:
        assert after.state == "serving" and after.replacement is None
        assert (after.card.max_model_len, after.revision) == (80, serve.revision_told["a"])
        assert entry_of(after.given).max_num_seqs == entry_of(after.chosen).max_num_seqs == 8
    else:
        assert after == before
        assert serve.revision_told["a"] == before.revision
    assert len(serve.models["a"].running) == 2
    following.restart("a", 1, log)


def test_names_of_models_are_names_of_applications() -> None:
    names = ["a", "a-b", "a/b", "a~b", "org/chat.v1"]
    assert len({app_name(name) for name in names[:3]}) == 3
    assert len({deployment_name(name) for name in names[:3]}) == 3
    assert all(is_ours(app_name(name)) and "/" not in deployment_name(name) for name in names)
    assert not is_ours("default")
    with pytest.raises(ValueError, match="name"):
        ModelEntry(name="a~b", source="/a")
