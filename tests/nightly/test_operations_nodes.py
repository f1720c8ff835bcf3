"""What is served changes on a cluster of several nodes that was there before: a node ends, and a driver comes back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.placement import GATEWAY_RESOURCE
from cluster.ray_api import ClusterControl
from model_parallel.errors import ConfigError
from serving.client.client import Client
from serving.config import ServingConfig, parse_config
from serving.contracts.operations import Progress
from serving.driver.app import RunningApp, start
from serving.driver.environment import CLUSTER_VARIABLES, token_file
from tests.support.operations import Load, ask, entry, groups, names
from tests.support.small_llama import save_small_llama
from tests.support.stack import wait_until
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

FIRST, SECOND = "first", "second"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The gateway runs on the head, ranks on three nodes of one CPU each."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(tmp_path)))
    about: dict[str, Any] = {"env_vars": dict(CLUSTER_VARIABLES), "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": {GATEWAY_RESOURCE: 1}, **about})
    for _ in range(3):
        made.add_node(num_cpus=1, **about)
    yield made
    ray.shutdown()
    made.shutdown()


def config(cluster: Cluster, *entries: dict[str, object], **ray_section: object) -> ServingConfig:
    data = {
        "models": list(entries),
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 5},
        "admin": {"metrics_port": 0, "port": 0},
        "ray": {"address": cluster.address, "num_gateways": 1, "wait_for_nodes_s": PATIENCE_S, **ray_section},
    }
    return parse_config(data, origin="test")


def nodes_of_ranks() -> list[str]:
    """In the order of the bundles, of which the first is the leader's, of the one group that has its places now."""
    table = placement_group_table().values()
    (found,) = [found["bundles_to_node_id"] for found in table if found["state"] == "CREATED"]
    return [found[bundle] for bundle in sorted(found)]


def test_a_group_leaves_a_node_that_is_to_end(cluster: Cluster, source: Path) -> None:
    """The node of a rank that is not the leader's, which Serve would not look at."""
    app = start(config(cluster, entry(FIRST, source, tensor_parallel_size=2, cpus_per_rank=1.0)), print)
    try:
        with Client(app.address) as client:
            alone = {seed: ask(client, FIRST, seed) for seed in range(2)}
        (before,) = groups(FIRST)
        of_leader, ending = nodes_of_ranks()
        assert of_leader != ending
        load = Load(app.address, FIRST, 2)
        assert ClusterControl(cluster.address, PATIENCE_S).drain(ending, "a test", 4 * PATIENCE_S) == ""
        wait_until(lambda: groups(FIRST) != [before], 4 * PATIENCE_S, "another group runs")
        assert ending not in nodes_of_ranks()
        load.end()
        assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}
    finally:
        app.stop()


def test_the_next_command_goes_on_with_what_was_changed(cluster: Cluster, source: Path) -> None:
    def begun() -> RunningApp:
        return start(config(cluster, entry(FIRST, source), detached=True), print)

    said: list[Progress] = []
    app = begun()
    app.operations.deploy(json.dumps(entry(SECOND, source)), 1, said.append, only_check=False)
    app.operations.scale(SECOND, said.append, num_groups=2, min_groups=None, max_groups=None)
    app.stop()

    app = begun()
    assert names(app)[0] == [FIRST, SECOND]
    assert {model.name: model.num_groups for model in app.operations.status()} == {FIRST: 1, SECOND: 2}
    app.operations.restart(SECOND, 1, said.append)
    assert len(groups(SECOND)) == 2
    app.operations.undeploy(FIRST, said.append)
    assert names(app)[0] == [SECOND]
    app.stop()


def test_a_command_that_is_refused_leaves_what_is_served(cluster: Cluster, source: Path) -> None:
    """Also one that may replace it. It ended the stack that served."""
    app = start(config(cluster, entry(FIRST, source), detached=True), print)
    with Client(app.address) as client:
        before = ask(client, FIRST, 0)
    app.stop()
    with pytest.raises(ConfigError, match=r"serves first already, deployed with ray\.detached: true"):
        start(config(cluster, entry(SECOND, source)), print)
    too_many = entry(FIRST, source, num_groups=99)
    with pytest.raises(ConfigError, match="room for"):
        start(config(cluster, too_many, detached=True, wait_for_nodes_s=0), print)
    app = start(config(cluster, entry(FIRST, source), detached=True), print)
    with Client(app.address) as client:
        assert ask(client, FIRST, 0) == before
    assert len(groups(FIRST)) == 1
    app.stop()
