"""The loop around the policy: what it does with an answer, with failures, and with a successor."""

import threading

import msgspec
import pytest
from ray.exceptions import RaySystemError

from cluster.autoscaler import Autoscaler, Mode, ScaledModel, ScalingError, SupersededError
from cluster.autoscaler_store import RecordStore
from cluster.policy import Cause, GatewayLoad, GatewayObservation, ModelObservation, ModelPolicy, Observation
from tests.support.policy_worlds import running

MEMORY = "packtrain/autoscaler/memory/1"
POLICY = ModelPolicy(min_groups=2, max_groups=4)
"""One group is observed, so the answer is always to have one more."""


class Cluster:
    """Observer and actuator."""

    def __init__(self) -> None:
        self.target = 1
        self.orders: list[tuple[str, int, tuple[str, ...]]] = []
        self.is_dark = False
        self.refuses = False
        self.num_settled = 0

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

    def settle(self) -> None:
        self.num_settled += 1
        if self.refuses:
            raise ScalingError("a group did not end")


class Records(dict[str, bytes]):
    """Ray's control store, which can be out of reach."""

    is_away = False

    def read(self, key: str) -> bytes | None:
        self._check()
        return self.get(key)

    def write(self, key: str, value: bytes | None) -> None:
        self._check()
        if value is None:
            self.pop(key, None)
        else:
            self[key] = value

    def create(self, key: str, value: bytes) -> bool:
        self._check()
        if key in self:
            return False
        self[key] = value
        return True

    def _check(self) -> None:
        if self.is_away:
            raise RaySystemError("the control store does not answer")


@pytest.fixture
def records() -> Records:
    return Records()


def autoscaler(cluster: Cluster, records: Records, mode: Mode = Mode.ON) -> Autoscaler:
    models = {"m": ScaledModel(policy=POLICY, mode=mode)}
    return Autoscaler(models, cluster, cluster, RecordStore(records), clock=lambda: 1000.0)


def test_it_carries_out_what_the_policy_decides(records: Records) -> None:
    cluster = Cluster()
    autoscaler(cluster, records).tick()
    assert cluster.orders == [("m", 2, ())]


def test_advice_is_logged_and_not_carried_out(records: Records) -> None:
    cluster = Cluster()
    adviser = autoscaler(cluster, records, Mode.ADVISE)
    adviser.tick()
    (entry,) = adviser.log(0.0)
    assert (cluster.orders, entry.decision.target, entry.decision.cause) == ([], 2, Cause.BOUNDS)


def test_off_is_off(records: Records) -> None:
    cluster = Cluster()
    decision = autoscaler(cluster, records, Mode.OFF).tick()
    assert decision is not None
    assert not decision.models
    assert not cluster.orders


def test_an_order_that_fails_is_told_and_given_again(records: Records) -> None:
    cluster = Cluster()
    cluster.refuses = True
    scaler = autoscaler(cluster, records)
    scaler.tick()
    assert scaler.log(0.0)[-1].error == "the controller is gone"
    cluster.refuses = False
    scaler.tick()
    assert cluster.orders == [("m", 2, ())]


def test_what_is_under_way_is_looked_after_at_every_look(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    scaler = autoscaler(cluster, records, Mode.ADVISE)
    scaler.tick()
    cluster.refuses = True
    assert scaler.tick() is not None
    assert cluster.num_settled == 2
    assert "a group did not end" in caplog.text


def test_nothing_is_scaled_blindly(records: Records) -> None:
    cluster = Cluster()
    cluster.is_dark = True
    assert autoscaler(cluster, records).tick() is None
    assert not cluster.orders


def test_nothing_is_scaled_that_a_successor_would_not_know_of(records: Records) -> None:
    cluster = Cluster()
    scaler = autoscaler(cluster, records)
    records.is_away = True
    scaler.tick()
    assert not cluster.orders
    with pytest.raises(ScalingError):
        autoscaler(cluster, records)
    records.is_away = False
    scaler.tick()
    assert cluster.orders == [("m", 2, ())]


def test_a_successor_knows_what_was_learned_and_why(records: Records) -> None:
    cluster = Cluster()
    first = autoscaler(cluster, records)
    first.tick()
    first.tick()
    second = autoscaler(cluster, records)
    assert [entry.decision.target for entry in second.log(0.0)] == [2]
    assert second._state == first._state


def test_the_one_before_stops_when_a_successor_is_there(records: Records) -> None:
    cluster = Cluster()
    first, second = autoscaler(cluster, records), autoscaler(cluster, records)
    with pytest.raises(SupersededError):
        first.tick()
    assert not cluster.orders
    second.tick()
    assert cluster.orders == [("m", 2, ())]
    first.run(threading.Event(), 0.0)  # returns by itself


def test_what_a_superseded_writer_still_writes_is_not_what_the_next_reads(records: Records) -> None:
    first, second = RecordStore(records), RecordStore(records)
    first.open()
    first.save(b"one")
    assert second.open() == b"one"
    second.save(b"two")
    records[MEMORY] = b"late"  # as if `first` had been stopped between its look for a successor and its writing
    with pytest.raises(SupersededError):
        first.save(b"later")
    assert RecordStore(records).open() == b"two"


def test_a_writer_that_died_before_it_wrote_is_passed_over(records: Records) -> None:
    first = RecordStore(records)
    first.open()
    first.save(b"one")
    RecordStore(records).open()
    assert RecordStore(records).open() == b"one"


def test_of_two_that_begin_at_once_one_goes_on(records: Records) -> None:
    stores = [RecordStore(records), RecordStore(records)]
    for store in stores:
        store.open()
        records["packtrain/autoscaler/last"] = b"0"  # neither sees that the other has begun
    with pytest.raises(SupersededError):
        stores[0].save(b"one")
    stores[1].save(b"two")


def test_old_memories_are_removed(records: Records) -> None:
    for _ in range(5):
        store = RecordStore(records)
        store.open()
        store.save(b"m")
    assert [key for key in records if "/memory/" in key] == ["packtrain/autoscaler/memory/5"]


@pytest.mark.parametrize("content", [b"", b"\x00damaged", b"\xc1" * 100])
def test_a_damaged_memory_is_measured_anew(records: Records, content: bytes) -> None:
    RecordStore(records).open()
    records[MEMORY] = content
    cluster = Cluster()
    autoscaler(cluster, records).tick()
    assert cluster.orders


def test_a_memory_of_another_version_is_measured_anew(records: Records) -> None:
    cluster = Cluster()
    autoscaler(cluster, records).tick()
    known = msgspec.msgpack.decode(records[MEMORY])
    known["state"]["version"] = 99
    records[MEMORY] = msgspec.msgpack.encode(known)
    assert autoscaler(cluster, records)._state.now_s is None


def test_decisions_that_say_the_same_are_one_entry(records: Records) -> None:
    cluster = Cluster()
    scaler = autoscaler(cluster, records)
    for _ in range(20):
        scaler.tick()
    causes = [(entry.decision.before, entry.decision.target) for entry in scaler.log(0.0)]
    assert causes == [(1, 2), (2, 2)]


def test_advice_that_is_repeated_is_one_entry_and_told_once(records: Records) -> None:
    cluster = Cluster()
    told: list[tuple[str, Mode, int]] = []
    adviser = Autoscaler(
        {"m": ScaledModel(policy=POLICY, mode=Mode.ADVISE)},
        cluster,
        cluster,
        RecordStore(records),
        clock=iter(range(1000, 2000)).__next__,
        on_change=lambda model, mode, made: told.append((model, mode, made.target)),
    )
    for _ in range(10):
        adviser.tick()
    (entry,) = adviser.log(0.0)
    assert (entry.first_s, entry.last_s) == (1000, 1009)
    assert told == [("m", Mode.ADVISE, 2)]


def test_an_order_that_fails_again_and_again_is_one_entry(records: Records) -> None:
    cluster = Cluster()
    cluster.refuses = True
    scaler = autoscaler(cluster, records)
    for _ in range(10):
        scaler.tick()
    assert [entry.error for entry in scaler.log(0.0)] == ["the controller is gone"]


def test_what_is_only_advised_takes_nothing_from_others(records: Records) -> None:
    class Shared(Cluster):
        """Two models with all of the accelerators."""

        def observe(self) -> Observation:
            groups = tuple(running(f"g{number}", 1000.0) for number in range(3))
            load = GatewayLoad(measured_s=1000.0, num_sequences=0, num_prompt_tokens=0)
            gateways = (GatewayObservation(gateway="gateway", load=load),)
            served = ModelObservation(target=3, groups=groups, gateways=gateways)
            looked_at = ModelObservation(target=1, groups=groups[:1], gateways=gateways)
            return Observation(models={"served": served, "looked at": looked_at}, num_accelerators=4)

    def orders(mode: Mode) -> list[tuple[str, int]]:
        cluster = Shared()
        served, wanted = ModelPolicy(min_groups=1, max_groups=4), ModelPolicy(min_groups=2, max_groups=4, priority=1)
        models = {"served": ScaledModel(policy=served), "looked at": ScaledModel(policy=wanted, mode=mode)}
        Autoscaler(models, cluster, cluster, RecordStore(records), clock=lambda: 1000.0).tick()
        return [(model, target) for model, target, _ in cluster.orders]

    assert orders(Mode.ADVISE) == []
    assert orders(Mode.ON) == [("served", 2)]
