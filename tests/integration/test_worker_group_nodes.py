"""RayExecutor across Ray nodes: two on this machine, of one CPU each, so that a group of two must span them."""

import os
import signal
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.placement import GroupRequest, plan_groups
from cluster.ray_api import alive_nodes, this_node
from cluster.worker_group import RayExecutor
from model_parallel.errors import ConfigError, GroupFailedError
from tests.support.executors import execute
from tests.support.fake_rank import FAKE_RANK, group_config, plan, tokens
from tests.support.waiting import wait_until


@pytest.fixture(scope="module", autouse=True)
def _two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def bundles() -> Iterator[PlacementGroup]:
    request = GroupRequest(name="fake", tp_size=2, device="cpu", cpus_per_rank=1)
    (placement,) = plan_groups([request], alive_nodes())
    assert placement.strategy == "PACK"
    group = placement_group(list(placement.bundles), strategy=placement.strategy)
    yield group
    remove_placement_group(group)


def wait_gone(pids: tuple[int, ...]) -> bool:
    return wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_group_spans_nodes_from_the_leaders_node_on(bundles: PlacementGroup) -> None:
    executor = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)
    assert executor.locations[0].node_id == this_node()[0]
    assert executor.locations[1].node_id != this_node()[0]
    for step_id in range(1, 50):
        assert tokens(execute(executor, plan(step_id, (0, step_id)))) == [3 * step_id]
    for at in executor.locations:
        sockets = psutil.Process(at.pid).net_connections("inet")
        listening = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.ip != at.ip]
        assert len(listening) <= 1  # Ray's own; the ranks' are all at the node's address
    executor.shutdown()
    assert wait_gone(executor.pids)


def test_rank_lost_on_the_other_node_ends_the_group(bundles: PlacementGroup) -> None:
    executor = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)
    os.kill(executor.pids[1], signal.SIGKILL)
    with pytest.raises(GroupFailedError, match="rank 1"):
        for step_id in range(1, 1000):
            execute(executor, plan(step_id, (0, 1)))
    assert wait_gone(executor.pids)
    executor.shutdown()


def test_group_that_the_cluster_can_never_hold_is_refused() -> None:
    request = GroupRequest(name="fake", tp_size=3, device="cpu", cpus_per_rank=1)
    with pytest.raises(ConfigError, match=r"3 ranks need 3 CPUs; the cluster has 2 CPUs \(at most 1 a node\)"):
        plan_groups([request], alive_nodes())
