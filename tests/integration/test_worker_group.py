"""RayExecutor on one Ray node: steps, lost ranks, a lost leader, failed starts."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.ray_api import alive_nodes, short_messages
from cluster.worker_group import RayExecutor
from model_parallel.errors import CheckpointError, ConfigError, GroupFailedError
from tests.support.executors import execute
from tests.support.fake_rank import FAKE_RANK, HANG, group_config, plan, tokens
from tests.support.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module", autouse=True)
def _ray_node() -> Iterator[None]:
    with short_messages():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def bundles() -> Iterator[PlacementGroup]:
    group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK")
    yield group
    remove_placement_group(group)


def all_gone(pids: tuple[int, ...]) -> bool:
    return wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_steps_and_orderly_stop(bundles: PlacementGroup) -> None:
    progress: list[tuple[int, int, int]] = []
    executor = RayExecutor(
        group_config(2),
        placement_group=bundles,
        rank_class=FAKE_RANK,
        on_progress=lambda *seen: progress.append(seen),
    )
    assert sorted(progress) == [(rank, done, 2) for rank in range(2) for done in (1, 2)]
    for step_id in range(1, 100):
        assert tokens(execute(executor, plan(step_id, (0, step_id)))) == [3 * step_id]
    assert executor.health.problem() is None
    assert [at.pid for at in executor.locations] == list(executor.pids)
    for pid in executor.pids:
        addresses = {
            s.laddr.ip for s in psutil.Process(pid).net_connections("inet") if s.status == psutil.CONN_ESTABLISHED
        }
        assert "127.0.0.1" in addresses
    executor.shutdown()
    executor.shutdown()
    assert all_gone(executor.pids)
    assert executor.health.problem() is None

    again = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)  # the bundles are free again
    assert tokens(execute(again, plan(1, (0, 5)))) == [15]
    again.shutdown()
    assert all_gone(again.pids)


def test_ray_tells_of_ranks_that_died_and_not_of_those_that_were_stopped(
    bundles: PlacementGroup, caplog: pytest.LogCaptureFixture
) -> None:
    def is_told(pid: int) -> bool:
        return f"(pid {pid})" in caplog.text

    stopped = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)
    stopped.shutdown()
    lost = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)
    os.kill(lost.pids[1], signal.SIGKILL)
    assert wait_until(lambda: is_told(lost.pids[1]))
    lost.shutdown()
    assert not any(map(is_told, stopped.pids)), caplog.text


def test_killed_rank_ends_the_group(bundles: PlacementGroup) -> None:
    executor = RayExecutor(group_config(2), placement_group=bundles, rank_class=FAKE_RANK)
    reasons: list[str] = []
    executor.set_failure_callback(reasons.append)
    execute(executor, plan(1, (0, 1)))
    os.kill(executor.pids[1], signal.SIGKILL)
    assert wait_until(lambda: reasons)
    assert "rank 1" in reasons[0]
    assert executor.health.problem() == reasons[0]
    assert all_gone(executor.pids)
    with pytest.raises(GroupFailedError, match="rank 1"):
        execute(executor, plan(2, (0, 1)))
    executor.shutdown()


def test_stopped_rank_is_given_up_and_killed(bundles: PlacementGroup) -> None:
    executor = RayExecutor(group_config(2, step_timeout_s=1.5), placement_group=bundles, rank_class=FAKE_RANK)
    os.kill(executor.pids[0], signal.SIGSTOP)
    # Told by the leader, or by the other rank, which waited as long.
    with pytest.raises(GroupFailedError, match=r"within 1\.5 s|has moved in step 1"):
        execute(executor, plan(1, (0, 1)))
    executor.shutdown()
    assert all_gone(executor.pids)


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("broken:1", CheckpointError, "rank 1 failed to start"),
        ("dies:0", GroupFailedError, "rank 0 is lost"),
    ],
)
def test_failed_start_leaves_no_actor(
    bundles: PlacementGroup, checkpoint: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RayExecutor(group_config(2, checkpoint_path=checkpoint), placement_group=bundles, rank_class=FAKE_RANK)
    free = f"CPU_group_{bundles.id.hex()}"
    assert wait_until(lambda: ray.available_resources().get(free) == 2.0)


def test_placement_group_that_does_not_match_is_refused(bundles: PlacementGroup) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3 and there is a placement group of 2 bundles"):
        RayExecutor(group_config(3), placement_group=bundles, rank_class=FAKE_RANK)
    with pytest.raises(ConfigError, match="no placement group"):
        RayExecutor(group_config(2), rank_class=FAKE_RANK)


def test_placement_that_never_comes_has_a_deadline() -> None:
    group = placement_group([{"CPU": 2}] * 2, strategy="STRICT_PACK")
    with pytest.raises(GroupFailedError, match="Ray has not reserved the 2 bundles"):
        RayExecutor(group_config(2, start_timeout_s=0.5), placement_group=group, rank_class=FAKE_RANK)
    remove_placement_group(group)


def test_nodes_are_listed_with_what_they_have_in_all() -> None:
    (node,) = alive_nodes()
    assert (node.num_cpus, node.num_gpus) == (2.0, 0.0)


class Leader:
    """Leads a group from inside an actor of the group's own first bundle, as a Serve replica does."""

    def __init__(self) -> None:
        self.executor = RayExecutor(group_config(2), rank_class=FAKE_RANK)

    def step(self) -> list[int | None]:
        return tokens(execute(self.executor, plan(1, (0, 5))))

    def pids(self) -> tuple[int, ...]:
        return (os.getpid(), *self.executor.pids)

    def hang(self) -> None:
        execute(self.executor, plan(2, (HANG, 1), (0, 1)))


@pytest.mark.parametrize("in_a_step", [False, True])
def test_ranks_end_with_a_killed_leader(bundles: PlacementGroup, in_a_step: bool) -> None:
    strategy = PlacementGroupSchedulingStrategy(
        bundles, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    leader: Any = ray.remote(Leader).options(num_cpus=0, scheduling_strategy=strategy).remote()
    assert ray.get(leader.step.remote(), timeout=60) == [15]
    pids = ray.get(leader.pids.remote(), timeout=PATIENCE_S)
    if in_a_step:
        leader.hang.remote()
        time.sleep(0.5)
    os.kill(pids[0], signal.SIGKILL)
    assert all_gone(pids)
