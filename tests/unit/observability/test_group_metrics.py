"""From a group's reports to families of metrics: each group counts once, and is forgotten when it has gone."""

from dataclasses import asdict

import pytest
from prometheus_client.samples import Sample

from bench.support.fake_backend import card
from model_parallel.engine.messages import Row, StepPlan
from model_parallel.engine.request import EngineOutput
from model_parallel.engine.stats import SchedulerStats
from serving.contracts.accounts import Principal
from serving.contracts.group_report import GroupReport
from serving.gateway.server import METHODS
from serving.observability.gateway import GatewayWatch
from serving.observability.groups import FORGET_AFTER_S
from serving.observability.metrics import GatewayMetrics, _one_two_five
from serving.observability.requests import Telemetry
from serving.observability.tracing import Tracing
from serving.replica.reports import READER_LEASE_S, IterationTokens, ReaderLease
from tests.support.usage import usage_record

STATS = asdict(
    SchedulerStats(
        num_running=3,
        num_waiting=5,
        num_waiting_tokens=400,
        kv_usage=0.25,
        estimated_wait_s=1.5,
        num_prompt_tokens=70,
        num_generation_tokens=11,
        num_preemptions=1,
        num_pauses=4,
        num_paused=2,
        num_grammars=0,
        num_compiled_grammars=0,
        num_prefix_query_tokens=90,
        num_prefix_hit_tokens=20,
        num_corrupted=2,
    )
)
CACHE = {"block_size": "16", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}


def report(engine: str, **changes: object) -> GroupReport:
    tokens = IterationTokens()
    for num_tokens in (1, 9, 16, 20_000):
        tokens.observe(StepPlan(1, 1, rows=(Row(1, 0, num_tokens - 1, False), Row(2, 0, 1, True))))
    values = {
        "stats": STATS,
        "iteration_counts": tuple(tokens.counts),
        "num_iteration_tokens": tokens.total,
        "cache_config": CACHE,
    }
    return GroupReport(engine=engine, **(values | changes))  # type: ignore[arg-type]


def samples(watch: GatewayWatch) -> list[Sample]:
    return [sample for family in watch.metrics.registry.collect() for sample in family.samples]


@pytest.fixture
def watch() -> GatewayWatch:
    return GatewayWatch([card(num_groups=2)], METHODS, Tracing())


def test_a_report_is_shown_under_vllms_names(watch: GatewayWatch) -> None:
    watch.metrics.groups.take({"tiny": [report("g1")]}, 0.0)

    def value(name: str, **labels: str) -> float | None:
        return watch.metrics.registry.get_sample_value(name, {"model_name": "tiny", "engine": "g1", **labels})

    assert value("vllm:num_requests_running") == 3
    assert value("vllm:num_requests_waiting") == 5
    assert value("packtrain_waiting_tokens") == 400
    assert value("packtrain_estimated_wait_seconds") == 1.5
    assert value("vllm:kv_cache_usage_perc") == 0.25
    assert value("vllm:prompt_tokens_total") == 70
    assert value("vllm:generation_tokens_total") == 11
    assert value("vllm:num_preemptions_total") == 1
    assert value("vllm:prefix_cache_queries_total") == 90
    assert value("vllm:prefix_cache_hits_total") == 20
    assert value("vllm:corrupted_requests_total") == 2
    assert value("vllm:cache_config_info", **CACHE) == 1
    assert value("packtrain_group_up") == 1
    bounds = ("1.0", "8.0", "16.0", "16384.0", "+Inf")
    buckets = [value("vllm:iteration_tokens_total_bucket", le=bound) for bound in bounds]
    assert buckets == [1, 1, 3, 3, 4]
    assert value("vllm:iteration_tokens_total_sum") == 1 + 9 + 16 + 20_000


def test_a_step_that_only_forgets_is_no_iteration() -> None:
    tokens = IterationTokens()
    tokens.observe(StepPlan(1, 1, finished=(1,)))
    assert sum(tokens.counts) == tokens.total == 0


def test_a_group_that_counts_elsewhere_or_is_lost_is_shown_as_such(watch: GatewayWatch) -> None:
    watch.metrics.groups.take({"tiny": [report("g1", stats={}), report("g2", is_healthy=False)]}, 0.0)
    up = {s.labels["engine"]: s.value for s in samples(watch) if s.name == "packtrain_group_up"}
    assert up == {"g2": 0}
    assert watch.metrics.registry.get_sample_value("packtrain_groups_configured", {"model_name": "tiny"}) == 2


def test_a_group_counts_with_one_gateway_at_a_time() -> None:
    now_s = 0.0
    lease = ReaderLease(lambda: now_s)
    assert [lease.is_held_by("a"), lease.is_held_by("b")] == [True, False]
    now_s = READER_LEASE_S - 1
    assert [lease.is_held_by("a"), lease.is_held_by("b")] == [True, False]
    now_s = 2 * READER_LEASE_S
    assert [lease.is_held_by("b"), lease.is_held_by("a")] == [True, False]


def test_the_series_of_a_group_that_has_gone_are_removed(watch: GatewayWatch) -> None:
    groups, ended = watch.metrics.groups, "packtrain_groups_ended_total"
    groups.take({"tiny": [report("g1"), report("elsewhere", stats={})]}, 0.0)
    number = len(samples(watch))
    for incarnation in range(2, 20):
        now_s = incarnation * (FORGET_AFTER_S + 1)
        watch.metrics.engine("tiny", f"g{incarnation}").inter_token_latency.observe(0.1)
        watch.metrics.request_success.labels("tiny", f"g{incarnation}", "stop").inc()
        groups.take({"tiny": [report(f"g{incarnation}")]}, now_s)
        groups.take({"tiny": []}, now_s + FORGET_AFTER_S)
        groups.take({"tiny": []}, now_s + FORGET_AFTER_S + 0.5)
    assert watch.metrics.registry.get_sample_value(ended, {"model_name": "tiny"}) == 1 + 18
    assert not any(sample.labels.get("engine") for sample in samples(watch))
    assert len(samples(watch)) < number


def test_token_buckets_end_at_the_longest_sequence() -> None:
    assert _one_two_five(4096) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert _one_two_five(1) == (1,)


def tokens(*, choice: int = 0) -> list[EngineOutput]:
    return [EngineOutput(request_id="r", choice=choice, token_ids=(1,))]


def series_of(metrics: GatewayMetrics, engine: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("engine") == engine and not sample.name.endswith("_created")
    }


def test_tokens_count_with_the_group_that_made_them() -> None:
    clock = [0.0]
    metrics = GatewayMetrics({"m": 2048}, {"m": 2}, ())
    with Telemetry(metrics, Tracing(), clock=lambda: clock[0]).observe("grpc", "G", "r", {}) as observer:
        observer.authenticated(Principal(tenant_id="t"))
        observer.resolved("m", "m")
        observer.submitted()
        for engine, times_s in (("old", (1, 2, 4)), ("new", (10, 11, 12, 13))):
            observer.accepted(engine)
            for clock[0] in times_s:
                observer.received(tokens())
            if engine == "old":
                observer.interrupted()
        observer.settled(usage_record("r", num_completion_tokens=7))
    old, new = (series_of(metrics, engine) for engine in ("old", "new"))
    name = "vllm:inter_token_latency_seconds"
    assert (old[f"{name}_count"], old[f"{name}_sum"]) == (2, 3), (
        "the pause is nobody's: the stages of resumption tell it"
    )
    assert (new[f"{name}_count"], new[f"{name}_sum"]) == (3, 3)
    first = "vllm:time_to_first_token_seconds_count"
    assert (old[first], new[first]) == (1, 0), "the client waited for one first token"
    assert new["vllm:request_time_per_output_token_seconds_sum"] == (13 - 1) / 6


def test_series_that_are_made_after_a_group_has_gone_go_as_well() -> None:
    metrics = GatewayMetrics({"m": 2048}, {"m": 1}, ())
    metrics.groups.take({"m": [report("g1")]}, 0.0)
    with Telemetry(metrics, Tracing()).observe("grpc", "G", "r", {}) as observer:
        observer.resolved("m", "m")
        observer.accepted("g1")
        observer.received(tokens())
        metrics.groups.take({"m": []}, 100.0)
        assert series_of(metrics, "g1") == {}
        observer.received(tokens())
        observer.settled(usage_record("r", outcome="deadline"))
        observer.failed("RESOURCE_EXHAUSTED", "OVERLOADED", engine="g1")
    assert series_of(metrics, "g1") != {}
    metrics.groups.take({"m": []}, 101.0)
    assert series_of(metrics, "g1") != {}
    metrics.groups.take({"m": []}, 200.0)
    assert series_of(metrics, "g1") == {}
