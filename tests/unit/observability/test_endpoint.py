"""The listener of /metrics."""

import asyncio
import gzip
import socket
from http.client import HTTPConnection
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
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


OPEN_METRICS = "application/openmetrics-text"
PROMETHEUS_2 = (
    f"{OPEN_METRICS};version=1.0.0;q=0.5,{OPEN_METRICS};version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    f"{OPEN_METRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,{OPEN_METRICS};version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "text/plain;version=0.0.4",
        "text/plain;version=1.0.0;escaping=underscores",
        OPEN_METRICS,
        f"{OPEN_METRICS};version=1.0.0;escaping=underscores",
        f"{OPEN_METRICS};version=1.0.0;escaping=dots",
        f"{OPEN_METRICS};version=1.0.0;escaping=values",
        PROMETHEUS_2,
        PROMETHEUS_3,
    ],
)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_names_are_the_same_in_every_format(accept: str, encoding: str) -> None:
    metrics = GatewayWatch([card()], METHODS, Tracing()).metrics
    metrics.request_success.labels("tiny", "g1", "stop").inc()
    endpoint = MetricsEndpoint(metrics.registry, "127.0.0.1", 0)
    try:
        connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=PATIENCE_S)
        connection.request("GET", "/metrics", headers={"Accept": accept, "Accept-Encoding": encoding})
        with connection.getresponse() as response:
            body, headers = response.read(), response.headers
        connection.close()
    finally:
        endpoint.close()
    page = (gzip.decompress(body) if headers["Content-Encoding"] == "gzip" else body).decode()
    assert headers.get("Content-Encoding", "identity") == encoding
    is_open = headers["Content-Type"].startswith(OPEN_METRICS)
    assert is_open == accept.startswith(OPEN_METRICS)
    families = list((openmetrics_families if is_open else text_string_to_metric_families)(page))
    assert {"vllm:num_requests_running", "packtrain_requests_in_progress"} <= {family.name for family in families}
    names = {sample.name for family in families for sample in family.samples}
    assert "vllm:request_success_total" in names
    assert not {name for name in names if name.startswith("vllm_")}


def test_families_may_be_asked_for_by_name() -> None:
    endpoint = MetricsEndpoint(GatewayWatch([card()], METHODS, Tracing()).metrics.registry, "127.0.0.1", 0)
    try:
        address = f"http://127.0.0.1:{endpoint.port}/metrics?name[]=packtrain_build_info"
        with urlopen(address, timeout=PATIENCE_S) as answer:
            (family,) = text_string_to_metric_families(answer.read().decode())
        assert family.name == "packtrain_build_info"
        with pytest.raises(HTTPError, match="405") as caught:
            urlopen(Request(address, method="POST"), timeout=PATIENCE_S)
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
    with pytest.raises(ConfigError, match=r"^admin\.host: the host 'locahost\.invalid' cannot be resolved"):
        check_admin_listening(AdminConfig(host="locahost.invalid"), has_keys=False, insecure=False)
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
