"""The Prometheus metrics of one gateway: vLLM's names and buckets for what both have, `packtrain_*` for the rest.

No label takes its value from a client: models are the served ones, methods those of the front ends, tenants the authenticated
ones and at most MAX_TENANTS of them. Everything else is "other".
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from serving import __version__
from serving.observability.fleet import FleetCollector
from serving.observability.groups import GroupCollector

MAX_TENANTS = 200
OTHER = "other"

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_STAGE_BUCKETS = (0.0001, 0.0005, *_TTFT_BUCKETS)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_NUM_CHOICES_BUCKETS = (1, 2, 5, 10, 20)

STAGES = ("gateway", "queue", "prefill", "network")
RESUMPTION_STAGES = ("handover", "queue", "prefill", "network")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """What requests on one replica group are observed with, labels bound."""

    time_to_first_token: Histogram
    inter_token_latency: Histogram
    time_per_output_token: Histogram
    e2e_latency: Histogram
    queue_time: Histogram
    inference_time: Histogram
    prefill_time: Histogram
    decode_time: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    max_num_generation_tokens: Histogram
    params_n: Histogram
    params_max_tokens: Histogram


def _engine_histograms(token_buckets: tuple[int, ...]) -> dict[str, tuple[str, str, tuple[float, ...]]]:
    """vLLM's name, what it is, and the buckets, for each field of EngineMetrics."""
    latency = _REQUEST_LATENCY_BUCKETS
    return {
        "time_to_first_token": ("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS),
        "inter_token_latency": (
            "inter_token_latency_seconds", "Between two deliveries of tokens of one choice.", _TOKEN_LATENCY_BUCKETS
        ),
        "time_per_output_token": (
            "request_time_per_output_token_seconds", "Mean time of a request's tokens after the first.",
            _TOKEN_LATENCY_BUCKETS,
        ),
        "e2e_latency": ("e2e_request_latency_seconds", "From arrival to the end.", latency),
        "queue_time": ("request_queue_time_seconds", "Time waited in the group.", latency),
        "inference_time": ("request_inference_time_seconds", "Prefill and decode.", latency),
        "prefill_time": ("request_prefill_time_seconds", "From the first step to the first token.", latency),
        "decode_time": ("request_decode_time_seconds", "From the first token to the last.", latency),
        "prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request.", token_buckets),
        "generation_tokens": ("request_generation_tokens", "Generated tokens of a request, all choices.", token_buckets),
        "max_num_generation_tokens": (
            "request_max_num_generation_tokens", "Generated tokens of a request's longest choice.", token_buckets
        ),
        "params_n": ("request_params_n", "Choices asked for.", _NUM_CHOICES_BUCKETS),
        "params_max_tokens": ("request_params_max_tokens", "Most tokens of a choice.", token_buckets),
    }  # fmt: skip


class GatewayMetrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self, models: Mapping[str, int], num_groups: Mapping[str, int], methods: Iterable[str]) -> None:
        """`models`: the served names and their longest sequence; `num_groups` by model; `methods` of all front ends."""
        self.registry = registry = CollectorRegistry()
        self._models = frozenset(models)
        self._methods = frozenset(methods)
        self._tenants: set[str] = set()
        engine = ("model_name", "engine")
        histograms = _engine_histograms(_one_two_five(max(models.values(), default=1)))
        self._histograms = {
            field: Histogram(f"vllm:{name}", text, engine, buckets=buckets, registry=registry)
            for field, (name, text, buckets) in histograms.items()
        }
        self._engines: dict[tuple[str, str], EngineMetrics] = {}
        self.request_success = Counter(
            "vllm:request_success", "Requests that a group ran, by how they ended.", (*engine, "finished_reason"),
            registry=registry,
        )  # fmt: skip
        self.group_rejections = Counter(
            "vllm:admission_rejections", "Requests that a group did not take.", (*engine, "reason"), registry=registry
        )
        ttft_stage = Histogram(
            "packtrain_ttft_stage_seconds", "Where the time to the first token went.", ("model_name", "stage"),
            buckets=_STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        resumption_stage = Histogram(
            "packtrain_resumption_stage_seconds", "Where the pause went of requests whose group was lost.",
            ("model_name", "stage"), buckets=_STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.requests = Counter(
            "packtrain_requests", "Answered requests.", ("front_end", "method", "model_name", "code"), registry=registry
        )
        self.requests_in_progress = Gauge(
            "packtrain_requests_in_progress", "Requests that are open.", ("front_end",), registry=registry
        )
        self.admission_rejections = Counter(
            "packtrain_admission_rejections",
            "Requests that were not taken.",
            ("model_name", "reason"),
            registry=registry,
        )
        self.quota_refusals = Counter(
            "packtrain_quota_refusals", "Requests refused because a quota was used up.", ("tenant", "quota"),
            registry=registry,
        )  # fmt: skip
        self.ignored_fields = Counter(
            "packtrain_ignored_fields", "Fields of requests that this server does not know and did not look at.",
            ("method",), registry=registry,
        )  # fmt: skip
        self.tenant_requests = Counter(
            "packtrain_tenant_requests", "Metered requests.", ("tenant", "model_name", "outcome"), registry=registry
        )
        self.tenant_tokens = Counter(
            "packtrain_tokens", "Metered tokens; cached ones are prompt tokens too.", ("tenant", "model_name", "kind"),
            registry=registry,
        )  # fmt: skip
        self.tenant_ttft = Summary(
            "packtrain_tenant_ttft_seconds", "From arrival to the first token.", ("tenant", "model_name"),
            registry=registry,
        )  # fmt: skip
        self._pending_records = Gauge(
            "packtrain_usage_records_pending", "Usage records that are not durable yet.", registry=registry
        )
        self.loop_lag = Histogram(
            "packtrain_event_loop_lag_seconds", "How late the gateway's event loop is.", buckets=_LAG_BUCKETS,
            registry=registry,
        )  # fmt: skip
        Info("packtrain_build", "The version that runs.", registry=registry).info({"version": __version__})
        self.groups = GroupCollector(num_groups, self._forget_engine)
        registry.register(self.groups)
        self.fleet = FleetCollector()
        registry.register(self.fleet)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._ttft_stage, self._resumption_stage = ttft_stage, resumption_stage
        self.ttft_stages: dict[tuple[str, str], Histogram] = {}
        self.resumption_stages: dict[tuple[str, str], Histogram] = {}
        for model in models:
            self._bind_stages(model)

    def set_models(self, num_groups: Mapping[str, int]) -> None:
        """Models that are served from now on, with the number of their groups. Series of others stay: their requests counted."""
        for model in set(num_groups) - self._models:
            self._bind_stages(model)
        self._models |= set(num_groups)
        self.groups.set_models(num_groups)

    def _bind_stages(self, model: str) -> None:
        self.ttft_stages |= {(model, stage): self._ttft_stage.labels(model, stage) for stage in STAGES}
        self.resumption_stages |= {
            (model, stage): self._resumption_stage.labels(model, stage) for stage in RESUMPTION_STAGES
        }

    def watch_pending_records(self, count: Callable[[], float]) -> None:
        """`count` is asked whenever the metrics are read."""
        self._pending_records.set_function(count)

    def model_label(self, model: str) -> str:
        return model if model in self._models else OTHER

    def method_label(self, method: str) -> str:
        return method if method in self._methods else OTHER

    def tenant_label(self, tenant: str) -> str:
        """The tenant's id; "other" for those that come when MAX_TENANTS have been seen."""
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= MAX_TENANTS:
            return OTHER
        self._tenants.add(tenant)
        return tenant

    def engine(self, model: str, engine: str) -> EngineMetrics:
        """Bound once for each group, so that a token looks up no label."""
        bound = self._engines.get((model, engine))
        if bound is None:
            self.groups.heard_of(model, engine)
            children = {field: histogram.labels(model, engine) for field, histogram in self._histograms.items()}
            bound = self._engines[model, engine] = EngineMetrics(**children)
        return bound

    def _forget_engine(self, model: str, engine: str) -> None:
        self._engines.pop((model, engine), None)
        for histogram in self._histograms.values():
            histogram.remove(model, engine)
        for counter in (self.request_success, self.group_rejections):
            counter.remove_by_labels({"model_name": model, "engine": engine})


def _one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `limit`."""
    buckets = []
    power = 1
    while power <= limit:
        buckets += [step * power for step in (1, 2, 5) if step * power <= limit]
        power *= 10
    return tuple(buckets)
