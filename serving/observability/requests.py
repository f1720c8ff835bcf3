"""What happens to one request, told to metrics, trace and log.

A request costs some tens of microseconds here, a token one or two: labels are bound and spans begun before tokens flow.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from opentelemetry.trace import Span, SpanKind

from model_parallel.engine.request import EngineOutput, SamplingParams, Timings
from serving.contracts.accounts import Principal, UsageRecord
from serving.contracts.observer import RequestObserver
from serving.observability.log import log_event
from serving.observability.metrics import EngineMetrics, GatewayMetrics
from serving.observability.tracing import Tracing, end_span, trace_context

logger = logging.getLogger("serving.access")

MAX_LINES_PER_S = 200
"""Of the access log, which must not be what an overloaded gateway is busy with."""

_FINISHED_REASON = {
    "stop": "stop", "length": "length", "cancelled": "abort", "deadline": "abort", "unavailable": "error", "error": "error",
}  # fmt: skip
"""vLLM's word for each outcome of a request that a group ran."""
_REJECTIONS = frozenset({"OVERLOADED", "DRAINING", "NO_ACCOUNTS", "NO_GROUP", "NO_DATABASE", "QUOTA"})
"""Reasons of `serving.gateway.core.error_responses` that have nothing to do with the request itself."""
_FAILURE_CODES = frozenset({"INTERNAL", "UNAVAILABLE", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED"})


class Telemetry:
    """Makes the observers of one gateway."""

    def __init__(
        self, metrics: GatewayMetrics, tracing: Tracing, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self.clock = clock
        self._line_budget = _LineBudget()

    def observe(self, front_end: str, method: str, request_id: str, headers: Mapping[str, str]) -> RequestObserver:
        """For one request, as a context around it. `headers` may name the client's span (traceparent, tracestate)."""
        return _Observer(self, front_end, method, request_id, headers)

    def log_line(self, now_s: float, level: int, fields: dict[str, object]) -> None:
        """One line of the access log, if there is room for it."""
        if not logger.isEnabledFor(level):
            return
        num_omitted = self._line_budget.take(now_s)
        if num_omitted is not None:
            log_event(logger, level, "request", **fields, **({"num_omitted": num_omitted} if num_omitted else {}))


class _LineBudget:
    """At most MAX_LINES_PER_S in each second."""

    def __init__(self) -> None:
        self._second = 0
        self._num_lines = 0
        self._num_omitted = 0

    def take(self, now_s: float) -> int | None:
        """None when there is no room; otherwise how many lines were left out since the last one."""
        if int(now_s) != self._second:
            self._second, self._num_lines = int(now_s), 0
        if self._num_lines >= MAX_LINES_PER_S:
            self._num_omitted += 1
            return None
        self._num_lines += 1
        num_omitted, self._num_omitted = self._num_omitted, 0
        return num_omitted


class _Observer(RequestObserver):
    def __init__(
        self, telemetry: Telemetry, front_end: str, method: str, request_id: str, headers: Mapping[str, str]
    ) -> None:
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._clock = telemetry.clock
        self._front_end = front_end
        self._method = telemetry.metrics.method_label(method)
        self._request_id = request_id
        self._headers = headers
        self._principal: Principal | None = None
        self._asked = ""
        """The model's name, which may be an adapter's."""
        self._model = ""
        """For labels: the model, or the one that the adapter changes."""
        self._code = ""
        self._reason = ""
        self._num_choices = 0
        self._max_tokens = 0
        self._record: UsageRecord | None = None
        self._engine_id = ""
        """Of the group that has accepted it."""
        self._engine: EngineMetrics | None = None
        """The same group's, from its first token on."""
        self._submitted_s = 0.0
        self._first_s: float | None = None
        self._interrupted_s: float | None = None
        """When its group was lost, until it has a token of another one."""
        self._accepted_s = 0.0
        self._last_s: dict[int, float] = {}
        """When each choice had its latest token of this group."""
        self._latest_s = 0.0
        """When any choice had one of any group."""
        self._num_tokens: dict[int, int] = {}
        self._span: Span

    def __enter__(self) -> "RequestObserver":
        self._started_s = self._clock()
        self._metrics.requests_in_progress.labels(self._front_end).inc()
        self._span = self._telemetry.tracing.start("gateway.request", SpanKind.SERVER, self._headers)
        if self._span.is_recording():
            self._span.set_attribute("rpc.method", self._method)
            self._span.set_attribute("packtrain.front_end", self._front_end)
            self._span.set_attribute("packtrain.request_id", self._request_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._code:
            self._code = _code_of(error)
        now_s = self._clock()
        metrics, model = self._metrics, self._metrics.model_label(self._model)
        metrics.requests_in_progress.labels(self._front_end).dec()
        metrics.requests.labels(self._front_end, self._method, model, self._code).inc()
        if self._span.is_recording():
            self._span.set_attribute("rpc.response.status_code", self._code)
        end_span(self._span, (self._reason or self._code) if self._code in _FAILURE_CODES else "")
        level = logging.WARNING if self._code in ("INTERNAL", "UNKNOWN") else logging.INFO
        self._telemetry.log_line(now_s, level, self._line(now_s))

    def authenticated(self, principal: Principal) -> None:
        self._principal = principal

    def resolved(self, model: str, base: str) -> None:
        self._asked, self._model = model, base
        if self._span.is_recording():
            self._span.set_attribute("gen_ai.request.model", model)

    def ignored(self, num_fields: int) -> None:
        if num_fields:
            self._metrics.ignored_fields.labels(self._method).inc(num_fields)

    def generates(self, operation: str, num_choices: int, sampling: SamplingParams) -> None:
        self._num_choices, self._max_tokens = num_choices, sampling.max_tokens
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "packtrain",
                    "gen_ai.request.choice.count": num_choices,
                    "gen_ai.request.max_tokens": sampling.max_tokens,
                    "gen_ai.request.temperature": sampling.temperature,
                    "gen_ai.request.top_p": sampling.top_p,
                }
            )

    def submitted(self) -> Mapping[str, str]:
        self._submitted_s = self._clock()
        return trace_context(self._span) if self._telemetry.tracing.is_on else {}

    def accepted(self, engine: str) -> None:
        self._engine_id, self._engine, self._last_s = engine, None, {}
        self._accepted_s = self._clock()

    def interrupted(self) -> None:
        if self._interrupted_s is None:
            self._interrupted_s = self._clock()
        self._span.add_event("group_lost")

    def received(self, outputs: Sequence[EngineOutput]) -> None:
        now_s = self._clock()
        if self._interrupted_s is not None and any(output.token_ids for output in outputs):
            self._goes_on(now_s, self._interrupted_s, outputs)
        for output in outputs:
            if not output.token_ids:
                continue
            choice = output.choice
            if self._engine is None:
                self._engine = self._metrics.engine(self._model, self._engine_id)
            if self._first_s is None:
                self._first_token(now_s, self._engine, output)
            if (last_s := self._last_s.get(choice)) is not None:
                self._engine.inter_token_latency.observe(now_s - last_s)
            self._last_s[choice] = self._latest_s = now_s
            self._num_tokens[choice] = self._num_tokens.get(choice, 0) + len(output.token_ids)

    def _goes_on(self, now_s: float, interrupted_s: float, outputs: Sequence[EngineOutput]) -> None:
        """Its first token of another group than the one that was lost."""
        self._interrupted_s = None
        timings = next((output.timings for output in outputs if output.token_ids), None) or Timings()
        waited_s = now_s - self._accepted_s
        stages = {
            "handover": self._accepted_s - interrupted_s,
            "queue": timings.queue_s,
            "prefill": timings.prefill_s,
            "network": max(0.0, waited_s - timings.queue_s - timings.prefill_s),
        }
        for stage, duration_s in stages.items():
            self._metrics.resumption_stages[self._model, stage].observe(duration_s)
        self._span.add_event("first_token_after_loss")

    def _first_token(self, now_s: float, engine: EngineMetrics, output: EngineOutput) -> None:
        self._first_s = now_s
        ttft_s = now_s - self._started_s
        engine.time_to_first_token.observe(ttft_s)
        self._metrics.tenant_ttft.labels(self._tenant_label(), self._model).observe(ttft_s)
        if (timings := output.timings) is not None:
            gateway_s = self._submitted_s - self._started_s
            network_s = max(0.0, ttft_s - gateway_s - timings.queue_s - timings.prefill_s)
            stages = {
                "gateway": gateway_s,
                "queue": timings.queue_s,
                "prefill": timings.prefill_s,
                "network": network_s,
            }
            for stage, duration_s in stages.items():
                self._metrics.ttft_stages[self._model, stage].observe(duration_s)
        self._span.add_event("first_token")

    def settled(self, record: UsageRecord) -> None:
        self._record = record
        metrics, tenant, model = self._metrics, self._tenant_label(), self._model
        metrics.tenant_requests.labels(tenant, model, record.outcome).inc()
        tokens = {
            "prompt": record.num_prompt_tokens,
            "cached": record.num_cached_tokens,
            "completion": record.num_completion_tokens,
        }
        for kind, number in tokens.items():
            metrics.tenant_tokens.labels(tenant, model, kind).inc(number)
        finished_reason = _FINISHED_REASON.get(record.outcome)
        if self._engine_id and finished_reason is not None:
            metrics.groups.heard_of(model, self._engine_id)
            metrics.request_success.labels(model, self._engine_id, finished_reason).inc()
            if finished_reason in ("stop", "length"):
                self._observe_whole(record, metrics.engine(model, self._engine_id))
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "gen_ai.response.id": record.request_id,
                    "gen_ai.response.finish_reasons": [record.outcome],
                    "gen_ai.usage.input_tokens": record.num_prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
                    "gen_ai.usage.output_tokens": record.num_completion_tokens,
                }
            )

    def _observe_whole(self, record: UsageRecord, engine: EngineMetrics) -> None:
        """A whole answer: only of these are all stages known."""
        engine.e2e_latency.observe(self._clock() - self._started_s)
        engine.queue_time.observe(record.queue_s)
        engine.prefill_time.observe(record.prefill_s)
        engine.decode_time.observe(record.decode_s)
        engine.inference_time.observe(record.prefill_s + record.decode_s)
        engine.prompt_tokens.observe(record.num_prompt_tokens)
        if self._first_s is None:  # it only scored its prompt
            return
        engine.generation_tokens.observe(record.num_completion_tokens)
        engine.params_n.observe(self._num_choices)
        engine.params_max_tokens.observe(self._max_tokens)
        longest = max(self._num_tokens.values())
        engine.max_num_generation_tokens.observe(longest)
        if longest > 1:
            engine.time_per_output_token.observe((self._latest_s - self._first_s) / (longest - 1))

    def failed(self, code: str, reason: str, *, quota: str = "", engine: str = "") -> None:
        self._code, self._reason = code, reason
        metrics, model = self._metrics, self._metrics.model_label(self._model)
        if reason in _REJECTIONS:
            metrics.admission_rejections.labels(model, reason).inc()
        if engine and reason == "OVERLOADED":
            metrics.groups.heard_of(model, engine)
            metrics.group_rejections.labels(model, engine, reason).inc()
        if quota:
            metrics.quota_refusals.labels(self._tenant_label(), quota).inc()

    def ended(self, code: str) -> None:
        self._code = code

    def _tenant_label(self) -> str:
        return self._metrics.tenant_label(self._principal.tenant_id if self._principal is not None else "")

    def _line(self, now_s: float) -> dict[str, object]:
        fields: dict[str, object] = {
            "request_id": self._request_id,
            "front_end": self._front_end,
            "method": self._method,
            "model": self._asked,
            "code": self._code,
            "total_s": round(now_s - self._started_s, 6),
        }
        if self._reason:
            fields["reason"] = self._reason
        if self._principal is not None:
            fields |= {"tenant": self._principal.tenant_id, "key": self._principal.key_id}
        if self._first_s is not None:
            fields["ttft_s"] = round(self._first_s - self._started_s, 6)
        if (record := self._record) is not None:
            fields |= {
                "outcome": record.outcome,
                "prompt_tokens": record.num_prompt_tokens,
                "cached_tokens": record.num_cached_tokens,
                "completion_tokens": record.num_completion_tokens,
                "queue_s": round(record.queue_s, 6),
                "prefill_s": round(record.prefill_s, 6),
                "decode_s": round(record.decode_s, 6),
            }
        return fields


def _code_of(error: BaseException | None) -> str:
    match error:
        case None:
            return "OK"
        case asyncio.CancelledError() | GeneratorExit():
            return "CANCELLED"
        case _:
            return "UNKNOWN"
