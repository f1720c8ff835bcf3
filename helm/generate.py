"""Makes what the chart repeats of other files: values.schema.json, README.md, the dashboard; and what `packtrain k8s` repeats of the
chart, serving/driver/chart.json. `python helm/generate.py [--check]`.

The schema's types are those of values.yaml, with the limits of `RULES`; what is under `config` is the server's own configuration
(serving/config.py), less what the chart decides. README.md's table is made of the comments in values.yaml that begin with "# --".
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "packtrain"

Schema = dict[str, Any]

# Set by the chart: TLS, and the cluster to join. No file of another machine is in a pod.
CHARTS_OWN = {"ServingConfig": ["ray"], "GatewayConfig": ["insecure", "tls", "resume_key_file"]}
# All of a pod's addresses: of IPv4, or with :: of IPv6 too.
HOSTS: Schema = {"enum": ["0.0.0.0", "::"]}

_NAME: Schema = {"type": "string", "maxLength": 253, "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_QUANTITY: Schema = {
    "type": ["string", "number"],
    "minimum": 0,
    "pattern": r"^\+?([0-9]+\.?[0-9]*|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$",
}
_WHOLE: Schema = {"type": ["string", "integer"], "minimum": 0, "pattern": "^[0-9]+$"}
_AMOUNTS: Schema = {
    "type": "object",
    "patternProperties": {"/": _WHOLE},  # devices: nvidia.com/gpu
    "additionalProperties": _QUANTITY,
}
_RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"requests": _AMOUNTS, "limits": _AMOUNTS, "claims": {"type": "array", "items": {"type": "object"}}},
}
_NUMBER: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}
_START_PARAMETERS: Schema = {
    "type": "object",
    "properties": {"num-cpus": _NUMBER, "num-gpus": {"type": "string", "pattern": "^[0-9]+$"}},
    "additionalProperties": {"type": "string"},
}
_ENVIRONMENT: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z_.-][A-Za-z0-9_.-]*$"},
            "value": {"type": "string"},
            "valueFrom": {"type": "object", "minProperties": 1, "maxProperties": 1},
        },
        "maxProperties": 2,  # one of value and valueFrom
    },
}
_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
# Not by propertyNames, for which helm tells a place that has nothing to do with it.
_STRINGS: Schema = {"type": "object", "patternProperties": {_KEY: {"type": "string"}}, "additionalProperties": False}
_LABEL_VALUE: Schema = {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
_LABELS: Schema = {"type": "object", "patternProperties": {_KEY: _LABEL_VALUE}, "additionalProperties": False}
_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
_NOT_EMPTY: Schema = {"type": "object", "minProperties": 1}


def _record(needed: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    made: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return made | ({"required": list(needed)} if needed else {})


# KubeRay takes a wrong word in a pod's template, and Kubernetes then refuses every pod that KubeRay would make.
_TEXT: Schema = {"type": "string"}
_SELECTOR = _record(
    matchLabels=_LABELS,
    matchExpressions={
        "type": "array",
        "items": _record(
            ("key", "operator"),
            key=_TEXT,
            operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            values={"type": "array", "items": _TEXT},
        ),
    },
)
_TOLERATION = _record(
    key=_TEXT,
    operator={"enum": ["Exists", "Equal", "Lt", "Gt"]},
    value=_TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    tolerationSeconds={"type": "integer"},
)
_HONOURED: Schema = {"enum": ["Honor", "Ignore"]}
_SPREAD = _record(
    ("maxSkew", "topologyKey", "whenUnsatisfiable"),
    maxSkew={"type": "integer", "minimum": 1},
    topologyKey={"type": "string", "minLength": 1},
    whenUnsatisfiable={"enum": ["DoNotSchedule", "ScheduleAnyway"]},
    labelSelector={"$ref": "#/$defs/LabelSelector"},
    matchLabelKeys={"type": "array", "items": _TEXT},
    minDomains={"type": "integer", "minimum": 1},
    nodeAffinityPolicy=_HONOURED,
    nodeTaintsPolicy=_HONOURED,
)
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_OF_PODS = _record(**{_PREFERRED: _OBJECTS, _REQUIRED: _OBJECTS})
_AFFINITY = _record(
    nodeAffinity=_record(**{_PREFERRED: _OBJECTS, _REQUIRED: {"type": "object"}}),
    podAffinity=_OF_PODS,
    podAntiAffinity=_OF_PODS,
)
_PEER = _NOT_EMPTY | _record(
    ipBlock=_record(("cidr",), cidr=_TEXT, **{"except": {"type": "array", "items": _TEXT}}),
    namespaceSelector={"$ref": "#/$defs/LabelSelector"},
    podSelector={"$ref": "#/$defs/LabelSelector"},
)
_OF_KUBERNETES: dict[str, Schema] = {
    "Affinity": _AFFINITY,
    "LabelSelector": _SELECTOR,
    "NetworkPolicyPeer": _PEER,
    "Toleration": _TOLERATION,
    "TopologySpreadConstraint": _SPREAD,
}
_PEERS: Schema = {"type": "array", "items": {"$ref": "#/$defs/NetworkPolicyPeer"}}

# A pod's ports are known before it runs, so that none is picked (0). null, which helm takes for the default, turns none off; false does.
_PORT_OR_OFF: Schema = {"anyOf": [_PORT, {"const": False}]}
PORTS = {
    "GatewayConfig": {"port": _PORT, "http_port": _PORT_OR_OFF},
    "AdminConfig": {"port": _PORT_OR_OFF, "metrics_port": _PORT_OR_OFF},
}

_STEP = r"([^/.][^/]*|\.[^/.][^/]*|\.\.[^/]+|\.)"
"""Of a path that stays below where it begins: anything but `..`."""

# By path or, beginning with "*.", by the last part of it.
RULES: Mapping[str, Schema] = {
    "*.rayStartParams": _START_PARAMETERS,
    "*.resources": _RESOURCES,
    "*.rayResources": _RESOURCES,
    "*.containerEnv": _ENVIRONMENT,
    "*.annotations": _STRINGS,
    "*.podAnnotations": _STRINGS,
    "*.labels": _LABELS,
    "*.nodeSelector": _LABELS,
    "*.shmSize": _QUANTITY,
    "*.size": _QUANTITY,
    "*.sizeLimit": _QUANTITY,
    "*.replicas": _COUNT,
    "*.minReplicas": _COUNT,
    "*.maxReplicas": _COUNT,
    "*.numOfHosts": {"type": "integer", "minimum": 1},
    "*.maxUnavailable": {"type": ["integer", "string"], "minimum": 0, "pattern": "^([0-9]{1,2}|100)%$"},
    "*.tolerations": {"type": "array", "items": {"$ref": "#/$defs/Toleration"}},
    "*.topologySpreadConstraints": {"type": "array", "items": {"$ref": "#/$defs/TopologySpreadConstraint"}},
    "*.affinity": {"$ref": "#/$defs/Affinity"},
    "*.volumes": _OBJECTS,
    "*.volumeMounts": _OBJECTS,
    "weights.initContainers": _OBJECTS,
    "networkPolicy.clients": _PEERS,
    "networkPolicy.adminClients": _PEERS,
    "networkPolicy.monitoring": _PEERS,
    "networkPolicy.dns": _PEERS,
    "networkPolicy.apiServer": _PEERS,
    "networkPolicy.extraEgress": {
        "type": "array",
        "items": _NOT_EMPTY | _record(to=_PEERS, ports={"type": "array", "items": _NOT_EMPTY}),
    },
    "database.egress.to": _PEERS,
    "weights.s3.egress": _PEERS,
    "*.existingClaim": _NAME,
    "*.existingSecret": _NAME,
    "*.credentialsSecret": _NAME,
    "*.storageClassName": _NAME,
    "*.priorityClassName": _NAME,
    "*.runtimeClassName": _NAME,
    "gateway.replicas": {"type": "integer", "minimum": 1},
    "nameOverride": {"type": "string", "maxLength": 40, "pattern": "^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"},
    "fullnameOverride": {"type": "string", "maxLength": 40, "pattern": "^([a-z]([-a-z0-9]*[a-z0-9])?)?$"},
    "imagePullSecrets": {"type": "array", "items": {"type": "string"}},
    "image.repository": {
        "type": "string",
        "pattern": r"^([A-Za-z0-9-]+([.][A-Za-z0-9-]+)+(:[0-9]+)?/|[A-Za-z0-9-]+:[0-9]+/)?[a-z0-9]+([._/-]+[a-z0-9]+)*$",
    },
    "image.tag": {"type": "string", "not": {"const": "latest"}, "pattern": "^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$"},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "common.logLevel": {"enum": ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]},
    "common.logFormat": {"enum": ["json", "text"]},
    "ray.version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    "ray.autoscaling.version": {"enum": ["v1", "v2"]},
    "ray.autoscaling.upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
    "ray.autoscaling.idleTimeoutSeconds": {"type": "integer", "minimum": 1},
    "gcsFaultTolerance.backend": {"enum": ["rocksdb", "redis"]},
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 45},
    "worker.groupName": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$"},
    "driver.waitForNodesSeconds": {"type": "integer", "minimum": 1},
    "database.egress.port": _PORT | {"minimum": 0},
    "weights.pvc.subPath": {"type": "string", "pattern": f"^({_STEP}(/{_STEP})*/?)?$"},
    "weights.source": {"enum": ["none", "pvc", "s3", "init"]},
    "weights.s3.uri": {"type": "string", "pattern": "^(s3://.+)?$"},
    "weights.s3.endpoint": {"type": "string", "pattern": "^(https?://.+)?$"},
    "service.type": {"enum": ["ClusterIP", "LoadBalancer", "NodePort"]},
    "networkPolicy.apiServerPorts": {"type": "array", "items": _PORT, "minItems": 1},
    "ingress.hosts": {
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["host"],
            "properties": {"host": {"type": "string", "minLength": 1}, "path": {"type": "string", "pattern": "^/"}},
        },
    },
    "monitoring.podMonitor.interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
    "monitoring.prometheusRule.ttftSeconds": {"type": "number", "exclusiveMinimum": 0},
    "monitoring.prometheusRule.itlSeconds": {"type": "number", "exclusiveMinimum": 0},
    "monitoring.prometheusRule.queueSeconds": {"type": "number", "exclusiveMinimum": 0},
}


def values_schema(values: Mapping[str, Any], serving: Schema) -> Schema:
    """The chart's schema, of its default values and the JSON schema of ServingConfig."""
    properties = {name: _schema_of(name, value) for name, value in values.items() if name != "config"}
    properties["config"] = {"$ref": "#/$defs/ServingConfig"}
    # Helm's own: values of a parent chart, and the condition under which it takes this one.
    properties["global"] = {"type": "object"}
    properties["enabled"] = {"type": "boolean"}
    properties["additionalWorkerGroups"] = {
        "type": "object",
        "additionalProperties": _without_required(properties["worker"]),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart packtrain",
        "type": "object",
        "additionalProperties": False,
        "required": _needed(values),
        "properties": properties,
        "$defs": _configuration(serving) | _OF_KUBERNETES,
    }


def _schema_of(path: str, value: object) -> Schema:
    for rule in (path, "*." + path.rpartition(".")[2]):
        if rule in RULES:
            return RULES[rule]
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int | float):
        return {"type": "number"}
    if isinstance(value, str):
        return {"type": "string"}
    if isinstance(value, list):
        return {"type": "array"}
    if not isinstance(value, dict):
        raise TypeError(f"{path} has no default from which its type could be told: {value!r}")
    if not value:
        return {"type": "object"}
    inner = {name: _schema_of(f"{path}.{name}", item) for name, item in value.items()}
    return {"type": "object", "additionalProperties": False, "required": _needed(value), "properties": inner}


def _needed(values: Mapping[str, Any]) -> list[str]:
    """What `null`, by which helm takes a value away, would leave a hole in: all that is not empty by default."""
    return [name for name, value in values.items() if value not in ("", [], {})]


def _without_required(schema: Schema) -> Schema:
    """For parts of a whole: each key may be left out."""
    properties = {name: _without_required(inner) for name, inner in schema.get("properties", {}).items()}
    made = {key: value for key, value in schema.items() if key != "required"}
    return made | ({"properties": properties} if properties else {})


def _configuration(serving: Schema) -> Schema:
    definitions: Schema = {**serving["$defs"], "ServingConfig": {k: v for k, v in serving.items() if k != "$defs"}}
    for name, keys in CHARTS_OWN.items():
        for key in keys:
            del definitions[name]["properties"][key]
    for name, ports in PORTS.items():
        definitions[name]["properties"] |= ports
        definitions[name]["required"] = list(ports)  # who writes null wants the port off, and would have it open
    for name in ("GatewayConfig", "AdminConfig"):
        definitions[name]["properties"]["host"] = HOSTS
    definitions["TenancyConfig"]["properties"]["database"] = {
        "type": "string",
        "pattern": "^((sqlite|postgresql)[+:].*)?$",
    }
    used = set(_references(definitions["ServingConfig"], definitions))
    return {name: _plain(definitions[name]) for name in sorted(used | {"ServingConfig"})}


def _references(node: object, definitions: Schema) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            yield name
            yield from _references(definitions[name], definitions)
        for value in node.values():
            yield from _references(value, definitions)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item, definitions)


def _plain(node: object) -> Any:
    """Without what only repeats names and defaults, which are the server's to set."""
    if isinstance(node, dict):
        is_properties = "type" not in node and "$ref" not in node and all(isinstance(v, dict) for v in node.values())
        dropped = () if is_properties else ("title", "default", "format")
        return {key: _plain(value) for key, value in node.items() if key not in dropped}
    return [_plain(item) for item in node] if isinstance(node, list) else node


@dataclass(frozen=True, kw_only=True, slots=True)
class Documented:
    """A value with its comment."""

    path: str
    default: object
    text: str


def documented_values(text: str) -> list[Documented]:
    """Every key of values.yaml that has a comment beginning with "# --"."""
    values = yaml.safe_load(text)
    found: list[Documented] = []
    parents: list[tuple[int, str]] = []
    comment: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            words = stripped.lstrip("#").strip()
            if words.startswith("--"):
                comment = [words[2:].strip()]
            elif comment is not None:
                comment.append(words)
            continue
        key = re.match(r"^( *)([A-Za-z_][\w]*):", line)
        if key is None:
            comment = None
            continue
        indent = len(key[1])
        parents = [(at, name) for at, name in parents if at < indent] + [(indent, key[2])]
        if comment is not None:
            path = [name for _, name in parents]
            found.append(Documented(path=".".join(path), default=_at(values, path), text=" ".join(comment)))
            comment = None
    return found


def _at(values: Any, path: list[str]) -> object:
    for name in path:
        values = values[name]
    return values


def readme(values: list[Documented], chart: Mapping[str, Any]) -> str:
    """README.md of the chart."""
    rows = "\n".join(f"| `{v.path}` | {_default(v)} | {_cell(v.text)} |" for v in values)
    return f"""<!-- Made by `python helm/generate.py` of values.yaml; edit that. -->

# {chart["name"]}

{chart["description"]}

Chart {chart["version"]}, application {chart["appVersion"]}; Kubernetes {chart["kubeVersion"].removesuffix("-0")}; KubeRay
{chart["annotations"]["packtrain.io/kuberay"]}.

```
helm install llm helm/packtrain --namespace llm --create-namespace --values my-values.yaml
```

`packtrain k8s render serve.yaml --gpu a100-80g --gpus-per-node 8 > my-values.yaml` makes values of a configuration that
`packtrain serve` reads, with the sizes worked out; `packtrain k8s check my-values.yaml` says whether they can work. `ci/` has values
for common cases.
How to install, upgrade and mend it is in [docs/operations.md](../../docs/operations.md).

## Values

| key | default | meaning |
| --- | --- | --- |
{rows}
"""


def _default(value: Documented) -> str:
    if value.path == "config":
        return "a small model on a CPU"
    text = json.dumps(value.default)
    return f"`{text}`" if len(text) <= 80 else "see values.yaml"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def generated() -> dict[Path, str]:
    """Every generated file and what it has to hold."""
    sys.path.insert(0, str(ROOT))
    from serving.config import ServingConfig  # noqa: PLC0415  # this file lies beside the packages, not in one

    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load(text)
    schema = values_schema(values, ServingConfig.model_json_schema())
    dashboard = (ROOT / "docs" / "dashboards" / "packtrain.json").read_text(encoding="utf-8")
    return {
        CHART / "values.schema.json": json.dumps(schema, indent=2) + "\n",
        ROOT / "serving" / "driver" / "chart.json": json.dumps({"values": values, "schema": schema}) + "\n",
        CHART / "README.md": readme(documented_values(text), chart),
        CHART / "dashboards" / "packtrain.json": dashboard,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 when a file is not up to date")
    only_check = parser.parse_args().check
    stale = [
        path for path, text in generated().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is {'not up to date' if only_check else 'written'}")
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated()[path], encoding="utf-8")
    return 1 if stale and only_check else 0


if __name__ == "__main__":
    sys.exit(main())
