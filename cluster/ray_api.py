"""Every call that this package makes to Ray, so that the rest of it can be read and tested without."""

import functools
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.actor import ActorHandle
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
from ray.exceptions import GetTimeoutError, RayError
from ray.job_config import JobConfig
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.placement import NodeResources

__all__ = ["ActorHandle", "PlacementGroup", "RayError"]

logger = logging.getLogger(__name__)

_FOR_EVER_S = 10 * 365 * 24 * 3600
_PYTHON = 0
"""Ray's number of the language."""
_NODE_POLL_S = 0.05
_JOBS_TIMEOUT_S = 30.0


_OF_A_CLUSTER_OF_MANY = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's Node that start the head's autoscaler, the reader of logs for the driver, and the dashboard."""


@contextmanager
def only_needed_processes() -> Iterator[None]:
    """A cluster that is started in this block has none of three processes that Ray has no setting against. One machine does not
    grow, its logs are read by nobody, and without a dashboard that process serves usage statistics alone, which are off. They
    import Ray while everything else does, and the driver waits for the last. The dashboard's agent on the node, which the raylet
    needs, is the small one of an installation without a dashboard. A Ray without such a function keeps its process.
    """
    no_dashboard = ImportError("no dashboard is wanted")
    with ExitStack() as stack:
        for name in _OF_A_CLUSTER_OF_MANY:
            stack.enter_context(_replaced(ray._private.node.Node, name, lambda *_arguments, **_named: None))
        stack.enter_context(_replaced(ray._private.utils, "get_dashboard_dependency_error", lambda: no_dashboard))
        yield


@contextmanager
def patient_start(timeout_s: float) -> Iterator[None]:
    """A cluster that is started in this block may take so long to have its node. Ray gives its raylet 30 s and has no setting for
    it; on a busy machine the two agents that the raylet waits for import for longer. A raylet that ends is not waited for.
    """
    services: Any = ray._private.services
    get_node: Any = getattr(services, "get_node", None)

    def get_node_in_time(address: str, node_id: str) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return get_node(address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline_s or not _has_raylet():
                    raise
                time.sleep(_NODE_POLL_S)

    with _replaced(services, "get_node", get_node_in_time):
        yield


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """A driver that starts or joins a cluster in this block does at SIGTERM what it did before. Ray would end it with another
    status, and has a second handler, below Python's, that tells of a crash and aborts the process three seconds later."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _replaced(ray._private.utils, "set_sigterm_handler", lambda _handler: None):
            yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def keep_serve_to_this_node() -> None:
    """For the constructor of a Serve replica. After it Serve starts the replica's server for calls from other replicas, which
    unpickles what it is sent and asks for no token. From now on that server listens at the address of this node, where callers
    look for it. Serve has it listen on every address of the machine, also where the cluster lies on loopback, and has no setting.
    """
    from ray.serve._private import replica  # noqa: PLC0415 - ranks do without Serve

    serve: Any = replica
    listen = serve.add_port_to_grpc_server
    node = ray.util.get_node_ip_address()
    address = f"[{node}]:0" if ":" in node else f"{node}:0"
    serve.add_port_to_grpc_server = lambda server, _everywhere: listen(server, address)


class _NoPaths(list[str]):
    """Stays empty."""

    def extend(self, paths: Iterable[str]) -> None:
        pass


def job_of_installed_modules() -> JobConfig:
    """For a driver's `ray.init`. Ray has all workers search the driver's current directory for modules first, and has no setting
    against it. That directory may be a checkpoint's, and nothing that comes with weights is run."""
    job = JobConfig()
    job._py_driver_sys_path = _NoPaths()
    return job


@contextmanager
def short_messages() -> Iterator[None]:
    """A driver that joins a cluster in this block logs what Ray tells all drivers, such as the death of a process, in a line
    each. Ray prints paragraphs with guesses in colours, and has no setting for it."""
    with _replaced(ray._private.worker, "listen_error_messages", _log_messages):
        yield


def _log_messages(worker: Any, stopped: threading.Event) -> None:
    """In a thread that Ray starts and ends."""
    messages = worker.gcs_error_subscriber
    messages.subscribe()
    jobs = (None, worker.current_job_id.binary(), ray.JobID.nil().binary())
    with suppress(OSError):  # the control store is gone
        while not stopped.is_set():
            _, message = messages.poll()
            if message is not None and message["job_id"] in jobs:
                logger.warning("Ray: %s", first_sentence(message["error_message"]))


def first_sentence(message: str) -> str:
    """Of Ray's text, with the process that it is about."""
    process = re.search(r"Worker PID: (\d+)", message)
    sentence = re.split(r"\.\s", " ".join(message.split()), maxsplit=1)[0].rstrip(".")
    return f"{sentence} (pid {process[1]})" if process else sentence


@contextmanager
def _replaced(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Ray has another function of this name within the block. Nothing happens in a Ray that has none."""
    before = getattr(place, name, None)
    if before is None:
        yield
        return
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)


def _has_raylet() -> bool:
    """Whether one that this process has started still runs."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def alive_nodes() -> list[NodeResources]:
    return [
        NodeResources(
            node_id=node["NodeID"],
            ip=node["NodeManagerAddress"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _environment(names: tuple[str, ...]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def environment_by_node(names: tuple[str, ...], timeout_s: float) -> dict[str, dict[str, str | None]]:
    """Environment variables of the workers of every node, by the node's address. Raises TimeoutError, RayError."""
    nodes = alive_nodes()
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(_environment)
    references = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(names)
        for node in nodes
    ]
    return dict(zip([node.ip for node in nodes], get(references, timeout_s), strict=True))


def has_actor(name: str, namespace: str) -> bool:
    """Whether there is an actor of this name, or Ray will start it: not one that has ended for good. Raises RayError."""
    require_cluster()
    # Not `ray.get_actor`, which says the same of an actor that is not there and of a control store that does not answer.
    return {"name": name, "namespace": namespace} in list_named_actors(all_namespaces=True)


def ended_processes() -> list[str]:
    """Those of Ray's own processes that this process has started with a cluster and that have ended. Nobody starts them again.
    None in a cluster that was joined."""
    node: Any = ray._private.worker._global_node
    return [] if node is None else sorted(kind for kind, _ in node.dead_processes())


def cluster_problem() -> str:
    """Why nobody in the cluster can be asked; "" when somebody can. Calls that wait without a deadline would wait for ever."""
    if not ray.is_initialized():  # Serve would start another one
        return "Ray has been shut down"
    if ended := ended_processes():
        return f"Ray's {' and '.join(ended)} ended"
    return ""


def require_cluster() -> None:
    """Raises RayError when nobody in the cluster can be asked."""
    if problem := cluster_problem():
        raise RayError(problem)


def has_resource(name: str) -> bool:
    """Whether some node has this custom resource."""
    return float(ray.cluster_resources().get(name, 0.0)) > 0


def read_note(key: str) -> str | None:
    """What was written last under this name; kept as long as Ray's control store."""
    value = read_record(key)
    return None if value is None else value.decode()


def write_note(key: str, text: str | None) -> None:
    """None removes it."""
    write_record(key, None if text is None else text.encode())


def read_record(key: str) -> bytes | None:
    """What was written last under this name; kept as long as Ray's control store. Raises RayError."""
    value = ray.experimental.internal_kv._internal_kv_get(key.encode())
    return None if value is None else bytes(value)


def write_record(key: str, value: bytes | None) -> None:
    """None removes it. Raises RayError."""
    if value is None:
        ray.experimental.internal_kv._internal_kv_del(key.encode())
    else:
        ray.experimental.internal_kv._internal_kv_put(key.encode(), value)


def create_record(key: str, value: bytes) -> bool:
    """Write it unless there is one of this name; whether it was written. Of several who try, one succeeds. Raises RayError."""
    is_there_already = ray.experimental.internal_kv._internal_kv_put(key.encode(), value, overwrite=False)
    return not is_there_already


def this_node() -> tuple[str, str]:
    """(id, address) of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


@functools.lru_cache(maxsize=1)
def _control_store(address: str) -> Any:
    return ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]


def draining_nodes(timeout_s: float) -> dict[str, float]:
    """Ids of living nodes that are to end, and when (wall clock; infinite where nobody has said). Raises RayError."""
    found = _control_store(ray.get_runtime_context().gcs_address).get_draining_nodes(timeout=timeout_s)
    return {node_id: deadline_ms / 1000 if deadline_ms else math.inf for node_id, deadline_ms in found.items()}


def this_job() -> str:
    """Id of the job that this process belongs to. Each driver of a cluster has one of its own."""
    return str(ray.get_runtime_context().get_job_id())


def has_driver(job: str) -> bool:
    """Whether the driver of this job runs. Raises RayError."""
    found = _control_store(ray.get_runtime_context().gcs_address).get_all_job_info(timeout=_JOBS_TIMEOUT_S)
    return any(each.job_id.hex() == job and not each.is_dead for each in found.values())


def this_gpu_ids() -> tuple[int, ...]:
    """GPUs that Ray gave to this actor, as the node numbers them."""
    return tuple(sorted(int(gpu) for gpu in ray.get_gpu_ids()))


def run_on_node(function: Callable[[], Any], node_id: str, timeout_s: float) -> Any:
    """What a function returns on that node. It holds none of its resources. Raises TimeoutError, RayError."""
    remote: Any = ray.remote(function)
    where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return get([remote.options(num_cpus=0, scheduling_strategy=where).remote()], timeout_s)[0]


def start_idle_worker(timeout_s: float) -> None:
    """Have this node start a worker process that nobody has asked for, and keep it. Raises RayError.

    Ray has no public call for that. This one is what it uses itself before tasks come.
    """
    node_id = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    messages: Any = node_manager_pb2
    request = messages.PrestartWorkersRequest(language=_PYTHON, num_workers=1, keep_alive_duration_secs=_FOR_EVER_S)
    request.runtime_env_info.serialized_runtime_env = "{}"
    channel = init_grpc_channel(address)
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise RayError(f"the node does not start worker processes: {error}") from error
    finally:
        channel.close()


def current_placement_group() -> PlacementGroup | None:
    """The one that this actor was scheduled into."""
    return get_current_placement_group()


@contextmanager
def asking_for_nodes(groups: Sequence[Sequence[Mapping[str, float]]]) -> Iterator[None]:
    """Within the block Ray's autoscaler, where there is one, is asked for nodes with room for these bundles, those of each group
    reserved at once. What has been reserved by the end is given back."""
    # PACK: which nodes can come is not known, and so neither whether a group fits one of them.
    asked = [placement_group([dict(bundle) for bundle in bundles], strategy="PACK") for bundles in groups]
    try:
        yield
    finally:
        for group in asked:
            remove_placement_group(group)


def wait_placed(group: PlacementGroup, timeout_s: float) -> bool:
    """Whether all bundles of the group are reserved by then."""
    return bool(group.wait(timeout_s))


def create_actor(actor_class: type, group: PlacementGroup, bundle: int) -> ActorHandle[Any]:
    """An actor that takes all of one bundle, and is never restarted."""
    resources = group.bundle_specs[bundle]
    remote: Any = ray.remote(actor_class)
    actor: ActorHandle[Any] = remote.options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    ).remote()
    return actor


def get(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """Results in order. Raises TimeoutError, RayError, or what the method raised."""
    try:
        return ray.get(list(references), timeout=max(timeout_s, 0.0))
    except GetTimeoutError as error:
        raise TimeoutError(str(error)) from error


def finished(references: Sequence[Any], timeout_s: float = 0.0) -> list[Any]:
    """Those that have a result or an error; returns as soon as all have, at the latest by then."""
    if not references or not ray.is_initialized():
        return []
    done, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    return list(done)


def kill(actor: ActorHandle[Any]) -> None:
    """End the actor's process at once. Does nothing when it is dead or Ray has been shut down."""
    if ray.is_initialized():
        ray.kill(actor, no_restart=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalNode:
    """The Ray node of this host or pod, and what is going on in its cluster."""

    node_id: str
    is_head: bool
    resources: frozenset[str]
    """Names of what it has, custom ones included."""
    num_draining: int
    """Living nodes of the cluster that are to end."""


class ClusterControl:
    """Ray's control store, for a process that is no part of the cluster and must be quick. Every call has a deadline."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Raises RayError, RuntimeError or OSError when there is no cluster at the address."""
        self._timeout_s = timeout_s
        self._client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]

    def local_node(self) -> LocalNode | None:
        """None when no Ray node runs on this host."""
        nodes = self._client.get_all_node_info(timeout=self._timeout_s)
        alive = {node_id.hex(): node for node_id, node in nodes.items() if node.state == 0}  # GcsNodeInfo.ALIVE
        here = [node_id for node_id in ray._private.services.find_node_ids() if node_id in alive]
        if not here:
            return None
        draining = self._client.get_draining_nodes(timeout=self._timeout_s)
        return LocalNode(
            node_id=here[0],
            is_head=bool(alive[here[0]].is_head_node),
            resources=frozenset(alive[here[0]].resources_total),
            num_draining=sum(node_id in alive for node_id in draining),
        )

    def drain(self, node_id: str, reason: str, deadline_s: float) -> str:
        """Have Ray give the node nothing new, and Serve end its replicas there within `deadline_s`. Returns why not, or ""."""
        preemption = 2  # DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION: idle or not
        deadline_ms = int(1000 * (time.time() + deadline_s))
        is_accepted, message = self._client.drain_node(node_id, preemption, reason, deadline_ms)
        return "" if is_accepted else str(message)
