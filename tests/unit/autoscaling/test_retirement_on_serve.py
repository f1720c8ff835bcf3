"""Which groups end, by Serve's own rules: its bookkeeping of a deployment runs here, on replicas that are none."""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import MagicMock, patch

import msgspec
import pytest
from ray.serve._private import deployment_state
from ray.serve._private.autoscaling_state import AutoscalingStateManager
from ray.serve._private.common import DeploymentID
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.deployment_state import DeploymentStateManager

from serving.autoscaling.retirement import Deployed, Replica, Retirements
from serving.contracts.fleet import Departure

with patch.dict(
    sys.modules, {"httpx": MagicMock()}
):  # Ray's stand-ins bring an HTTP client along that nobody uses here
    from ray.serve._private.test_utils import MockClusterNodeInfoCache, MockKVStore, MockReplicaActorWrapper

NODES = ("n0", "n1", "n2")
DEPLOYMENT = DeploymentID("d", "app")


class Serve:
    """Looks when somebody sleeps. Replicas that start need several looks for it."""

    def __init__(self) -> None:
        nodes = MockClusterNodeInfoCache()
        for node in NODES:
            nodes.add_node(node)
        self.manager: Any = DeploymentStateManager(
            MockKVStore(), MagicMock(), [], [], nodes, AutoscalingStateManager(), head_node_id_override="head"
        )
        self.departures: dict[str, Departure] = {}
        self.places = itertools.cycle(NODES)
        self.now_s = 0.0
        self.num_killed = 0

    def deploy(self, num_replicas: int) -> None:
        config = DeploymentConfig(num_replicas=num_replicas, max_constructor_retry_count=1)
        replica = ReplicaConfig.create(lambda: None)
        info = DeploymentInfo(
            deployment_config=config, replica_config=replica, start_time_ms=0, deployer_job_id="", version="1"
        )
        self.manager.deploy(DEPLOYMENT, info)
        self.manager.update()

    @property
    def actors(self) -> dict[str, Any]:
        """Stand-ins of the replicas' actors, by id, oldest first."""
        replicas = self.manager._deployment_states[DEPLOYMENT]._replicas.get()
        return {replica.replica_id.unique_id: replica._actor for replica in replicas}

    def running(self) -> set[str]:
        return {replica.id for replica in self.deployed()["d"].replicas if replica.state == "RUNNING"}

    def make_ready(self) -> None:
        """All that start do run."""
        for actor in self.actors.values():
            if actor._node_id is None:
                actor.set_node_id(next(self.places))
                actor.set_ready()
        self.manager.update()

    def look(self, seconds: float = 0.1) -> None:
        self.now_s += seconds
        for actor in self.actors.values():
            if actor.stopped and actor._node_id is not None:  # what has not started yet does not stop by itself
                actor.set_done_stopping()
        self.manager.update()

    def deployed(self) -> Mapping[str, Deployed]:
        found = self.manager.get_deployment_details(DEPLOYMENT)
        replicas = tuple(
            Replica(id=replica.replica_id, state=str(replica.state.value), started_s=replica.start_time_s)
            for replica in found.replicas
        )
        given_up = found.message if found.status == "DEPLOY_FAILED" else ""
        return {"d": Deployed(target=found.target_num_replicas, replicas=replicas, given_up=given_up)}

    def set_target(self, deployment: str, num_replicas: int) -> None:
        self.manager.set_target_num_replicas(DEPLOYMENT, num_replicas)

    def kill(self, replica: Replica) -> None:
        self.actors[replica.id].set_done_stopping()
        self.num_killed += 1

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        named = set(msgspec.msgpack.decode(arguments[0], type=list[str]))
        for group in named:
            if method == "retire":
                self.departures[group] = Departure.RETIRED
            else:
                self.actors[group].set_unhealthy()
        return [msgspec.msgpack.encode(group) for group in sorted(named)]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr(deployment_state, "ActorReplicaWrapper", MockReplicaActorWrapper)
    yield Serve()


@pytest.fixture
def retirements(serve: Serve) -> Callable[[], Retirements]:
    """As after a look of the autoscaler."""

    def learned() -> Retirements:
        made = Retirements(control=serve, deployment="d", sleep=serve.look, clock=lambda: serve.now_s)
        made.learn(serve.deployed()["d"], serve.departures)
        return made

    return learned


@pytest.mark.parametrize("place", range(5))
def test_the_one_that_was_chosen_ends(serve: Serve, retirements: Callable[[], Retirements], place: int) -> None:
    serve.deploy(5)
    serve.make_ready()
    before = serve.running()
    assert len(before) == 5
    victim = list(serve.actors)[place]
    retirements().scale(4, (victim,))
    retirements().settle()
    for _ in range(5):
        serve.look()
    assert serve.running() == before - {victim} == set(serve.actors)
    assert serve.deployed()["d"].target == 4
    assert serve.num_killed == 1, "the replacement"
    assert serve.manager.get_deployment_details(DEPLOYMENT).status == "HEALTHY"


def test_several_end_at_once(serve: Serve, retirements: Callable[[], Retirements]) -> None:
    serve.deploy(5)
    serve.make_ready()
    before, victims = serve.running(), tuple(serve.actors)[:3]
    retirements().scale(2, victims)
    retirements().settle()
    for _ in range(5):
        serve.look()
    assert serve.running() == before - set(victims) == set(serve.actors)


def test_serve_by_itself_takes_the_newest_of_a_node(serve: Serve) -> None:
    """So the tests above would notice."""
    serve.places = itertools.cycle(NODES[:1])
    serve.deploy(3)
    serve.make_ready()
    *kept, newest = serve.actors
    serve.set_target("d", 2)
    for _ in range(5):
        serve.look()
    assert serve.running() == set(kept)
    assert newest not in kept


def test_with_the_number_lowered_first_two_would_end(serve: Serve) -> None:
    serve.places = itertools.cycle(NODES[:1])
    serve.deploy(3)
    serve.make_ready()
    oldest, middle, _ = serve.actors
    serve.set_target("d", 2)
    serve.look()
    serve.actors[oldest].set_unhealthy()
    for _ in range(5):
        serve.look()
    assert serve.running() == {middle}


def test_a_deployment_whose_first_start_failed_is_started_again(
    serve: Serve, retirements: Callable[[], Retirements]
) -> None:
    serve.deploy(1)
    (actor,) = serve.actors.values()
    actor.set_failed_to_start()
    actor.set_done_stopping()
    for _ in range(5):
        serve.look()
    assert not serve.actors, "Serve has given up"
    assert serve.deployed()["d"].given_up
    retirements().begin_anew()
    serve.look()
    assert not serve.deployed()["d"].given_up
    serve.make_ready()
    assert len(serve.running()) == 1
