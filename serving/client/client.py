"""A small blocking gRPC client, for the command line and for load tests."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from serving.client.probe import Port, look_at_port
from serving.client.tls import ClientTls
from serving.contracts.addresses import DEFAULT_GRPC_PORT, parse_target

CONNECT_TIMEOUT_S = 10.0
_EXPLAIN_AFTER_S = 1.0
"""A TLS connection that takes longer is looked into."""


@dataclass(slots=True)
class StreamTimes:
    """What a person at the terminal sees of one stream's speed, measured at the client."""

    started_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0

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


class Client:
    """One connection to a gateway. Use it as a context manager."""

    def __init__(self, address: str, *, api_key: str = "", tls: ClientTls | None = None) -> None:
        """`api_key` for a server that has tenants."""
        self.address = address
        self._target = parse_target(address)
        self._tls = tls
        # gRPC would send calls to this very machine through a proxy of the environment.
        options = [("grpc.enable_http_proxy", 0)] if self._target.is_on_this_machine else []
        if tls is None:
            self._channel = grpc.insecure_channel(self._target.address, options)
        else:
            self._channel = grpc.secure_channel(self._target.address, tls.credentials(), options)
        signed = grpc.intercept_channel(self._channel, _Credentials(api_key)) if api_key else self._channel
        self.stub = InferenceStub(signed)
        self.admin = AdminStub(signed)
        """Answers where the address is that of packtrain.v1.Admin."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def wait_until_connected(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Raises ConnectionError when nothing answers at the address in time, or when TLS with it fails."""
        if problem := self._problem():
            raise ConnectionError(problem)
        ready = grpc.channel_ready_future(self._channel)
        if self._tls is not None:
            self._explain_tls(ready)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            hint = " If it speaks TLS, give --tls." if self._tls is None else ""
            raise ConnectionError(
                f"nothing answers at {self.address}; is `packtrain serve` running there?{hint}"
            ) from error

    def _problem(self) -> str:
        """What one look at the port tells at once; "" when gRPC may have more luck."""
        parts = self._target.host_and_port
        if parts is None or not self._target.is_on_this_machine:
            return ""  # there may be a proxy, or a name that resolves for gRPC alone
        match look_at_port(*parts, tls=self._tls is not None):
            case Port.CLOSED:
                return f"nothing listens at {self.address}; is `packtrain serve` running there?"
            case Port.HTTP:
                return (
                    f"{self.address} speaks HTTP and not gRPC; give the address of gRPC, which `packtrain serve` prints "
                    f"({DEFAULT_GRPC_PORT} unless another was chosen)"
                )
        return ""

    def _explain_tls(self, ready: "grpc.Future[None]") -> None:
        assert self._tls is not None
        try:
            ready.result(timeout=_EXPLAIN_AFTER_S)
        except grpc.FutureTimeoutError:
            if problem := self._tls.problem(self.address):
                raise ConnectionError(f"TLS with {self.address} fails: {problem}") from None

    def models(self, timeout_s: float = CONNECT_TIMEOUT_S) -> Sequence[pb.ModelCard]:
        response: pb.ListModelsResponse = self.stub.ListModels(pb.ListModelsRequest(), timeout=timeout_s)
        return response.models

    def stream(
        self, request: pb.GenerateRequest, *, timeout_s: float, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[Iterator[pb.GenerateStreamResponse], StreamTimes]:
        """The chunks as they come, and their times, which fill up as the chunks are read."""
        times = StreamTimes(started_s=clock())
        call = self.stub.GenerateStream(request, timeout=timeout_s)

        def chunks() -> Iterator[pb.GenerateStreamResponse]:
            for chunk in call:
                times.count(len(chunk.token_ids), clock())
                yield chunk

        return chunks(), times


def chat_prompt(messages: Sequence[tuple[str, str]]) -> pb.Prompt:
    """A chat prompt from (role, content) pairs."""
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages]))


def explain(error: grpc.RpcError) -> str:
    """One line for the terminal: what the server said, and its status."""
    if isinstance(error, grpc.Call):
        return f"{error.details()} ({error.code().name})"
    return str(error)
