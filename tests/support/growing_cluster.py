"""A Ray cluster on this machine whose own autoscaler adds and removes nodes: those of Ray's fake multi-node provider."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
from ray.cluster_utils import Cluster

from cluster.guard import kill_processes_in
from cluster.placement import DRIVER_RESOURCE, GATEWAY_RESOURCE
from serving.contracts.start_failure import StartError
from serving.driver.environment import CLUSTER_VARIABLES
from tests.support.waiting import PATIENCE_S

HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""What the provider calls the head; the others are counted from there."""
_OBJECT_STORE_BYTES = 80 << 20
"""Of a node; Ray takes no less than 75 MiB."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def _autoscaling(address: str, cpus_per_node: int, max_nodes: int, idle_timeout_s: float) -> dict[str, Any]:
    """What `ray up` would be given. The wheel of Ray lacks the example that its own fake cluster reads."""
    return {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_timeout_s / 60,
        "provider": {
            "type": "external",
            "module": "tests.support.fake_nodes.FakeNodes",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": address,
            "head_node_id": HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 0, GATEWAY_RESOURCE: 1, DRIVER_RESOURCE: 1},
                "node_config": {},
                "max_workers": 0,
            },
            "accelerators": {
                "resources": {"CPU": cpus_per_node, "object_store_memory": _OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        # Nothing is done to a node, but each must be there.
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


@contextmanager
def growing_cluster(
    directory: Path,
    *,
    cpus_per_node: int,
    max_nodes: int,
    idle_timeout_s: float = 5.0,
    environment: Mapping[str, str] = CLUSTER_VARIABLES,
) -> Iterator[str]:
    """Its address. It begins with a head, which gateways run on and no rank. Nodes come when somebody waits for room, and go
    when they were idle so long. `directory` must be short: sockets lie in it."""
    port = _free_port()
    ip = ray.util.get_node_ip_address()
    address = f"{ip}:{port}"
    config = directory / "autoscaling.json"
    config.write_text(json.dumps(_autoscaling(address, cpus_per_node, max_nodes, idle_timeout_s)))
    # The process of Ray's autoscaler, and so the nodes that it starts, have their environment from this one.
    autoscaler = {
        **environment,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with patch.dict(os.environ, autoscaler):
        cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={
                "num_cpus": 0,
                "resources": {GATEWAY_RESOURCE: 1, DRIVER_RESOURCE: 1},
                "node_ip_address": ip,
                "gcs_server_port": port,
                "temp_dir": str(directory),
                "include_dashboard": False,
                "autoscaling_config": str(config),
                "object_store_memory": _OBJECT_STORE_BYTES,
                "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID},
            },
        )
    try:
        yield address
    finally:
        ray.shutdown()
        cluster.shutdown()
        kill_processes_in(directory, spare=os.getpid())


def lose_node(node_id: str) -> None:
    """Kill all that runs on it, as when its machine fails."""
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.info["name"] == "raylet" and process.environ()["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] == node_id:
                lost = [process, *process.children(recursive=True)]
                for each in lost:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                return
    raise AssertionError(f"node {node_id} has no process")


class GangWatch:
    """Looks all the time whether some node is held by a part of a gang. Gangs take whole nodes here. One that starts holds its
    node before its ranks are there, for as long as this machine takes to start them."""

    def __init__(self, ranks_per_node: int, longest_s: float, num_starting: Callable[[], int]) -> None:
        """`num_starting` gangs; raises StartError where nobody can tell now."""
        self._ranks_per_node, self._longest_s, self._num_starting = ranks_per_node, longest_s, num_starting
        self._since_s: dict[str, float] = {}
        self.partial: list[str] = []
        """What was seen that should not be."""
        self.most_nodes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        free = ray._private.state.available_resources_per_node()
        places = nodes_of_ranks()
        held = {}
        for node_id, total in workers().items():
            used, num_ranks = total - free.get(node_id, {}).get("CPU", 0.0), places.count(node_id)
            if used and num_ranks != self._ranks_per_node:
                held[node_id] = f"{node_id[-5:]}: {used:g} CPUs are held and {num_ranks} ranks are there"
        try:
            if len(held) <= self._num_starting():
                held = {}
        except StartError:  # Serve's controller is starting: nobody knows which gangs are
            held = {}
        self.most_nodes = max(self.most_nodes, len(workers()))
        now_s = time.monotonic()
        self._since_s = {node_id: self._since_s.get(node_id, now_s) for node_id in held}
        self.partial += [what for node_id, what in held.items() if now_s - self._since_s[node_id] > self._longest_s]


def nodes_of_ranks() -> list[str]:
    """The node of each living rank."""
    actors = ray._private.state.actors().values()
    return [a["Address"]["NodeID"] for a in actors if a["State"] == "ALIVE" and a["ActorClassName"] == "RankActor"]


def workers() -> dict[str, float]:
    """CPUs of the living nodes other than the head, by id."""
    return {
        node["NodeID"]: node["Resources"]["CPU"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != HEAD_NODE_ID
    }
