"""Every metric and label that the dashboard asks for exists, and so does every one that the page of metrics names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.support.fake_backend import card
from model_parallel.engine.request import EngineOutput, SamplingParams, Timings
from serving.contracts.accounts import Principal
from serving.gateway.server import METHODS
from serving.observability.gateway import GatewayWatch
from serving.observability.tracing import Tracing
from tests.support.usage import usage_record
from tests.unit.observability.test_group_metrics import report

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "docs/dashboards/packtrain.json").read_text())
SCRAPE_LABELS = {"instance", "job"}
METRIC = re.compile(r"\b((?:vllm:|packtrain_|process_|python_)\w+)(\{[^}]*\})?")


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """Labels by sample name, after everything that can be counted has been."""
    watch = GatewayWatch([card()], METHODS, Tracing())
    timings = Timings(queue_s=0.1, prefill_s=0.1)
    outputs = [EngineOutput(request_id="r-0", token_ids=(1,), timings=timings) for _ in range(2)]
    record = usage_record("r", model="tiny", num_prompt_tokens=1, num_completion_tokens=2)
    with watch.telemetry.observe("grpc", METHODS[0], "r", {}) as observer:
        observer.authenticated(Principal(tenant_id="t"))
        observer.resolved("tiny")
        observer.generates("chat", 1, SamplingParams())
        observer.submitted()
        observer.accepted("g1")
        observer.received(outputs)
        observer.settled(record)
        observer.failed("RESOURCE_EXHAUSTED", "OVERLOADED", quota="tokens_per_minute", engine="g1")
    watch.metrics.loop_lag.observe(0)
    watch.metrics.groups.take({"tiny": [report("g1")]}, 0.0)
    found: dict[str, set[str]] = {}
    for family in watch.metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            yield f"count by ({label}) ({metric})"


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_what_is_asked_for_exists(query: str, labels_of: dict[str, set[str]]) -> None:
    metrics = METRIC.findall(query)
    assert metrics
    grouped = {label for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(", ")}
    for name, selector in metrics:
        assert name in labels_of
        matched = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", re.sub(r'"[^"]*"', "", selector)))
        assert matched | grouped <= labels_of[name] | SCRAPE_LABELS


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__all"} <= variables


def test_every_metric_is_documented(labels_of: dict[str, set[str]]) -> None:
    page = (ROOT / "docs/observability.md").read_text()
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels_of if not name.endswith("_created")}
    ours = {name for name in names if name.startswith(("vllm:", "packtrain_"))}
    assert sorted(name for name in ours if f"`{name}`" not in page) == []
    documented = set(re.findall(r"`((?:vllm:|packtrain_)\w+)`", page))
    assert documented <= ours
