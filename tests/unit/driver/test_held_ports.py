"""Ports that a stack keeps from its check until it has stopped: its own servers get them, and nobody else does."""

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from prometheus_client import CollectorRegistry

from serving.config import ServingConfig, parse_config
from serving.contracts.addresses import open_listener, why_not_listening
from serving.driver.checks import check_ports, listeners
from serving.driver.held_ports import HeldPorts
from serving.gateway.server import bind
from serving.observability.endpoint import MetricsEndpoint
from tests.support.waiting import PATIENCE_S

HOST = "127.0.0.1"


@pytest.fixture
def port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def ports() -> Iterator[HeldPorts]:
    held = HeldPorts()
    yield held
    held.close()


def test_a_second_stack_does_not_get_a_port_that_is_kept(ports: HeldPorts, port: int) -> None:
    """Two stacks that started together both found the port free, and one failed when its models had loaded."""
    other = HeldPorts()
    assert ports.hold(HOST, port) == 0
    assert other.hold(HOST, port) == errno.EADDRINUSE
    assert ports.hold(HOST, port) == 0, "it is its own"
    ports.close()
    assert other.hold(HOST, port) == 0
    other.close()


HOSTS = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::", "::1")


@pytest.mark.parametrize("second", HOSTS)
@pytest.mark.parametrize("first", HOSTS)
def test_a_port_that_is_kept_is_kept_from_whoever_could_not_listen_there(
    ports: HeldPorts, port: int, first: str, second: str
) -> None:
    """The system says which addresses go together. Stacks of which one had a wildcard both got the port."""
    try:
        with open_listener(first, port) as listener:
            listener.listen()
            expected = why_not_listening(second, port)
    except OSError:
        pytest.skip(f"nobody listens at {first} here")
    if expected not in (0, errno.EADDRINUSE):
        pytest.skip(f"nobody listens at {second} here")
    other = HeldPorts()
    assert ports.hold(first, port) == 0
    assert other.hold(second, port) == expected
    other.close()
    assert ports.hold(second, port) == 0, "its own are told apart elsewhere"
    ports.close()
    assert other.hold(second, port) == 0
    other.close()


def test_of_many_that_start_together_exactly_one_gets_a_port(port: int) -> None:
    together = [HeldPorts() for _ in range(16)]
    barrier = threading.Barrier(len(together))

    def hold(number: int) -> int:
        barrier.wait(PATIENCE_S)
        return together[number].hold(HOSTS[number % 4], port)

    with ThreadPoolExecutor(len(together)) as pool:
        found = list(pool.map(hold, range(len(together))))
    for each in together:
        each.close()
    kept = {HOSTS[number % 4] for number, status in enumerate(found) if status == 0}
    assert kept in ({"127.0.0.1"}, {"127.0.0.2"}, {"127.0.0.1", "127.0.0.2"}, {"0.0.0.0"}, {"::"})
    assert found.count(0) == len(kept)
    assert set(found) <= {0, errno.EADDRINUSE}


def test_of_two_stacks_that_start_together_one_moves_what_nobody_chose_and_is_refused_for_the_rest() -> None:
    def config(gateway_port: int) -> ServingConfig:
        sections = {"gateway": {"port": gateway_port, "http_port": 0}, "models": [{"name": "m", "source": "s"}]}
        return parse_config(sections, origin="test")

    first, second = HeldPorts(), HeldPorts()
    check_ports(config(0), first.hold)
    changed, moved, problems = check_ports(config(0), second.hold)
    assert (changed.admin.port, changed.admin.metrics_port, problems) == (0, 0, [])
    assert [line.split()[0] for line in moved] == ["admin.metrics_port", "admin.port"]
    with socket.create_server((HOST, 0)) as server:
        chosen = int(server.getsockname()[1])
    assert check_ports(config(chosen), first.hold)[2] == []
    (problem,) = check_ports(config(chosen), second.hold)[2]
    assert f"gateway.port (--port): {HOST}:{chosen} is in use" in problem
    first.close()
    second.close()


async def test_servers_of_the_stack_listen_at_ports_that_are_kept(ports: HeldPorts, port: int) -> None:
    assert ports.hold(HOST, port) == 0
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    assert bind(server, HOST, port, None) == port
    await server.start()
    assert why_not_listening(HOST, port) == errno.EADDRINUSE
    await server.stop(None)
    with open_listener(HOST, port) as sock:
        http = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=sock)
        http.close()
        await http.wait_closed()
    endpoint = MetricsEndpoint(CollectorRegistry(), HOST, port)
    assert endpoint.port == port
    endpoint.close()
    assert ports.hold(HOST, port) == 0, "and it is still kept"


def test_the_system_gives_a_port_that_is_kept_to_nobody(ports: HeldPorts, port: int) -> None:
    """Ray's processes ask for free ports by the hundred while models load."""
    assert ports.hold(HOST, port) == 0
    with socket.socket() as client, pytest.raises(OSError) as refused:
        client.bind((HOST, port))
    assert refused.value.errno == errno.EADDRINUSE


def test_a_port_of_somebody_else_is_not_kept(ports: HeldPorts) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = int(server.getsockname()[1])
        assert ports.hold(HOST, port) == errno.EADDRINUSE
    assert ports.hold(HOST, port) == 0, "it is free now"


def test_a_port_whose_last_connection_waits_for_its_end_can_be_kept(ports: HeldPorts) -> None:
    """A stack that starts anew right after its end."""
    with socket.create_server((HOST, 0)) as server:
        port = int(server.getsockname()[1])
        client = socket.create_connection((HOST, port))
        accepted, _ = server.accept()
        accepted.close()  # who closes first waits
        client.close()
    assert ports.hold(HOST, port) == 0


def test_no_port_and_an_address_of_another_machine_are_not_kept(ports: HeldPorts, port: int) -> None:
    assert ports.hold(HOST, 0) == 0
    assert ports.hold("192.0.2.7", port) == errno.EADDRNOTAVAIL
    with open_listener(HOST, port):
        pass


def test_the_gateways_of_a_cluster_that_is_joined_listen_elsewhere() -> None:
    """The admin server does not: its port was tried when everything had loaded."""
    config = parse_config(
        {"models": [{"name": "m", "source": "s"}], "ray": {"address": "auto"}, "admin": {"port": 7000}}, origin="test"
    )
    assert [listener.setting for listener in listeners(config)] == ["admin.port"]
