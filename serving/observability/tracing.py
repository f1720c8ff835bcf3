"""OpenTelemetry spans, sent over OTLP when $OTEL_EXPORTER_OTLP_ENDPOINT is set and not made at all otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.trace import (
    INVALID_SPAN,
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from model_parallel.engine.request import EngineOutput, FinishReason
from model_parallel.errors import ConfigError
from serving.config import tracing_is_on

_PROPAGATOR = TraceContextTextMapPropagator()
_SERVICE_NAME = "packtrain"


class Tracing:
    """Starts the spans of one process. W3C trace context links them to the client's and to one another."""

    def __init__(self, provider: Any = None) -> None:
        """`provider` is a TracerProvider of OpenTelemetry's SDK; without one, no span is recorded."""
        self._provider = provider
        self._tracer: Tracer = NoOpTracer() if provider is None else provider.get_tracer(_SERVICE_NAME)

    @property
    def is_on(self) -> bool:
        return self._provider is not None

    def start(self, name: str, kind: SpanKind, headers: Mapping[str, str]) -> Span:
        """A span whose parent is named by `headers` (traceparent, tracestate), if they name one. End it with `end_span`."""
        return self._tracer.start_span(name, context=_PROPAGATOR.extract(headers) if headers else None, kind=kind)

    def close(self) -> None:
        """Send what is left; bounded by OpenTelemetry's own timeouts. Blocks."""
        if self._provider is not None:
            self._provider.shutdown()


def open_tracing() -> Tracing:
    """As the environment says. Raises ConfigError."""
    if not tracing_is_on():
        return Tracing()
    # The SDK is loaded only where it is used: it costs a gateway's start a noticeable time.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    try:
        resource = Resource({"service.name": _SERVICE_NAME}).merge(OTELResourceDetector().detect())  # the latter wins
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except Exception as error:  # of many kinds: whatever the SDK raises for a variable that it does not take
        raise ConfigError(
            f"the OTEL_ variables are wrong, and traces cannot be sent: {type(error).__name__}: {error}; mend them, or turn "
            "tracing off with OTEL_TRACES_EXPORTER=none"
        ) from error
    return Tracing(provider)


def trace_context(span: Span) -> dict[str, str]:
    """The headers that make other spans children of this one; empty when nothing is traced."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, set_span_in_context(span))
    return headers


def end_span(span: Span, failure: str = "") -> None:
    """End it, with status ERROR and `failure`, a stable label, unless that is empty."""
    if failure:
        span.set_attribute("error.type", failure)
        span.set_status(Status(StatusCode.ERROR, failure))
    span.end()


class GroupSpan:
    """One request in its group: the span group.generate, if the gateway's is traced. End it."""

    def __init__(self, tracing: Tracing, model: str, engine: str, trace_context: Mapping[str, str]) -> None:
        is_traced = tracing.is_on and bool(trace_context)
        self._span = tracing.start("group.generate", SpanKind.INTERNAL, trace_context) if is_traced else INVALID_SPAN
        self._is_traced = is_traced
        self._failure = ""
        self._has_tokens = False
        self._span.set_attributes({"gen_ai.request.model": model, "packtrain.engine": engine})

    def received(self, outputs: Sequence[EngineOutput]) -> None:
        """Outputs that go to the gateway."""
        if not self._is_traced:
            return
        if not self._has_tokens and any(output.token_ids for output in outputs):
            self._has_tokens = True
            self._span.add_event("first_token")
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                self._failure = output.error_kind

    def failed(self, kind: str) -> None:
        """The group refuses the request, or is lost."""
        self._failure = kind

    def end(self) -> None:
        """The group has done with the request."""
        end_span(self._span, self._failure)
