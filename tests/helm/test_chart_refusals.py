"""What the chart refuses, in which words, and that nothing else refuses it: without that check it would have rendered."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import parse_config
from tests.support.helm import (
    CHART,
    CI_VALUES,
    KUBERNETES_VERSIONS,
    NAME,
    RELEASE,
    changed_chart,
    of_kind,
    only,
    render,
    run_helm,
    serve_config,
    template,
)

MINIMAL = next(path for path in CI_VALUES if path.name.startswith("minimal"))
SMALL = {"name": "small", "source": "/opt/packtrain/models/x.gguf"}
ON_GPU = SMALL | {"device": "cuda"}
LLAMA = {"name": "chat", "source": "/models/Llama-2-7b-chat-hf"}
ONE_CLAIM = {"source": "pvc", "pvc": {"existingClaim": "llama"}}
POSTGRESQL = {"tenancy": {"database": "postgresql://packtrain@db/packtrain"}}

CLIENTS = {"networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}}
A_HOST = {"enabled": True, "hosts": [{"host": "a.example"}]}
IN_CLEAR = {"insecure": True}


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
        {"service": {"type": "LoadBalancer"}, **CLIENTS},
        "travel in clear",
        {"tls": {"existingSecret": "tls"}},
    ),
    "a node port in clear": ({"service": {"type": "NodePort"}, **CLIENTS}, "travel in clear", {"insecure": True}),
    "an ingress in clear": (
        {"ingress": A_HOST, **CLIENTS},
        "ingress.enabled without ingress.tls",
        {"ingress": A_HOST | {"tls": [{"secretName": "tls"}]}},
    ),
    "a route to any listener": (
        {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "public"}]}, **CLIENTS},
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
    "another secret among the URL's parameters": (
        {"config": {"tenancy": {"database": "postgresql://db/packtrain?sslmode=require&oauth_client_secret=hunter2"}}},
        "has a password in it",
        {"config": POSTGRESQL},
    ),
    "a password with a slash in it": (
        {"config": {"tenancy": {"database": "postgresql://packtrain:a/b@db/packtrain"}}},
        "has a password in it",
        {"config": POSTGRESQL},
    ),
    "a password in Redis' address": (
        {"gcsFaultTolerance": {"backend": "redis", "redis": {"address": "redis://:hunter2@redis:6379"}}},
        "gcsFaultTolerance.redis.address has a password in it",
        {"gcsFaultTolerance": {"redis": {"address": "redis://redis:6379"}}},
    ),
    "a variable that is the chart's": (
        {"worker": {"containerEnv": [{"name": "RAY_SERVE_USE_GRPC_BY_DEFAULT", "value": "0"}]}},
        "worker group workers.containerEnv: RAY_SERVE_USE_GRPC_BY_DEFAULT is the chart's own",
        {"worker": {"containerEnv": [{"name": "MALLOC_ARENA_MAX", "value": "8"}]}},
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
    **{
        f"{name} given to {place}": (
            {place: {"rayStartParams": {name: value}}},
            f"{'worker group workers' if place == 'worker' else place}.rayStartParams.{name} is the chart's own",
            None,
        )
        for place in ("head", "gateway", "driver", "worker")
        for name, value in (("address", "elsewhere:6379"), ("head", "true"), ("block", "false"))
    },
    **{
        f"{name} of {place}": (
            {place: {"rayStartParams": {name: value}}},
            f"{place}.rayStartParams.{name} is",
            None,
        )
        for place, name, value in (
            ("head", "num-gpus", "1"),
            ("driver", "num-gpus", "1"),
            ("gateway", "resources", "{}"),
            ("driver", "resources", "{}"),
        )
    },
    "a volume twice": (
        {"worker": {"volumes": [{"name": "tmp", "emptyDir": {}}]}},
        'worker group workers.volumes: the name "tmp" stands twice',
        {"worker": {"volumes": [{"name": "mine", "emptyDir": {}}]}},
    ),
    "a mount twice": (
        {"worker": {"volumeMounts": [{"name": "tmp", "mountPath": "/dev/shm"}]}},
        "worker group workers.volumeMounts: /dev/shm is mounted twice",
        {"worker": {"volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}]}},
    ),
    "HTTP that an ingress needs": (
        {"config": {"gateway": {"http_port": False}}, "ingress": A_HOST, **CLIENTS, **IN_CLEAR},
        "config.gateway.http_port is off, and ingress.enabled needs it",
        {"ingress": {"enabled": False}},
    ),
    "metrics that TLS needs": (
        {"config": {"admin": {"metrics_port": False}}, "tls": {"existingSecret": "tls"}},
        "config.admin.metrics_port is off, and TLS",
        {"tls": {"existingSecret": ""}},
    ),
    "metrics that a PodMonitor needs": (
        {"config": {"admin": {"metrics_port": False}}, "monitoring": {"podMonitor": {"enabled": True}}},
        "config.admin.metrics_port is off, and monitoring.podMonitor needs it",
        {"monitoring": {"podMonitor": {"enabled": False}}},
    ),
    "one model twice": (
        {"config": models(SMALL | {"cpus_per_rank": 0.5}, SMALL | {"cpus_per_rank": 0.5})},
        'config.models: the name "small" stands twice',
        {"config": models(SMALL)},
    ),
    "an adapter called like its model": (
        {"config": models(SMALL | {"lora": {"adapters": [{"name": "small", "source": "/opt/a"}]}})},
        'config.models: the name "small" stands twice',
        {"config": models(SMALL | {"lora": {"adapters": [{"name": "other", "source": "/opt/a"}]}})},
    ),
    "a draft model that is not mounted": (
        {"config": models(SMALL | {"draft_model": "/models/tiny"})},
        "the draft_model of small is /models/tiny, and weights.source is none",
        {"config": models(SMALL | {"draft_model": "/models-local/tiny"})},
    ),
    "an adapter that is not mounted": (
        {"config": models(SMALL | {"lora": {"adapters": [{"name": "one", "source": "/models/one"}]}})},
        "the adapter one of small is /models/one, and weights.source is none",
        {"weights": ONE_CLAIM},
    ),
    "all groups within max_ranks": (
        {
            "config": models(ON_GPU | {"autoscaling": {"max_groups": 4}}) | {"autoscaler": {"max_ranks": 3}},
            "worker": gpus(2),
        },
        "autoscaling.max_groups, bounded by autoscaler.max_ranks, 3 of 1 ranks",
        {"config": {"autoscaler": {"max_ranks": 2}}},
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
    **{
        f"a group called {name}": (
            {"worker": {"groupName": name}},
            f'the name "{name}" stands twice; head, gateway and gateways are the chart\'s own',
            None,
        )
        for name in ("gateways", "gateway", "head")
    },
    **{
        f"a group called {name:.10}": (
            {"additionalWorkerGroups": {name: {}}},
            f'additionalWorkerGroups: the name "{name}" is no part of Kubernetes\' names',
            None,
        )
        for name in ("A100_Big", "-a", "a" * 41)
    },
    "a name that is too long": (
        {"nameOverride": "n" * 37},
        f'the resources\' name would be "rel-{"n" * 37}"',
        {"fullnameOverride": "n" * 40},
    ),
    "the chart's label on everything": (
        {"common": {"labels": {"app.kubernetes.io/name": "other", "app.kubernetes.io/part-of": "platform"}}},
        "common.labels: app.kubernetes.io/name is the chart's own",
        None,
    ),
    "the chart's label on nodes": (
        {"worker": {"labels": {"app.kubernetes.io/component": "gpu"}}},
        "worker group workers.labels: app.kubernetes.io/component is the chart's own",
        None,
    ),
    "one port twice": (
        {"config": {"gateway": {"port": 8000}}},
        "config.gateway.port and config.gateway.http_port are both 8000; each needs a port of its own",
        {"config": {"gateway": {"http_port": 8001}}},
    ),
    "metrics on the Admin service's port": (
        {"config": {"admin": {"metrics_port": 50052}}},
        "config.admin.port and config.admin.metrics_port are both 50052",
        None,
    ),
    **{
        f"{field} at the port of Ray's agent": (
            {"config": {field.partition(".")[0]: {field.partition(".")[2]: 52365}}},
            f"config.{field} is 52365, which Ray listens at in the same pods ({place}.rayStartParams.dashboard-agent-",
            {place: {"rayStartParams": {"dashboard-agent-listen-port": "52366"}}},
        )
        for field, place in (
            ("gateway.port", "gateway"),
            ("gateway.http_port", "gateway"),
            ("admin.metrics_port", "gateway"),
            ("admin.port", "driver"),
        )
    },
    "a port that is given to Ray": (
        {"gateway": {"rayStartParams": {"node-manager-port": "8000"}}},
        "config.gateway.http_port is 8000, which Ray listens at in the same pods (gateway.rayStartParams.node-manager-port)",
        {"config": {"gateway": {"http_port": 8001}}},
    ),
    "a load balancer that nobody may use": (
        {"service": {"type": "LoadBalancer"}, **IN_CLEAR},
        "service.type is LoadBalancer and networkPolicy.clients is empty",
        CLIENTS,
    ),
    "a node port that nobody may use": (
        {"service": {"type": "NodePort"}, **IN_CLEAR},
        "service.type is NodePort and networkPolicy.clients is empty",
        {"networkPolicy": {"enabled": False}},
    ),
    "an ingress that may not come in": (
        {"ingress": A_HOST, **IN_CLEAR},
        "ingress.enabled is true and networkPolicy.clients is empty",
        CLIENTS,
    ),
    "routes that may not come in": (
        {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "public"}]}, **IN_CLEAR},
        "gatewayApi.enabled is true and networkPolicy.clients is empty",
        CLIENTS,
    ),
    "a request above the chart's limit": (
        {"worker": {"resources": {"requests": {"cpu": 64}}}},
        "worker.resources: requests.cpu is 64 and limits.cpu is 2 (the chart's, where you gave none); Kubernetes wants the limit "
        "at least as high, or null for none",
        {"worker": {"resources": {"limits": {"cpu": None}}}},
    ),
    "a request above a limit in other units": (
        {"gateway": {"resources": {"requests": {"memory": "3073Mi"}}}},
        "gateway.resources: requests.memory is 3073Mi and limits.memory is 3Gi",
        {"gateway": {"resources": {"limits": {"memory": 3222274048}}}},
    ),
    "a request of an additional group": (
        {"additionalWorkerGroups": {"more": {"resources": {"requests": {"cpu": "1500m"}, "limits": {"cpu": 1}}}}},
        "additionalWorkerGroups.more.resources: requests.cpu is 1500m and limits.cpu is 1",
        {"additionalWorkerGroups": {"more": {"resources": {"limits": {"cpu": 1.5}}}}},
    ),
    "GPUs that are only requested": (
        {"worker": {"resources": {"requests": {"nvidia.com/gpu": 8}}}},
        "worker.resources: requests.nvidia.com/gpu is 8 and limits.nvidia.com/gpu is 0",
        {"worker": {"resources": {"limits": {"nvidia.com/gpu": 8}}}},
    ),
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
    "routes of no kind": (
        {
            "gatewayApi": {
                "enabled": True,
                "parentRefs": [{"name": "a", "sectionName": "https"}],
                "grpc": False,
                "http": False,
            },
            **CLIENTS,
        },
        "gatewayApi.grpc and gatewayApi.http are both false",
        {"gatewayApi": {"grpc": True}},
    ),
    "a path of no claim": (
        {
            "weights": {
                "source": "init",
                "pvc": {"subPath": "llama"},
                "initContainers": [{"name": "get", "image": "curl:8"}],
            }
        },
        'weights.pvc.subPath is "llama" and weights.source is init',
        {"weights": {"pvc": {"subPath": ""}}},
    ),
    **{
        f"a container before Ray that is called {name}": (
            {"weights": {"initContainers": [{"name": "get", "image": "curl:8"}, {"name": name, "image": "curl:8"}]}},
            f'weights.initContainers: the name "{name}" stands twice, or is one of the pods\' own containers',
            {"weights": {"initContainers": [{"name": "get", "image": "curl:8"}]}},
        )
        for name in ("get", "wait-gcs-ready", "ray-node", "ray-worker")
    },
    "two makers of a certificate": (
        {"tls": {"existingSecret": "tls", "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}}},
        "tls.existingSecret and tls.certManager.enabled are both given",
        {"tls": {"existingSecret": ""}},
    ),
    "ranges that keep nobody out": (
        {"service": {"loadBalancerSourceRanges": ["10.0.0.0/8"]}},
        "service.loadBalancerSourceRanges are given and service.type is ClusterIP",
        {"service": {"type": "LoadBalancer"}, "insecure": True, **CLIENTS},
    ),
    "routes without gateway": ({"gatewayApi": {"enabled": True}, **CLIENTS}, "needs gatewayApi.parentRefs", None),
    "an ingress without hosts": (
        {"ingress": {"enabled": True, "tls": [{"secretName": "tls"}]}, **CLIENTS},
        "ingress.enabled needs ingress.hosts",
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}], "tls": [{"secretName": "tls"}]}},
    ),
}

BY_SCHEMA: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"gatway": {}}, "gatway"),
    "an unknown value inside": ({"gateway": {"replica": 2}}, "replica"),
    "an unknown key of the server": ({"config": {"gateway": {"prot": 1}}}, "prot"),
    "an unknown key of a model": ({"config": models(SMALL | {"tensor_parallel": 2})}, "tensor_parallel"),
    "an address that nobody reaches": ({"config": {"gateway": {"host": "127.0.0.1"}}}, "/config/gateway/host"),
    "a file that is not in the pods": ({"config": {"gateway": {"resume_key_file": "/key"}}}, "resume_key_file"),
    "another database": ({"config": {"tenancy": {"database": "mysql://db/x"}}}, "/config/tenancy"),
    "a key that no label has": ({"common": {"labels": {"a b": "c"}}}, "/common/labels"),
    "a key that no annotation has": ({"head": {"annotations": {"a/b/c": "d"}}}, "/head/annotations"),
    "a name that no variable has": (
        {"common": {"containerEnv": [{"name": "a b", "value": "c"}]}},
        "containerEnv/0/name",
    ),
    "more than all nodes": ({"worker": {"podDisruptionBudget": {"maxUnavailable": "101%"}}}, "maxUnavailable"),
    "tolerations that are a text": ({"worker": {"tolerations": "all"}}, "/worker/tolerations"),
    "affinity that is a text": ({"gateway": {"affinity": "near"}}, "/gateway/affinity"),
    "tolerations of an unknown key": ({"worker": {"tolerations": [{"ky": "gpu"}]}}, "/worker/tolerations/0"),
    "tolerations of an unknown operator": (
        {"head": {"tolerations": [{"key": "gpu", "operator": "Equals", "value": "a100"}]}},
        "/head/tolerations/0/operator",
    ),
    "tolerations of an unknown effect": (
        {"additionalWorkerGroups": {"more": {"tolerations": [{"key": "gpu", "effect": "NoExec"}]}}},
        "/additionalWorkerGroups/more/tolerations/0/effect",
    ),
    "affinity to what there is not": ({"driver": {"affinity": {"nodeAfinity": {}}}}, "/driver/affinity"),
    "affinity that is always sometimes": (
        {"gateway": {"affinity": {"podAntiAffinity": {"required": []}}}},
        "/gateway/affinity/podAntiAffinity",
    ),
    "a spread that is never kept": (
        {
            "gateway": {
                "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "Sometimes"}]
            }
        },
        "/gateway/topologySpreadConstraints/0/whenUnsatisfiable",
    ),
    "a spread over nothing": (
        {"worker": {"topologySpreadConstraints": [{"maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}]}},
        "topologyKey",
    ),
    "a variable of two values": (
        {
            "worker": {
                "containerEnv": [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]
            }
        },
        "/worker/containerEnv/0",
    ),
    "a path from the volume's root": ({"weights": {"source": "pvc", "pvc": {"subPath": "/llama"}}}, "subPath"),
    "a path out of the volume": ({"weights": {"source": "pvc", "pvc": {"subPath": "llama/../.."}}}, "subPath"),
    "clients of an unknown kind": (
        {"networkPolicy": {"clients": [{"ipBlok": {"cidr": "10.0.0.0/8"}}]}},
        "/networkPolicy/clients/0",
    ),
    "a selector of an unknown operator": (
        {
            "networkPolicy": {
                "clients": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "is", "values": ["a"]}]}}]
            }
        },
        "/networkPolicy/clients/0/podSelector/matchExpressions/0/operator",
    ),
    "clients that are a text": ({"networkPolicy": {"clients": "all"}}, "/networkPolicy/clients"),
    "a client that is everybody": ({"networkPolicy": {"clients": [{}]}}, "/networkPolicy/clients/0"),
    "no port of the API": ({"networkPolicy": {"apiServerPorts": []}}, "/networkPolicy/apiServerPorts"),
    "a number of CPUs that is none": ({"worker": {"rayStartParams": {"num-cpus": "abc"}}}, "num-cpus"),
    "a part of a GPU": ({"worker": {"resources": {"limits": {"nvidia.com/gpu": "1.5"}}}}, "nvidia.com~1gpu"),
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
    **{
        f"the name {name}": ({"fullnameOverride": name}, "/fullnameOverride") for name in ("My_LLM", "-x", "a.b", "70b")
    },
    "a name with spaces": ({"nameOverride": "My App"}, "/nameOverride"),
    "a value that no label has": ({"common": {"labels": {"team": "a b"}}}, "/common/labels/team"),
    "a port that is picked": ({"config": {"gateway": {"port": 0}}}, "/config/gateway/port"),
    "an HTTP port that is picked": ({"config": {"gateway": {"http_port": 0}}}, "/config/gateway/http_port"),
    "a port for metrics that is picked": ({"config": {"admin": {"metrics_port": 0}}}, "/config/admin/metrics_port"),
    "no share of nodes": ({"worker": {"podDisruptionBudget": {"maxUnavailable": "abc"}}}, "maxUnavailable"),
    "no amount of memory": (
        {"worker": {"resources": {"limits": {"memory": "8GB"}}}},
        "/worker/resources/limits/memory",
    ),
    "no tag": ({"image": {"tag": "bad tag"}}, "/image/tag"),
    "no repository": ({"image": {"repository": "UPPER/x"}}, "/image/repository"),
    "no interval": ({"monitoring": {"podMonitor": {"interval": "abc"}}}, "/monitoring/podMonitor/interval"),
    "no address of S3": ({"weights": {"s3": {"endpoint": "minio:9000"}}}, "/weights/s3/endpoint"),
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


@pytest.mark.parametrize("release", ["70b", "a.b", "platform-team-language-models-production"])
def test_a_release_whose_name_cannot_be_that_of_resources(release: str) -> None:
    """Services begin with a letter. What is too long is not cut, since two releases would have the same names then."""
    command = (CHART, "--kube-version", KUBERNETES_VERSIONS[-1], "--values", MINIMAL)
    done = run_helm("template", release, *command)
    assert done.returncode != 0
    assert f'the resources\' name would be "{release}-packtrain"' in done.stderr
    assert run_helm("template", release, *command, "--set", "fullnameOverride=llm").returncode == 0


def test_nothing_that_null_would_take_away_may_be_missing() -> None:
    """Nil pointers in templates do not tell which value they miss."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def look(values: dict[str, Any], at: dict[str, Any], path: str) -> Iterator[str]:
        empty = {name for name, value in values.items() if value in ("", [], {})}
        assert set(at["required"]) == set(values) - empty, path
        for name, value in values.items():
            inner = at["properties"][name]
            if name not in empty and isinstance(value, dict) and "required" in inner and name != "config":
                yield from look(value, inner, f"{path}{name}.")
            elif name in empty:
                yield f"{path}{name}"

    empty = list(look(defaults, schema, ""))
    assert {"additionalWorkerGroups", "gateway.rayStartParams", "head.annotations", "image.tag"} <= set(empty)
    # What is empty by default may as well be null.
    done = template(arguments=tuple(part for path in empty for part in ("--set", f"{path}=null")))
    assert done.returncode == 0, done.stderr
    assert [document for document in yaml.safe_load_all(done.stdout) if document] == render()


@pytest.mark.parametrize(
    "path",
    [
        "networkPolicy",
        "worker.podDisruptionBudget",
        "head.shmSize",
        "config.gateway.http_port",
        "config.admin.metrics_port",
    ],
)
def test_null_is_told_by_its_name(path: str) -> None:
    done = template(arguments=("--set", f"{path}=null"))
    section, _, name = path.rpartition(".")
    assert f"at '{'/' + section.replace('.', '/') if section else ''}': missing property '{name}'" in done.stderr


@pytest.mark.parametrize(("written", "mode"), [("on", True), ("off", False), ("advise", "advise"), ('"on"', "on")])
def test_modes_that_are_not_quoted(written: str, mode: bool | str, tmp_path: Path) -> None:
    """YAML reads off and on as false and true, and `packtrain serve` takes these."""
    file = tmp_path / "values.yaml"
    entry = f"{{name: m, source: /opt/x.gguf, device: cpu, autoscaling: {{mode: {written}, max_groups: 1}}}}"
    file.write_text(f"config: {{models: [{entry}]}}")
    config = serve_config(render(file))
    assert config["models"][0]["autoscaling"]["mode"] == mode
    scaling = parse_config(config, origin="test").models[0].autoscaling
    assert scaling is not None and scaling.mode == written.strip('"')


def test_a_group_replaces_what_it_gives() -> None:
    """Merged key by key, a group of CPUs beside one of GPUs had its GPUs and its node selector."""
    worker = {
        **gpus(8),
        "nodeSelector": {"gpu": "a100"},
        "labels": {"team": "a"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "podDisruptionBudget": {"maxUnavailable": 2},
        "replicas": 3,
        "maxReplicas": 3,
    }
    resources = {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}}
    own = {
        "resources": resources,
        "nodeSelector": {},
        "replicas": 0,
        "minReplicas": 0,
        "podDisruptionBudget": {"enabled": False},
    }
    manifests = render(values={"worker": worker, "additionalWorkerGroups": {"cpu": own, "more": {"maxReplicas": 4}}})
    _, first, cpu, more = only(manifests, "RayCluster")["spec"]["workerGroupSpecs"]
    assert (cpu["groupName"], cpu["replicas"], cpu["rayStartParams"]["num-gpus"]) == ("cpu", 0, "0")
    assert cpu["template"]["spec"]["containers"][0]["resources"] == resources
    assert "nodeSelector" not in cpu["template"]["spec"]
    assert cpu["template"]["metadata"]["labels"]["team"] == "a"
    assert more["template"]["spec"] == first["template"]["spec"]
    budgets = {m["metadata"]["name"]: m["spec"]["minAvailable"] for m in of_kind(manifests, "PodDisruptionBudget")}
    assert budgets == {f"{NAME}-gateway": 0, f"{NAME}-workers": 1, f"{NAME}-more": 1}


@pytest.mark.parametrize(
    ("policy", "values", "port"),
    [
        ("weights", {"endpoint": "http://minio.minio.svc:9000"}, 9000),
        ("weights", {"endpoint": "http://minio.minio.svc/"}, 80),
        ("weights", {"endpoint": "https://[fd00::7]"}, 443),
        ("weights", {}, 443),
        ("database", {"database": "postgresql://packtrain@pg.db.svc:6432/x"}, 6432),
        ("database", {"database": "postgresql+psycopg://pg/x?sslmode=require&port=6433"}, 6433),
        ("database", {"database": "postgresql://packtrain@10.0.0.7/x"}, 5432),
        ("database", {"database": "postgresql://packtrain@pg:6432/x", "port": 7000}, 7000),
        ("redis", {"address": "10.0.0.7"}, 6379),
        ("redis", {"address": "redis.db.svc:6380"}, 6380),
        ("redis", {"address": "rediss://redis.db.svc:6381/0"}, 6381),
        ("redis", {"address": "redis://[fd00::7]:6382"}, 6382),
    ],
)
def test_policies_open_the_ports_of_addresses(policy: str, values: dict[str, Any], port: int) -> None:
    given: dict[str, dict[str, Any]] = {
        "weights": {"weights": {"source": "s3", "s3": {"uri": "s3://b/p"} | values}},
        "database": {
            "config": {"tenancy": {"database": values.get("database")}},
            "database": {"egress": {"port": values.get("port", 0)}},
        },
        "redis": {"gcsFaultTolerance": {"backend": "redis", "redis": values}},
    }
    (rule,) = only(render(values=given[policy]), "NetworkPolicy", f"{NAME}-{policy}")["spec"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": port}]


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
