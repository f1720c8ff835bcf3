"""Every metric that a gateway can show, with its labels: what dashboards and alerts may ask for."""

from bench.support.fake_backend import card
from model_parallel.engine.request import EngineOutput, SamplingParams, Timings
from serving.contracts.accounts import Principal
from serving.contracts.fleet import Fleet, FleetModel
from serving.gateway.server import METHODS
from serving.observability.gateway import GatewayWatch
from serving.observability.tracing import Tracing
from tests.support.usage import usage_record
from tests.unit.observability.test_group_metrics import report


def labels_by_sample() -> dict[str, set[str]]:
    """Labels by sample name, after everything that can be counted has been."""
    watch = GatewayWatch([card()], METHODS, Tracing())
    timings = Timings(queue_s=0.1, prefill_s=0.1)
    outputs = [EngineOutput(request_id="r-0", token_ids=(1,), timings=timings) for _ in range(2)]
    record = usage_record("r", model="tiny", num_prompt_tokens=1, num_completion_tokens=2)
    with watch.telemetry.observe("grpc", METHODS[0], "r", {}) as observer:
        observer.authenticated(Principal(tenant_id="t"))
        observer.resolved("tiny", "tiny")
        observer.generates("chat", 1, SamplingParams())
        observer.ignored(1)
        observer.submitted()
        observer.accepted("g1")
        observer.received(outputs)
        observer.settled(record)
        observer.failed("RESOURCE_EXHAUSTED", "OVERLOADED", quota="tokens_per_minute", engine="g1")
    watch.metrics.loop_lag.observe(0)
    watch.metrics.groups.take({"tiny": [report("g1")]}, 0.0)
    seen = FleetModel(mode="on", target=1, min_groups=1, max_groups=1, groups=(), num_decisions={"demand": 1})
    watch.metrics.fleet.take(Fleet(at_s=0.0, models={"tiny": seen}))
    found: dict[str, set[str]] = {}
    for family in watch.metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
