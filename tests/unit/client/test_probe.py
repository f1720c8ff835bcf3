"""A look at a port tells a wrong address at once."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest

from serving.client.client import Client
from serving.client.probe import Port, look_at_port
from serving.contracts.addresses import resolve


@pytest.fixture
def grpc_port() -> Iterator[int]:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(0).wait(30)


@pytest.fixture
def http_port() -> Iterator[int]:
    """Answers one connection in HTTP/1."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(30)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_what_a_port_is(grpc_port: int, http_port: int) -> None:
    assert look_at_port("127.0.0.1", grpc_port) is Port.OPEN
    assert look_at_port("127.0.0.1", http_port) is Port.HTTP
    assert look_at_port("127.0.0.1", closed_port()) is Port.CLOSED
    assert look_at_port("127.0.0.1", grpc_port, tls=True) is Port.OPEN


@pytest.mark.parametrize("form", ["0.0.0.0:{}", "127.1:{}", "127.0.0.1:{}", "http://127.0.0.1:{}", "{}", ":{}"])
def test_a_closed_port_is_told_without_waiting_for_grpc(form: str) -> None:
    with Client(form.format(closed_port())) as client, pytest.raises(ConnectionError, match="nothing listens at"):
        client.wait_until_connected(timeout_s=0.0)  # must expire


def test_a_host_that_does_not_resolve_is_told_without_waiting_for_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("serving.client.client.resolve", partial(resolve, look_up=look_up))
    with Client("nowhere.invalid:1") as client, pytest.raises(ConnectionError) as caught:
        client.wait_until_connected(timeout_s=0.0)  # must expire
    assert str(caught.value) == (
        "nowhere.invalid:1: the host 'nowhere.invalid' cannot be resolved: Name or service not known"
    )
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # a proxy resolves names by itself
    with Client("nowhere.invalid:1") as client:
        assert client._problem(client._gateways[0]) == ""


def test_the_port_of_http_is_told_apart(http_port: int) -> None:
    with (
        Client(f"127.0.0.1:{http_port}") as client,
        pytest.raises(ConnectionError, match=r"speaks HTTP and not gRPC.*50051"),
    ):
        client.wait_until_connected()


def test_a_proxy_does_not_stand_before_this_machine(grpc_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(f"http://localhost:{grpc_port}") as client:
        client.wait_until_connected(timeout_s=60.0)
