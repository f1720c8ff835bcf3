"""`packtrain k8s render` and `check`, and helm with the same values: they agree, and no values end in an error of Python."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from model_parallel.memory import DEVICES
from serving.cli.main import app
from serving.driver import kubernetes
from serving.driver.chart_values import chart_defaults, merged, with_defaults
from tests.support.helm import CHART, CI_VALUES, ROOT, render, template

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
A100 = DEVICES["a100-80g"]


def k8s(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["k8s", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_go_all_the_way(example: Path, tmp_path: Path) -> None:
    """As docs/operations.md says it: render, check, helm."""
    status, output = k8s("render", example)
    assert status == 0, output
    values = tmp_path / "values.yaml"
    values.write_text(output)
    status, output = k8s("check", values)
    assert (status, output.splitlines()[-1]) == (0, "these values can work")
    assert render(values)


def test_what_is_rendered_and_would_not_work_is_told(tmp_path: Path) -> None:
    serve = tmp_path / "serve.yaml"
    serve.write_text("models: [{name: chat, source: /models/Llama-2-7b-hf, device: cuda}]\n")
    status, output = k8s("render", serve, "--gpu", "a100-80g", "--gpus-per-node", "1")
    assert status == 1
    told = " ".join(output.split())
    assert "--accept-license" in told and "nothing is mounted at /models" in told
    assert "config:" not in output


# Refused by both, with what the check says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt section": ({"gatway": {}}, "gatway: the chart has no such value; did you mean gateway?"),
    "a misspelt key": (
        {"worker": {"replica": 1}},
        "worker.replica: the chart has no such value; did you mean replicas?",
    ),
    "a list for a section": ({"worker": []}, "worker: [] is not of type 'object'"),
    "a section that is true": ({"gateway": True}, "gateway: True is not of type 'object'"),
    "a group that is null": ({"additionalWorkerGroups": {"more": None}}, "additionalWorkerGroups.more: None"),
    "groups in a list": ({"additionalWorkerGroups": ["a"]}, "additionalWorkerGroups: ['a']"),
    "more than the most": (
        {"worker": {"replicas": 3}},
        "replicas is 3, and must be from minReplicas, 1, to maxReplicas, 1",
    ),
    "fewest above most": ({"worker": {"minReplicas": 2}}, "must be from minReplicas, 2, to maxReplicas, 1"),
    "a text for a number": ({"gateway": {"replicas": "2"}}, "gateway.replicas: '2' is not of type 'integer'"),
    "seconds with a unit": ({"terminationGracePeriodSeconds": "90s"}, "terminationGracePeriodSeconds: '90s'"),
    "seconds that null removes": ({"terminationGracePeriodSeconds": None}, "terminationGracePeriodSeconds: is missing"),
    "no replicas": ({"worker": {"replicas": None}}, "worker.replicas: is missing"),
    "no hosts": ({"worker": {"numOfHosts": None}}, "worker.numOfHosts: is missing"),
    "no resources": ({"worker": {"resources": None}}, "worker.resources: is missing"),
    "limits in a list": ({"worker": {"resources": {"limits": [1]}}}, "worker.resources.limits: [1]"),
    "CPUs that are no number": ({"worker": {"rayStartParams": {"num-cpus": "abc"}}}, "worker.rayStartParams.num-cpus"),
    "GPUs that are no number": ({"worker": {"resources": {"limits": {"nvidia.com/gpu": "x"}}}}, "nvidia.com/gpu"),
    "a part of a GPU": ({"worker": {"resources": {"limits": {"nvidia.com/gpu": "1.5"}}}}, "nvidia.com/gpu"),
    "autoscaling that is true": ({"ray": {"autoscaling": True}}, "ray.autoscaling: True"),
    "a configuration that is a text": ({"config": "x"}, "config: 'x' is not of type 'object'"),
    "a configuration in a list": ({"config": [1]}, "config: [1]"),
    "a gateway that is a number": ({"config": {"gateway": 5}}, "gateway"),
    "a selector that is a number": ({"worker": {"nodeSelector": {"zone": 5}}}, "worker.nodeSelector.zone"),
    "another database": ({"config": {"tenancy": {"database": "mysql://u:hunter2@db/x"}}}, "config.tenancy.database"),
    "a port that is true": ({"config": {"gateway": {"http_port": True}}}, "http_port"),
    "the server's own port 0": ({"config": {"admin": {"port": 0}}}, "config.admin.port is 0"),
    "a share above all": ({"worker": {"podDisruptionBudget": {"maxUnavailable": "101%"}}}, "maxUnavailable: '101%'"),
    "a key that no label has": ({"common": {"labels": {"a b": "c", "d": "e"}}}, "common.labels: 'a b' is no key"),
    "a key that is a number": ({1: {"a": "b"}}, "1: the chart has no such value"),
    "one model twice": ({"config": {"models": [{"name": "m", "source": "/opt/x", "device": "cpu"}] * 2}}, "'m'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_check_and_by_helm(case: str) -> None:
    values, words = REFUSED[case]
    try:
        told = "\n".join(kubernetes.check(values, None, {}).problems)
    except ConfigError as error:
        told = str(error)
    assert words in told
    assert "hunter2" not in told
    assert template(values=values).returncode != 0


def test_nothing_given_is_the_charts_own_model() -> None:
    assert kubernetes.check({}, None, {}).problems == ()
    assert kubernetes.check({"common": {"logLevel": "DEBUG"}}, None, {}).problems == ()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"worker": {"resources": {"limits": {"cpu": None, "nvidia.com/gpu": 8}}}},
        {"config": {"tenancy": None}, "insecure": True},
        {"config": {"tenancy": {"database": None}}},
        {"config": {"gateway": {"http_port": False, "drain_timeout_s": None}}},
        {"additionalWorkerGroups": {"more": {"replicas": 0, "minReplicas": 0}}},
        {"networkPolicy": {"monitoring": [], "dns": []}, "image": {"tag": None}},
        {"monitoring": {"dashboard": {"labels": {"grafana_dashboard": None, "x": "y"}}}},
    ],
    ids=str,
)
def test_values_are_merged_as_helm_merges_them(values: dict[str, Any], tmp_path: Path) -> None:
    chart = tmp_path / "packtrain"
    (chart / "templates").mkdir(parents=True)
    for name in ("Chart.yaml", "values.yaml"):
        (chart / name).write_text((CHART / name).read_text())
    (chart / "templates" / "seen.yaml").write_text("seen: {{ .Values | toJson }}\n")
    done = template(values=values, chart=chart)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["seen"] == with_defaults(values)


def test_later_files_are_over_earlier_ones_as_helm_has_it(tmp_path: Path) -> None:
    first = {"worker": {"replicas": 3, "maxReplicas": 3, "labels": {"a": "b"}}, "imagePullSecrets": ["a", "b"]}
    second = {"worker": {"replicas": 2, "labels": None}, "imagePullSecrets": ["c"]}
    files = []
    for number, values in enumerate((first, second)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(values))
    assert render(*files) == render(values=merged(first, second))


def paths(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    for key, value in values.items() if isinstance(values, dict) else ():
        found += paths(value, (*path, key))
    return found


PATHS = sorted(
    {path for file in CI_VALUES for path in paths(merged(chart_defaults(), yaml.safe_load(file.read_text())))}
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 40),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["90s", "1.5", "/models/x", "on", "50%", "1e3"]),
    st.lists(st.one_of(st.none(), st.integers(0, 3), st.text(max_size=3)), max_size=2),
    st.dictionaries(st.text(max_size=4), st.one_of(st.none(), st.integers(0, 3), st.text(max_size=3)), max_size=2),
)


@given(file=st.sampled_from(CI_VALUES), path=st.sampled_from(PATHS), junk=JUNK)
def test_a_wrong_value_anywhere_is_told_and_breaks_nothing(file: Path, path: tuple[str, ...], junk: Any) -> None:
    change = junk
    for key in reversed(path):
        change = {key: change}
    try:
        verdict = kubernetes.check(merged(yaml.safe_load(file.read_text()), change), A100, {})
    except ConfigError:
        return
    assert all(isinstance(line, str) for line in (*verdict.lines, *verdict.problems))
