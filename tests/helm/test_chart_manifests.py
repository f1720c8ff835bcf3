"""What the chart makes of values that are unusual and right: names like numbers, what is said twice or off, what changes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.config import parse_config
from tests.helm.test_chart_refusals import merged
from tests.support import chart_rules as rules
from tests.support.helm import (
    CHART,
    KUBERNETES_VERSIONS,
    NAME,
    NAMESPACE,
    KubernetesLoader,
    Manifest,
    changed_chart,
    containers,
    of_kind,
    only,
    pod_templates,
    raycluster_validator,
    render,
    run_helm,
    serve_config,
    template,
)
from tests.support.helm import Values as ChartValues

POSTGRESQL = "postgresql://packtrain@db/packtrain"
S3 = {"source": "s3", "s3": {"uri": "s3://models/llama"}}
LIKE_NUMBERS = ("123", "007", "1e3", "true", "0x1f")


def job(values: ChartValues) -> Manifest:
    (found,) = of_kind(render(values=values), "Job")
    return found


# --- names that look like numbers


def like(name: str) -> dict[str, Any]:
    """Every name that users give, but that of the release."""
    group = {
        "priorityClassName": name,
        "nodeSelector": {"zone": name},
        "labels": {"l": name},
        "annotations": {"a": name},
    }
    return {
        "nameOverride": name,
        "fullnameOverride": "llm",
        "imagePullSecrets": [name],
        "image": {"repository": name, "tag": name},
        "common": {"otlpEndpoint": name, "labels": {"common": name}, "podAnnotations": {"common": name}},
        "config": {"tenancy": {"database": POSTGRESQL}},
        "ray": {"auth": {"existingSecret": name}},
        "gcsFaultTolerance": {
            "backend": "redis",
            "redis": {"address": name, "passwordSecret": {"name": name, "key": name}},
        },
        "head": group,
        "gateway": group,
        "worker": group | {"groupName": name, "runtimeClassName": name},
        "additionalWorkerGroups": {f"{name}0": {}},
        "driver": group,
        "database": {"passwordSecret": {"name": name, "key": name}},
        "weights": {
            "source": "s3",
            "pvc": {"existingClaim": name, "subPath": name},
            "s3": {"uri": "s3://b", "region": name, "credentialsSecret": name, "image": f"{name}:{name}"},
        },
        "tls": {"existingSecret": name},
        "ingress": {"enabled": True, "className": name, "hosts": [{"host": name}], "tls": [{"secretName": name}]},
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": name}}}]},
        "serviceAccount": {"annotations": {"role": name}},
        "service": {"annotations": {"role": name}},
        "monitoring": {"podMonitor": {"enabled": True, "labels": {"release": name}}},
    }


def on_volumes(name: str) -> dict[str, Any]:
    return {
        "gcsFaultTolerance": {"storage": {"existingClaim": name}},
        "database": {"persistence": {"existingClaim": name}},
        "weights": {"source": "pvc", "pvc": {"existingClaim": name}},
    }


def with_claims(name: str) -> dict[str, Any]:
    return {
        "gcsFaultTolerance": {"storage": {"storageClassName": name, "size": name}},
        "database": {"persistence": {"storageClassName": name}},
        "weights": S3 | {"pvc": {"storageClassName": name}},
    }


@pytest.mark.parametrize("values", [like, on_volumes, with_claims], ids=lambda values: values.__name__)
@pytest.mark.parametrize("name", LIKE_NUMBERS)
def test_names_like_numbers_stay_texts(name: str, values: Callable[[str], dict[str, Any]]) -> None:
    given = values(name)
    if values is with_claims and name in ("true", "0x1f"):
        given["gcsFaultTolerance"]["storage"]["size"] = "1e3"
    manifests = render(values=given)
    assert manifests
    for manifest in manifests:
        if "." not in manifest["apiVersion"] or ".k8s.io/" in manifest["apiVersion"]:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[-1], strict=True)
    assert [e.message for e in raycluster_validator().iter_errors(only(manifests, "RayCluster"))] == []
    assert rules.nothing_stands_twice(manifests) == []


def test_a_release_like_a_number() -> None:
    command = ("--namespace", NAMESPACE, "--kube-version", KUBERNETES_VERSIONS[-1], "--set", "fullnameOverride=llm")
    done = run_helm("template", "123", CHART, *command)
    assert done.returncode == 0, done.stderr
    for manifest in yaml.load_all(done.stdout, Loader=KubernetesLoader):
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "123"


def test_a_runbook_with_the_marks_of_yaml() -> None:
    rule = {"enabled": True, "runbookUrl": "https://wiki/x: y #z"}
    (found,) = of_kind(render(values={"monitoring": {"prometheusRule": rule}}), "PrometheusRule")
    first = found["spec"]["groups"][0]["rules"][0]
    assert first["annotations"]["runbook_url"] == "https://wiki/x: y #z#packtraindown"


def test_large_whole_numbers(tmp_path: Path) -> None:
    """helm reads numbers of files as floating-point ones, which print as 1e+06."""
    file = tmp_path / "values.yaml"
    file.write_text(
        "terminationGracePeriodSeconds: 1000000\nworker: {replicas: 2000000, maxReplicas: 3000000}\n"
        "ray: {autoscaling: {enabled: true, idleTimeoutSeconds: 4000000}}\nconfig: {models: "
        "[{name: m, source: /opt/m.gguf, kv_cache_tokens: 5000000}]}\ndriver: {waitForNodesSeconds: 6000000}\n"
    )
    manifests = render(file)
    cluster = only(manifests, "RayCluster")["spec"]
    group = cluster["workerGroupSpecs"][1]
    assert (group["replicas"], group["maxReplicas"]) == (2000000, 3000000)
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 4000000
    assert {pod["spec"].get("terminationGracePeriodSeconds") for _, pod in pod_templates(manifests)} == {1000000}
    config = serve_config(manifests)
    assert (config["models"][0]["kv_cache_tokens"], config["ray"]["wait_for_nodes_s"]) == (5000000, 6000000)


# --- one thing said in two places


def test_a_variable_that_is_set_twice_has_the_closest_value() -> None:
    def variables(**given: str) -> dict[str, Any]:
        return {"containerEnv": [{"name": name, "value": value} for name, value in given.items()]}

    values = {"common": variables(HOME="/common", NCCL_DEBUG="common", MALLOC_ARENA_MAX="8")}
    values |= {place: variables(NCCL_DEBUG=place) for place in ("head", "gateway", "worker", "driver")}
    manifests = render(values=values)
    assert rules.nothing_stands_twice(manifests) == []
    for name, pod in pod_templates(manifests):
        place = {"gateways": "gateway", "workers": "worker", f"{NAME}-driver": "driver"}.get(name, name)
        for container in containers(pod):
            environment = {variable["name"]: variable.get("value") for variable in container["env"]}
            closest = "common" if container["name"] == "wait-gcs-ready" else place
            assert (environment["NCCL_DEBUG"], environment["HOME"]) == (closest, "/common"), container["name"]
            assert environment["MALLOC_ARENA_MAX"] == "8"


def test_a_label_and_an_annotation_that_are_given_twice() -> None:
    own = {"labels": {"team": "own"}, "annotations": {"note": "own"}}
    values = {
        "common": {"labels": {"team": "common", "part": "all"}, "podAnnotations": {"note": "common"}},
        **dict.fromkeys(("head", "gateway", "worker", "driver"), own),
        "monitoring": {
            name: {"enabled": True, "labels": {"team": "own"}} for name in ("podMonitor", "prometheusRule", "dashboard")
        },
    }
    manifests = render(values=values)  # whose reader takes no key twice
    for name, pod in pod_templates(manifests):
        assert pod["metadata"]["labels"]["team"] == "own", name
        assert pod["metadata"]["labels"]["part"] == "all"
        assert pod["metadata"]["annotations"]["note"] == "own"
    for kind in ("PodMonitor", "PrometheusRule"):
        assert only(manifests, kind)["metadata"]["labels"]["team"] == "own"


# --- PodDisruptionBudgets


@pytest.mark.parametrize(
    ("worker", "autoscaling", "stay"),
    [
        ({"replicas": 1}, False, 0),
        ({"replicas": 5}, False, 4),
        ({"replicas": 5, "podDisruptionBudget": {"maxUnavailable": 0}}, False, 5),
        ({"replicas": 5, "podDisruptionBudget": {"maxUnavailable": 9}}, False, 0),
        ({"replicas": 3, "podDisruptionBudget": {"maxUnavailable": "50%"}}, False, 1),
        ({"replicas": 3, "podDisruptionBudget": {"maxUnavailable": "0%"}}, False, 3),
        ({"replicas": 3, "podDisruptionBudget": {"maxUnavailable": "100%"}}, False, 0),
        ({"replicas": 3, "numOfHosts": 2, "podDisruptionBudget": {"maxUnavailable": 2}}, False, 4),
        ({"replicas": 5, "minReplicas": 2, "numOfHosts": 2}, True, 3),
        ({"replicas": 1, "minReplicas": 0}, True, 0),
    ],
)
def test_pods_that_stay(worker: dict[str, Any], autoscaling: bool, stay: int) -> None:
    values = {"worker": {"maxReplicas": 5, **worker}, "ray": {"autoscaling": {"enabled": autoscaling}}}
    assert only(render(values=values), "PodDisruptionBudget", f"{NAME}-workers")["spec"]["minAvailable"] == stay


def test_gateways_that_stay() -> None:
    values = {"gateway": {"replicas": 3}, "config": {"tenancy": {"database": POSTGRESQL}}}
    assert only(render(values=values), "PodDisruptionBudget", f"{NAME}-gateway")["spec"]["minAvailable"] == 2


def test_a_head_whose_state_is_lost_with_it_stays() -> None:
    manifests = render(values={"gcsFaultTolerance": {"enabled": False}})
    assert only(manifests, "PodDisruptionBudget", f"{NAME}-head")["spec"]["minAvailable"] == 1
    assert rules.disruptions_are_bounded(manifests) == []


# --- the copy of the weights


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"s3": {"uri": "s3://models/other"}}},
        {"weights": {"s3": {"endpoint": "http://minio:9000"}}},
        {"weights": {"s3": {"region": "eu-central-1"}}},
        {"weights": {"s3": {"credentialsSecret": "s3"}}},
        {"weights": {"s3": {"image": "aws-cli:2.32.0"}}},
        {"weights": {"s3": {"resources": {"limits": {"cpu": "4"}}}}},
        {"weights": {"s3": {"nodeSelector": {"pool": "io"}}}},
        {"weights": {"s3": {"tolerations": [{"key": "io", "operator": "Exists"}]}}},
        {"weights": {"s3": {"affinity": {"nodeAffinity": {}}}}},
        {"weights": {"s3": {"priorityClassName": "low"}}},
        {"weights": {"s3": {"annotations": {"a": "b"}}}},
        {"weights": {"pvc": {"subPath": "llama"}}},
        {"weights": {"pvc": {"existingClaim": "mine"}}},
        {"imagePullSecrets": ["registry"]},
        {"common": {"labels": {"team": "a"}}},
        {"common": {"podAnnotations": {"a": "b"}}},
        {"fullnameOverride": "other"},
    ],
    ids=str,
)
def test_another_pod_is_another_job(change: dict[str, Any]) -> None:
    """Kubernetes takes no other pod for a Job that is there."""
    before, after = job({"weights": S3}), job(merged({"weights": S3}, change))
    assert before["spec"]["template"] != after["spec"]["template"]
    assert before["metadata"]["name"] != after["metadata"]["name"]


@pytest.mark.parametrize(
    "change", [("version: 0.1.0", "version: 0.1.1"), ('appVersion: "0.2.0"', 'appVersion: "0.2.1"')]
)
def test_another_version_is_the_same_job(change: tuple[str, str], tmp_path: Path) -> None:
    (newer,) = of_kind(render(values={"weights": S3}, chart=changed_chart(tmp_path, {"Chart.yaml": change})), "Job")
    before = job({"weights": S3})
    assert newer["metadata"]["name"] == before["metadata"]["name"]
    assert newer["spec"]["template"] == before["spec"]["template"]
    assert newer["metadata"]["labels"] != before["metadata"]["labels"]


def test_the_copy_may_be_placed() -> None:
    placed = {
        "nodeSelector": {"pool": "io"},
        "tolerations": [{"key": "io", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "low",
    }
    values = {"weights": S3 | {"s3": S3["s3"] | placed}, "common": {"podAnnotations": {"a": "b"}}}  # type: ignore[operator]
    pod = job(values)["spec"]["template"]
    assert {key: pod["spec"][key] for key in placed} == placed
    assert pod["metadata"]["annotations"] == {"a": "b"}


class Copy:
    """The Job's own script in a directory instead of /models, with an `aws` that notes its calls."""

    def __init__(self, directory: Path) -> None:
        self.models, self._tools = directory / "models", directory / "bin"
        self.models.mkdir()
        self._tools.mkdir()
        self._calls = directory / "calls"

    def run(self, uri: str, *, works: bool = True) -> int:
        (container,) = job({"weights": {"source": "s3", "s3": {"uri": uri}}})["spec"]["template"]["spec"]["containers"]
        aws = self._tools / "aws"
        aws.write_text(f'#!/bin/sh\necho "$@" >> {self._calls}\nexit {0 if works else 1}\n')
        aws.chmod(0o755)
        (script,) = container["args"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        environment["PATH"] = f"{self._tools}:{os.environ['PATH']}"
        command = [*container["command"], script.replace("/models", str(self.models))]
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode

    @property
    def num_calls(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0

    @property
    def markers(self) -> set[str]:
        return {path.name for path in self.models.iterdir()}


def waited_for(uri: str) -> str:
    values = {"weights": {"source": "s3", "s3": {"uri": uri}}}
    found = {
        container["command"][-1]
        for _, pod in pod_templates(render(values=values))
        for container in containers(pod)
        if container["name"] == "wait-for-weights"
    }
    (marker,) = found
    return str(marker)


def test_the_copy_is_made_once_a_source(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    assert copy.run("s3://b/one", works=False) != 0
    assert (copy.num_calls, copy.markers) == (1, set())
    assert copy.run("s3://b/one") == 0
    assert (copy.num_calls, copy.markers) == (2, {waited_for("s3://b/one")})
    # S3 is gone by now, and is not asked.
    assert copy.run("s3://b/one", works=False) == 0
    assert (copy.num_calls, copy.markers) == (2, {waited_for("s3://b/one")})
    assert copy.run("s3://b/two", works=False) != 0
    assert copy.markers == set()
    assert copy.run("s3://b/two") == 0
    assert copy.markers == {waited_for("s3://b/two")}


# --- what is off


def test_ports_that_are_off() -> None:
    off = {"gateway": {"http_port": False}, "admin": {"port": False, "metrics_port": False}}
    manifests = render(values={"config": off})
    config = parse_config(serve_config(manifests), origin="test")
    assert (config.gateway.http_port, config.admin.port, config.admin.metrics_port) == (None, None, None)
    named = {
        port["name"] for _, pod in pod_templates(manifests) for c in containers(pod) for port in c.get("ports", [])
    }
    assert named == {"gcs-server", "grpc"}
    served = {port["name"] for service in of_kind(manifests, "Service") for port in service["spec"]["ports"]}
    assert served == {"grpc"}
    (rule,) = only(manifests, "NetworkPolicy", f"{NAME}-gateway")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": "grpc"}]


def test_addresses_of_ipv6() -> None:
    config = serve_config(render(values={"config": {"gateway": {"host": "::"}, "admin": {"host": "::"}}}))
    assert (config["gateway"]["host"], config["admin"]["host"]) == ("::", "::")


@pytest.mark.parametrize("memory", ["8.", "+8Gi", "8e9", "8E-3", 8e9, "1Pi", "8000000000000m", "9000000000u"])
def test_quantities_as_kubernetes_has_them(memory: str | float) -> None:
    resources = {"requests": {"memory": memory, "cpu": ".5"}, "limits": {"memory": memory, "cpu": "2"}}
    manifests = render(values={"worker": {"resources": resources | {"claims": [{"name": "gpu"}]}}})
    assert [e.message for e in raycluster_validator().iter_errors(only(manifests, "RayCluster"))] == []


def test_gpus_of_rays_own_parameter_count() -> None:
    given = {"name": "m", "source": "/opt/x", "device": "cuda", "tensor_parallel_size": 2}
    values = {"config": {"models": [given]}, "worker": {"rayStartParams": {"num-gpus": "2"}}}
    group = only(render(values=values), "RayCluster")["spec"]["workerGroupSpecs"][1]
    assert group["rayStartParams"]["num-gpus"] == "2"


def test_names_that_no_pod_may_ask_for() -> None:
    manifests = render(values={"networkPolicy": {"dns": []}})
    assert f"{NAME}-dns" not in {policy["metadata"]["name"] for policy in of_kind(manifests, "NetworkPolicy")}
    assert rules.nothing_passes_but_the_listed_flows(manifests) == []


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("tenancy", [{}, {"database": None}, {"database": ""}, {"refresh_s": 2}], ids=str)
def test_a_tenancy_section_without_keys_is_tenancy(tenancy: dict[str, Any], insecure: bool) -> None:
    """helm's null takes the key away and leaves an empty section, which was taken for none: everybody was let in."""
    manifests = render(values={"config": {"tenancy": tenancy}, "insecure": insecure})
    assert serve_config(manifests)["tenancy"]["database"] == "sqlite:////var/lib/packtrain/tenants.db"
    assert only(manifests, "PersistentVolumeClaim", f"{NAME}-database")
    assert only(manifests, "Service", f"{NAME}-admin")


def test_no_tenancy_is_null() -> None:
    assert "tenancy" not in serve_config(render(values={"config": {"tenancy": None}, "insecure": True}))


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("postgresql://u@/x?host=db1:6432", [6432]),
        ("postgresql://u@/x?host=db1:6432&host=db2:6433", [6432, 6433]),
        ("postgresql://u@/x?host=db1%3A6432", [6432]),
        ("postgresql://u@/x?host=db1,db2&port=6432,6433", [6432, 6433]),
        ("postgresql://u@/x?host=db1", [5432]),
        ("postgresql://u@db:6432/x?sslmode=require", [6432]),
    ],
)
def test_ports_of_a_database_on_several_hosts(url: str, ports: list[int]) -> None:
    policy = only(render(values={"config": {"tenancy": {"database": url}}}), "NetworkPolicy", f"{NAME}-database")
    (rule,) = policy["spec"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": port} for port in ports]


def test_models_that_share_max_ranks() -> None:
    """Each may have all four GPUs, and both together have no more."""
    scaled = {"source": "/opt/x.gguf", "device": "cuda", "autoscaling": {"max_groups": 4}}
    values: dict[str, Any] = {
        "config": {
            "models": [scaled | {"name": "a"}, scaled | {"name": "b"}],
            "autoscaler": {"max_ranks": 4},
        },
        "worker": {"resources": {"limits": {"cpu": 8, "nvidia.com/gpu": 4}}},
    }
    assert render(values=values)
    # One that is not scaled is beside them.
    values["config"]["models"].append({"name": "c", "source": "/opt/x.gguf", "device": "cuda"})
    assert "all groups together need 5 GPUs" in template(values=values).stderr


def test_as_a_part_of_another_chart(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    (parent / "charts" / "packtrain").symlink_to(CHART)
    dependency = "{name: packtrain, version: 0.1.0, condition: packtrain.enabled}"
    (parent / "Chart.yaml").write_text(
        f"apiVersion: v2\nname: parent\nversion: 0.1.0\ndependencies:\n  - {dependency}\n"
    )
    (parent / "values.yaml").write_text("global: {a: b}\npacktrain: {enabled: true}\n")
    done = template(chart=parent)
    assert done.returncode == 0, done.stderr
    assert "kind: RayCluster" in done.stdout
    assert "RayCluster" not in template(chart=parent, values={"packtrain": {"enabled": False}}).stdout
