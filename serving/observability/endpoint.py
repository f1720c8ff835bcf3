"""The listener of /metrics. It is an operator's: a port of its own, never one of the front ends'."""

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from model_parallel.errors import ConfigError

_PEER_TIMEOUT_S = 10.0

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


class MetricsEndpoint:
    """Serves GET /metrics from a thread, so that making up a page does not hold up tokens."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Listens from now on; port 0 picks a free one. Raises ConfigError when the address cannot be had."""
        server_class = type("_Server", (_Server,), {"address_family": _family(host)})
        try:
            self._server: WSGIServer = make_server(host, port, _application(registry), server_class, _Handler)
        except OSError as error:
            raise ConfigError(
                f"admin.metrics_port: cannot listen on {host}:{port} ({error.strerror}); is the port taken?"
            ) from error
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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away or sends nothing is no news."""


class _Handler(WSGIRequestHandler):
    timeout = _PEER_TIMEOUT_S  # of every read and write

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


def _application(registry: CollectorRegistry) -> Any:
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"metrics are at /metrics\n"]
        page: Iterable[bytes] = metrics(environ, start_response)
        return page

    return answer


def _family(host: str) -> socket.AddressFamily:
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        return socket.AF_INET
    return socket.AF_INET6 if is_v6 else socket.AF_INET
