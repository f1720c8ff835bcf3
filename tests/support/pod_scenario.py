"""The life of an installed chart, as processes: python -m tests.support.pod_scenario VALUES RESULT, as root in a sandbox.

Writes what it saw to RESULT as JSON; tests/helm/test_pods.py asserts on it. Everything that it starts ends with it.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from protos import inference_pb2 as pb
from serving.client.client import Client, chat_prompt
from serving.models.fetch import fetch_model
from tests.support.helm import NAME, NAMESPACE, render
from tests.support.pods import TOKEN, Facts, Pod, all_killed, image_of_this_checkout, make_bridge, pods_of

MODEL = "smollm2-135m-instruct"
HEAD = f"{NAME}-head-svc.{NAMESPACE}.svc.cluster.local"
READY_S = 900.0
STREAM_S = 300.0
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
MAX_TOKENS = 400  # a KV cache as small as a busy machine has room for holds them


def wait(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.5)


def ray_container(pod: Pod) -> str:
    return str(pod.spec["containers"][0]["name"])


def looks(pod: Pod) -> dict[str, bool]:
    """Every probe of the pod's containers, taken once."""
    specs = [
        *pod.spec["containers"],
        *(s for s in pod.spec.get("initContainers", []) if s.get("restartPolicy") == "Always"),
    ]
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    return {f"{spec['name']}/{name}": pod.probe(spec, name) for spec in specs for name in probes if name in spec}


def request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        prompt=chat_prompt([("user", "Count from one to a thousand.")]),
        sampling=pb.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )


def status_of(address: str, key: str) -> str:
    """How a short request ends."""
    with Client(address, api_key=key) as client:
        try:
            chunks, _ = client.stream(request(1), timeout_s=30)
            for _ in chunks:
                pass
        except grpc.RpcError as error:
            return str(error.code().name) if isinstance(error, grpc.Call) else repr(error)
    return "OK"


class Streaming(threading.Thread):
    """A long request that is open while something else happens."""

    def __init__(self, address: str, key: str, max_tokens: int) -> None:
        super().__init__()
        self._address, self._key, self._max_tokens = address, key, max_tokens
        self.has_begun = threading.Event()
        self.num_tokens = 0
        self.status = ""

    def end(self) -> str:
        """OK when it ended well and with all of its tokens."""
        is_whole = self.status != "OK" or self.num_tokens == self._max_tokens
        return self.status if is_whole else f"{self.num_tokens} of {self._max_tokens} tokens"

    def run(self) -> None:
        with Client(self._address, api_key=self._key) as client:
            try:
                # Not `client.stream`, which would go on elsewhere: nothing may be cut.
                for chunk in client.stub.GenerateStream(request(self._max_tokens), timeout=STREAM_S):
                    self.has_begun.set()
                    if chunk.HasField("usage"):
                        self.num_tokens = chunk.usage.completion_tokens
                self.status = "OK"
            except grpc.RpcError as error:
                self.status = str(error.code().name) if isinstance(error, grpc.Call) else repr(error)
            finally:
                self.has_begun.set()


def replica_pids(pod: Pod) -> list[str]:
    done = pod.exec(
        ray_container(pod),
        "sh",
        "-c",
        "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^ray::ServeReplica' && echo $p; done; true",
    )
    return sorted(done.stdout.split())


def tokens_per_s(address: str, key: str) -> float:
    """Of one request: streams are as long as this machine, and what else runs on it, lets them be."""
    started = time.monotonic()
    stream = Streaming(address, key, 48)
    stream.start()
    stream.join(STREAM_S)
    if stream.status != "OK":
        raise RuntimeError(f"a request of 48 tokens ended with {stream.status or 'nothing'}")
    return stream.num_tokens / (time.monotonic() - started)


def is_ready(pod: Pod) -> bool:
    """Of its first container, which is started again when it has ended."""
    pod.restart_ended()
    return pod.probe(pod.spec["containers"][0], "readinessProbe")


def left_in(pod: Pod) -> list[str]:
    """What goes on in a pod that has ended, but Ray's agents: they tell the control store of their node's end, for a minute when
    there is none any more, and a container's runtime ends them with the container."""
    deadline = time.monotonic() + 15  # children of what was killed see it within seconds
    while (
        left := [line for line in pod.processes() if not line.startswith(RAYS_AGENTS)]
    ) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def live(pods: dict[str, Pod], facts: Facts) -> None:
    with ThreadPoolExecutor(len(pods)) as pool:
        starting = {name: pool.submit(pod.start) for name, pod in pods.items()}
        gateway, driver = pods["gateways-0"], pods["driver"]
        # KubeRay's own probe of a node answers long before a group has loaded.
        spec = gateway.spec["containers"][0]

        def holds(probe: str) -> bool:
            for name, pod in pods.items():
                if starting[name].done():
                    pod.restart_ended()
            for future in starting.values():
                if future.done():
                    future.result()
            return gateway.probe(spec, probe)

        wait(lambda: holds("livenessProbe"), READY_S, "the gateway's node is alive")
        facts["early"] = looks(gateway)
        wait(lambda: holds("readinessProbe"), READY_S, "the gateway is ready")
        for future in starting.values():
            future.result()
    # Gateways serve a little before the driver has everything.
    wait(lambda: is_ready(driver), READY_S, "the driver is ready")
    facts["ready"] = {name: looks(pod) for name, pod in pods.items()}
    address = f"{gateway.ip}:50051"
    notes = ("--config", "/etc/packtrain/serve.yaml")
    made = driver.exec("driver", "packtrain", "tenants", "create", "acme", *notes)
    created = driver.exec("driver", "packtrain", "keys", "create", "acme", *notes)
    key = next((word for word in created.stdout.split() if word.startswith("pt_")), "")
    facts["key"] = bool(key) or made.stderr + created.stderr + created.stdout
    wait(lambda: status_of(address, key) == "OK", 30, "the key is known")
    facts["with key"], facts["without key"] = status_of(address, key), status_of(address, "")
    facts["where replicas are"] = {name: len(replica_pids(pod)) for name, pod in pods.items()}
    facts["users"] = (
        pods["workers-0"]
        .exec("ray-worker", "sh", "-c", "id -u; grep -E 'NoNewPrivs|CapBnd' /proc/self/status")
        .stdout.split()
    )
    facts["read-only"] = pods["workers-0"].exec("ray-worker", "touch", "/etc/packtrain-was-here").returncode
    dashboard = f"import socket; socket.create_connection(('{HEAD}', 8265), 3)"
    facts["dashboard from elsewhere"] = gateway.exec(ray_container(gateway), sys.executable, "-c", dashboard).returncode
    ask = f"from ray._raylet import GcsClient; GcsClient(address='{HEAD}:6379').get_all_node_info(timeout=20)"
    for name, token in (("a wrong token", "wrong"), ("the right token", TOKEN)):
        line = ("env", f"RAY_AUTH_TOKEN={token}", sys.executable, "-c", ask)
        facts[name] = gateway.exec(ray_container(gateway), *line).returncode

    facts["tokens per second"] = rate = tokens_per_s(address, key)
    long, short = (int(min(MAX_TOKENS, max(32, rate * seconds))) for seconds in (60, 15))
    before = {name: replica_pids(pods[name]) for name in ("gateways-0", "workers-0")}
    stream = Streaming(address, key, long)
    stream.start()
    stream.has_begun.wait(60)
    facts["driver ended after"] = driver.terminate()
    facts["left of the driver"] = left_in(driver)
    driver.kill()
    driver.start()
    wait(lambda: is_ready(driver), READY_S, "the driver is back")
    facts["driver's log"] = driver.containers["driver"].log.read_text()[-2000:]
    stream.join(STREAM_S)
    facts["stream beside a driver's restart"] = stream.end()
    facts["replicas stayed"] = {name: replica_pids(pods[name]) for name in before} == before
    wait(lambda: status_of(address, key) == "OK", 60, "it serves with the authority on the new node")

    stream = Streaming(address, key, long)
    stream.start()
    stream.has_begun.wait(60)
    pods["head"].kill()
    facts["without a head"] = status_of(address, key)
    pods["head"].start()
    wait(lambda: is_ready(pods["head"]), READY_S, "the head is back")
    stream.join(STREAM_S)
    facts["stream beside the head's loss"] = stream.end()
    time.sleep(10)  # nodes come back to the new head, and Serve's controller takes its state up
    facts["replicas outlived the head"] = {name: replica_pids(pods[name]) for name in before} == before
    facts["after the head's loss"] = status_of(address, key)

    stream = Streaming(address, key, short)
    stream.start()
    stream.has_begun.wait(60)
    with ThreadPoolExecutor(len(pods)) as pool:
        ending = {name: pool.submit(pod.terminate) for name, pod in pods.items()}
        wait(lambda: not gateway.probe(spec, "readinessProbe"), 60, "the gateway is not ready any more")
        facts["a stream was open then"] = stream.is_alive()
        facts["new request while ending"] = status_of(address, key)
        facts["seconds to end"] = {name: future.result() for name, future in ending.items()}
    stream.join(STREAM_S)
    facts["stream while ending"] = stream.end()
    facts["left"] = {name: left for name, pod in pods.items() if (left := left_in(pod))}


def ray_logs(directory: Path) -> dict[str, str]:
    """Ends of what Ray's own processes wrote, which go with their pods."""
    paths = [path for name in ("raylet.err", "gcs_server.err") for path in (directory / "volumes").rglob(name)]
    return {f"{path.relative_to(directory)}": path.read_text(errors="replace")[-2000:] for path in sorted(paths)}


def main() -> None:
    values, result = Path(sys.argv[1]), Path(sys.argv[2])
    facts: Facts = {}
    model = fetch_model(MODEL)
    manifests = render(values)
    with tempfile.TemporaryDirectory(prefix="pods-", ignore_cleanup_errors=True) as made:
        directory = Path(made)
        directory.chmod(0o755)
        make_bridge()
        image, environment = image_of_this_checkout(directory, model)
        pods = pods_of(manifests, directory, image, environment)
        try:
            with all_killed(pods):
                try:
                    live(pods, facts)
                except Exception as error:
                    facts["failed"] = f"{type(error).__name__}: {error}"[-4000:]
                    facts["Ray's logs"] = ray_logs(directory)
                    raise
        finally:
            facts["logs"] = {path.name: path.read_text()[-3000:] for path in sorted((directory / "logs").glob("*.log"))}
            result.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
