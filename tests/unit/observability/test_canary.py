"""A prompt, a key and a label are sent in every way that a request can go, and must be found nowhere afterwards."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from bench.support.fake_backend import FakeBackend, Script, say
from model_parallel.engine.request import EngineOutput, EngineRequest
from model_parallel.errors import RequestError
from protos import inference_pb2 as pb
from serving.client.client import chat_prompt
from serving.contracts.accounts import OpenAccounts, Principal
from serving.contracts.errors import GroupUnavailableError, UnauthenticatedError
from serving.observability.log import JsonFormatter, TextFormatter
from tests.support.waiting import PATIENCE_S
from tests.unit.observability.conftest import Watch, Watched

CANARY = "heliotrope"
PROMPT, KEY, LABEL = f"my {CANARY} prompt", f"pt-{CANARY}-key", f"{CANARY}-label"
METADATA = (("authorization", f"Bearer {KEY}"), ("x-request-id", LABEL), ("traceparent", CANARY))


class OneKey(OpenAccounts):
    def authenticate(self, credentials: Sequence[str]) -> Principal:
        if list(credentials) != [f"Bearer {KEY}"]:
            raise UnauthenticatedError("the key is not valid")
        return Principal(tenant_id="acme", key_id="k1")


def failing(error: Exception) -> Script:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(65,)),)
        raise error

    return script


@contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    """All records of all loggers, in both formats, as a gateway writes them."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers = []
    for kind in (JsonFormatter, TextFormatter):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(kind("gateway", error_messages=False))
        handlers.append(handler)
        root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)


def requests() -> list[pb.GenerateRequest]:
    text, chat = pb.Prompt(text=PROMPT), chat_prompt([("user", PROMPT)])
    return [
        pb.GenerateRequest(model="tiny", prompt=text),
        pb.GenerateRequest(model="tiny", prompt=chat),
        pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text=PROMPT * 100)),  # too long
        pb.GenerateRequest(model="tiny", prompt=text, sampling=pb.Sampling(stop=[PROMPT] * 33)),
        pb.GenerateRequest(model="tiny", prompt=text, sampling=pb.Sampling(stop=[PROMPT * 9])),
        pb.GenerateRequest(model="plain", prompt=chat),  # has no chat format
        pb.GenerateRequest(model="unknown", prompt=text),
    ]


async def by_grpc(gateway: Watched) -> str:
    """Send everything, with the good key and with a bad one. Returns what came back of errors."""
    told = ""
    for metadata in (METADATA, (("authorization", f"Bearer {KEY}x"),)):
        for request in requests():
            for method in ("Generate", "GenerateStream"):
                call = getattr(gateway.stub, method)(request, metadata=metadata)
                try:
                    if method == "Generate":
                        await call
                    else:
                        [chunk async for chunk in call]
                except grpc.aio.AioRpcError as error:
                    told += f"{error.details()} {error.trailing_metadata()}"
        call = gateway.channel.unary_unary("/packtrain.v1.Inference/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff" + PROMPT.encode(), metadata=metadata)
        told += f"{caught.value.details()} {caught.value.trailing_metadata()}"
    return told


def by_http(url: str) -> str:
    told = ""
    bodies = [
        {"model": "tiny", "prompt": PROMPT},
        {"model": "tiny", "prompt": PROMPT, "stream": True},
        {"model": "tiny", "prompt": PROMPT * 100},
        {"model": "tiny", "prompt": {"text": PROMPT}},
        {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]},
        PROMPT,
    ]
    paths = ("/v1/completions", "/v1/chat/completions", f"/v1/{CANARY}", f"/v1/models/{CANARY}")
    for key in (KEY, f"{KEY}x"):
        headers = {"authorization": f"Bearer {key}", "x-request-id": LABEL, "content-type": "application/json"}
        for path in paths:
            for body in bodies:
                request = Request(url + path, json.dumps(body).encode(), headers)
                try:
                    with urlopen(request, timeout=PATIENCE_S) as answer:
                        answer.read()
                except HTTPError as error:
                    told += error.read().decode()
    return told


@pytest.mark.parametrize(
    "script",
    [
        say("Paris"),
        failing(RuntimeError(f"cannot do {PROMPT} with {KEY}")),
        failing(GroupUnavailableError("the group was lost")),
        failing(RequestError("not finite", kind="numerical_error")),
    ],
    ids=["success", "bug", "lost", "not-finite"],
)
async def test_canaries_are_found_nowhere(watched: Watch, script: Script) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with everything_logged() as log:
        async with watched(FakeBackend(script), provider=provider, accounts=OneKey(), http_port=0) as gateway:
            told = await by_grpc(gateway)
            told += await asyncio.to_thread(by_http, f"http://127.0.0.1:{gateway.http_port}")
            await gateway.idle()
            page = generate_latest(gateway.watch.metrics.registry).decode()
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    assert len(spans) > 50
    assert '"event": "request"' in log.getvalue() and "] serving.access: request request_id=" in log.getvalue()
    assert "packtrain_requests_total" in page and "acme" in page
    for name, text in {"logs": log.getvalue(), "errors": told, "metrics": page, "traces": "".join(spans)}.items():
        lines = [line for line in text.splitlines() if CANARY in line.lower()]
        assert lines == [], f"{name} hold a canary"
