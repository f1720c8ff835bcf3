"""Our additions to how Ray starts a cluster, on stand-ins of what they replace in Ray."""

from collections.abc import Iterator

import pytest
import ray

from cluster import ray_api
from cluster.ray_api import only_needed_processes, patient_start

services = ray._private.services


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RuntimeError | str]]:
    """What Ray's control store says of the node, one after the other."""
    left: list[RuntimeError | str] = []

    def get_node(address: str, node_id: str) -> str:
        answer = left.pop(0)
        if isinstance(answer, RuntimeError):
            raise answer
        return f"{answer} {node_id} at {address}"

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_api, "_NODE_POLL_S", 0.0)
    yield left
    assert not left, "all answers were asked for"
    assert services.get_node is get_node, "Ray is as before"


def test_a_node_that_comes_late_is_waited_for(
    answers: list[RuntimeError | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_api, "_has_raylet", lambda: True)
    answers += [RuntimeError("not yet")] * 50 + ["node"]
    with patient_start(60.0):
        assert services.get_node("here", "a1") == "node a1 at here"


def test_a_node_whose_raylet_has_ended_is_not_waited_for(answers: list[RuntimeError | str]) -> None:
    answers.append(RuntimeError("nobody"))
    with patient_start(60.0), pytest.raises(RuntimeError, match="nobody"):
        services.get_node("here", "a1")


def test_a_node_that_never_comes_has_a_deadline(
    answers: list[RuntimeError | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_api, "_has_raylet", lambda: True)
    answers.append(RuntimeError("not yet"))
    with patient_start(-1.0), pytest.raises(RuntimeError, match="not yet"):
        services.get_node("here", "a1")


def test_a_private_cluster_has_no_dashboard_and_ray_is_as_before_afterwards() -> None:
    node, utils = ray._private.node.Node, ray._private.utils
    before = node.start_monitor, node.start_log_monitor, node.start_api_server, utils.get_dashboard_dependency_error
    assert utils.get_dashboard_dependency_error() is None
    with only_needed_processes():
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)
        assert (
            node.start_monitor() is node.start_log_monitor() is node.start_api_server(include_dashboard=False) is None
        )
    after = node.start_monitor, node.start_log_monitor, node.start_api_server, utils.get_dashboard_dependency_error
    assert after == before
