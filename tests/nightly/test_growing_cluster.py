"""Groups on a cluster of several nodes that scales itself: nodes come for whole groups and go after them, and whatever is lost on
the way, no request fails."""

import json
import os
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster import ray_api
from serving.autoscaling.actor import NAME, NAMESPACE, start_autoscaler
from serving.autoscaling.settings import settings_of
from serving.cli.fleet import sentence
from serving.client.client import Client
from serving.config import ServingConfig, parse_config
from serving.contracts.fleet import Fleet
from serving.driver import applications
from serving.driver.app import RunningApp, start
from serving.driver.environment import token_file
from serving.gateway.deployment import Gateway
from tests.support.growing_cluster import GangWatch, growing_cluster, lose_node, nodes_of_ranks, workers
from tests.support.operations import Load, ask, entry, groups
from tests.support.small_llama import save_small_llama
from tests.support.stack import ray_processes, wait_until
from tests.support.switched_autoscaler import CLOCK_NOTE, SILENCE_NOTE, SwitchedAutoscaler
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

NAME_OF_MODEL = "tiny"
NUM_CLIENTS = 12
"""More than three groups of two sequences serve at a time."""
SCALE_TIMEOUT_S = 6 * PATIENCE_S
LONGEST_PARTIAL_S = 30.0
SHRINK_AFTER_S = 8.0


def config(address: str, source: Path, directory: Path) -> ServingConfig:
    scaling = {
        "min_groups": 0,
        "max_groups": 3,
        "ttft_p99_s": 1.0,
        "tpot_p99_s": 0.5,
        "shrink_after_s": SHRINK_AFTER_S,
        "cooldown_s": 4.0,
        "idle_s": 5.0,
    }
    data = {
        "models": [
            entry(NAME_OF_MODEL, source, tensor_parallel_size=2, cpus_per_rank=1.0, max_num_seqs=2, autoscaling=scaling)
        ],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 5},
        "admin": {"metrics_port": 0, "port": 0},
        "autoscaler": {"period_s": 1.0},
        "ray": {"address": address, "wait_for_nodes_s": SCALE_TIMEOUT_S, "num_gateways": 1},
    }
    return parse_config(data, origin="test")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """On a cluster that has no node for a group when it starts, and at most three."""
    source = save_small_llama(tmp_path_factory.mktemp("models") / "tiny")
    with tempfile.TemporaryDirectory(prefix="pt", dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        directory = Path(name)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(directory)))
        with growing_cluster(directory, cpus_per_node=2, max_nodes=3) as address:
            running = start(config(address, source, directory), print)
            try:
                yield running
            finally:
                running.stop()
    wait_until(lambda: not ray_processes(), PATIENCE_S, "Ray's processes are gone")


def fleet(app: RunningApp) -> Fleet:
    """What the gateway was told last."""
    address = str(app.metrics_url).replace("/metrics", "/fleet")
    with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
        return msgspec.json.decode(answer.read(), type=Fleet)


def states(app: RunningApp) -> list[str]:
    """Of all groups."""
    return sorted(group.state for group in fleet(app).models[NAME_OF_MODEL].groups)


def target(app: RunningApp) -> int:
    return fleet(app).models[NAME_OF_MODEL].target


def changes(app: RunningApp) -> list[tuple[int, int]]:
    return [(made.before, made.target) for made in fleet(app).decisions if made.before != made.target]


def wait_for_groups(app: RunningApp, num_groups: int) -> None:
    wait_until(
        lambda: states(app) == ["running"] * num_groups and len(workers()) >= num_groups,
        SCALE_TIMEOUT_S,
        f"{num_groups} groups run",
    )


def wait_asleep(app: RunningApp) -> None:
    wait_until(lambda: states(app) == [], SCALE_TIMEOUT_S, "no group is left")
    wait_until(lambda: not workers(), SCALE_TIMEOUT_S, "all nodes are released")


def num_starting() -> int:
    """Groups, as Serve has it. After its controller's restart those that had begun are RECOVERING until they run."""
    found = applications.deployed(NAME_OF_MODEL)
    return 0 if found is None else sum(state in ("STARTING", "RECOVERING") for state in found.replicas.values())


@contextmanager
def watched(app: RunningApp) -> Iterator[GangWatch]:
    """No part of a gang holds a node within the block. When the block fails, what was decided is told."""
    watch = GangWatch(ranks_per_node=2, longest_s=LONGEST_PARTIAL_S, num_starting=num_starting)
    try:
        yield watch
    except BaseException:
        print(*map(sentence, fleet(app).decisions), sep="\n")
        raise
    finally:
        watch.end()
    assert not watch.partial


@contextmanager
def trickle(app: RunningApp) -> Iterator[None]:
    """One answer after the other, with pauses that are too short to sleep in. Raises what one failed with."""
    is_over, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            with Client(app.address) as client:
                while not is_over.wait(2.0):
                    ask(client, NAME_OF_MODEL, 0)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(SCALE_TIMEOUT_S)
    assert not failures, failures


@contextmanager
def loaded(app: RunningApp, num_clients: int) -> Iterator[Load]:
    """They stream until the end of the block. Raises what a request failed with."""
    load = Load(app.address, NAME_OF_MODEL, num_clients)
    try:
        yield load
    finally:
        load.end()


def nodes_without_ranks() -> set[str]:
    return workers().keys() - set(nodes_of_ranks())


def kill_controller() -> None:
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    os.kill(int(ray.get(controller.get_pid.remote(), timeout=PATIENCE_S)), signal.SIGKILL)


def kill_autoscaler() -> None:
    os.kill(int(ray.get(ray.get_actor(NAME, NAMESPACE).pid.remote(), timeout=PATIENCE_S)), signal.SIGKILL)


def test_groups_and_their_nodes_come_with_the_load_and_go_after_it(app: RunningApp) -> None:
    with Client(app.address) as client:
        alone = {seed: {ask(client, NAME_OF_MODEL, seed)} for seed in range(NUM_CLIENTS)}
    with watched(app) as watch:
        wait_asleep(app)
        begin = len(changes(app))
        with trickle(app):
            with loaded(app, NUM_CLIENTS) as load:
                wait_for_groups(app, 3)
                assert watch.most_nodes == 3
            wait_for_groups(app, 1)
            wait_until(lambda: len(workers()) == 1, SCALE_TIMEOUT_S, "two nodes are released")
        wait_asleep(app)
    assert load.answers == alone
    made = changes(app)[begin:]
    assert made[0][0] == 0
    assert made[-1] == (1, 0)
    assert max(after for _, after in made) == 3


def test_controller_autoscaler_and_a_node_are_lost_while_groups_start(app: RunningApp) -> None:
    with watched(app):
        wait_asleep(app)
        with loaded(app, NUM_CLIENTS):
            wait_until(lambda: target(app) > 0, SCALE_TIMEOUT_S, "a group is ordered")
            kill_controller()
            wait_until(lambda: bool(nodes_of_ranks()), SCALE_TIMEOUT_S, "a group's ranks are there")
            known = set(groups(NAME_OF_MODEL))
            wait_until(lambda: bool(nodes_without_ranks()), SCALE_TIMEOUT_S, "a node comes for another group")
            unused = min(nodes_without_ranks())
            kill_autoscaler()
            lose_node(unused)
            wait_for_groups(app, 3)
            assert known <= set(groups(NAME_OF_MODEL)), "what ran goes on"
        wait_asleep(app)


def test_the_node_of_the_first_group_is_lost_while_it_starts_and_serve_knows_of_no_other(app: RunningApp) -> None:
    """After its controller's restart Serve takes the start for the first one, and gives up when that fails."""
    with watched(app), Client(app.address) as client:
        wait_asleep(app)
        kill_controller()
        with loaded(app, 1) as load:
            wait_until(lambda: len(workers()) > 0, SCALE_TIMEOUT_S, "a node comes")
            wait_until(lambda: "starting" in states(app), SCALE_TIMEOUT_S, "a group starts")
            lose_node(next(iter(workers())))
            wait_until(lambda: "running" in states(app), SCALE_TIMEOUT_S, "a group runs")
        assert ask(client, NAME_OF_MODEL, 0) in load.answers[0]
        wait_asleep(app)


def test_frozen_metrics_hold_and_a_clock_that_jumps_changes_nothing_for_long(app: RunningApp) -> None:
    settings = settings_of(app.operations.entries, app.config.autoscaler, Gateway.__name__)
    assert settings is not None
    with watched(app), trickle(app):
        start_autoscaler(settings, PATIENCE_S, SwitchedAutoscaler)
        with loaded(app, NUM_CLIENTS):
            wait_for_groups(app, 3)
            ray_api.write_note(SILENCE_NOTE, "1")
        # The trickle goes on, for which one group is enough.
        time.sleep(2 * SHRINK_AFTER_S)
        assert len(groups(NAME_OF_MODEL)) == 3
        ray_api.write_note(SILENCE_NOTE, None)
        wait_for_groups(app, 1)

        for jump_s in (3600.0, -3600.0):
            ray_api.write_note(CLOCK_NOTE, str(jump_s))
            with loaded(app, NUM_CLIENTS):
                wait_for_groups(app, 3)
            wait_for_groups(app, 1)
    wait_asleep(app)
    print(json.dumps(changes(app)))
