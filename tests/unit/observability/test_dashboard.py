"""Every metric and label that the dashboard asks for exists, and so does every one that the page of metrics names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.metric_labels import labels_by_sample

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "docs/dashboards/packtrain.json").read_text())
SCRAPE_LABELS = {"instance", "job"}
METRIC = re.compile(r"\b((?:vllm:|packtrain_|process_|python_)\w+)(\{[^}]*\})?")


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """Labels by sample name, after everything that can be counted has been."""
    return labels_by_sample()


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


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_only_the_servers_that_are_chosen_are_shown(query: str) -> None:
    """Other programs have metrics of processes too, and one Prometheus may watch several servers."""
    for name, selector in METRIC.findall(query):
        assert 'job=~"$job"' in selector or name == "packtrain_build_info"


def test_the_choice_of_servers_holds_no_other_programs() -> None:
    """Without a value of its own, All is the list of what was found."""
    (job,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "job")
    assert job["query"]["query"] == "label_values(packtrain_build_info, job)"
    assert "allValue" not in job and job["includeAll"]


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
