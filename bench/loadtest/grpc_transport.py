"""Requests over packtrain.v1.Inference."""

import asyncio
import itertools
import time
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.loadtest.replies import TRUNCATED, Reply, Stages, told_wait
from bench.loadtest.scenario import Tenant
from bench.loadtest.targets import Target
from bench.loadtest.work import Content
from protos import inference_pb2 as pb
from serving.client.tls import ClientTls

_METHODS = {"generate-stream": "GenerateStream", "generate": "Generate", "score": "Score"}
_SERVICE = "/packtrain.v1.Inference/"
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # each channel is a connection of its own
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),  # requests go where they were told, whatever the environment says
    ("grpc.enable_retries", 0),  # one call is one request; what is sent again is counted by us
)
Metadata = tuple[tuple[str, str], ...]


def channel_to(target: Target, tls: ClientTls | None) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    if target.is_secure:
        credentials = grpc.ssl_channel_credentials() if tls is None else tls.credentials()
        return grpc.aio.secure_channel(target.address, credentials, options=_OPTIONS)
    return grpc.aio.insecure_channel(target.address, options=_OPTIONS)


class GrpcTransport:
    """One tenant's channels."""

    def __init__(
        self, tenant: Tenant, model: str, api_key: str, tls: ClientTls | None, *, keep_answers: bool = False
    ) -> None:
        self._tenant, self._model, self._keep_answers = tenant, model, keep_answers
        self._api = tenant.chosen_api
        self._metadata: Metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        target = tenant.parsed_target
        self._channels = [channel_to(target, tls) for _ in range(tenant.connections)]
        self.num_connections = len(self._channels)
        path = _SERVICE + _METHODS[self._api]
        # Requests are serialised before their time comes, and go out as they are.
        if self._api == "generate-stream":
            calls: list[Any] = [channel.unary_stream(path) for channel in self._channels]
        else:
            calls = [channel.unary_unary(path) for channel in self._channels]
        self._calls = itertools.cycle(calls)

    async def open(self, timeout_s: float) -> None:
        for channel in self._channels:
            try:
                await asyncio.wait_for(channel.channel_ready(), timeout_s)
            except TimeoutError:
                hint = (
                    ""
                    if self._tenant.parsed_target.is_secure
                    else " If it speaks TLS, the target must begin with grpcs://."
                )
                raise ConnectionError(
                    f"nothing answers at {self._tenant.target} within {timeout_s:g} s.{hint}"
                ) from None

    def prepare(self, prompt: Content, output_tokens: int, label: str) -> tuple[bytes, Metadata]:
        metadata = (*self._metadata, ("x-request-id", label))
        if self._api == "score":
            return self._score(prompt, output_tokens).SerializeToString(), metadata
        sampling = pb.Sampling(
            temperature=self._tenant.temperature, max_tokens=output_tokens, ignore_eos=self._tenant.ignore_eos
        )
        request = pb.GenerateRequest(model=self._model, prompt=_prompt(prompt), sampling=sampling)
        return request.SerializeToString(), metadata

    def _score(self, prompt: Content, output_tokens: int) -> pb.ScoreRequest:
        """The last `output_tokens` of the prompt are what is scored after the rest; at least one token is."""
        if isinstance(prompt, str):
            words = prompt.split(" ")
            cut = max(1, len(words) - output_tokens)
            context = pb.Prompt(text=" ".join(words[:cut]))
            continuation = pb.Continuation(text=" " + " ".join(words[cut:] or words[-1:]))
            return pb.ScoreRequest(model=self._model, context=context, continuations=[continuation])
        ids: list[int] = prompt  # type: ignore[assignment]  # score is never asked with messages
        cut = max(1, len(ids) - output_tokens) if len(ids) > 1 else 0
        return pb.ScoreRequest(
            model=self._model,
            context=pb.Prompt(token_ids=pb.TokenIds(ids=ids[:cut])),
            continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=ids[cut:]))],
        )

    async def ask(self, prepared: Any, timeout_s: float, reply: Reply) -> None:
        body, metadata = prepared
        reply.sent_s = time.monotonic()
        try:
            if self._api == "generate-stream":
                await self._read_stream(next(self._calls)(body, timeout=timeout_s, metadata=metadata), reply)
            else:
                self._read_whole(await next(self._calls)(body, timeout=timeout_s, metadata=metadata), reply)
        except grpc.aio.AioRpcError as error:
            _take_error(error, reply)

    async def _read_stream(self, call: Any, reply: Reply) -> None:
        is_ended, parse = False, pb.GenerateStreamResponse.FromString
        while (body := await call.read()) is not grpc.aio.EOF:
            chunk = parse(body)
            if num_tokens := len(chunk.token_ids):
                reply.arrived(num_tokens)
            if self._keep_answers:
                reply.text.append(chunk.text)
                reply.token_ids.extend(chunk.token_ids)
            if chunk.HasField("usage"):
                _take_usage(chunk, reply)
            is_ended = is_ended or chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        if (code := await call.code()) is not grpc.StatusCode.OK:
            error = grpc.aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
            )
            _take_error(error, reply)
        elif is_ended:
            reply.finish()
        else:
            reply.fail(TRUNCATED, "no finish_reason")

    def _read_whole(self, body: bytes, reply: Reply) -> None:
        if self._api == "score":
            scored = pb.ScoreResponse.FromString(body)
            _take_usage(scored, reply)
            reply.usage_output = sum(score.num_tokens for score in scored.scores)
        else:
            whole = pb.GenerateResponse.FromString(body)
            _take_usage(whole, reply)
            if self._keep_answers:
                reply.text = [whole.choices[0].text]
                reply.token_ids = list(whole.choices[0].token_ids)
        reply.finish()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def _prompt(content: Content) -> pb.Prompt:
    if isinstance(content, str):
        return pb.Prompt(text=content)
    if content and not isinstance(content[0], int):
        messages = [pb.ChatMessage(role=role, content=text) for role, text in content]
        return pb.Prompt(chat=pb.Chat(messages=messages))
    return pb.Prompt(token_ids=pb.TokenIds(ids=content))  # type: ignore[arg-type]


def _take_usage(message: Any, reply: Reply) -> None:
    reply.usage_prompt, reply.usage_output = message.usage.prompt_tokens, message.usage.completion_tokens
    if message.HasField("timings"):
        told = message.timings
        reply.stages = Stages(told.gateway_s, told.queue_s, told.prefill_s, told.decode_s, told.total_s)


def _take_error(error: grpc.aio.AioRpcError, reply: Reply) -> None:
    """RESOURCE_EXHAUSTED is a refusal, and UNAVAILABLE with a time to come back; otherwise it failed."""
    reason, retry_after_s = _explanation(error)
    is_refusal = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED or (
        error.code() is grpc.StatusCode.UNAVAILABLE and retry_after_s is not None
    )
    reply.fail(error.code().name, reason, is_refusal=is_refusal, retry_after_s=retry_after_s)


def _explanation(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    """ErrorInfo's reason, and seconds to wait by RetryInfo or grpc-retry-pushback-ms, as far as the server tells them."""
    reason, retry_after_s = "", None
    try:
        status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # wants the same three methods
    except ValueError:  # status details that contradict the status
        status = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = told_wait(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
    if retry_after_s is None:
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-retry-pushback-ms" and isinstance(value, str) and value.isascii() and value.isdigit():
                retry_after_s = told_wait(float(value) / 1e3)
    return reason, retry_after_s
