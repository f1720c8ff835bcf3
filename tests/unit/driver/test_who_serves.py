"""Commands that join one cluster: which of them may replace what it serves, and which ends it."""

import pytest

from model_parallel.errors import ConfigError
from serving.config import ModelEntry, RayConfig, ServingConfig, parse_config
from serving.contracts.served import Owner, Served
from serving.driver import app, applications
from serving.driver.changes import entry_text
from serving.driver.joined import check_replaceable
from serving.driver.preflight import Preflight
from serving.driver.record import served_model
from tests.unit.driver.test_operations_on_fake_serve import spec_of

OURS = "02000000"


def served(owner: Owner | None) -> Served:
    entry = ModelEntry(name="a", source="/a")
    return Served(
        generation=7, models={"a": served_model(spec_of(entry), entry_text(entry), 7, "serving")}, owner=owner
    )


@pytest.mark.parametrize(
    ("owner", "detached", "said"),
    [
        (
            Owner(job="alive", is_detached=False),
            False,
            r"serves a already, for another packtrain serve that runs.*alive",
        ),
        (
            Owner(job="alive", is_detached=False),
            True,
            r"serves a already, for another packtrain serve that runs.*alive",
        ),
        (Owner(job="alive", is_detached=True), False, r"serves a already, deployed with ray.detached: true"),
        (Owner(job="ended", is_detached=True), False, r"serves a already, deployed with ray.detached: true"),
        (Owner(job="alive", is_detached=True), True, None),
        (Owner(job="ended", is_detached=True), True, None),
        (Owner(job="ended", is_detached=False), True, None),
        (Owner(job="ended", is_detached=False), False, None),
        (None, False, None),
    ],
)
def test_what_another_command_serves_is_not_replaced(owner: Owner | None, detached: bool, said: str | None) -> None:
    section = RayConfig(address="10.0.0.1:6379", detached=detached)
    if said is None:
        check_replaceable(served(owner), section, lambda job: job == "alive")
    else:
        with pytest.raises(ConfigError, match=rf"--ray-address.*10\.0\.0\.1:6379 {said}"):
            check_replaceable(served(owner), section, lambda job: job == "alive")


def test_a_cluster_that_serves_nothing_is_anybodys() -> None:
    section = RayConfig(address="auto")
    check_replaceable(None, section, lambda job: True)
    check_replaceable(
        Served(generation=0, models={}, owner=Owner(job="x", is_detached=True)), section, lambda job: True
    )


def _config() -> ServingConfig:
    return parse_config({"models": [{"name": "m", "source": "/m"}], "ray": {"address": "auto"}}, origin="test")


class Cluster:
    """A cluster with the applications of a stack, and what is done to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record: Served | None = None
        self.deleted: set[str] = set()
        self.done: list[str] = []
        monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(app.ray, "shutdown", lambda: self.done.append("left"))
        monkeypatch.setattr(applications, "all_applications", dict)
        monkeypatch.setattr(app.serve, "shutdown", lambda: self.done.append("Serve ended"))
        monkeypatch.setattr(app, "this_job", lambda: OURS)
        monkeypatch.setattr(app, "read_served", lambda: self.record)
        monkeypatch.setattr(app, "write_served", self._write)
        monkeypatch.setattr(app, "stop_autoscaler", lambda timeout_s: self.done.append("autoscaler ended"))
        monkeypatch.setattr("serving.tenants.authority.actor.stop_authority", lambda timeout_s: None)
        monkeypatch.setattr(applications, "our_applications", lambda: {"packtrain", "packtrain-model-a"} - self.deleted)
        monkeypatch.setattr(applications, "delete", lambda apps, timeout_s: self.deleted.update(apps))

    def _write(self, served: Served) -> None:
        self.record = served


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.mark.parametrize(
    "owner", [None, Owner(job="01000000", is_detached=False), Owner(job=OURS, is_detached=True)], ids=str
)
def test_what_this_command_has_not_deployed_goes_on_when_it_ends(cluster: Cluster, owner: Owner | None) -> None:
    cluster.record = before = served(owner)
    app.shut_down(_config(), None)
    assert (cluster.done, cluster.deleted, cluster.record) == (["left"], set(), before)


def test_what_this_command_has_deployed_ends_with_it(cluster: Cluster) -> None:
    cluster.record = served(Owner(job=OURS, is_detached=False))
    app.shut_down(_config(), None)
    assert cluster.done == ["autoscaler ended", "Serve ended", "left"]
    assert cluster.deleted == {"packtrain", "packtrain-model-a"}
    assert cluster.record.models == {}


def test_a_start_that_is_refused_leaves_what_is_served(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with too many groups ended the stack that served in the cluster that it had joined."""

    def no_room(*arguments: object, **named: object) -> None:
        raise ConfigError("models.m: 9 groups need 36 CPUs and the cluster has room for 2")

    # The command that has deployed it was killed, so that another one may replace it.
    cluster.record = before = served(Owner(job="01000000", is_detached=False))
    monkeypatch.setattr(app, "_join_ray", lambda config, specs, guard: None)
    monkeypatch.setattr(app.joined, "check_replaceable", lambda found, section: None)
    monkeypatch.setattr(app.joined, "wait_for_places", no_room)
    config = _config()
    with pytest.raises(ConfigError, match="room for 2"):
        app.start(config, lambda text: None, preflight=Preflight(config=config, specs=[], parent=None))
    assert (cluster.done, cluster.deleted, cluster.record) == (["left"], set(), before)
