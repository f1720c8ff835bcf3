"""Groups are made, killed and made again, many times: nothing of them stays, neither on the machine nor in Ray."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from ray.util import placement_group_table
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.worker_group import RayExecutor
from model_parallel.errors import GroupFailedError
from model_parallel.runtime.executors import SpawnedExecutor
from model_parallel.runtime.leader import SocketExecutor
from tests.support.executors import execute
from tests.support.fake_rank import FAKE_RANK, group_config, plan, tokens
from tests.support.stack import ray_processes
from tests.support.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.timeout(7200)

NUM_CYCLES = 200
NUM_WARM_UP = 5
"""Cycles in which Ray opens what it keeps."""
SLACK = 3
"""Descriptors and ports that Ray opens by itself now and then. A leak would be one a cycle."""


@pytest.fixture
def ray_node() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Census:
    """What there is on the machine and in Ray of this test."""

    rank_processes: int
    placement_groups: int
    segments: int
    """Processes that map a group's shared memory, which has no name, or hold it open."""
    descriptors: int
    """Of this process, which leads the groups."""
    ports: int
    """On which this process and Ray's listen."""


def census() -> Census:
    ours = psutil.Process()
    # Another stack of this terminal session is none of ours.
    processes = [*(ray_processes() if ray.is_initialized() else ()), *ours.children()]
    ports = 0
    for process in (ours, *processes):
        try:
            ports += sum(each.status == psutil.CONN_LISTEN for each in process.net_connections("inet"))
        except psutil.NoSuchProcess:
            continue
    return Census(
        rank_processes=sum("RankActor" in line or "rank_process" in line for line in map(_command, processes)),
        placement_groups=sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())
        if ray.is_initialized()
        else 0,
        segments=sum(map(_holds_a_segment, (ours, *processes))),
        descriptors=ours.num_fds(),
        ports=ports,
    )


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _holds_a_segment(process: psutil.Process) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        directory = Path(f"/proc/{process.pid}")
        open_files = [os.readlink(each) for each in (directory / "fd").iterdir()]
        return "packtrain-store" in (directory / "maps").read_text() + " ".join(open_files)
    return False


def crash_one(executor: SocketExecutor, draw: random.Random, fault: signal.Signals) -> None:
    """The group makes a step and loses a rank."""
    reasons: list[str] = []
    executor.set_failure_callback(reasons.append)
    assert tokens(execute(executor, plan(1, (0, 5)))) == [15]
    assert all(_holds_a_segment(psutil.Process(pid)) for pid in executor.pids), "the census sees what there is"
    os.kill(draw.choice(executor.pids), fault)
    if fault is signal.SIGSTOP:  # which is noticed in a step
        with pytest.raises(GroupFailedError):
            execute(executor, plan(2, (0, 5)))
    else:
        assert wait_until(lambda: reasons), "the loss is noticed"
    executor.shutdown()
    assert wait_until(lambda: not any(map(psutil.pid_exists, executor.pids))), "all ranks are gone"


@contextmanager
def spawned() -> Iterator[SocketExecutor]:
    yield SpawnedExecutor(group_config(2, step_timeout_s=2.0), rank_class=FAKE_RANK)


@contextmanager
def placed_by_ray() -> Iterator[SocketExecutor]:
    bundles = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK")
    try:
        yield RayExecutor(group_config(2, step_timeout_s=2.0), placement_group=bundles, rank_class=FAKE_RANK)
    finally:
        remove_placement_group(bundles)


@pytest.mark.nightly
def test_spawned_groups_that_crash_and_are_made_anew_leave_nothing() -> None:
    check_cycles(spawned)


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_node")
def test_groups_on_ray_that_crash_and_are_made_anew_leave_nothing() -> None:
    check_cycles(placed_by_ray)


def check_cycles(group: Callable[[], AbstractContextManager[SocketExecutor]]) -> None:
    """Every tenth rank is stopped, the others are killed."""
    draw = random.Random(1)
    before = census()
    for turn in range(NUM_CYCLES):
        with group() as executor:
            crash_one(executor, draw, signal.SIGSTOP if turn % 10 == 9 else signal.SIGKILL)
        if turn == NUM_WARM_UP:
            before = census()
    clean = Census(0, 0, 0, before.descriptors + SLACK, before.ports + SLACK)

    def is_clean() -> bool:
        now = census()
        return all(getattr(now, name) <= getattr(clean, name) for name in Census.__dataclass_fields__)

    assert wait_until(is_clean), (
        f"{census()} after {NUM_CYCLES} cycles, {before} after {NUM_WARM_UP}, within {PATIENCE_S} s"
    )
    print(f"{census()} after {NUM_CYCLES} cycles, {before} after {NUM_WARM_UP}")
