"""Pods without Kubernetes: what the chart renders, run as kubelet would run it, in namespaces of this machine's kernel.

Each pod has a network, processes and mounts of its own, its containers a read-only root, the volumes of the manifest and the user
of its security context. What KubeRay adds to a RayCluster's pods (`ray start` and its environment) is added as KubeRay 1.7 does.
Needs root: namespaces are made. Run by tests/support/pod_scenario.py, in a sandbox that takes everything with it when it ends.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_parallel.directories import cache_directory
from tests.support.helm import NAMESPACE, ROOT, Manifest, only

BRIDGE, SUBNET = "packtrain0", "10.244.0"
TOKEN = "a-token-that-kuberay-would-have-drawn"
_UID = 10001
_START_S = 60.0
_MAX_RESTARTS = 5
# What Ray gives up after is meant for a machine that has its cores to itself. Its memory monitor looks at a pod's own memory;
# here it would see the machine's, and end replicas because of what others use.
PATIENCE = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_memory_monitor_refresh_ms": "0",
}

# Pid 1 of a pod: takes in processes whose parents have ended.
_PAUSE = "import os, time\nwhile True:\n    try:\n        os.wait()\n    except ChildProcessError:\n        time.sleep(0.2)\n"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def make_bridge() -> None:
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What all pods share: files of the manifests, claims, names."""

    directory: Path
    config_maps: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]
    hosts: Mapping[str, str]
    """Address by name, as DNS would tell it."""
    image: Mapping[str, Path]
    """What the image has beside this machine's own files: path in it, and where that lies here."""
    image_environment: Mapping[str, str]


@dataclass(kw_only=True)
class Container:
    """A running container."""

    spec: Manifest
    process: subprocess.Popen[bytes]
    log: Path

    def main_pid(self) -> int | None:
        """In the sandbox's numbers; None when it has ended."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(FileNotFoundError):
            pids = children.read_text().split()
            return int(pids[0]) if pids else None
        return None

    def is_running(self) -> bool:
        return self.process.poll() is None


@dataclass(kw_only=True)
class Pod:
    """One pod."""

    name: str
    ip: str
    spec: Manifest
    cluster: Cluster
    containers: dict[str, Container] = field(default_factory=dict)
    num_restarts: int = 0
    _pause: subprocess.Popen[bytes] | None = None
    _pid: int = 0
    """Of the pod's first process."""

    def start(self) -> None:
        """The pod's namespaces, volumes and containers: init containers in order, sidecars among them, then the rest."""
        self._make_namespaces()
        for spec in self.spec.get("initContainers", []):
            if spec.get("restartPolicy") == "Always":
                self.start_container(spec)
                self._wait(lambda spec=spec: self.probe(spec, "startupProbe"), f"{spec['name']} started")
            else:
                container = self.start_container(spec)
                if container.process.wait(_START_S * 15) != 0:
                    raise RuntimeError(f"{self.name}/{spec['name']} failed:\n{container.log.read_text()[-3000:]}")
        for spec in self.spec["containers"]:
            self.start_container(spec)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_S * 15
        while not condition():
            self.restart_ended()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: not {what} in time")
            time.sleep(0.5)

    def _make_namespaces(self) -> None:
        self._pause = subprocess.Popen(
            [
                "unshare",
                "--net",
                "--mount",
                "--pid",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
                sys.executable,
                "-c",
                _PAUSE,
            ]
        )
        children = Path(f"/proc/{self._pause.pid}/task/{self._pause.pid}/children")
        deadline = time.monotonic() + _START_S
        while not (pids := children.read_text().split()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start")
            time.sleep(0.02)
        self._pid = int(pids[0])
        time.sleep(0.2)
        host_side = f"v{self.ip.rpartition('.')[2]}"
        run("ip", "link", "add", host_side, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        run("ip", "link", "set", host_side, "master", BRIDGE, "up")
        inside = ("nsenter", "-t", str(self._pid), "-n", "--", "ip")
        run(*inside, "addr", "add", f"{self.ip}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        run("nsenter", "-t", str(self._pid), "-u", "--", "hostname", self.name)
        for spec in (*self.spec.get("initContainers", []), *self.spec["containers"]):
            self._make_root(spec)

    def _root(self, spec: Manifest) -> Path:
        return self.cluster.directory / "roots" / self.name / spec["name"]

    def _make_root(self, spec: Manifest) -> None:
        """A read-only root of this machine's files and the image's, with the container's volumes in it."""
        root = self._root(spec)
        root.mkdir(parents=True, exist_ok=True)
        hosts = self.cluster.directory / f"hosts-{self.name}"
        names = {"localhost": "127.0.0.1", self.name: self.ip, **self.cluster.hosts}
        hosts.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        lines = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755 root {root}"]
        own = {"dev", "etc", "home", "mnt", "models", "opt", "proc", "root", "sys", "tmp", "var"}
        for entry in sorted(Path("/").iterdir()):
            target = root / entry.name
            if entry.is_symlink():
                lines.append(f"ln -s {os.readlink(entry)} {target}")
            elif entry.is_dir() and entry.name not in own:
                lines.append(
                    f"mkdir {target} && mount --rbind {entry} {target} && mount -o remount,bind,ro {target} || true"
                )
        for name in ("etc", "opt", "var", "home"):
            lines.append(f"mkdir -p {root}/{name}")
            for entry in sorted(Path("/", name).iterdir()) if name in ("etc", "opt") else []:
                target = root / name / entry.name
                if entry.is_symlink():
                    lines.append(f"ln -s {os.readlink(entry)} {target}")
                elif entry.is_dir():
                    lines.append(f"mkdir {target} && mount --rbind {entry} {target}")
                elif entry.is_file():
                    source = hosts if entry == Path("/etc/hosts") else entry
                    lines.append(f"touch {target} && mount --bind {source} {target}")
        lines += [
            f"mkdir -p {root}/proc {root}/dev {root}/sys {root}/tmp {root}/root",
            f"mount -t proc proc {root}/proc",
        ]
        lines += [f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
        for inside, outside in self.cluster.image.items():
            lines.append(self._bind(outside, root / inside.lstrip("/"), read_only=True))
        mounts = sorted(spec.get("volumeMounts", []), key=lambda mount: len(mount["mountPath"]))
        for mount in mounts:
            source = self._volume(mount["name"])
            if "subPath" in mount:
                source = source / mount["subPath"]
            lines.append(
                self._bind(source, root / mount["mountPath"].lstrip("/"), read_only=bool(mount.get("readOnly")))
            )
        if spec["securityContext"].get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,ro {root}")
        run("nsenter", "-t", str(self._pid), "-n", "-m", "-p", "--", "bash", "-c", "\n".join(lines))

    @staticmethod
    def _bind(source: Path, target: Path, *, read_only: bool) -> str:
        make = f"mkdir -p {target}" if source.is_dir() else f"mkdir -p {target.parent} && touch {target}"
        return f"{make} && mount --bind {source} {target}" + (
            f" && mount -o remount,bind,ro {target}" if read_only else ""
        )

    def _volume(self, name: str) -> Path:
        """The directory of a volume, made the first time. A claim's outlives the pod."""
        (volume,) = (v for v in self.spec["volumes"] if v["name"] == name)
        if claim := volume.get("persistentVolumeClaim"):
            directory = self.cluster.directory / "claims" / claim["claimName"]
            owner = _UID
        else:
            directory = self.cluster.directory / "volumes" / self.name / name
            owner = _UID if "emptyDir" in volume else 0
        if directory.exists():
            return directory
        directory.mkdir(parents=True)
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            # In the pod's own mounts: what is mounted outside of them now, the pod does not see.
            size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
            options = f"size={size},mode=2777,uid={owner},gid={self.spec['securityContext']['fsGroup']}"
            in_pod = ("nsenter", "-t", str(self._pid), "-m", "--")
            run(*in_pod, "mount", "-t", "tmpfs", "-o", options, "memory", str(directory))
            return directory
        files: Mapping[str, str] = {}
        if "configMap" in volume:
            files = self.cluster.config_maps[volume["configMap"]["name"]]
        elif "secret" in volume:
            files = self.cluster.secrets[volume["secret"]["secretName"]]
        for file, text in files.items():
            (directory / file).write_text(text)
        os.chown(directory, owner, self.spec["securityContext"]["fsGroup"])
        directory.chmod(0o2775)
        return directory

    def environment(self, spec: Manifest) -> dict[str, str]:
        found = dict(self.cluster.image_environment)
        for variable in spec.get("env", []):
            if "value" in variable:
                found[variable["name"]] = str(variable["value"])
            elif reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found[variable["name"]] = self.cluster.secrets[reference["name"]][reference["key"]]
        return found

    def _command(self, spec: Manifest, command: list[str]) -> list[str]:
        """Within the pod's namespaces and the container's root, as the user of the security context, without root's rights."""
        context = {**self.spec["securityContext"], **spec["securityContext"]}
        user, group = str(context["runAsUser"]), str(context["runAsGroup"])
        rights = ["--no-new-privs"] if context.get("allowPrivilegeEscalation") is False else []
        if context["capabilities"]["drop"] == ["ALL"]:
            rights += ["--bounding-set=-all", "--inh-caps=-all"]
        variables = [f"{name}={value}" for name, value in self.environment(spec).items()]
        return [
            *("nsenter", "-t", str(self._pid), "-n", "-m", "-p", "-i", "-u", "--"),
            *("chroot", str(self._root(spec)), "setpriv", f"--reuid={user}", f"--regid={group}"),
            *(
                f"--groups={self.spec['securityContext']['fsGroup']}",
                *rights,
                "--",
                "env",
                "-i",
                "--chdir=/",
                *variables,
                *command,
            ),
        ]

    def start_container(self, spec: Manifest) -> Container:
        log = self.cluster.directory / "logs" / f"{self.name}-{spec['name']}.log"
        log.parent.mkdir(exist_ok=True)
        command = self._command(spec, [*spec["command"], *spec.get("args", [])])
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        container = self.containers[spec["name"]] = Container(spec=spec, process=process, log=log)
        return container

    def restart_ended(self) -> None:
        """As kubelet does, without its growing delay. A pod's init containers have run by then. Raises RuntimeError when one
        ends again and again."""
        for name, container in list(self.containers.items()):
            always = name in {spec["name"] for spec in self.spec["containers"]} or container.spec.get("restartPolicy")
            if always and not container.is_running():
                self.num_restarts += 1
                if self.num_restarts > _MAX_RESTARTS:
                    raise RuntimeError(f"{self.name}/{name} ends again and again:\n{container.log.read_text()[-3000:]}")
                self.start_container(container.spec)

    def exec(self, container: str, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec`."""
        line = self._command(self.containers[container].spec, list(command))
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)

    def probe(self, spec: Manifest, name: str) -> bool:
        """One look, as kubelet takes it."""
        probe = spec[name]
        timeout_s = float(probe.get("timeoutSeconds", 1))
        if "httpGet" in probe:
            return self._http(probe["httpGet"], timeout_s)
        if "grpc" in probe:
            return self._grpc(probe["grpc"], timeout_s)
        raise NotImplementedError(f"a probe by {sorted(probe)}")

    def _http(self, action: Manifest, timeout_s: float) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://{self.ip}:{action['port']}{action['path']}", timeout=timeout_s
            ) as answer:
                return 200 <= answer.status < 400
        except (urllib.error.URLError, OSError):
            return False

    def _grpc(self, action: Manifest, timeout_s: float) -> bool:
        with grpc.insecure_channel(f"{self.ip}:{action['port']}") as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=action.get("service", ""))
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def processes(self) -> list[str]:
        """Command lines of what runs in the pod, but its first process; the dead that nobody has looked at do not count."""
        lines = []
        namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != self._pid and os.readlink(entry / "ns/pid") == namespace:
                    lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [line for line in lines if line]

    def terminate(self) -> float:
        """As kubelet ends a pod: preStop, SIGTERM, sidecars after the rest. The seconds, or TimeoutExpired after its grace."""
        grace_s = float(self.spec["terminationGracePeriodSeconds"])
        started = time.monotonic()
        sidecars = {
            spec["name"] for spec in self.spec.get("initContainers", []) if spec.get("restartPolicy") == "Always"
        }
        for is_sidecar in (False, True):
            ending = [c for name, c in self.containers.items() if (name in sidecars) == is_sidecar and c.is_running()]
            for container in ending:
                hook = container.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
                if hook:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        done = self.exec(
                            container.spec["name"], *hook, timeout_s=grace_s - (time.monotonic() - started)
                        )
                        with container.log.open("a") as log:
                            log.write(f"preStop: {done.stdout}{done.stderr}\n")
                if (pid := container.main_pid()) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            for container in ending:
                container.process.wait(max(0.1, grace_s - (time.monotonic() - started)))
        return time.monotonic() - started

    def kill(self) -> None:
        """The machine is lost: nobody is told."""
        os.kill(self._pid, signal.SIGKILL)
        if self._pause is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._pause.wait(120)
        with contextlib.suppress(RuntimeError):
            run("ip", "link", "del", f"v{self.ip.rpartition('.')[2]}")
        # What is not on a claim goes with the pod.
        volumes = self.cluster.directory / "volumes" / self.name
        shutil.rmtree(volumes, ignore_errors=True)
        self.containers.clear()


def kuberay_start(template: Manifest, parameters: Mapping[str, str], *, is_head: bool, head_name: str) -> Manifest:
    """The pod that KubeRay makes of a group's template."""
    spec: Manifest = json.loads(json.dumps(template["spec"]))
    container = spec["containers"][0]
    limits = container["resources"].get("limits", {})
    gib = str(limits["memory"]).removesuffix("Gi")
    defaults = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true"}
    defaults |= {"memory": str(int(gib) << 30)} | ({} if is_head else {"address": f"{head_name}:6379"})
    merged = defaults | dict(parameters)
    flags = " ".join(f"--{k}" if v == "true" else f"--{k}={v}" for k, v in merged.items())
    start = f"ray start {'--head ' if is_head else ''}{flags}"
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n 65536; {start}"]
    added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "KUBERAY_GEN_RAY_START_CMD": start, "RAY_PORT": "6379"}
    added["RAY_ADDRESS"] = "127.0.0.1:6379" if is_head else f"{head_name}:6379"
    if not is_head:
        added |= {"FQ_RAY_IP": head_name, "RAY_IP": head_name.partition(".")[0]}
    known = {variable["name"] for variable in container["env"]}
    container["env"] += [{"name": name, "value": value} for name, value in added.items() if name not in known]
    if not is_head:
        # As KubeRay's loop, but that it does not load Ray before there is something to ask, which two cores would feel.
        wait = f"until (exec 3<>/dev/tcp/{head_name}/6379) 2>/dev/null; do sleep 1; done; "
        wait += f"until ray health-check --address {head_name}:6379 >/dev/null 2>&1; do sleep 2; done"
        first = {**container, "name": "wait-gcs-ready", "command": ["/bin/bash", "-c", "--"], "args": [wait]}
        first.pop("lifecycle", None)
        spec["initContainers"] = [*spec.get("initContainers", []), first]
    return spec


def pods_of(
    manifests: list[Manifest], directory: Path, image: Mapping[str, Path], environment: Mapping[str, str]
) -> dict[str, Pod]:
    """Head, gateways, workers and driver, not started."""
    ray = only(manifests, "RayCluster")
    name = ray["metadata"]["name"]
    head_name = f"{name}-head-svc.{NAMESPACE}.svc.cluster.local"
    cluster = Cluster(
        directory=directory,
        config_maps={m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"},
        secrets={name: {"auth_token": TOKEN}},
        hosts=dict.fromkeys((head_name, head_name.removesuffix(".cluster.local")), f"{SUBNET}.2"),
        image=image,
        image_environment=environment,
    )
    specs: dict[str, Manifest] = {
        "head": kuberay_start(
            ray["spec"]["headGroupSpec"]["template"],
            ray["spec"]["headGroupSpec"]["rayStartParams"],
            is_head=True,
            head_name=head_name,
        )
    }
    for group in ray["spec"]["workerGroupSpecs"]:
        for number in range(group["replicas"] * group.get("numOfHosts", 1)):
            spec = kuberay_start(group["template"], group["rayStartParams"], is_head=False, head_name=head_name)
            specs[f"{group['groupName']}-{number}"] = spec
    (driver,) = (m for m in manifests if m["kind"] == "Deployment")
    specs["driver"] = driver["spec"]["template"]["spec"]
    return {
        pod: Pod(name=pod, ip=f"{SUBNET}.{2 + number}", spec=spec, cluster=cluster)
        for number, (pod, spec) in enumerate(specs.items())
    }


def image_of_this_checkout(directory: Path, model: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """What the Dockerfile puts into the image, from this checkout: commands, the small model; and the environment there."""
    commands = directory / "bin"
    commands.mkdir()
    for name, target in (("packtrain", "-m serving.cli"), ("ray", "-m ray.scripts.scripts")):
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {target} "$@"\n')
        path.chmod(0o755)
    models = directory / "models" / "smollm2-135m-instruct"
    models.mkdir(parents=True)
    (models / model.name).write_bytes(model.read_bytes())
    # Compiled once on this machine; a pod finds it where the image has it, and needs no compiler.
    subprocess.run([sys.executable, "-m", "model_parallel.native"], cwd=ROOT, check=True, timeout=600)
    cache = directory / "cache"
    shutil.copytree(cache_directory() / "native", cache / "native", ignore=shutil.ignore_patterns("*.lock"))
    run("chmod", "-R", "a+rX", str(cache))
    image = {"/opt/packtrain/bin": commands, "/opt/packtrain/models": models.parent, "/opt/packtrain/cache": cache}
    if sys.base_prefix.startswith("/root/"):  # which a pod's own root has empty
        image[sys.base_prefix] = Path(sys.base_prefix)
    environment = {
        "PATH": f"/opt/packtrain/bin:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "PACKTRAIN_CACHE": "/opt/packtrain/cache",
        "PYTHONDONTWRITEBYTECODE": "1",
        **PATIENCE,
    }
    return image, environment


@contextlib.contextmanager
def all_killed(pods: Mapping[str, Pod]) -> Iterator[None]:
    """However the block is left, no pod is left running."""
    try:
        yield
    finally:
        for pod in pods.values():
            if pod._pause is not None and pod._pause.poll() is None:
                pod.kill()


Facts = dict[str, Any]
