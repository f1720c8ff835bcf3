"""What must hold of everything that the chart renders. Each rule says what breaks it, in words; an empty list is well."""

import re
from collections.abc import Callable, Iterator

from tests.support.helm import NAME, Manifest, containers, of_kind, only, pod_templates, serve_config

Rule = Callable[[list[Manifest]], list[str]]

# Ray's own: dashboard, client, its agents and metrics, Serve's proxies. None belongs into a Service.
RAY_PORTS = {8265, 10001, 52365, 8080, 9000, 8076, 8077}
SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|credential|api_?key|access_?key)")
_TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"


def _each_container(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for name, pod in pod_templates(manifests):
        for container in containers(pod):
            yield f"{name}/{container['name']}", container
    for cluster in of_kind(manifests, "RayCluster"):
        if options := cluster["spec"].get("autoscalerOptions"):
            yield "head/autoscaler", options


def runs_without_privileges(manifests: list[Manifest]) -> list[str]:
    found = []
    for name, pod in pod_templates(manifests):
        context = pod["spec"].get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("runAsUser", 0) > 0):
            found.append(f"{name} may run as root")
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            found.append(f"{name} has no seccomp profile")
        found += [
            f"{name} sees the host: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod["spec"].get(key)
        ]
        found += [f"{name} mounts the host: {v['name']}" for v in pod["spec"].get("volumes", []) if "hostPath" in v]
    for name, container in _each_container(manifests):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name} may gain privileges")
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            found.append(f"{name} keeps capabilities")
        if context.get("privileged"):
            found.append(f"{name} is privileged")
    return found


def root_file_systems_are_read_only(manifests: list[Manifest]) -> list[str]:
    return [
        f"{name} can write to its image"
        for name, container in _each_container(manifests)
        if not container.get("securityContext", {}).get("readOnlyRootFilesystem")
    ]


def no_service_account_token(manifests: list[Manifest]) -> list[str]:
    """But in Ray's autoscaler, which asks the Kubernetes API."""
    found = [
        f"{name} gets a token"
        for name, pod in pod_templates(manifests)
        if pod["spec"].get("automountServiceAccountToken") is not False
    ]
    found += [
        f"account {account['metadata']['name']} gives its token away"
        for account in of_kind(manifests, "ServiceAccount")
        if account.get("automountServiceAccountToken") is not False
    ]
    for name, container in _each_container(manifests):
        mounts = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if _TOKEN_PATH in mounts and name != "head/autoscaler":
            found.append(f"{name} mounts the token")
    cluster = only(manifests, "RayCluster")["spec"]
    if cluster.get("enableInTreeAutoscaling") and _TOKEN_PATH not in [
        mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]
    ]:
        found.append("the autoscaler could not ask the Kubernetes API")
    return found


def no_secret_in_values(manifests: list[Manifest]) -> list[str]:
    """Secrets are named, never written: not in arguments, environment, or configuration."""
    found = [f"the chart makes a Secret: {secret['metadata']['name']}" for secret in of_kind(manifests, "Secret")]
    for name, container in _each_container(manifests):
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]) and variable.get("value"):
                found.append(f"{name} has {variable['name']} in clear")
        line = " ".join(container.get("command", []) + container.get("args", []))
        if re.search(r"--[\w-]*(password|token|secret)[= ]", line):
            found.append(f"{name} has a secret among its arguments")
    database = (serve_config(manifests).get("tenancy") or {}).get("database", "")
    if re.search(r"://[^/@]*:[^/@]*@|[?&][a-z_]*(password|_key|secret)=", database):
        found.append("the database's password is in the ConfigMap")
    return found


def ray_asks_for_a_token(manifests: list[Manifest]) -> list[str]:
    found = []
    if only(manifests, "RayCluster")["spec"].get("authOptions", {}).get("mode") != "token":
        found.append("the cluster takes anybody")
    driver = only(manifests, "Deployment", f"{NAME}-driver")["spec"]["template"]
    for container in containers(driver):
        if container["name"] not in ("driver", "ray-node"):
            continue
        environment = {variable["name"]: variable for variable in container["env"]}
        if environment.get("RAY_AUTH_MODE", {}).get("value") != "token":
            found.append(f"{container['name']} does not use the token")
        if "secretKeyRef" not in environment.get("RAY_AUTH_TOKEN", {}).get("valueFrom", {}):
            found.append(f"{container['name']} has no token from a Secret")
    return found


def rays_ports_are_in_no_service(manifests: list[Manifest]) -> list[str]:
    found = []
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            if {port["port"], port.get("targetPort")} & RAY_PORTS:
                found.append(f"Service {service['metadata']['name']} opens {port['port']}")
        if service["spec"]["selector"].get("app.kubernetes.io/component") not in ("gateway", "driver"):
            found.append(f"Service {service['metadata']['name']} reaches pods that clients have no business with")
    head = only(manifests, "RayCluster")["spec"]["headGroupSpec"]
    # KubeRay's Service of the head has the ports that its container names.
    named = [port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]]
    if named != ["gcs-server"]:
        found.append(f"the head's Service opens {named}")
    if head["rayStartParams"].get("dashboard-host") != "127.0.0.1":
        found.append("the dashboard listens beyond loopback")
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress"):
        found.append("the head is reachable from outside")
    return found


def admin_port_is_apart(manifests: list[Manifest]) -> list[str]:
    config = serve_config(manifests)
    admin, metrics = config["admin"].get("port"), config["admin"].get("metrics_port")
    found = []
    for service in of_kind(manifests, "Service"):
        ports = {port.get("targetPort") for port in service["spec"]["ports"]} | {
            port["port"] for port in service["spec"]["ports"]
        }
        if service["metadata"]["name"] != f"{NAME}-admin" and ports & {admin, metrics, "admin", "gateway-metrics"}:
            found.append(f"Service {service['metadata']['name']} opens an operators' port")
        if service["metadata"]["name"] == f"{NAME}-admin" and service["spec"]["type"] != "ClusterIP":
            found.append("the Admin service is reachable from outside")
    return found


def serves_with_keys(manifests: list[Manifest]) -> list[str]:
    config = serve_config(manifests)
    found = [] if config.get("tenancy") else ["there are no keys"]
    return found + (["the server is told to be insecure"] if config["gateway"].get("insecure") else [])


def exposed_with_tls(manifests: list[Manifest]) -> list[str]:
    """Whatever leads into the cluster from outside is encrypted."""
    found = []
    tls = "tls" in serve_config(manifests)["gateway"]
    for service in of_kind(manifests, "Service"):
        if service["spec"].get("type") in ("LoadBalancer", "NodePort") and not tls:
            found.append(f"Service {service['metadata']['name']} is open in clear")
    found += [
        f"{i['metadata']['name']} is open in clear" for i in of_kind(manifests, "Ingress") if not i["spec"].get("tls")
    ]
    for kind in ("GRPCRoute", "HTTPRoute"):
        for route in of_kind(manifests, kind):
            if not all("sectionName" in parent for parent in route["spec"]["parentRefs"]):
                found.append(f"{kind} attaches to any listener")
    return found


def images_are_pinned(manifests: list[Manifest]) -> list[str]:
    found = []
    for name, container in _each_container(manifests):
        image = container.get("image")
        if image and not re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)$", image):
            found.append(f"{name} runs {image}")
    return found


def grace_is_longer_than_the_drain(manifests: list[Manifest]) -> list[str]:
    """kubelet counts preStop against the grace period, and sends SIGTERM after it."""
    drain_s = serve_config(manifests)["gateway"]["drain_timeout_s"]
    found = []
    cluster = only(manifests, "RayCluster")["spec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    for name, pod in {"head": cluster["headGroupSpec"]["template"], **groups}.items():
        grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30)
        command = (
            pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        )
        if command[:3] != ["packtrain", "k8s", "drain"]:
            found.append(f"{name} ends without draining")
            continue
        timeout_s = float(command[command.index("--timeout-s") + 1])
        if timeout_s < drain_s:
            found.append(f"{name} waits {timeout_s} s for requests that may take {drain_s} s")
        if grace_s < timeout_s + 15:
            found.append(f"{name} is killed after {grace_s} s and needs {timeout_s + 15} s")
    for name, template in pod_templates(manifests):
        for container in containers(template):
            variables = {v["name"]: v.get("value") for v in container.get("env", [])}
            if (
                "RAY_SERVE_USE_GRPC_BY_DEFAULT" in variables
                and variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") != "0"
            ):
                found.append(f"{name}/{container['name']} drains its node once more after preStop has")
    return found


def live_is_not_ready(manifests: list[Manifest]) -> list[str]:
    """Ready is a gateway with a group behind it; live is the Ray node. A pod is not restarted because groups are loading."""
    config = serve_config(manifests)
    cluster = only(manifests, "RayCluster")["spec"]
    found = []
    for group in cluster["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        for probe in ("livenessProbe", "startupProbe"):
            if container.get(probe, {}).get("httpGet", {}).get("path") != "/api/healthz":
                found.append(f"{group['groupName']}: {probe} does not ask the Ray node")
        ready = container.get("readinessProbe", {})
        if group["groupName"] != "gateways":
            continue
        if "tls" in config["gateway"]:
            # kubelet's gRPC probe speaks no TLS.
            well = ready.get("httpGet") == {"path": "/readyz", "port": config["admin"]["metrics_port"]}
        else:
            well = ready.get("grpc") == {"port": config["gateway"]["port"]}
        if not well:
            found.append(f"a gateway is ready by {ready}")
    return found


def head_holds_no_group(manifests: list[Manifest]) -> list[str]:
    cluster = only(manifests, "RayCluster")["spec"]
    found = []
    for name, parameters in [
        ("head", cluster["headGroupSpec"]["rayStartParams"]),
        *((g["groupName"], g["rayStartParams"]) for g in cluster["workerGroupSpecs"] if g["groupName"] == "gateways"),
    ]:
        if parameters.get("num-cpus") != "0" or parameters.get("num-gpus") != "0":
            found.append(f"a replica group could come to lie on {name}")
    driver = only(manifests, "Deployment", f"{NAME}-driver")["spec"]["template"]
    (node,) = (c for c in containers(driver) if c["name"] == "ray-node")
    if "--num-cpus=0" not in node["command"]:
        found.append("a replica group could come to lie beside the driver")
    return found


def state_outlives_the_head(manifests: list[Manifest]) -> list[str]:
    cluster = only(manifests, "RayCluster")["spec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]
    environment = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    by_redis = cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress")
    path = environment.get("RAY_gcs_storage_path")
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    by_volume = environment.get("RAY_gcs_storage") == "rocksdb" and mounts.get(str(path)) in claims
    found = [] if by_redis or by_volume else ["the head's state is lost with it"]
    for name, template in pod_templates(manifests):
        for container in containers(template):
            variables = {v["name"]: v.get("value") for v in container.get("env", [])}
            if (
                "RAY_SERVE_USE_GRPC_BY_DEFAULT" in variables
                and variables.get("RAY_gcs_rpc_server_reconnect_timeout_s") != "600"
            ):
                found.append(f"{name}/{container['name']} gives the head up too soon")
    return found


def nothing_passes_but_the_listed_flows(manifests: list[Manifest]) -> list[str]:
    """Every pod is under a policy that denies; and each flow that is allowed is one of these."""
    policies = {p["metadata"]["name"].removeprefix(f"{NAME}-"): p["spec"] for p in of_kind(manifests, "NetworkPolicy")}
    selector = {"app.kubernetes.io/name": "packtrain", "app.kubernetes.io/instance": "rel"}
    found = []
    deny = policies.pop("default-deny", None)
    if deny is None or deny.get("ingress") or deny.get("egress") or set(deny["policyTypes"]) != {"Ingress", "Egress"}:
        found.append("nothing denies by default")
    elif deny["podSelector"] != {"matchLabels": selector}:
        found.append("not every pod is under the policy that denies")
    for name, pod in pod_templates(manifests):
        if not selector.items() <= pod["metadata"]["labels"].items():
            found.append(f"{name} is under no policy")
    for name, spec in policies.items():
        if spec["podSelector"].get("matchLabels", {}).items() < selector.items():
            found.append(f"policy {name} is for other pods too")
        for rule in spec.get("ingress", []):
            if not rule.get("from") or {} in rule["from"]:
                found.append(f"policy {name} lets everybody in")
            if name != "ray" and not rule.get("ports"):
                found.append(f"policy {name} opens every port")
        for rule in spec.get("egress", []):
            if not rule.get("to") and not rule.get("ports"):
                found.append(f"policy {name} lets everything out")
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            # Kubernetes takes an empty list, and one that is null, for "all".
            found += [f"policy {name} has {key} without any" for key, given in rule.items() if not given]
    components = policies.get("ray", {}).get("podSelector", {}).get("matchExpressions", [{}])[0].get("values")
    if components != ["head", "gateway", "worker", "driver"]:
        found.append("pods of the Ray cluster cannot reach each other, or others can")
    for name, component, ports in (
        ("gateway", "gateway", {"grpc", "http", "gateway-metrics"}),
        ("admin", "driver", {"admin"}),
    ):
        spec = policies.get(name)
        if spec is None:
            continue
        if spec["podSelector"]["matchLabels"].get("app.kubernetes.io/component") != component:
            found.append(f"policy {name} is for other pods")
        found += [
            f"policy {name} opens {port['port']}"
            for rule in spec["ingress"]
            for port in rule["ports"]
            if port["port"] not in ports
        ]
    allowed = {"ray", "dns", "gateway", "admin", "database", "redis", "autoscaler", "weights", "extra"}
    found += [f"policy {name} is not among the listed flows" for name in policies.keys() - allowed]
    return found


def disruptions_are_bounded(manifests: list[Manifest]) -> list[str]:
    """By whole numbers of pods that stay: a RayCluster has no scale subresource, and without it Kubernetes counts neither
    `maxUnavailable` nor shares, and lets no pod go."""
    budgets = [p["spec"] for p in of_kind(manifests, "PodDisruptionBudget")]
    found = [
        f"Kubernetes cannot count {budget}"
        for budget in budgets
        if "maxUnavailable" in budget or type(budget.get("minAvailable")) is not int
    ]
    cluster = only(manifests, "RayCluster")["spec"]
    for group in cluster["workerGroupSpecs"]:
        labels = group["template"]["metadata"]["labels"]
        replicas = group["minReplicas"] if cluster["enableInTreeAutoscaling"] else group["replicas"]
        pods = replicas * group.get("numOfHosts", 1)
        matching = [b for b in budgets if b["selector"]["matchLabels"].items() <= labels.items()]
        if [b.get("minAvailable") for b in matching] != [pods - 1]:
            found.append(f"{group['groupName']}: {len(matching)} budgets, or not one node at a time")
    return found


def nothing_stands_twice(manifests: list[Manifest]) -> list[str]:
    """Server-side apply, Helm's own way since version 4, takes no list in which a key stands twice."""
    found = []
    for pod, template in pod_templates(manifests):
        volumes = [volume["name"] for volume in template["spec"].get("volumes", [])]
        found += [f"{pod}: volume {name} twice" for name in {n for n in volumes if volumes.count(n) > 1}]
    for name, container in _each_container(manifests):
        for list_key, key in (("env", "name"), ("volumeMounts", "mountPath"), ("ports", "containerPort")):
            keys = [item[key] for item in container.get(list_key, [])]
            found += [f"{name}: {list_key} has {key} twice" for key in {k for k in keys if keys.count(k) > 1}]
    return found


def shared_memory_is_sized(manifests: list[Manifest]) -> list[str]:
    found = []
    for name, pod in pod_templates(manifests):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in containers(pod):
            if "RAY_SERVE_USE_GRPC_BY_DEFAULT" not in [v["name"] for v in container.get("env", [])]:
                continue
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            volume = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
            if volume.get("medium") != "Memory" or not volume.get("sizeLimit"):
                found.append(f"{name}/{container['name']} has no sized /dev/shm")
    return found


def scaling_is_ours_alone(manifests: list[Manifest]) -> list[str]:
    kinds = {manifest["kind"] for manifest in manifests}
    return [f"{kind} would scale against Packtrain" for kind in kinds & {"HorizontalPodAutoscaler", "ScaledObject"}]


RULES: tuple[Rule, ...] = (
    runs_without_privileges,
    root_file_systems_are_read_only,
    no_service_account_token,
    no_secret_in_values,
    ray_asks_for_a_token,
    rays_ports_are_in_no_service,
    admin_port_is_apart,
    serves_with_keys,
    exposed_with_tls,
    images_are_pinned,
    grace_is_longer_than_the_drain,
    live_is_not_ready,
    head_holds_no_group,
    state_outlives_the_head,
    nothing_passes_but_the_listed_flows,
    disruptions_are_bounded,
    nothing_stands_twice,
    shared_memory_is_sized,
    scaling_is_ours_alone,
)
