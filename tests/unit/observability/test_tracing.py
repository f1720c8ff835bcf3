"""Spans of one request, from the client's over the gateway's to the group's, and their way to a collector."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from bench.support.fake_backend import FakeBackend, say
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from serving.config import tracing_is_on
from serving.contracts.errors import GroupUnavailableError
from serving.driver.preflight import check_environment
from serving.gateway.core.call import trace_headers
from serving.observability.tracing import GroupSpan, Tracing, end_span, open_tracing, trace_context
from tests.support.otlp import running_collector
from tests.support.waiting import PATIENCE_S
from tests.unit.observability.conftest import Watch

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))
REQUEST = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(max_tokens=9, top_p=0.5))


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


class TracedBackend(FakeBackend):
    """Remembers what went with the request."""

    context: dict[str, str]

    async def generate(self, model: str, requests: Sequence[EngineRequest], trace_context: Any) -> AsyncIterator[Any]:
        self.context = trace_context
        async for outputs in super().generate(model, requests, trace_context):
            yield outputs


async def test_a_request_is_one_span_under_the_clients(
    watched: Watch, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    backend = TracedBackend(say("Paris"))
    async with watched(backend, provider=provider) as gateway:
        answer = await gateway.stub.Generate(REQUEST, metadata=HEADERS)
    span = only(exporter)
    assert (span.name, span.kind, span.status.status_code) == ("gateway.request", SpanKind.SERVER, StatusCode.UNSET)
    assert span.context is not None and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert [event.name for event in span.events] == ["first_token"]
    assert dict(span.attributes or {}) == {
        "rpc.method": "/packtrain.v1.Inference/Generate",
        "rpc.response.status_code": "OK",
        "packtrain.front_end": "grpc",
        "packtrain.request_id": answer.request.request_id,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "packtrain",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.response.id": answer.request.request_id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
    }
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert {name for name in span.attributes or {} if name.startswith("gen_ai.")} <= known
    assert backend.context["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert backend.context["tracestate"] == "vendor=1"


async def test_a_failure_is_an_error_that_names_the_model(
    watched: Watch, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    async def lose(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        raise GroupUnavailableError("lost")
        yield ()

    async with watched(FakeBackend(lose), provider=provider) as gateway:
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(REQUEST)
    span = only(exporter)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "NO_GROUP")
    attributes = span.attributes or {}
    assert (attributes["gen_ai.request.model"], attributes["error.type"]) == ("tiny", "NO_GROUP")
    assert span.parent is None


@pytest.mark.parametrize("traceparent", ["", "00-zz-1-01", "\x1b[2J", "0" * 5000])
async def test_a_context_that_is_none_begins_a_new_trace(
    watched: Watch, provider: TracerProvider, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    with Watched(provider, {"traceparent": traceparent}):
        pass
    assert only(exporter).parent is None


class Watched:
    """A span of one Tracing, as a context."""

    def __init__(self, provider: TracerProvider, headers: dict[str, str]) -> None:
        self.span = Tracing(provider).start("gateway.request", SpanKind.SERVER, headers)

    def __enter__(self) -> dict[str, str]:
        return trace_context(self.span)

    def __exit__(self, *raised: object) -> None:
        end_span(self.span)


def output(**fields: Any) -> EngineOutput:
    return EngineOutput(request_id="r", **fields)


@pytest.mark.parametrize(
    ("batches", "refusal", "failure", "num_events"),
    [
        ([output(token_ids=(1,)), output(token_ids=(2,), finish_reason=FinishReason.STOP)], None, None, 1),
        ([output(finish_reason=FinishReason.ERROR, error_kind="unavailable")], None, "unavailable", 0),
        ([], "overloaded", "overloaded", 0),
        ([output(token_ids=(1,))], None, None, 1),  # and then it was cancelled
    ],
)
def test_the_group_has_a_span_under_the_gateways(
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    batches: list[EngineOutput],
    refusal: str | None,
    failure: str | None,
    num_events: int,
) -> None:
    with Watched(provider, {}) as context:
        span = GroupSpan(Tracing(provider), "tiny", "g1", context)
        for batch in batches:
            span.received([batch])
        if refusal is not None:
            span.failed(refusal)
        span.end()
    group, gateway = exporter.get_finished_spans()
    assert group.parent is not None and group.parent.span_id == gateway.get_span_context().span_id
    assert (group.name, len(group.events), group.status.description) == ("group.generate", num_events, failure)
    attributes = group.attributes or {}
    assert (attributes["gen_ai.request.model"], attributes["packtrain.engine"]) == ("tiny", "g1")


def test_nothing_is_traced_unless_told_to(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    tracing = open_tracing()
    assert not tracing.is_on
    span = tracing.start("gateway.request", SpanKind.SERVER, {})
    assert (trace_context(span), span.is_recording()) == ({}, False)
    group = GroupSpan(Tracing(provider), "tiny", "g1", {})  # the gateway does not trace
    group.received([output(token_ids=(1,))])
    group.end()
    tracing.close()
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("name", ["", "llama-in-berlin"])
def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    with running_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracing = open_tracing()
        assert tracing.is_on
        end_span(tracing.start("gateway.request", SpanKind.SERVER, dict(HEADERS)), "NO_GROUP")
        tracing.close()
    (spans,) = collector.requests.get(timeout=PATIENCE_S).resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in spans.resource.attributes}
    assert resource["service.name"] == (name or "packtrain")
    (span,) = spans.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("gateway.request", TRACE, PARENT)
    assert span.status.code == span.status.STATUS_CODE_ERROR


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_COMPRESSION": "zstd"},
        {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4096"},
        {"OTEL_BSP_SCHEDULE_DELAY": "0"},
        {"OTEL_EXPORTER_OTLP_TIMEOUT": "5s"},
        {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "-1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1"},
    ],
)
def test_variables_that_opentelemetry_does_not_take_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the OTEL_ variables are wrong"):
        check_environment()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    check_environment()


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": ""}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_variables_of_traces_count_before_those_of_all_signals(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_on: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing_is_on() == is_on


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], {}),
        ([("traceparent", "p"), ("other", "x")], {"traceparent": "p"}),
        (
            [("tracestate", "a=1"), ("traceparent", "p"), ("tracestate", "b=2,c=3")],
            {"traceparent": "p", "tracestate": "a=1,b=2,c=3"},
        ),
        ([("traceparent", "p"), ("traceparent", "q"), ("tracestate", "a=1")], {}),
        ([("tracestate", "a=1")], {}),
    ],
)
def test_trace_context_is_read_as_w3c_says(headers: list[tuple[str, str]], expected: dict[str, str]) -> None:
    assert trace_headers(headers) == expected
