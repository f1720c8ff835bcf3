"""The loop around the policy: what it does with an answer, with failures, and with a successor."""

import threading
from pathlib import Path

import msgspec
import pytest

from cluster.autoscaler import Autoscaler, Mode, ScaledModel, ScalingError, SupersededError
from cluster.autoscaler_store import FileStore
from cluster.policy import Cause, ModelObservation, ModelPolicy, Observation
from tests.support.policy_worlds import running

POLICY = ModelPolicy(min_groups=2, max_groups=4)
"""One group is observed, so the answer is always to have one more."""


class Cluster:
    """Observer and actuator."""

    def __init__(self) -> None:
        self.target = 1
        self.orders: list[tuple[str, int, tuple[str, ...]]] = []
        self.is_dark = False
        self.refuses = False

    def observe(self) -> Observation:
        if self.is_dark:
            raise ScalingError("Ray does not answer")
        groups = tuple(running(f"g{number}", 1000.0) for number in range(self.target))
        return Observation(models={"m": ModelObservation(target=self.target, groups=groups, gateways=())})

    def scale(self, model: str, target: int, victims: tuple[str, ...]) -> None:
        if self.refuses:
            raise ScalingError("the controller is gone")
        self.orders.append((model, target, victims))
        self.target = target


def autoscaler(cluster: Cluster, path: Path, mode: Mode = Mode.ON) -> Autoscaler:
    models = {"m": ScaledModel(policy=POLICY, mode=mode)}
    return Autoscaler(models, cluster, cluster, FileStore(path / "autoscaler"), clock=lambda: 1000.0)


def test_it_carries_out_what_the_policy_decides(tmp_path: Path) -> None:
    cluster = Cluster()
    autoscaler(cluster, tmp_path).tick()
    assert cluster.orders == [("m", 2, ())]


def test_advice_is_logged_and_not_carried_out(tmp_path: Path) -> None:
    cluster = Cluster()
    adviser = autoscaler(cluster, tmp_path, Mode.ADVISE)
    adviser.tick()
    (entry,) = adviser.log(0.0)
    assert (cluster.orders, entry.decision.target, entry.decision.cause) == ([], 2, Cause.BOUNDS)


def test_off_is_off(tmp_path: Path) -> None:
    cluster = Cluster()
    decision = autoscaler(cluster, tmp_path, Mode.OFF).tick()
    assert decision is not None
    assert not decision.models
    assert not cluster.orders


def test_an_order_that_fails_is_told_and_given_again(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.refuses = True
    scaler = autoscaler(cluster, tmp_path)
    scaler.tick()
    assert scaler.log(0.0)[-1].error == "the controller is gone"
    cluster.refuses = False
    scaler.tick()
    assert cluster.orders == [("m", 2, ())]


def test_nothing_is_scaled_blindly(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.is_dark = True
    assert autoscaler(cluster, tmp_path).tick() is None
    assert not cluster.orders


def test_nothing_is_scaled_that_a_successor_would_not_know_of(tmp_path: Path) -> None:
    cluster = Cluster()

    class FullDisk(FileStore):
        def save(self, memory: bytes) -> None:
            raise ScalingError("no space left")

    models = {"m": ScaledModel(policy=POLICY)}
    Autoscaler(models, cluster, cluster, FullDisk(tmp_path / "autoscaler"), clock=lambda: 1000.0).tick()
    assert not cluster.orders


def test_a_successor_knows_what_was_learned_and_why(tmp_path: Path) -> None:
    cluster = Cluster()
    first = autoscaler(cluster, tmp_path)
    first.tick()
    first.tick()
    second = autoscaler(cluster, tmp_path)
    assert [entry.decision.target for entry in second.log(0.0)] == [2]
    assert second._state == first._state


def test_the_one_before_stops_when_a_successor_is_there(tmp_path: Path) -> None:
    cluster = Cluster()
    first, second = autoscaler(cluster, tmp_path), autoscaler(cluster, tmp_path)
    with pytest.raises(SupersededError):
        first.tick()
    assert not cluster.orders
    second.tick()
    assert cluster.orders == [("m", 2, ())]
    first.run(threading.Event(), 0.0)  # returns by itself


@pytest.mark.parametrize("content", [b"", b"\x00damaged", b"\xc1" * 100])
def test_a_damaged_memory_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "autoscaler").write_bytes(content)
    cluster = Cluster()
    autoscaler(cluster, tmp_path).tick()
    assert cluster.orders


def test_a_memory_of_another_version_is_measured_anew(tmp_path: Path) -> None:
    cluster = Cluster()
    autoscaler(cluster, tmp_path).tick()
    path = tmp_path / "autoscaler"
    known = msgspec.msgpack.decode(path.read_bytes())
    known["state"]["version"] = 99
    path.write_bytes(msgspec.msgpack.encode(known))
    assert autoscaler(cluster, tmp_path)._state.now_s is None


def test_decisions_that_say_the_same_are_one_entry(tmp_path: Path) -> None:
    cluster = Cluster()
    scaler = autoscaler(cluster, tmp_path)
    for _ in range(20):
        scaler.tick()
    causes = [(entry.decision.before, entry.decision.target) for entry in scaler.log(0.0)]
    assert causes == [(1, 2), (2, 2)]
