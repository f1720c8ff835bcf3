"""The listener of /metrics."""

import asyncio
import socket
from http.client import HTTPConnection
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from bench.support.fake_backend import card
from model_parallel.errors import ConfigError
from serving.config import AdminConfig
from serving.contracts.group_report import GroupReport
from serving.gateway.server import METHODS, check_admin_listening
from serving.observability.endpoint import MetricsEndpoint
from serving.observability.gateway import GatewayWatch
from serving.observability.tracing import Tracing
from tests.support.waiting import PATIENCE_S


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_metrics_are_at_their_path_and_nowhere_else(host: str) -> None:
    registry = CollectorRegistry()
    Counter("things", "Some.", registry=registry).inc(3)
    endpoint = MetricsEndpoint(registry, host, 0)
    try:
        base = f"http://{f'[{host}]' if ':' in host else host}:{endpoint.port}"
        with urlopen(f"{base}/metrics", timeout=PATIENCE_S) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            (family, *_) = text_string_to_metric_families(answer.read().decode())
        assert family.samples[0].value == 3
        with pytest.raises(HTTPError, match="404") as caught:
            urlopen(f"{base}/", timeout=PATIENCE_S)
        caught.value.close()
    finally:
        endpoint.close()


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/fleet", "/nowhere"])
def test_head_is_get_without_its_page(path: str) -> None:
    registry = CollectorRegistry()
    Counter("things", "Some.", registry=registry).inc(3)
    endpoint = MetricsEndpoint(registry, "127.0.0.1", 0)
    try:
        answers = []
        for method in ("GET", "HEAD"):
            connection = HTTPConnection("127.0.0.1", endpoint.port or 0, timeout=PATIENCE_S)
            connection.request(method, path)
            response = connection.getresponse()
            answers.append((response.status, response.headers["Content-Type"], response.headers["Content-Length"]))
            assert (response.read() == b"") == (method == "HEAD" or answers[-1][2] == "0")
            connection.close()
        assert answers[0] == answers[1]
    finally:
        endpoint.close()


def test_a_silent_peer_holds_up_nobody() -> None:
    endpoint = MetricsEndpoint(CollectorRegistry(), "127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", endpoint.port)):
            assert fetch(endpoint.port) == ""
    finally:
        endpoint.close()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"admin\.metrics_port.*{port}"):
            MetricsEndpoint(CollectorRegistry(), "127.0.0.1", port)


def test_operators_ports_are_not_open_to_others_by_accident() -> None:
    config = AdminConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"admin\.host.*0\.0\.0\.0"):
        check_admin_listening(config, has_keys=False, insecure=False)
    check_admin_listening(config, has_keys=True, insecure=False)
    check_admin_listening(config, has_keys=False, insecure=True)
    check_admin_listening(AdminConfig(), has_keys=False, insecure=False)


def fetch(port: int | None) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        page: bytes = answer.read()
    return page.decode()


async def test_a_watch_serves_what_the_groups_report() -> None:
    readers = set()

    async def ask(reader: str) -> dict[str, list[GroupReport]]:
        readers.add(reader)
        raise RuntimeError("the groups are not to be reached, and metrics must not end for it")

    watch = GatewayWatch([card()], METHODS, Tracing())
    assert watch.start(AdminConfig(metrics_port=None), ask, lambda: True) is None
    port = watch.start(AdminConfig(metrics_port=0), ask, lambda: True)
    try:
        page = await asyncio.to_thread(fetch, port)
        assert "packtrain_build_info" in page and "process_resident_memory_bytes" in page
        assert len(readers) == 1
    finally:
        await watch.stop()
