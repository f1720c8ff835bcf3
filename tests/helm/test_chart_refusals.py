"""What the chart refuses, in which words, and that nothing else refuses it: without that check it would have rendered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helm import CHART, CI_VALUES, RELEASE, changed_chart, only, render, run_helm, template

MINIMAL = next(path for path in CI_VALUES if path.name.startswith("minimal"))
SMALL = {"name": "small", "source": "/opt/packtrain/models/x.gguf"}
ON_GPU = SMALL | {"device": "cuda"}
LLAMA = {"name": "chat", "source": "/models/Llama-2-7b-chat-hf"}
ONE_CLAIM = {"source": "pvc", "pvc": {"existingClaim": "llama"}}
POSTGRESQL = {"tenancy": {"database": "postgresql://packtrain@db/packtrain"}}


def gpus(count: int, cpus: int = 8, **more: object) -> dict[str, Any]:
    return {"resources": {"limits": {"cpu": cpus, "nvidia.com/gpu": count}}, **more}


def models(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"models": list(entries)}


# Values, words of the refusal, and a change by which they are taken (None: without the check alone).
BY_TEMPLATE: dict[str, tuple[dict[str, Any], str, dict[str, Any] | None]] = {
    "no keys": ({"config": {"tenancy": None}}, "without a key", {"insecure": True}),
    "no token": ({"ray": {"auth": {"enabled": False}}}, "could run code", {"insecure": True}),
    "no network policy": ({"networkPolicy": {"enabled": False}}, "Ray's ports would be open", {"insecure": True}),
    "a load balancer in clear": (
        {"service": {"type": "LoadBalancer"}},
        "travel in clear",
        {"tls": {"existingSecret": "tls"}},
    ),
    "a node port in clear": ({"service": {"type": "NodePort"}}, "travel in clear", {"insecure": True}),
    "an ingress in clear": (
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}]}},
        "ingress.enabled without ingress.tls",
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}], "tls": [{"secretName": "tls"}]}},
    ),
    "a route to any listener": (
        {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        "has no sectionName",
        {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "public", "sectionName": "https"}]}},
    ),
    "a password in the URL": (
        {"config": {"tenancy": {"database": "postgresql://packtrain:hunter2@db/packtrain"}}},
        "has a password in it",
        {"config": POSTGRESQL},
    ),
    "a password among the URL's parameters": (
        {"config": {"tenancy": {"database": "postgresql://db/packtrain?password=hunter2"}}},
        "has a password in it",
        {"config": POSTGRESQL},
    ),
    "a secret in the environment": (
        {"common": {"containerEnv": [{"name": "HF_TOKEN", "value": "hf_1"}]}},
        "common.containerEnv: HF_TOKEN has its value in the values",
        {
            "common": {
                "containerEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}]
            }
        },
    ),
    "a secret in a group's environment": (
        {"additionalWorkerGroups": {"more": {"containerEnv": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]}}},
        "more.containerEnv: AWS_SECRET_ACCESS_KEY",
        None,
    ),
    "a password in an argument": (
        {"head": {"rayStartParams": {"redis-password": "x"}}},
        "would stand in the process list",
        None,
    ),
    "client certificates without any": (
        {"tls": {"requireClientCertificate": True}},
        "tls.requireClientCertificate needs",
        {"tls": {"requireClientCertificate": True, "existingSecret": "tls"}},
    ),
    "cert-manager without issuer": (
        {"tls": {"certManager": {"enabled": True}}},
        "needs tls.certManager.issuerRef",
        None,
    ),
    "an image that moves": (
        {"weights": {"s3": {"image": "aws-cli:latest"}}},
        "means another image tomorrow",
        {"weights": {"s3": {"image": "aws-cli:2.31.0"}}},
    ),
    "an image without tag": (
        {"weights": {"s3": {"image": "registry:5000/aws-cli"}}},
        "means another image tomorrow",
        None,
    ),
    "an init container's image that moves": (
        {"weights": {"source": "init", "initContainers": [{"name": "get", "image": "curl"}]}},
        "weights.initContainers[0].image",
        {"weights": {"source": "init", "initContainers": [{"name": "get", "image": "curl:8.10"}]}},
    ),
    "Llama 2 without its licence": (
        {"config": models(LLAMA), "weights": ONE_CLAIM},
        "license.accept: true",
        {"license": {"accept": True}},
    ),
    "Llama 2 by name": (
        {"config": models(SMALL | {"name": "llama2-chat"})},
        "is Llama 2",
        {"license": {"accept": True}},
    ),
    "weights that are not mounted": (
        {"config": models(LLAMA), "license": {"accept": True}},
        "nothing is mounted at /models",
        {"weights": ONE_CLAIM},
    ),
    "more ranks than a node has GPUs": (
        {"config": models(ON_GPU | {"tensor_parallel_size": 8}), "worker": gpus(4)},
        "small has tensor_parallel_size 8, and no node has room for more than 4 ranks of 1 GPU and 1 CPU each",
        {"worker": gpus(8)},
    ),
    "more ranks than two machines have GPUs": (
        {"config": models(ON_GPU | {"tensor_parallel_size": 32}), "worker": gpus(8, numOfHosts=2)},
        "(16 over numOfHosts machines)",
        {"worker": gpus(8, numOfHosts=4)},
    ),
    "more ranks than a node has CPUs": (
        {"config": models(SMALL | {"tensor_parallel_size": 3})},
        "no node has room for more than 2 ranks of 1 CPU each",
        {"worker": {"resources": {"limits": {"cpu": "3"}}}},
    ),
    "GPUs where there are none": (
        {"config": models(ON_GPU)},
        "no node has room for more than 0 ranks",
        {"worker": gpus(1)},
    ),
    "more groups than nodes": (
        {
            "config": models(ON_GPU | {"tensor_parallel_size": 8, "num_groups": 3}),
            "worker": gpus(8, replicas=2, maxReplicas=2),
        },
        "num_groups 3 of 8 ranks of 1 GPU and 1 CPU each, and there are nodes for 2",
        {"worker": gpus(8, replicas=3, maxReplicas=3)},
    ),
    "more groups to come than nodes": (
        {
            "config": models(ON_GPU | {"tensor_parallel_size": 8, "autoscaling": {"max_groups": 3}}),
            "worker": gpus(8, replicas=2, maxReplicas=2),
        },
        "autoscaling.max_groups 3 of 8 ranks of 1 GPU and 1 CPU each, and there are nodes for 2",
        {"worker": gpus(8, replicas=3, maxReplicas=3)},
    ),
    "all groups together": (
        {"config": models(ON_GPU, ON_GPU | {"name": "other"}), "worker": gpus(1)},
        "all groups together need 2 GPUs, and the worker groups have 1",
        {"worker": gpus(2)},
    ),
    "more ranks than a node with GPUs has CPUs": (
        {"config": models(ON_GPU | {"tensor_parallel_size": 8}), "worker": gpus(8, cpus=4)},
        "no node has room for more than 4 ranks of 1 GPU and 1 CPU each",
        {"config": models(ON_GPU | {"tensor_parallel_size": 8, "cpus_per_rank": 0.5})},
    ),
    "more groups that span machines than there are": (
        {"config": models(SMALL | {"tensor_parallel_size": 4, "num_groups": 2}), "worker": {"numOfHosts": 2}},
        "num_groups 2 of 4 ranks of 1 CPU each, and there are nodes for 1",
        {"worker": {"replicas": 2, "maxReplicas": 2}},
    ),
    "all groups together on CPUs": (
        {"config": models(SMALL, SMALL | {"name": "other", "cpus_per_rank": 1.5})},
        "all groups together need 2.5 CPUs (cpus_per_rank of each rank), and the worker groups have 2",
        {"worker": {"resources": {"limits": {"cpu": "2500m"}}}},
    ),
    "nothing to be placed by": (
        {"config": models(SMALL | {"cpus_per_rank": 0})},
        "small has cpus_per_rank 0 and no GPUs",
        {"worker": gpus(1)},
    ),
    "a grace shorter than the drain": (
        {"config": {"gateway": {"drain_timeout_s": 60}}, "terminationGracePeriodSeconds": 104},
        "At least 105 are needed",
        {"terminationGracePeriodSeconds": 105},
    ),
    "SQLite on two gateways": ({"gateway": {"replicas": 2}}, "which only one machine can use", {"config": POSTGRESQL}),
    "groups on the head": (
        {"head": {"rayStartParams": {"num-cpus": "4"}}},
        "replica groups would be placed there",
        None,
    ),
    "groups on gateways": ({"gateway": {"rayStartParams": {"num-cpus": "1"}}}, "gateway.rayStartParams.num-cpus", None),
    "Redis without address": (
        {"gcsFaultTolerance": {"backend": "redis"}},
        "redis.address is missing",
        {"gcsFaultTolerance": {"backend": "redis", "redis": {"address": "redis:6379"}}},
    ),
    "two groups of one name": ({"additionalWorkerGroups": {"workers": {}}}, 'the name "workers" stands twice', None),
    "a group called gateways": ({"worker": {"groupName": "gateways"}}, "`gateways` is the gateways' own", None),
    "fewest above most": ({"worker": {"minReplicas": 2, "replicas": 2}}, "minReplicas 2 is above maxReplicas 1", None),
    "replicas beyond the most": (
        {"worker": {"replicas": 2}},
        "replicas 2 is not between minReplicas 1 and maxReplicas 1",
        {"worker": {"replicas": 2, "maxReplicas": 2}},
    ),
    "a claim without name": ({"weights": {"source": "pvc"}}, "existingClaim is missing", {"weights": ONE_CLAIM}),
    "S3 without address": (
        {"weights": {"source": "s3"}},
        "uri is missing",
        {"weights": {"source": "s3", "s3": {"uri": "s3://b/p"}}},
    ),
    "nothing that fills /models": ({"weights": {"source": "init"}}, "nothing would fill /models", None),
    "routes without gateway": ({"gatewayApi": {"enabled": True}}, "needs gatewayApi.parentRefs", None),
    "an ingress without hosts": (
        {"ingress": {"enabled": True, "tls": [{"secretName": "tls"}]}},
        "ingress.enabled needs ingress.hosts",
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}], "tls": [{"secretName": "tls"}]}},
    ),
}

BY_SCHEMA: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"gatway": {}}, "gatway"),
    "an unknown value inside": ({"gateway": {"replica": 2}}, "replica"),
    "an unknown key of the server": ({"config": {"gateway": {"prot": 1}}}, "prot"),
    "an unknown key of a model": ({"config": models(SMALL | {"tensor_parallel": 2})}, "tensor_parallel"),
    "an address, which is the chart's": ({"config": {"gateway": {"host": "0.0.0.0"}}}, "host"),
    "a cluster, which is the chart's": ({"config": {"ray": {"address": "auto"}}}, "ray"),
    "insecure by the server's configuration": ({"config": {"gateway": {"insecure": True}}}, "insecure"),
    "no model": ({"config": {"models": []}}, "models"),
    "a wrong device": ({"config": models(SMALL | {"device": "tpu"})}, "device"),
    "the tag latest": ({"image": {"tag": "latest"}}, "image/tag"),
    "a digest that is none": ({"image": {"digest": "sha256:1"}}, "image/digest"),
    "a number as a parameter": ({"worker": {"rayStartParams": {"num-cpus": 1}}}, "num-cpus"),
    "no gateway": ({"gateway": {"replicas": 0}}, "minimum"),
    "a backend that is none": ({"gcsFaultTolerance": {"backend": "etcd"}}, "backend"),
    "a misspelt key of a group": ({"additionalWorkerGroups": {"more": {"replica": 1}}}, "replica"),
    "no number of seconds": ({"terminationGracePeriodSeconds": "90s"}, "terminationGracePeriodSeconds"),
}


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The chart without its own checks."""
    changes = {"templates/raycluster.yaml": ('{{- include "packtrain.validate" . -}}\n', "")}
    yield changed_chart(tmp_path_factory.mktemp("unchecked"), changes)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@pytest.mark.parametrize("case", BY_TEMPLATE)
def test_refused_by_the_chart(case: str, unchecked: Path) -> None:
    values, words, _ = BY_TEMPLATE[case]
    done = template(values=values)
    assert done.returncode != 0
    assert words in done.stderr
    # It is the check that refuses: without it there would be manifests.
    assert template(values=values, chart=unchecked).returncode == 0


@pytest.mark.parametrize("case", [case for case, (*_, mended) in BY_TEMPLATE.items() if mended is not None])
def test_taken_when_it_is_mended(case: str) -> None:
    values, _, mended = BY_TEMPLATE[case]
    assert render(values=merged(values, mended or {}))


@pytest.mark.parametrize("case", BY_SCHEMA)
def test_refused_by_the_schema(case: str) -> None:
    values, words = BY_SCHEMA[case]
    done = template(values=values)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("limit", "cpus"), [({}, "64"), ({"cpu": "9"}, "9"), ({"cpu": "8500m"}, "9"), ({"cpu": 12.0}, "12")]
)
def test_cpus_of_a_node_are_its_limit_or_else_its_request(limit: dict[str, Any], cpus: str) -> None:
    """Without a limit the request counts: with `num-cpus` 0 nothing could be placed beside eight GPUs."""
    resources = {"requests": {"cpu": 64 if not limit else 1}, "limits": {"cpu": None, "nvidia.com/gpu": 8} | limit}
    values = {"config": models(ON_GPU | {"tensor_parallel_size": 8}), "worker": {"resources": resources}}
    group = only(render(values=values), "RayCluster")["spec"]["workerGroupSpecs"][1]
    assert (group["rayStartParams"]["num-cpus"], group["rayStartParams"]["num-gpus"]) == (cpus, "8")


def test_the_next_command_is_told() -> None:
    done = run_helm("install", RELEASE, CHART, "--namespace", "llm", "--values", MINIMAL, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    for command in (
        "kubectl -n llm wait pod --for=condition=Ready",
        "kubectl -n llm exec deploy/rel-packtrain-driver -c driver -- packtrain keys create acme",
        "kubectl -n llm port-forward svc/rel-packtrain 50051 8000",
        "packtrain generate --model smollm2-135m-instruct",
    ):
        assert command in notes
