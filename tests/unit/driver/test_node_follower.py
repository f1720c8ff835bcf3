"""Gateways come and go with the nodes of a cluster, and what a node lacks is told."""

import threading

import pytest

from serving.contracts.start_failure import StartError
from serving.driver.nodes import NodeFollower
from tests.support.waiting import PATIENCE_S


class Cluster:
    """Has nodes as a script says, a letter each, and is told how many gateways there are to be. `x` and `y` share a host."""

    def __init__(self, *looks: str | Exception) -> None:
        self.looks = list(looks)
        self.last = ""
        self.orders: list[int] = []
        self.num_asked = 0
        self.is_over = threading.Event()

    def look(self) -> dict[str, str]:
        if not self.looks:
            self.is_over.set()
        else:
            found = self.looks.pop(0)
            if isinstance(found, Exception):
                raise found
            self.last = found
        return {node: "xy" if node in "xy" else node for node in self.last}

    def problem(self) -> str:
        self.num_asked += 1
        return "ray.address: a node lacks a setting"


def follow(*looks: str | Exception, num_gateways: int | None = 2) -> Cluster:
    cluster = Cluster(*looks)
    follower = NodeFollower(
        num_gateways, look=cluster.look, order=cluster.orders.append, problem=cluster.problem, period_s=0.001
    )
    assert cluster.is_over.wait(PATIENCE_S)
    follower.close()
    return cluster


def test_there_are_as_many_gateways_as_hosts() -> None:
    assert follow("ab", "ab", "abc", "abc", "a").orders == [3, 1]
    assert follow("ax", "axy").orders == []


def test_their_number_can_be_fixed() -> None:
    assert follow("ab", "abc", "a", num_gateways=None).orders == []


@pytest.mark.parametrize("num_gateways", [2, None])
def test_what_a_new_node_lacks_is_told(num_gateways: int | None, caplog: pytest.LogCaptureFixture) -> None:
    assert follow("ab", "ac", "ac", "a", "ac", num_gateways=num_gateways).num_asked == 2
    assert caplog.text.count("a node lacks a setting") == 2


def test_nodes_that_were_there_when_it_was_joined_are_not_looked_at_again() -> None:
    assert follow("ab", "ab", "b").num_asked == 0


def test_one_is_always_left() -> None:
    assert follow("", "").orders == [1]


def test_a_cluster_that_does_not_answer_changes_nothing() -> None:
    assert follow(RuntimeError("the control store"), StartError("the controller"), KeyError("a bug"), "abc").orders == [
        3
    ]
