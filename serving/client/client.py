"""A small blocking gRPC client, for the command line and for load tests. Its streams go on when their gateway is lost."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from serving.client.probe import Port, look_at_port
from serving.client.resuming import Patience, Received, is_lost, pushback_s
from serving.client.tls import ClientTls
from serving.config import plain_key
from serving.contracts.addresses import DEFAULT_GRPC_PORT, parse_target, resolve

CONNECT_TIMEOUT_S = 10.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Variables that gRPC heeds."""
_EXPLAIN_AFTER_S = 1.0
"""A TLS connection that takes longer is looked into."""


@dataclass(slots=True)
class StreamTimes:
    """What a person at the terminal sees of one stream's speed, measured at the client."""

    started_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0
    num_resumed: int = 0
    """How often a gateway or connection was lost and the stream asked for again."""

    def count(self, num_tokens: int, now_s: float) -> None:
        """Take in a chunk that brought `num_tokens`."""
        if not num_tokens:
            return
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.num_tokens += num_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate: tokens after the first over the time since the first."""
        if self.first_token_s is None or self.last_token_s is None or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / (self.last_token_s - self.first_token_s)


class _Credentials(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the key with every call. (gRPC's own call credentials need TLS, which loopback does without.)"""

    def __init__(self, api_key: str) -> None:
        self._header = ("authorization", f"Bearer {api_key}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_header(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_header(details), request)

    def _with_header(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), self._header])


class _Gateway:
    """A connection to one address."""

    def __init__(self, address: str, api_key: str, tls: ClientTls | None) -> None:
        self.address = address
        self.target = parse_target(address)
        options: list[tuple[str, int]] = [
            # After a loss the next gateway may be there in a moment. gRPC would wait for minutes in the end.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.target.is_on_this_machine:
            options.append(("grpc.enable_http_proxy", 0))  # it would send calls to this very machine through one
        if tls is None:
            self.channel = grpc.insecure_channel(self.target.address, options)
        else:
            self.channel = grpc.secure_channel(self.target.address, tls.credentials(), options)
        signed = grpc.intercept_channel(self.channel, _Credentials(api_key)) if api_key else self.channel
        self.stub = InferenceStub(signed)
        self.admin = AdminStub(signed)
        self.has_answered = False


class Client:
    """Connections to the gateways of one deployment, of which one is used until it is lost. Use it as a context manager."""

    def __init__(self, *addresses: str, api_key: str = "", tls: ClientTls | None = None) -> None:
        """`addresses` of one gateway or several; `api_key` for a server that has tenants. Raises ConfigError, also for a key
        that no header can carry."""
        if not addresses:
            raise ConfigError("no address of a gateway is given")
        api_key = plain_key(api_key, "api_key")
        self._tls = tls
        self._gateways = [_Gateway(address, api_key, tls) for address in addresses]
        self._current = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Of the gateway that is used now."""
        return self._gateways[self._current].address

    @property
    def stub(self) -> Any:
        """Of the gateway that is used now."""
        return self._gateways[self._current].stub

    @property
    def admin(self) -> Any:
        """Answers where the address is that of packtrain.v1.Admin."""
        return self._gateways[self._current].admin

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for gateway in self._gateways:
            gateway.channel.close()

    def wait_until_connected(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """To the first gateway that can be reached. Raises ConnectionError when none answers in time, or when TLS fails."""
        problems: list[ConnectionError] = []
        for index in range(len(self._gateways)):
            try:
                self._connect(self._gateways[index], timeout_s)
            except ConnectionError as error:
                problems.append(error)
            else:
                self._current = index
                return
        raise problems[0] if len(problems) == 1 else ConnectionError("\n".join(map(str, problems)))

    def _connect(self, gateway: _Gateway, timeout_s: float) -> None:
        if problem := self._problem(gateway):
            raise ConnectionError(problem)
        ready = grpc.channel_ready_future(gateway.channel)
        if self._tls is not None:
            self._explain_tls(gateway.address, ready)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            ready.cancel()  # gRPC's thread would look at the channel after it is closed, and print a traceback
            hint = " If it speaks TLS, give --tls." if self._tls is None else ""
            raise ConnectionError(
                f"nothing answers at {gateway.address}; is `packtrain serve` running there?{hint}"
            ) from error
        gateway.has_answered = True

    def _problem(self, gateway: _Gateway) -> str:
        """What one look at the port tells at once; "" when gRPC may have more luck."""
        parts = gateway.target.host_and_port
        if parts is None:
            return ""
        if not gateway.target.is_on_this_machine:
            if any(os.environ.get(name) for name in _PROXIES):
                return ""  # which may know more names
            try:
                resolve(parts[0])
            except ConfigError as error:
                return f"{gateway.address}: {error}"
            return ""
        match look_at_port(*parts, tls=self._tls is not None):
            case Port.CLOSED:
                return f"nothing listens at {gateway.address}; is `packtrain serve` running there?"
            case Port.HTTP:
                return (
                    f"{gateway.address} speaks HTTP and not gRPC; give the address of gRPC, which `packtrain serve` prints "
                    f"({DEFAULT_GRPC_PORT} unless another was chosen)"
                )
        return ""

    def _explain_tls(self, address: str, ready: "grpc.Future[None]") -> None:
        assert self._tls is not None
        try:
            ready.result(timeout=_EXPLAIN_AFTER_S)
        except grpc.FutureTimeoutError:
            if problem := self._tls.problem(address):
                raise ConnectionError(f"TLS with {address} fails: {problem}") from None

    def models(self, timeout_s: float = CONNECT_TIMEOUT_S) -> Sequence[pb.ModelCard]:
        response: pb.ListModelsResponse = self.stub.ListModels(pb.ListModelsRequest(), timeout=timeout_s)
        return response.models

    def stream(
        self, request: pb.GenerateRequest, *, timeout_s: float, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[Iterator[pb.GenerateStreamResponse], StreamTimes]:
        """The chunks as they come, and their times, which fill up as the chunks are read.

        When the gateway goes away in the middle, the stream goes on at the next one, or at the same address, without a lost or
        repeated token, where the model is deterministic. What cannot be gone on with within `timeout_s` and RESUME_WITHIN_S ends
        with the grpc.RpcError of the loss.
        """
        times = StreamTimes(started_s=clock())
        patience = Patience(time.monotonic() + timeout_s)
        received = Received(request)
        asked = self._gateways[self._current]
        first = asked.stub.GenerateStream(request, timeout=timeout_s)

        def chunks() -> Iterator[pb.GenerateStreamResponse]:
            call, gateway = first, asked
            while True:
                try:
                    for chunk in call:
                        gateway.has_answered = True
                        patience.restore()
                        received.take(chunk)
                        times.count(len(chunk.token_ids), clock())
                        yield chunk
                    return
                except grpc.RpcError as error:
                    loss = error
                    self._wait_after(error, gateway, received, patience)
                    times.num_resumed += received.can_be_resumed
                finally:
                    call.cancel()  # of a reader that leaves
                gateway = self._gateways[self._current]
                try:
                    call = gateway.stub.GenerateStream(received.rest(), timeout=max(0.0, patience.left_s))
                except ValueError:  # the channel was closed with the client
                    raise loss from None

        return chunks(), times

    def _wait_after(self, error: grpc.RpcError, lost: _Gateway, received: Received, patience: Patience) -> None:
        """Until another try, at the next address. Raises the error where none makes sense."""
        said_s = pushback_s(error)
        # What nobody has begun to answer is tried again only where a connection was there and broke.
        was_cut = said_s is None and (lost.has_answered or len(self._gateways) > 1)
        may_help = received.can_be_resumed if received.has_begun else was_cut
        pause_s = patience.pause_s(said_s) if is_lost(error) and may_help else None
        if pause_s is None:
            raise error
        with self._lock:
            if self._gateways[self._current] is lost:  # another stream may have left it already
                self._current = (self._current + 1) % len(self._gateways)
        time.sleep(pause_s)


def chat_prompt(messages: Sequence[tuple[str, str]]) -> pb.Prompt:
    """A chat prompt from (role, content) pairs."""
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages]))


def explain(error: grpc.RpcError) -> str:
    """One line for the terminal: what the server said, and its status."""
    if isinstance(error, grpc.Call):
        return f"{error.details()} ({error.code().name})"
    return str(error)
