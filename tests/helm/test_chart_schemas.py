"""What the chart renders, by helm itself, against the schemas of Kubernetes and of KubeRay."""

import copy
import tarfile
from pathlib import Path

import kubernetes_validate
import pytest

from serving.config import parse_config
from tests.support.helm import (
    CHART,
    CI_VALUES,
    KUBERNETES_VERSIONS,
    of_kind,
    only,
    raycluster_validator,
    rendered,
    run_helm,
    serve_config,
    template,
)

# Kinds that Kubernetes itself does not define.
CUSTOM_GROUPS = ("ray.io", "monitoring.coreos.com", "cert-manager.io", "gateway.networking.k8s.io")
by_file = pytest.mark.parametrize("file", CI_VALUES, ids=lambda path: path.name)


def test_there_are_values_for_every_common_case() -> None:
    assert [path.name.removesuffix("-values.yaml") for path in CI_VALUES] == [
        "air-gapped",
        "llama-2-70b-tp16",
        "llama-2-70b-tp8",
        "llama-2-7b-a100",
        "many-models",
        "minimal-cpu",
    ]


def test_default_values_lint() -> None:
    done = run_helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr


@by_file
def test_lint(file: Path) -> None:
    done = run_helm("lint", "--strict", CHART, "--values", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_holds_the_chart_and_not_the_trials(tmp_path: Path) -> None:
    done = run_helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as package:
        names = {Path(name).relative_to("packtrain").as_posix() for name in package.getnames()}
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md", "dashboards/packtrain.json"} <= names
    assert {f"templates/{path.name}" for path in (CHART / "templates").iterdir()} <= names
    assert not [name for name in names if name.startswith("ci/")]
    # What was packaged renders as the directory does.
    assert template(chart=archive).stdout == template().stdout


@pytest.mark.parametrize(
    ("file", "version"),
    [*((file, KUBERNETES_VERSIONS[-1]) for file in CI_VALUES), (CI_VALUES[-1], KUBERNETES_VERSIONS[0])],
    ids=lambda value: getattr(value, "name", value),
)
def test_kubernetes_schemas(file: Path, version: str) -> None:
    checked = 0
    for manifest in rendered(file):
        if not manifest["apiVersion"].startswith(CUSTOM_GROUPS):
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked >= 10


@by_file
def test_kuberay_schema(file: Path) -> None:
    errors = [
        f"{list(e.path)}: {e.message}" for e in raycluster_validator().iter_errors(only(rendered(file), "RayCluster"))
    ]
    assert errors == []


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "headGroupSpec", "rayStartParam"),
        ("spec", "authOption"),
        ("spec", "headGroupSpec", "template", "spec", "automountServiceAccountTokens"),
        ("spec", "workerGroupSpecs", 0, "minReplica"),
        ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenessprobe"),
    ],
)
def test_kuberay_schema_finds_a_misspelt_field(path: tuple[str | int, ...]) -> None:
    manifest = only(rendered(CI_VALUES[0]), "RayCluster")
    at = manifest
    for part in path[:-1]:
        at = at[part]  # type: ignore[index]
    at[path[-1]] = True  # type: ignore[index]
    assert [e for e in raycluster_validator().iter_errors(manifest) if str(path[-1]) in e.message]


def test_kubernetes_schemas_find_a_misspelt_field() -> None:
    manifest = copy.deepcopy(only(rendered(CI_VALUES[0]), "Deployment"))
    manifest["spec"]["template"]["spec"]["shareProcessNamespaces"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[-1], strict=True)


@by_file
def test_names_are_unique_and_short_enough(file: Path) -> None:
    manifests = rendered(file)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)
    assert max(len(name) for _, name in names) <= 63
    assert len(of_kind(manifests, "RayCluster")[0]["metadata"]["name"]) <= 40


@by_file
def test_the_server_takes_the_configuration(file: Path) -> None:
    """The driver's own reader of configuration, which refuses unknown keys and wrong values."""
    config = parse_config(serve_config(rendered(file)), origin=file.name)
    assert config.ray.address == "rel-packtrain-head-svc.llm.svc:6379"
    assert config.gateway.host == "0.0.0.0"
