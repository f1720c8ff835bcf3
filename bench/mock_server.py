"""A server that answers with tokens it makes up, as fast as asked: what a client can do is then the client's own.

    python -m bench.mock_server [--first-token-s 0] [--token-s 0] [--refuse 0]

It speaks packtrain.v1.Inference over gRPC and OpenAI's API over HTTP, on free ports of loopback, prints them as one line of
JSON, and ends with its standard input. Every answer has exactly max_tokens tokens.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import uvloop
from aiohttp import web
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

MODEL = "mock"
VOCAB_SIZE = 32_000


@dataclass(kw_only=True)
class Behaviour:
    """How the mock answers."""

    first_token_s: float = 0.0
    """From a request's arrival to its first token."""
    token_s: float = 0.0
    """Between two tokens."""
    refuse: float = 0.0
    """Share of requests that are refused."""
    fail: float = 0.0
    """Share of streams that break after their first token."""
    retry_after_s: float | None = 0.2
    """What refusals tell."""
    tokens_a_chunk: int = 1
    max_running: int | None = None
    """Requests that are answered at a time; others wait, so that there is a capacity to be found."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[tuple[str, bytes]] | None = None
    """(tenant's key, body) of what came, where somebody asks for it."""

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_running) if self.max_running else None

    def seen(self, key: str, body: bytes) -> None:
        if self.requests is not None:
            self.requests.append((key, body))

    async def answer(self, num_tokens: int) -> AsyncIterator[int]:
        """Numbers of tokens as they come."""
        if self._slots is None:
            async for chunk in self._chunks(num_tokens):
                yield chunk
        else:
            async with self._slots:
                async for chunk in self._chunks(num_tokens):
                    yield chunk

    async def _chunks(self, num_tokens: int) -> AsyncIterator[int]:
        if self.first_token_s:
            await self.sleep(self.first_token_s)
        due_s = time.monotonic()
        for begin in range(0, num_tokens, self.tokens_a_chunk):
            if begin and self.token_s:
                due_s += self.token_s  # sleeps end late, which must not add up
                await self.sleep(max(0.0, due_s - time.monotonic()))
            yield min(self.tokens_a_chunk, num_tokens - begin)


class _Servicer(InferenceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        card = pb.ModelCard(name=MODEL, vocab_size=VOCAB_SIZE, max_model_len=1 << 20, chat_format="chatml")
        return pb.ListModelsResponse(models=[card])

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        return pb.TokenizeResponse(token_ids=range(len(request.text.split())))

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateStreamResponse]:  # noqa: N802
        await self._admit(request, context)
        began_s, num_left, first_s = time.monotonic(), request.sampling.max_tokens, None
        async for num_tokens in self._behaviour.answer(num_left):
            first_s = first_s or time.monotonic()
            num_left -= num_tokens
            chunk = pb.GenerateStreamResponse(text="token " * num_tokens, token_ids=[7] * num_tokens)
            if not num_left:
                chunk.finish_reason = pb.FINISH_REASON_LENGTH
                chunk.usage.CopyFrom(_usage(request))
                chunk.timings.CopyFrom(_timings(began_s, first_s))
            yield chunk
            if self._behaviour.fail and self._behaviour.draw.random() < self._behaviour.fail:
                await context.abort(grpc.StatusCode.INTERNAL, "broken on purpose")

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:  # noqa: N802
        await self._admit(request, context)
        began_s, first_s = time.monotonic(), None
        async for _ in self._behaviour.answer(request.sampling.max_tokens):
            first_s = first_s or time.monotonic()
        choice = pb.Choice(
            text="token " * request.sampling.max_tokens, token_ids=[7] * request.sampling.max_tokens,
            finish_reason=pb.FINISH_REASON_LENGTH,
        )  # fmt: skip
        return pb.GenerateResponse(
            choices=[choice], usage=_usage(request), timings=_timings(began_s, first_s or time.monotonic())
        )

    async def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        await self._admit(request, context)
        scores = [pb.Score(logprob=-1.0, num_tokens=len(each.token_ids.ids) or 1) for each in request.continuations]
        return pb.ScoreResponse(scores=scores, usage=pb.Usage(prompt_tokens=len(request.context.token_ids.ids)))

    async def _admit(self, request: Any, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self._behaviour.seen(metadata.get("authorization", ""), request.SerializeToString())
        if self._behaviour.refuse and self._behaviour.draw.random() < self._behaviour.refuse:
            details = [AnyMessage(), AnyMessage()]
            details[0].Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="mock"))
            if self._behaviour.retry_after_s is not None:
                delay = Duration()
                delay.FromMicroseconds(int(self._behaviour.retry_after_s * 1e6))
                details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="full", details=details)
            await context.abort_with_status(rpc_status.to_status(status))


def _usage(request: Any) -> pb.Usage:
    prompt = request.prompt
    num_tokens = len(prompt.token_ids.ids) or len(prompt.text.split())
    num_tokens += sum(len(message.content.split()) for message in prompt.chat.messages)
    return pb.Usage(prompt_tokens=num_tokens, completion_tokens=request.sampling.max_tokens)


def _timings(began_s: float, first_s: float) -> pb.Timings:
    now_s = time.monotonic()
    return pb.Timings(prefill_s=first_s - began_s, decode_s=now_s - first_s, total_s=now_s - began_s)


class _Http:
    """The part of OpenAI's API that load tests use."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "root": MODEL, "object": "model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        self._behaviour.seen(request.headers.get("authorization", ""), raw)
        if self._behaviour.refuse and self._behaviour.draw.random() < self._behaviour.refuse:
            error = {
                "message": "full",
                "type": "service_unavailable_error",
                "code": "server_is_overloaded",
                "param": None,
            }
            told = self._behaviour.retry_after_s
            headers = {} if told is None else {"retry-after": str(told)}
            return web.json_response({"error": error}, status=503, headers=headers)
        is_chat, num_tokens = "messages" in body, body.get("max_completion_tokens") or body.get("max_tokens") or 16
        usage = {"prompt_tokens": _num_prompt_tokens(body), "completion_tokens": num_tokens}
        if not body.get("stream"):
            async for _ in self._behaviour.answer(num_tokens):
                pass
            choice = _whole(is_chat, "token " * num_tokens)
            return web.json_response({"id": "x", "object": "y", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        num_left = num_tokens
        async for num_new in self._behaviour.answer(num_tokens):
            num_left -= num_new
            choice = _chunk(is_chat, "token " * num_new, None if num_left else "length")
            await response.write(_event({"id": "x", "object": "y", "choices": [choice]}))
            if self._behaviour.fail and self._behaviour.draw.random() < self._behaviour.fail:
                await response.write(
                    _event({"error": {"message": "broken", "type": "server_error", "code": "internal"}})
                )
                return response
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(_event({"id": "x", "object": "y", "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _chunk(is_chat: bool, text: str, finish_reason: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"index": 0, "finish_reason": finish_reason, **said}


def _whole(is_chat: bool, text: str) -> dict[str, Any]:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    return {"index": 0, "finish_reason": "length", **said}


def _num_prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        texts = (part["content"] for part in body["messages"])
        return sum(len(str(text).split()) for text in texts)
    prompt = body["prompt"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


@dataclass(frozen=True, kw_only=True)
class MockServer:
    """A running mock."""

    behaviour: Behaviour
    grpc_port: int
    http_port: int
    grpc_server: Any
    http_runner: web.AppRunner

    async def stop(self) -> None:
        await self.grpc_server.stop(0)
        await self.http_runner.cleanup()


async def serve_mock(behaviour: Behaviour) -> MockServer:
    """Listens on free ports of loopback until it is stopped."""
    server = grpc.aio.server()
    add_InferenceServicer_to_server(_Servicer(behaviour), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runner = web.AppRunner(_Http(behaviour).application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    http_port = runner.addresses[0][1]
    return MockServer(
        behaviour=behaviour, grpc_port=grpc_port, http_port=http_port, grpc_server=server, http_runner=runner
    )


async def _main(behaviour: Behaviour) -> None:
    server = await serve_mock(behaviour)
    print(json.dumps({"grpc": server.grpc_port, "http": server.http_port}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("first-token-s", "token-s", "refuse", "fail"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--tokens-a-chunk", type=int, default=1)
    parser.add_argument("--max-running", type=int)
    arguments = parser.parse_args()

    async def run() -> None:
        await _main(Behaviour(**vars(arguments)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(run())


if __name__ == "__main__":
    main()
