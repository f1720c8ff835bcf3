"""Which groups end when there are to be fewer: those that were chosen, on a Serve that would take others."""

from collections.abc import Callable, Mapping

import msgspec
import pytest

from cluster.autoscaler import ScalingError
from cluster.policy import GroupLoad
from serving.autoscaling.retirement import LEAVE_TIMEOUT_S, Deployed, Replica, Retirements
from serving.contracts.fleet import Departure
from tests.support.policy_worlds import group_load


class Serve:
    """Its rule: what does not run ends first, then the newest; what fails its health check ends and is replaced. It looks when
    somebody sleeps. Groups drain when the test says so."""

    def __init__(self, *groups: str) -> None:
        self.states = dict.fromkeys(groups, "RUNNING")
        """Oldest first."""
        self.target = len(groups)
        self.departures: dict[str, Departure] = {}
        self.leaving: dict[str, int] = {}
        """Looks until their third failed health check."""
        self.silent: set[str] = set()
        self.num_replacements = 0
        self.now_s = 0.0
        self.fails_after: int | None = None
        self.given_up = ""
        self.orders: list[int] = []
        self.loads: dict[str, GroupLoad] = {}
        self.drains_at_once = False
        self.killed: set[str] = set()

    @property
    def running(self) -> set[str]:
        return {group for group, state in self.states.items() if state == "RUNNING"}

    def deployed(self) -> Mapping[str, Deployed]:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise ScalingError("the controller does not answer")
        replicas = tuple(Replica(id=group, state=state, started_s=1.0) for group, state in self.states.items())
        return {"d": Deployed(target=self.target, replicas=replicas, given_up=self.given_up)}

    def set_target(self, deployment: str, num_replicas: int) -> None:
        assert deployment == "d"
        self.target = num_replicas
        self.orders.append(num_replicas)

    def kill(self, replica: Replica) -> None:
        assert self.states[replica.id] == "STOPPING"
        self.killed.add(replica.id)

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        assert deployment == "d"
        if method == "load":
            return [
                msgspec.msgpack.encode((group, self.loads.get(group), self.departures.get(group, Departure.NONE)))
                for group in sorted(self.running)
            ]
        named = msgspec.msgpack.decode(arguments[0], type=list[str])
        answering = self.running & set(named) - self.silent
        if method == "retire":
            how = Departure.RETIRED if self.drains_at_once else Departure.RETIRING
            self.departures |= dict.fromkeys(answering, how)
        else:
            assert method == "leave"
            for group in sorted(answering):
                if self.departures.get(group) is Departure.RETIRED:
                    self.leaving.setdefault(group, 3 + len(self.leaving))
        return [msgspec.msgpack.encode(group if group in answering else "") for group in sorted(self.running)]

    def look(self, seconds: float = 0.1) -> None:
        self.now_s += seconds
        if not self.target:
            self.given_up = ""
        for group in self.leaving:
            self.leaving[group] -= 1
            if self.leaving[group] == 0:
                self.states[group] = "STOPPING"
        counted = [group for group, state in self.states.items() if state != "STOPPING"]
        for _ in range(self.target - len(counted)):
            self.num_replacements += 1
            self.states[f"new{self.num_replacements}"] = "STARTING"
        starting = [group for group in counted if self.states[group] == "STARTING"]
        order = [*starting, *reversed([group for group in counted if group not in starting])]
        for group in order[: max(0, len(counted) - self.target)]:
            self.states[group] = "STOPPING"

    def settled(self) -> set[str]:
        """Groups that are left when Serve has looked often enough."""
        for _ in range(10):
            self.look()
        assert "STARTING" not in self.states.values()
        return self.running


def learned(serve: Serve) -> Retirements:
    """As after a look of the autoscaler, which may be a new one."""
    retirements = Retirements(control=serve, deployment="d", sleep=serve.look, clock=lambda: serve.now_s)
    retirements.learn(serve.deployed()["d"], serve.departures)
    return retirements


@pytest.mark.parametrize("victims", [("a",), ("b",), ("c",), ("a", "b"), ("c", "a")])
def test_those_that_were_chosen_end_and_no_other(victims: tuple[str, ...]) -> None:
    serve = Serve("a", "b", "c")
    retirements = learned(serve)
    retirements.scale(3 - len(victims), victims)
    assert retirements.target(serve.deployed()["d"]) == 3 - len(victims)
    retirements.settle()
    assert serve.settled() == {"a", "b", "c"}, "they drain as long as it takes"
    assert serve.target == 3
    serve.departures |= {group: Departure.RETIRED for group in victims}
    learned(serve).settle()  # by a successor
    assert serve.settled() == {"a", "b", "c"} - set(victims)
    assert serve.target == 3 - len(victims)
    assert serve.killed == {group for group in serve.states if group.startswith("new")}, "no replacement lingers"
    assert learned(serve).target(serve.deployed()["d"]) == serve.target


def test_serve_alone_would_take_the_newest() -> None:
    """So the tests above would notice."""
    serve = Serve("a", "b", "c")
    serve.set_target("d", 2)
    assert serve.settled() == {"a", "b"}


def test_one_that_drains_still_does_not_hold_up_another() -> None:
    serve = Serve("a", "b", "c")
    learned(serve).scale(1, ("a", "b"))
    serve.departures["b"] = Departure.RETIRED
    learned(serve).settle()
    assert serve.settled() == {"a", "c"}
    assert learned(serve).target(serve.deployed()["d"]) == 1


def test_those_that_start_end_at_once() -> None:
    serve = Serve("a", "b")
    serve.states["c"], serve.target = "STARTING", 3
    learned(serve).scale(1, ("c", "a"))
    assert serve.target == 2
    assert serve.killed == {"c"}
    serve.departures["a"] = Departure.RETIRED
    learned(serve).settle()
    assert serve.settled() == {"b"}


def test_more_groups_come_beside_one_that_retires() -> None:
    serve = Serve("a", "b")
    learned(serve).scale(1, ("a",))
    learned(serve).scale(3, ())
    assert serve.target == 4
    serve.departures["a"] = Departure.RETIRED
    learned(serve).settle()
    assert serve.target == 3


def test_all_end_without_a_choice() -> None:
    serve = Serve("a", "b")
    learned(serve).scale(1, ("b",))
    learned(serve).scale(0, ("a",))
    assert serve.settled() == set()


def test_a_group_that_does_not_answer_is_told() -> None:
    serve = Serve("a", "b", "c")
    serve.silent = {"a"}
    retirements = learned(serve)
    with pytest.raises(ScalingError, match="a did not answer"):
        retirements.scale(1, ("a", "b"))
    assert retirements.target(serve.deployed()["d"]) == 2
    retirements.scale(1, ("c", "a"))
    assert serve.departures == {"b": Departure.RETIRING, "c": Departure.RETIRING}


def test_a_group_that_is_lost_while_it_retires_leaves_the_number_as_it_was() -> None:
    serve = Serve("a", "b")
    learned(serve).scale(1, ("a",))
    serve.states["a"] = "STOPPING"
    retirements = learned(serve)
    assert retirements.target(serve.deployed()["d"]) == 2
    retirements.settle()
    assert serve.target == 2


def test_one_that_does_not_go_is_told_and_tried_again() -> None:
    serve = Serve("a", "b")
    serve.departures["a"] = Departure.RETIRED
    serve.silent = {"a"}
    with pytest.raises(ScalingError, match=f"a did not end within {LEAVE_TIMEOUT_S:g} s"):
        learned(serve).settle()
    assert serve.target == 2
    serve.silent = set()
    learned(serve).settle()
    assert serve.settled() == {"b"}


@pytest.mark.parametrize("num_looks", range(1, 8))
def test_whenever_it_is_lost_the_next_one_comes_to_the_same(num_looks: int) -> None:
    """Or to the number of before, with a new group: then the policy decides again."""
    serve = Serve("a", "b", "c")
    serve.departures["a"] = Departure.RETIRED
    retirements = learned(serve)
    serve.fails_after = num_looks
    _until_lost(retirements.settle)
    serve.fails_after = None
    learned(serve).settle()
    for group, state in serve.states.items():
        serve.states[group] = "RUNNING" if state == "STARTING" else state
    assert serve.settled() in ({"b", "c"}, {"b", "c", "new1"})
    assert len(serve.running) == serve.target


def _until_lost(call: Callable[[], None]) -> None:
    try:
        call()
    except ScalingError as error:
        assert "controller" in str(error)


def test_what_serve_has_given_up_is_begun_anew() -> None:
    serve = Serve()
    serve.target, serve.given_up = 2, "a node was lost"
    learned(serve).begin_anew()
    assert serve.orders == [0, 2]
    assert not serve.given_up


def test_what_runs_or_starts_is_left_alone() -> None:
    for state in ("RUNNING", "STARTING"):
        serve = Serve("a")
        serve.states["a"], serve.given_up = state, "a node was lost"
        learned(serve).begin_anew()
        assert not serve.orders
    serve = Serve()
    serve.given_up = "of before"
    learned(serve).begin_anew()
    assert not serve.orders, "none is wanted"


def test_an_operator_has_those_with_the_least_to_move_end() -> None:
    serve = Serve("a", "b", "c")
    serve.drains_at_once = True
    serve.loads = {"a": group_load(0.0), "b": group_load(0.0, num_running=1, kv_usage=0.1)}
    serve.loads["c"] = group_load(0.0, num_running=1, kv_usage=0.5)
    learned(serve).shrink(1, 60.0)
    assert serve.settled() == {"c"}
    assert serve.target == 1


def test_an_operator_does_not_wait_for_ever() -> None:
    serve = Serve("a", "b")
    serve.loads = {group: group_load(0.0) for group in serve.running}
    with pytest.raises(ScalingError, match="did not end within 60 s"):
        learned(serve).shrink(1, 60.0)
    assert serve.target == 2
