"""Gateways come and go with the nodes of a cluster."""

import threading

import pytest

from serving.contracts.start_failure import StartError
from serving.driver.gateways import GatewayFollower
from tests.support.waiting import PATIENCE_S


class Cluster:
    """Counts hosts as a script says, and is told how many gateways there are to be."""

    def __init__(self, *hosts: int | Exception) -> None:
        self.hosts = list(hosts)
        self.orders: list[int] = []
        self.is_over = threading.Event()

    def count(self) -> int:
        if not self.hosts:
            self.is_over.set()
            return self.orders[-1]
        found = self.hosts.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def problem(self) -> str:
        return "ray.address: a node lacks a setting"

    def order(self, num_gateways: int) -> None:
        self.orders.append(num_gateways)


def orders(*hosts: int | Exception) -> list[int]:
    cluster = Cluster(*hosts)
    follower = GatewayFollower(2, count=cluster.count, order=cluster.order, problem=cluster.problem, period_s=0.001)
    assert cluster.is_over.wait(PATIENCE_S)
    follower.close()
    return cluster.orders


def test_there_are_as_many_as_hosts() -> None:
    assert orders(2, 2, 3, 3, 1) == [3, 1]


def test_what_a_new_node_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    orders(2, 3, 3)
    assert caplog.text.count("a node lacks a setting") == 1


def test_one_is_always_left() -> None:
    assert orders(0, 0) == [1]


def test_a_cluster_that_does_not_answer_changes_nothing() -> None:
    assert orders(RuntimeError("the control store"), StartError("the controller"), 3) == [3]
