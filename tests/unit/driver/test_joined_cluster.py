"""A Ray cluster that was there before: its nodes' settings, and waiting for nodes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from cluster.placement import GroupRequest, NodeResources
from model_parallel.errors import ConfigError
from serving.config import parse_config
from serving.driver.joined import missing_settings, wait_for_places

REQUIRED = {"RAY_enable_metrics_collection": "0", "MALLOC_ARENA_MAX": "4"}


def test_a_cluster_that_has_all_settings() -> None:
    assert missing_settings(REQUIRED, {"10.0.0.1": dict(REQUIRED), "10.0.0.2": dict(REQUIRED)}) == ""


def test_each_missing_setting_is_named_with_its_nodes() -> None:
    found = {
        "10.0.0.1": dict(REQUIRED),
        "10.0.0.2": REQUIRED | {"MALLOC_ARENA_MAX": None},
        "10.0.0.3": {"RAY_enable_metrics_collection": "1", "MALLOC_ARENA_MAX": None},
    }
    message = missing_settings(REQUIRED, found)
    assert "MALLOC_ARENA_MAX=4 on 10.0.0.2, 10.0.0.3" in message
    assert "RAY_enable_metrics_collection=0 on 10.0.0.3" in message


class Growing:
    """A cluster that gets a node each time that somebody sleeps while nodes are asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_nodes = 0
        self.asked_for: Sequence[GroupRequest] | None = None
        self.num_asked = 0

    @contextmanager
    def ask(self, requests: Sequence[GroupRequest]) -> Iterator[None]:
        self.asked_for = requests
        self.num_asked += 1
        yield
        self.asked_for = None

    def nodes(self) -> Sequence[NodeResources]:
        return [NodeResources(node_id=str(i), ip=f"10.0.0.{i}", num_cpus=2.0) for i in range(self.num_nodes)]

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        assert self.asked_for
        self.num_nodes += 1


REQUEST = GroupRequest(name="m", tp_size=2, device="cpu", cpus_per_rank=1)


def wait(cluster: Growing, timeout_s: float, report: list[str], others: Sequence[GroupRequest] = ()) -> int:
    placements = wait_for_places(
        [REQUEST] * 3,
        timeout_s,
        report.append,
        others=others,
        ask=cluster.ask,
        nodes=cluster.nodes,
        clock=cluster.clock,
        sleep=cluster.sleep,
    )
    assert cluster.asked_for is None, "what was asked for is given back"
    return len(placements)


def test_groups_wait_for_their_nodes_and_say_what_is_missing() -> None:
    cluster, told = Growing(), list[str]()
    assert wait(cluster, 60, told) == 3
    assert cluster.num_nodes == 3
    assert all(line.startswith("waiting for nodes: ") for line in told)
    assert len(told) == len(set(told)) > 0


def test_nodes_are_asked_for_once_and_for_those_alone_that_have_no_place() -> None:
    cluster = Growing()
    other = GroupRequest(name="other", tp_size=2, device="cpu", cpus_per_rank=1)
    assert wait(cluster, 60, [], [other]) == 3
    assert (cluster.num_nodes, cluster.num_asked) == (4, 1)
    assert wait(cluster, 60, [], [other]) == 3
    assert cluster.num_asked == 1, "there is room"


def test_the_wait_has_an_end() -> None:
    with pytest.raises(ConfigError, match="3 groups of 2 ranks"):
        wait(Growing(), 1.5, [])


def test_no_wait_unless_asked_for() -> None:
    cluster = Growing()
    with pytest.raises(ConfigError):
        wait(cluster, 0, [])
    assert cluster.now_s == 0


@pytest.mark.parametrize("key", [{"detached": True}, {"wait_for_nodes_s": 1}, {"num_gateways": 1}])
def test_settings_of_a_joined_cluster_need_one(key: dict[str, object]) -> None:
    models = [{"name": "m", "source": "m"}]
    with pytest.raises(ConfigError, match=r"need ray\.address"):
        parse_config({"models": models, "ray": key}, origin="test")
    assert parse_config({"models": models, "ray": key | {"address": "auto"}}, origin="test").ray.address == "auto"
