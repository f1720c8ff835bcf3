"""Every rule of tests/support/chart_rules.py holds for the chart's own values, and notices a template that breaks it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import chart_rules as rules
from tests.support.helm import CI_VALUES, changed_chart, render, rendered

FILES = {path.name.removesuffix("-values.yaml"): path for path in CI_VALUES}
HELPERS, CLUSTER, DRIVER, PODS = (
    f"templates/{name}" for name in ("_helpers.tpl", "raycluster.yaml", "driver.yaml", "_pods.tpl")
)
SERVICES, POLICIES = "templates/services.yaml", "templates/networkpolicies.yaml"
WORKERS_STAY = 'minAvailable: {{ include "packtrain.minAvailable" (list $pods .podDisruptionBudget.maxUnavailable) }}'

# A template that breaks the rule: which rule, with which values, what is replaced in which file by what.
MUTANTS: list[tuple[rules.Rule, str, Mapping[str, tuple[str, str]]]] = [
    (rules.runs_without_privileges, "minimal-cpu", {HELPERS: ("runAsNonRoot: true\nrunAsUser: 10001", "runAsNonRoot: true")}),
    (rules.runs_without_privileges, "minimal-cpu", {HELPERS: ("drop: [ALL]", "drop: [NET_RAW]")}),
    (rules.runs_without_privileges, "minimal-cpu", {HELPERS: ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true")}),
    (rules.runs_without_privileges, "minimal-cpu", {HELPERS: ("type: RuntimeDefault\n{{- end -}}\n\n{{- define", "type: Unconfined\n{{- end -}}\n\n{{- define")}),
    (rules.runs_without_privileges, "llama-2-70b-tp8", {CLUSTER: ("securityContext: {{- include \"packtrain.securityContext\" . | nindent 6 }}", "securityContext: {}")}),
    (rules.root_file_systems_are_read_only, "minimal-cpu", {HELPERS: ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")}),
    (rules.no_service_account_token, "minimal-cpu", {DRIVER: ("automountServiceAccountToken: false", "automountServiceAccountToken: true")}),
    (rules.no_service_account_token, "minimal-cpu", {"templates/serviceaccount.yaml": ("Token: false", "Token: true")}),
    (rules.no_service_account_token, "llama-2-70b-tp8", {CLUSTER: ("{name: kube-api-access, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}", "{name: tmp, mountPath: /var/tmp}")}),
    (rules.no_secret_in_values, "many-models", {HELPERS: ("- name: PGPASSWORD\n", "- name: PGPASSWORD\n  value: hunter2\n")}),
    (rules.no_secret_in_values, "minimal-cpu", {DRIVER: ("- --block\n", "- --block\n            - --redis-password=hunter2\n")}),
    (rules.no_secret_in_values, "minimal-cpu", {HELPERS: ("sqlite:////var/lib/packtrain/tenants.db", "postgresql://packtrain:hunter2@db/packtrain")}),
    (rules.ray_asks_for_a_token, "minimal-cpu", {CLUSTER: ("mode: token", "mode: disabled")}),
    (rules.ray_asks_for_a_token, "minimal-cpu", {DRIVER: ('include "packtrain.authEnvironment" . | fromYamlArray', "list")}),
    (rules.rays_ports_are_in_no_service, "minimal-cpu", {SERVICES: ("targetPort: grpc}\n{{- $admin", "targetPort: grpc}\n    - {name: dashboard, port: 8265}\n{{- $admin")}),
    (rules.rays_ports_are_in_no_service, "minimal-cpu", {CLUSTER: ('"dashboard-host" "127.0.0.1"', '"dashboard-host" "0.0.0.0"')}),
    (rules.rays_ports_are_in_no_service, "minimal-cpu", {CLUSTER: ("            lifecycle: {{- include \"packtrain.lifecycle\" . | nindent 14 }}", "              - {name: client, containerPort: 10001}\n            lifecycle: {{- include \"packtrain.lifecycle\" . | nindent 14 }}")}),
    (rules.admin_port_is_apart, "minimal-cpu", {SERVICES: ("targetPort: grpc}\n{{- $admin", "targetPort: grpc}\n    - {name: metrics, port: 9464}\n{{- $admin")}),
    (rules.admin_port_is_apart, "minimal-cpu", {SERVICES: ("spec:\n  type: ClusterIP", "spec:\n  type: LoadBalancer")}),
    (rules.serves_with_keys, "minimal-cpu", {HELPERS: ("{{- if $tenancy -}}", "{{- if false -}}")}),
    (rules.serves_with_keys, "minimal-cpu", {HELPERS: ('"insecure" .Values.insecure', '"insecure" true')}),
    (rules.exposed_with_tls, "minimal-cpu", {SERVICES: ("spec:\n  type: {{ .Values.service.type }}", "spec:\n  type: NodePort")}),
    (rules.exposed_with_tls, "air-gapped", {"templates/ingress.yaml": ("{{- with .Values.ingress.tls }}", "{{- with list }}")}),
    (rules.exposed_with_tls, "many-models", {"templates/gatewayapi.yaml": ("{{- toYaml .Values.gatewayApi.parentRefs | nindent 4 }}", "[{name: public}]")}),
    (rules.images_are_pinned, "minimal-cpu", {CLUSTER: ("- name: ray-head\n            image: {{ include \"packtrain.image\" . | quote }}", "- name: ray-head\n            image: packtrain")}),
    (rules.grace_is_longer_than_the_drain, "minimal-cpu", {CLUSTER: ("terminationGracePeriodSeconds: {{ $grace }}", "terminationGracePeriodSeconds: 30")}),
    (rules.grace_is_longer_than_the_drain, "llama-2-70b-tp8", {HELPERS: ("{{ add (include \"packtrain.drainSeconds\" . | float64 | ceil | int) 30 | quote }}", '"60"')}),
    (rules.grace_is_longer_than_the_drain, "minimal-cpu", {HELPERS: ("command: [packtrain, k8s, drain,", "command: [sleep,")}),
    (rules.grace_is_longer_than_the_drain, "minimal-cpu", {HELPERS: ('RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "0"', 'RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "30"')}),
    (rules.live_is_not_ready, "minimal-cpu", {PODS: ("grpc: {port: {{ include \"packtrain.port\" (list . \"gateway\" \"port\" 50051) }}}", "httpGet: {path: /api/healthz, port: {{ $port }}}")}),
    (rules.live_is_not_ready, "many-models", {PODS: ("path: /readyz", "path: /healthz")}),
    (rules.live_is_not_ready, "minimal-cpu", {PODS: ("livenessProbe:\n  httpGet: {path: /api/healthz,", "livenessProbe:\n  httpGet: {path: /readyz,")}),
    (rules.head_holds_no_group, "minimal-cpu", {CLUSTER: ('merge (dict "num-cpus" "0" "num-gpus" "0") (.Values.head', 'merge (dict) (.Values.head')}),
    (rules.head_holds_no_group, "minimal-cpu", {DRIVER: ('"num-cpus" "0"', '"num-cpus" "4"')}),
    (rules.state_outlives_the_head, "minimal-cpu", {CLUSTER: ("- {name: gcs, mountPath: /var/lib/ray-gcs}", "- {name: tmp, mountPath: /var/lib/ray-gcs}")}),
    (rules.state_outlives_the_head, "minimal-cpu", {HELPERS: ('reconnect_timeout_s, value: "600"', 'reconnect_timeout_s, value: "60"')}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {POLICIES: ("policyTypes: [Ingress, Egress]\n---\n# Flow 1", "policyTypes: [Ingress]\n---\n# Flow 1")}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {POLICIES: ("  ingress:\n    - from:\n        - podSelector: *ray", "  ingress:\n    - {}")}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {POLICIES: ("(list (dict \"podSelector\" dict))", "(list dict)")}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {POLICIES: ("- {protocol: TCP, port: grpc}", "- {protocol: TCP, port: 6379}")}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {CLUSTER: ('{{- include "packtrain.podLabels" (list $root "worker" $own) | nindent 12 }}', " {app: worker}")}),
    (rules.nothing_passes_but_the_listed_flows, "llama-2-70b-tp8", {POLICIES: ("{{- range $policy.apiServerPorts }}", "{{- range list }}")}),
    (rules.nothing_passes_but_the_listed_flows, "minimal-cpu", {POLICIES: ("- to: {{- toYaml . | nindent 8 }}", "- to: []")}),
    (rules.disruptions_are_bounded, "llama-2-70b-tp8", {"templates/poddisruptionbudgets.yaml": (WORKERS_STAY, "maxUnavailable: 1")}),
    (rules.disruptions_are_bounded, "llama-2-70b-tp8", {"templates/poddisruptionbudgets.yaml": (WORKERS_STAY, "minAvailable: 50%")}),
    (rules.disruptions_are_bounded, "llama-2-70b-tp8", {"templates/poddisruptionbudgets.yaml": ("ternary .minReplicas .replicas", "ternary .replicas .replicas")}),
    (rules.disruptions_are_bounded, "llama-2-70b-tp16", {"templates/poddisruptionbudgets.yaml": (" .numOfHosts }}", " 1 }}")}),
    (rules.nothing_stands_twice, "minimal-cpu", {HELPERS: ("- {name: home, mountPath: /home/packtrain}\n{{- if include", "- {name: home, mountPath: /tmp}\n{{- if include")}),
    (rules.nothing_stands_twice, "minimal-cpu", {HELPERS: ("{{- range $names | uniq -}}", "{{- range concat $names $names -}}")}),
    (rules.nothing_stands_twice, "minimal-cpu", {HELPERS: ("- name: tmp\n", "- name: home\n  emptyDir: {}\n- name: tmp\n")}),
    (rules.disruptions_are_bounded, "minimal-cpu", {"templates/poddisruptionbudgets.yaml": ("app.kubernetes.io/component: gateway", "app.kubernetes.io/component: gateways")}),
    (rules.shared_memory_is_sized, "minimal-cpu", {HELPERS: ("emptyDir: {medium: Memory, sizeLimit: {{ index . 1 | quote }}}", "emptyDir: {medium: Memory}")}),
    (rules.scaling_is_ours_alone, "minimal-cpu", {"templates/serviceaccount.yaml": ("apiVersion: v1", "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {name: x}\n---\napiVersion: v1")}),
]  # fmt: skip


@pytest.mark.parametrize("file", CI_VALUES, ids=lambda path: path.name)
@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: rules.Rule, file: Path) -> None:
    assert rule(rendered(file)) == []


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_for_the_default_values(rule: rules.Rule) -> None:
    assert rule(render()) == []


@pytest.mark.parametrize(
    ("rule", "values", "changes"),
    MUTANTS,
    ids=[f"{rule.__name__}-{number}" for number, (rule, *_) in enumerate(MUTANTS)],
)
def test_rule_finds_a_template_that_breaks_it(
    rule: rules.Rule, values: str, changes: Mapping[str, tuple[str, str]], tmp_path: Path
) -> None:
    assert rule(render(FILES[values], chart=changed_chart(tmp_path, changes))) != []


def test_every_rule_has_a_mutant() -> None:
    assert {rule for rule, *_ in MUTANTS} == set(rules.RULES)


def test_the_pods_of_a_group_that_spans_machines() -> None:
    """70B at TP=16: two pods a replica, and eight GPUs each."""
    (cluster,) = (m for m in rendered(FILES["llama-2-70b-tp16"]) if m["kind"] == "RayCluster")
    group = cluster["spec"]["workerGroupSpecs"][1]
    assert (group["numOfHosts"], group["replicas"], group["rayStartParams"]["num-gpus"]) == (2, 1, "8")


def test_the_autoscaled_70b() -> None:
    (cluster,) = (m for m in rendered(FILES["llama-2-70b-tp8"]) if m["kind"] == "RayCluster")
    group = cluster["spec"]["workerGroupSpecs"][1]
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 4)
    assert {"name": "NCCL_P2P_LEVEL", "value": "NVL"} in group["template"]["spec"]["containers"][0]["env"]
    assert group["template"]["spec"]["priorityClassName"] == "inference"
