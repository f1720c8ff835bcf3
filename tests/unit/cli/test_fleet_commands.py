"""`packtrain status` and `packtrain autoscaler explain`."""

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from threading import Thread

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from serving.cli.fleet import read_fleet, render
from serving.cli.main import app
from serving.contracts.fleet import Fleet, FleetDecision, FleetGroup, FleetModel

NOW_S = time.time()
GROUP = FleetGroup(group="g1", state="running", since_s=NOW_S - 7200, num_running=3, num_waiting=1, kv_usage=0.25)
DECISION = FleetDecision(
    first_s=NOW_S - 7200, last_s=NOW_S - 7200, model="chat", mode="on", before=1, target=2, cause="demand",
    reason="1 → 2: much arrives",
)  # fmt: skip
FLEET = Fleet(
    at_s=NOW_S,
    models={
        "chat": FleetModel(
            mode="on", target=2, min_groups=1, max_groups=4,
            groups=(GROUP, FleetGroup(group="g2", state="starting", since_s=NOW_S - 30)),
        ),
        "fixed": FleetModel(mode="off", target=1, min_groups=1, max_groups=1, groups=()),
    },
    decisions=(
        DECISION,
        msgspec.structs.replace(
            DECISION, first_s=NOW_S - 600, last_s=NOW_S - 60, mode="advise", before=2, reason="stays at 2",
            warnings=("3 groups are needed and max_groups is 2",), error="the controller does not answer",
        ),
        msgspec.structs.replace(DECISION, model="other", first_s=NOW_S, last_s=NOW_S),
    ),
)  # fmt: skip


@pytest.fixture
def address() -> Iterator[str]:
    """Of a gateway that shows FLEET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/fleet" else 404)
            self.end_headers()
            self.wfile.write(msgspec.json.encode(FLEET))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_status_shows_groups_and_the_last_decisions(address: str) -> None:
    output = CliRunner().invoke(app, ["status", "--address", address], catch_exceptions=False).output
    assert "much arrives" in output
    shown = StringIO()
    Console(file=shown, width=160).print(render(FLEET, NOW_S))
    for word in ("g1", "running", "2.0 h", "25%", "g2", "starting", "30 s", "2 (1-4)", "fixed", "much arrives"):
        assert word in shown.getvalue()


def test_explain_goes_back_as_far_as_it_is_asked_to(address: str) -> None:
    explained = CliRunner().invoke(app, ["autoscaler", "explain", "--address", address], catch_exceptions=False).output
    assert len(explained.splitlines()) == 2
    assert "chat (advise), demand: stays at 2; warning: 3 groups" in explained
    assert "not carried out: the controller does not answer" in explained
    whole = CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--since", "1d"]).output
    assert len(whole.splitlines()) == 3
    of_one = ["autoscaler", "explain", "--address", address, "--model", "other", "--since", "1d"]
    assert len(CliRunner().invoke(app, of_one).output.splitlines()) == 1


def test_no_decision_is_said_to_be_none(address: str) -> None:
    nothing = ["autoscaler", "explain", "--address", address, "--model", "fixed"]
    assert "no decision since" in CliRunner().invoke(app, nothing).output


def test_a_wrong_length_of_time_is_named(address: str) -> None:
    result = CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--since", "soon"])
    assert result.exit_code != 0
    assert "'soon'" in result.output


def test_whoever_does_not_answer_is_named() -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 "):
        read_fleet("1")


def test_the_port_of_another_protocol_is_told_from_that_of_the_metrics() -> None:
    """As a gRPC server's answers begin: with frames of HTTP/2."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(bytes.fromhex("000018040000000000000400400000000500400000fe030000000100000003000000c8"))

        thread = Thread(target=answer)
        thread.start()
        result = CliRunner().invoke(app, ["status", "--address", str(server.getsockname()[1])])
        thread.join()
    assert isinstance(result.exception, ConnectionError)
    assert "does not speak HTTP: give the port of the metrics (--address, admin.metrics_port) and" in str(
        result.exception
    )


def test_what_is_no_gateway_is_told_from_one(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(msgspec.json, "encode", lambda fleet: json.dumps({"at_s": "soon"}).encode())
    with pytest.raises(ConnectionError, match="is no gateway"):
        read_fleet(address)


def test_no_proxy_stands_between_this_machine_and_itself(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert read_fleet(address).models.keys() == FLEET.models.keys()
    assert read_fleet(address.replace("127.0.0.1", "localhost")).models.keys() == FLEET.models.keys()
    with pytest.raises(ConnectionError, match=r"192\.0\.2\.1:9464"):  # through the proxy, which is not there
        read_fleet("192.0.2.1")


def test_a_model_that_nobody_knows_is_told_with_those_that_are_served(address: str) -> None:
    unknown = CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--model", "nope"])
    assert unknown.exit_code == 2
    said = " ".join(unknown.output.replace("│", " ").split())
    assert "no model 'nope' is served; served: chat, fixed" in said
    for known in ("chat", "fixed", "other"):
        assert CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--model", known]).exit_code == 0


@pytest.mark.parametrize("since", ["999999999d", "36501d", "876001h"])
def test_no_length_of_time_is_out_of_the_calendar(address: str, since: str) -> None:
    refused = CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--since", since])
    assert refused.exit_code == 2
    assert f"at most 36500d; not '{since}'" in " ".join(refused.output.replace("│", " ").split())
    assert CliRunner().invoke(app, ["autoscaler", "explain", "--address", address, "--since", "36500d"]).exit_code == 0
