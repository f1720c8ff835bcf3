"""The listener of /metrics, and of the probes /healthz and /readyz, which here need neither TLS nor a client's certificate.

It is an operator's: a port of its own, never one of the front ends'.
"""

import errno
import gzip
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.openmetrics.exposition import ALLOWUTF8

from model_parallel.errors import ConfigError
from serving.contracts.addresses import explain_listening, listening_addresses

_PEER_TIMEOUT_S = 10.0

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


class MetricsEndpoint:
    """Serves GET /metrics, /steps, /fleet, /healthz and /readyz from a thread, so that making up a page holds up no tokens."""

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        steps_page: Callable[[], bytes] | None = None,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """Listens from now on; port 0 picks a free one. `steps_page` makes what GET /steps answers, and may raise TimeoutError;
        `is_ready` is what /readyz tells. Raises ConfigError when the address cannot be had."""
        address = listening_addresses(host)[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server_class = type("_Server", (_Server,), {"address_family": family})
        self.fleet_page = b""
        """JSON, what GET /fleet answers; "" before the groups have been asked for the first time."""
        application = _application(registry, steps_page, is_ready, lambda: self.fleet_page)
        try:
            self._server: WSGIServer = make_server(address, port, application, server_class, _Handler)
        except OSError as error:
            reason = explain_listening(error.errno or errno.EIO, address, port)
            raise ConfigError(f"admin.metrics_port: {reason}") from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Waits for the thread, which looks twice a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """`::` takes IPv4 as well, as the front ends have it. The host's name is not looked up, which can take long."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away or sends nothing is no news."""


class _Handler(WSGIRequestHandler):
    timeout = _PEER_TIMEOUT_S  # of every read and write

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


def _metrics_page(registry: CollectorRegistry, environ: dict[str, Any]) -> tuple[bytes, list[tuple[str, str]]]:
    """In the format that the peer wants, of the families that it names, and its headers. Names stay as they are, as each scheme
    of escaping leaves those that Prometheus has always taken: in the OpenMetrics format prometheus_client (0.26) makes
    `vllm_…` of `vllm:…` in samples, and Prometheus 2 asks for that format."""
    encode: Any  # its type does not say that it takes the scheme of escaping
    encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
    headers = [("Content-Type", content_type)]
    names = parse_qs(environ.get("QUERY_STRING", "")).get("name[]")
    page: bytes = encode(registry.restricted_registry(names) if names else registry, escaping=ALLOWUTF8)
    if gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", "")):
        page = gzip.compress(page)
        headers.append(("Content-Encoding", "gzip"))
    return page, headers


def _application(
    registry: CollectorRegistry,
    steps_page: Callable[[], bytes] | None,
    is_ready: Callable[[], bool],
    fleet_page: Callable[[], bytes],
) -> Any:
    other_methods = make_wsgi_app(registry)
    text = [("Content-Type", "text/plain")]

    def answer(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/steps" and steps_page is not None:
            try:
                lines = steps_page()
            except TimeoutError:
                start_response("503 Service Unavailable", text)
                return [b"the replica groups do not answer in time\n"]
            start_response("200 OK", [("Content-Type", "application/x-ndjson")])
            return [lines]
        if path == "/fleet":
            page = fleet_page()
            start_response("200 OK" if page else "503 Service Unavailable", [("Content-Type", "application/json")])
            return [page]
        if path == "/healthz" or (path == "/readyz" and is_ready()):
            start_response("200 OK", text)
            return [b"ok\n"]
        if path == "/readyz":
            start_response("503 Service Unavailable", text)
            return [b"no replica group can serve, or the gateway is stopping\n"]
        if path != "/metrics":
            start_response("404 Not Found", text)
            return [b"metrics are at /metrics\n"]
        if environ["REQUEST_METHOD"] != "GET":
            refused: Iterable[bytes] = other_methods(environ, start_response)
            return refused
        page, headers = _metrics_page(registry, environ)
        start_response("200 OK", headers)
        return [page]

    def answer_head_too(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "HEAD":
            return answer(environ, start_response)
        started: list[tuple[str, list[tuple[str, str]]]] = []
        page = answer(environ | {"REQUEST_METHOD": "GET"}, lambda status, headers: started.append((status, headers)))
        ((status, headers),) = started
        start_response(status, [*headers, ("Content-Length", str(sum(map(len, page))))])
        return []

    return answer_head_too
