"""Every call that this package makes to Ray, so that the rest of it can be read and tested without."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import NodeResources

__all__ = ["ActorHandle", "PlacementGroup", "RayError"]


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


def this_node() -> tuple[str, str]:
    """(id, address) of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def this_gpu_ids() -> tuple[int, ...]:
    """GPUs that Ray gave to this actor, as the node numbers them."""
    return tuple(sorted(int(gpu) for gpu in ray.get_gpu_ids()))


def current_placement_group() -> PlacementGroup | None:
    """The one that this actor was scheduled into."""
    return get_current_placement_group()


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
