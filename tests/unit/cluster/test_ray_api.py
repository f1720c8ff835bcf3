"""Our additions to how Ray starts a cluster, on stand-ins of what they replace in Ray."""

import importlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster import ray_api
from cluster.ray_api import (
    first_sentence,
    keep_serve_to_this_node,
    keeping_sigterm,
    only_needed_processes,
    patient_start,
    short_messages,
)

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


class Worker:
    """What Ray's thread is given."""

    def __init__(self, *messages: tuple[bytes | None, str]) -> None:
        self.current_job_id = ray.JobID.from_int(1)
        self.gcs_error_subscriber = self
        self.stopped = threading.Event()
        self.is_subscribed = False
        self._left = list(messages)

    def subscribe(self) -> None:
        self.is_subscribed = True

    def poll(self) -> tuple[bytes, dict[str, object] | None]:
        assert self.is_subscribed
        if not self._left:
            self.stopped.set()
            return b"", None
        job_id, text = self._left.pop(0)
        return b"", {"job_id": job_id, "error_message": text}


DIED = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, check the "
    "logs for the dead worker. Lease ID: 01 Worker ID: c0 Node ID: 5c Worker IP address: 192.0.2.2 Worker port: 41397 Worker "
    "PID: 28092 Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."
)


def test_what_ray_tells_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    own, foreign = ray.JobID.from_int(1).binary(), ray.JobID.from_int(2).binary()
    worker = Worker((own, DIED), (foreign, "Somebody else's."), (None, "One line.\nAnother."))
    with short_messages():
        ray._private.worker.listen_error_messages(worker, worker.stopped)
    assert [record.getMessage() for record in caplog.records] == [
        "Ray: A worker died or was killed while executing a task by an unexpected system error (pid 28092)",
        "Ray: One line",
    ]


def test_a_control_store_that_is_gone_ends_it_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    worker.poll = lambda: (_ for _ in ()).throw(ConnectionError("gone"))  # type: ignore[method-assign]
    with short_messages():
        ray._private.worker.listen_error_messages(worker, worker.stopped)
    assert caplog.records == []


@pytest.mark.parametrize("text", ["", ".", "no end", "v1.2 is old. Use v2."])
def test_of_any_text_there_is_a_sentence(text: str) -> None:
    assert first_sentence(text) == {"": "", ".": "", "no end": "no end"}.get(text, "v1.2 is old")


def test_sigterm_means_after_a_start_of_ray_what_it_meant_before() -> None:
    """Ray's native handler is put in place without Python's knowledge, and so the old one is set once more."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    set_by_ray = ray._private.utils.set_sigterm_handler
    try:
        with keeping_sigterm():
            ray._private.utils.set_sigterm_handler(lambda number, frame: told.append(-1))
            signal.raise_signal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as natively, below Python
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM, signal.SIGTERM]
    assert ray._private.utils.set_sigterm_handler is set_by_ray


@pytest.mark.parametrize(("node", "address"), [("127.0.0.1", "127.0.0.1:0"), ("fd00::2", "[fd00::2]:0")])
def test_serve_listens_for_other_replicas_at_the_address_of_the_node_alone(
    node: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve: Any = importlib.import_module("ray.serve._private.replica")
    asked: list[str] = []

    def listen(_server: object, at: str) -> int:
        asked.append(at)
        return 4711

    monkeypatch.setattr(serve, "add_port_to_grpc_server", listen)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    keep_serve_to_this_node()
    assert serve.add_port_to_grpc_server(object(), "[::]:0") == 4711 and asked == [address]
