"""HTTP connections: uvicorn's protocol, with the bounds on what a peer may send, and how slowly, that it lacks."""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from model_parallel.errors import ConfigError
from serving.config import GatewayConfig, LimitsConfig
from serving.contracts.addresses import explain_listening, listening_addresses, open_listener
from serving.gateway.http.objects import Error, ErrorAnswer
from serving.gateway.http.responses import to_json

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections, so that theirs is the end that closes."""
_TLS_TIMEOUT_S = 10.0
_MAX_HEADERS = 100
_MAX_PIPELINED = 16
_MAX_UNREAD_BYTES = 32 << 10
_NUM_OTHER_FILES = 512
"""What a gateway has open besides its clients' connections."""
_KEEPALIVE_S = 30
_KEEPALIVE_TIMEOUT_S = 10
"""As for gRPC: a peer that has vanished without a word is noticed within the sum."""
_MAX_OVERHEAD = 8
"""Bytes on the wire for each byte of a body: six when every chunk holds one."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on connections, and on what comes over one."""

    max_connections: int
    max_connections_per_address: int
    max_header_bytes: int
    max_body_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    slow_reader_timeout_s: float

    @classmethod
    def of(cls, config: GatewayConfig, limits: LimitsConfig) -> "ConnectionLimits":
        return cls(
            max_connections=config.max_connections,
            max_connections_per_address=config.max_connections_per_address,
            max_header_bytes=limits.max_header_bytes,
            max_body_bytes=limits.max_message_bytes,
            header_timeout_s=config.header_timeout_s,
            body_timeout_s=config.body_timeout_s,
            slow_reader_timeout_s=config.slow_reader_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The last answer on a connection."""

    status: int
    code: str
    message: str
    headers: str = ""
    """Lines."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A peer that breaks a bound gets an error where that is possible, and is cut off.

    Between requests a connection may idle for as long as it is kept alive. With the first byte of a request the time for its
    headers begins to run, and with their end that for its body.
    """

    def __init__(self, limits: ConnectionLimits, num_by_address: Counter[str], *args: Any, **options: Any) -> None:
        """`num_by_address` counts the open connections of the listener."""
        super().__init__(*args, **options)
        self._limits = limits
        self._num_by_address = num_by_address
        self._address: str | None = None
        """None while the connection is not counted."""
        self._receive_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._num_bytes = 0
        """Of the request that is coming in."""
        self._num_header_bytes = 0
        self._problem = _Refusal(400, "bad_request", "Invalid HTTP request received.")
        """What is wrong with what comes in, when the parser says that something is."""
        self._refusal: _Refusal | None = None
        """Of what came behind requests that are still to be answered. Whatever follows is not looked at."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if refusal := self._has_no_room_for(transport.get_extra_info("peername")[0]):
            self.transport = transport
            self._refuse(_Refusal(503, "server_is_overloaded", refusal, "retry-after: 1\r\n"))
            return
        super().connection_made(transport)
        # What a client leaves unread lies here and in the kernel, and is bounded in both.
        transport.set_write_buffer_limits(_MAX_UNREAD_BYTES)
        bound_kernel(transport.get_extra_info("socket"), self._limits.slow_reader_timeout_s)
        self._expect(self._limits.header_timeout_s)

    def _has_no_room_for(self, address: str) -> str:
        """Why not, or "" when the connection is counted from now on."""
        if len(self.connections) >= self._limits.max_connections:
            return "this gateway has too many connections"
        if self._num_by_address[address] >= self._limits.max_connections_per_address:
            return "this gateway has too many connections from your address"
        self._num_by_address[address] += 1
        self._address = address
        return ""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self._num_by_address[self._address] -= 1
            if not self._num_by_address[self._address]:
                del self._num_by_address[self._address]  # or addresses that never come back would stay
            self._address = None
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._receive_timer is None:
            self._expect(self._limits.header_timeout_s)
        self._num_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse_after_answers(self._problem)
        if self._refusal is not None or self.transport.is_closing():
            return
        if self._in_headers and self._num_bytes > self._limits.max_header_bytes:
            self._refuse_after_answers(self._headers_too_large)
        elif self._num_bytes > self._limits.max_header_bytes + _MAX_OVERHEAD * self._limits.max_body_bytes:
            self.transport.abort()

    def _refuse_after_answers(self, refusal: _Refusal) -> None:
        """To whole requests that came before, where there are such."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy and (self._in_headers or self.pipeline):
            self._refusal = refusal
            self._expect(None)
        elif is_busy and self.cycle.response_started:
            self.transport.abort()  # an error here would stand in the middle of the answer
        else:
            self._refuse(refusal)

    def on_response_complete(self) -> None:
        # A request whose body came only in part waits behind the whole ones.
        num_broken = 0 if self._in_headers else 1
        if self._refusal is None or len(self.pipeline) > num_broken:
            super().on_response_complete()
        elif not self.transport.is_closing():
            self._refuse(self._refusal)

    @property
    def _headers_too_large(self) -> _Refusal:
        limit = self._limits.max_header_bytes
        return _Refusal(431, "headers_too_large", f"the headers exceed {limit} bytes, or are more than {_MAX_HEADERS}")

    def _feed(self, data: bytes) -> None:
        """Java's client asks on every first request whether it may go on in HTTP/2. One need not answer that, but the parser
        takes no body after such a question, so it gets the request again without it."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                method, version = self.parser.get_method(), self.parser.get_http_version()
                if method == b"CONNECT":
                    raise httptools.HttpParserError("not a proxy") from upgrade
                lines = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
                lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self._num_header_bytes = 0
                data = b"\r\n".join(lines) + b"\r\n\r\n" + data[upgrade.args[0] :]

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._receive_timer is None:  # it came together with the end of the one before
            self._num_bytes = 1
            self._expect(self._limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._num_header_bytes += len(url)
        super().on_url(url)
        self._check_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value)
        super().on_header(name, value)
        self._check_headers()
        if name.lower() == b"transfer-encoding":
            self._check_codings()

    def _check_codings(self) -> None:
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings != [b"chunked"]:
            given = b", ".join(codings).decode(errors="replace")
            message = f"transfer-encoding is {given!r:.80}; allowed: chunked, once"
            self._stop(_Refusal(501, "unsupported_encoding", message))

    def _check_headers(self) -> None:
        if len(self.headers) > _MAX_HEADERS or self._num_header_bytes > self._limits.max_header_bytes:
            self._stop(self._headers_too_large)

    def _stop(self, problem: _Refusal) -> NoReturn:
        """What the parser calls ends it."""
        self._problem = problem
        raise httptools.HttpParserError(problem.message)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests before the answer to the first")
        if self.parser.should_upgrade():
            return
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            self._stop(_Refusal(400, "bad_request", "The request needs one Host header (RFC 9112, 3.2)."))
        self._in_headers = False
        super().on_headers_complete()
        self._expect(self._limits.body_timeout_s)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = partial(_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_headers, self._num_bytes, self._num_header_bytes = True, 0, 0
        self._expect(None)
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The peer does not read, and what may lie here for it does."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        if self.flow is not None:
            super().resume_writing()

    def _await_reader(self) -> None:
        num_unread = self.transport.get_write_buffer_size()
        timeout_s = self._limits.slow_reader_timeout_s
        self._unread_timer = self.loop.call_later(timeout_s, self._end_slow_reader, num_unread)

    def _expect(self, timeout_s: float | None) -> None:
        """What is coming in must be there in time; None when nothing is."""
        if self._receive_timer is not None:
            self._receive_timer.cancel()
        self._receive_timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._end_slow_sender)

    def _end_slow_sender(self) -> None:
        if self.flow.read_paused:  # what lies in the kernel may be all of it
            self._expect(self._limits.header_timeout_s if self._in_headers else self._limits.body_timeout_s)
        elif self._num_bytes or not self._in_headers:
            self._refuse_after_answers(_Refusal(408, "request_timeout", "the request did not arrive in time"))
        else:
            self.transport.close()

    def _end_slow_reader(self, num_unread: int) -> None:
        if self.transport.get_write_buffer_size() <= num_unread - _MAX_UNREAD_BYTES:
            self._await_reader()  # a large answer, which a slow connection may take longer for
            return
        logger.info("a client did not read its answer for %g s; cut off", self._limits.slow_reader_timeout_s)
        self.transport.abort()

    def _refuse(self, refusal: _Refusal) -> None:
        kind = "service_unavailable_error" if refusal.status == 503 else "invalid_request_error"
        body = to_json(ErrorAnswer(Error(message=refusal.message, type=kind, param=None, code=refusal.code)))
        head = (
            f"HTTP/1.1 {refusal.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{refusal.headers}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


async def _without_chunks(app: Any, cycle: RequestResponseCycle, scope: Any, receive: Any, send: Any) -> None:
    """HTTP/1.0 has no chunks, which uvicorn sends all the same: an answer of unknown length ends with the connection."""

    has_length = True

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message["body"])
        await send(message)

    await app(scope, receive, send_plain)


class HttpListener:
    """The listening socket and its connections, in the running event loop."""

    def __init__(self, app: Any, limits: ConnectionLimits, tls: ssl.SSLContext | None) -> None:
        self._limits = limits
        self._tls = tls
        self._state = ServerState()
        self._num_by_address: Counter[str] = Counter()
        self._config = Config(
            app, lifespan="off", ws="none", log_config=None, log_level="error", access_log=False,
            server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE_S,
        )  # fmt: skip
        self._config.load()
        self._servers: list[asyncio.Server] = []
        """One for each address of the host."""

    async def start(self, host: str, port: int) -> int:
        """Listen. Returns the port. Raises ConfigError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {
                "ssl": self._tls,
                "ssl_handshake_timeout": _TLS_TIMEOUT_S,
                "ssl_shutdown_timeout": _TLS_TIMEOUT_S,
            }
        try:
            for address in listening_addresses(host):
                sock = open_listener(address, port)
                port = sock.getsockname()[1]  # the same for every address
                self._servers.append(await loop.create_server(self._protocol, sock=sock, backlog=_BACKLOG, **options))
        except OSError as error:
            number = error.errno or errno.EIO
            raise ConfigError(f"cannot listen for HTTP: {explain_listening(number, address, port)}") from error
        return port

    async def stop(self, grace_s: float) -> None:
        """Close the port; what still runs after `grace_s` is cut off."""
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            _, running = await asyncio.wait(self._state.tasks, timeout=grace_s)
            for task in running:
                task.cancel()
        for connection in list(self._state.connections):
            connection.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                for server in self._servers:
                    await server.wait_closed()
        self._servers = []

    def _protocol(self) -> BoundedProtocol:
        return BoundedProtocol(
            self._limits, self._num_by_address, self._config, self._state, {}, asyncio.get_running_loop()
        )


def bound_kernel(sock: socket.socket, slow_reader_timeout_s: float) -> None:
    """What the kernel keeps for a peer that does not read, and how long it believes in one that does not answer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_UNREAD_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    # The same while something is not acknowledged, which the kernel would try to deliver for a quarter of an hour. It is also
    # how long a peer without room may stay so, and that is what slow readers are given.
    timeout_s = max(_KEEPALIVE_S + _KEEPALIVE_TIMEOUT_S, slow_reader_timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * timeout_s))


def make_room(config: GatewayConfig) -> None:
    """Let this process open as many files as its connections need: whoever runs out of files accepts nobody. Raises
    ConfigError when the system forbids it."""
    num_http = 0 if config.http_port is None else config.max_connections
    needed = num_http + config.max_grpc_connections + _NUM_OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"gateway.max_connections is {config.max_connections} and gateway.max_grpc_connections "
            f"{config.max_grpc_connections}; they need {needed} open files, and the system allows {hard}; "
            "lower them, or raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
