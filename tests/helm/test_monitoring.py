"""Alerts and dashboard of the chart: real PromQL, of metrics and labels that exist, each alert with a runbook that is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.support.helm import CHART, CI_VALUES, NAME, NAMESPACE, ROOT, changed_chart, of_kind, only, render, rendered
from tests.support.metric_labels import labels_by_sample

MANY = next(path for path in CI_VALUES if path.name.startswith("many"))
# What Prometheus adds: PodMonitors give each series its namespace and pod.
SCRAPE_LABELS = {"instance", "job", "namespace", "pod", "container"}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """Labels by sample name, of a gateway's own registry after everything that can be counted has been."""
    return labels_by_sample()


def alerts(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for group in only(manifests, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]


def selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Metric names of an expression and the labels that are matched or grouped by, as a PromQL parser sees them."""
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", node.prettify()):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", re.sub(r'"[^"]*"', "", matchers)))


def grouped(expression: str) -> set[str]:
    return {label for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(", ")}


def problems_of(expression: str, labels_of: dict[str, set[str]]) -> list[str]:
    tree = promql_parser.parse(expression)
    found = []
    named = list(selectors(tree))
    if not named:
        found.append("no metric")
    for name, matched in named:
        if name not in labels_of:
            found.append(f"{name} does not exist")
        elif unknown := (matched | grouped(expression)) - labels_of[name] - SCRAPE_LABELS:
            found.append(f"{name} has no label {sorted(unknown)}")
    return found


ALERTS = {rule["alert"]: rule for rule in alerts(rendered(MANY))}


@pytest.mark.parametrize("name", ALERTS)
def test_alert_asks_for_what_exists(name: str, labels_of: dict[str, set[str]]) -> None:
    assert problems_of(ALERTS[name]["expr"], labels_of) == []


@pytest.mark.parametrize("name", ALERTS)
def test_alert_is_of_this_installation(name: str) -> None:
    """Another release's series must not raise it, of the same namespace either: a PodMonitor's job is its namespace and name."""
    for _, matched in selectors(promql_parser.parse(ALERTS[name]["expr"])):
        assert "namespace" in matched
    assert f'namespace="{NAMESPACE}", job="{NAMESPACE}/{NAME}"' in ALERTS[name]["expr"]


def test_alerts_without_the_charts_own_scraping_know_no_job() -> None:
    for rule in alerts(render(values={"monitoring": {"prometheusRule": {"enabled": True}}})):
        assert f'namespace="{NAMESPACE}"' in rule["expr"] and "job=" not in rule["expr"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("packtrain_estimated_wait_seconds", "packtrain_estimated_wait", "does not exist"),
        (
            "by (model_name, engine) (vllm:num_requests_running",
            "by (model, engine) (vllm:num_requests_running",
            "has no label",
        ),
        ('reason="OVERLOADED"', 'cause="OVERLOADED"', "has no label"),
    ],
)
def test_a_wrong_name_is_found(old: str, new: str, words: str, labels_of: dict[str, set[str]], tmp_path: Path) -> None:
    changed = alerts(render(MANY, chart=changed_chart(tmp_path, {"templates/prometheusrule.yaml": (old, new)})))
    assert [problem for rule in changed for problem in problems_of(rule["expr"], labels_of) if words in problem]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ALERTS)
def test_runbook_is_there(name: str) -> None:
    page, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
    assert (ROOT / page).is_file()
    assert anchor == name.lower()
    assert anchor in anchors((ROOT / page).read_text(encoding="utf-8"))
    assert ALERTS[name]["annotations"]["summary"]
    assert ALERTS[name]["labels"]["severity"] in ("critical", "warning")


def test_every_runbook_has_its_alert() -> None:
    assert {heading for heading in re.findall(r"^### (Packtrain\w+)$", OPERATIONS, re.MULTILINE)} == set(ALERTS)


def test_links_of_the_operations_guide_lead_somewhere() -> None:
    for page, anchor in re.findall(r"\]\(([\w./-]*)#?([\w-]*)\)", OPERATIONS):
        target = ROOT / "docs" / page if page else ROOT / "docs" / "operations.md"
        assert target.exists(), page
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), anchor


def test_the_dashboard_is_the_projects_own() -> None:
    (config_map,) = (m for m in of_kind(rendered(MANY), "ConfigMap") if m["metadata"]["name"].endswith("-dashboard"))
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config_map["data"]["packtrain.json"]) == json.loads(
        (ROOT / "docs/dashboards/packtrain.json").read_text()
    )


def test_the_pod_monitor_finds_the_gateways() -> None:
    manifests = rendered(MANY)
    monitor = only(manifests, "PodMonitor")["spec"]
    (group,) = (g for g in only(manifests, "RayCluster")["spec"]["workerGroupSpecs"] if g["groupName"] == "gateways")
    assert monitor["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    ports = [port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]]
    assert monitor["podMetricsEndpoints"][0]["port"] in ports


def test_compose_names_files_that_are_there() -> None:
    compose = yaml.safe_load((ROOT / "compose/compose.yaml").read_text())
    assert (ROOT / "compose" / compose["configs"]["serve"]["file"]).is_file()
    assert (CHART.parent.parent / "docs/dashboards").is_dir()
