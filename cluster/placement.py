"""Where the ranks of replica groups may lie. Pure tables; Ray is asked elsewhere.

One bundle a rank. While a group fits one node it is STRICT_PACK: its all-reduces stay on that node's fast links. A
larger group is PACK, which fills node after node, so that it spans as few as can be.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model_parallel.errors import ConfigError

GATEWAY_RESOURCE = "packtrain_gateway"
"""Custom Ray resource of nodes that gateways run on, where ray.num_gateways says how many there are."""
DRIVER_RESOURCE = "packtrain_driver"
"""Custom Ray resource of the node that the driver of a joined cluster runs on, wherever that comes to lie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResources:
    """What a node has in all, whether or not it is free now."""

    node_id: str
    ip: str
    num_cpus: float
    num_gpus: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRequest:
    """One replica group that is to be placed."""

    name: str
    """Named in errors: the model's name."""
    tp_size: int
    device: str
    cpus_per_rank: float

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank holds."""
        cpus = {"CPU": self.cpus_per_rank} if self.cpus_per_rank else {}
        return cpus | ({"GPU": 1.0} if self.device == "cuda" else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlacement:
    """The placement group of one replica group: `bundles[rank]`, and Ray's name for the strategy."""

    bundles: tuple[dict[str, float], ...]
    strategy: str


def plan_groups(requests: Sequence[GroupRequest], nodes: Sequence[NodeResources]) -> list[GroupPlacement]:
    """A placement for every request, in their order.

    Raises ConfigError, naming what is needed and what there is, when these nodes can never hold one of them or all of
    them together. What passes may still have to wait, for resources that others hold now.
    """
    placements = [_plan_group(request, nodes) for request in requests]
    for request, count in Counter(requests).items():
        if _is_packed(request, nodes):
            num_places = sum(_ranks_on(node, request) // request.tp_size for node in nodes)
            if count > num_places:
                raise ConfigError(
                    f"{request.name}: {count} groups of {request.tp_size} ranks, each on one node, are needed and the "
                    f"cluster has room for {num_places}"
                )
    for resource in ("CPU", "GPU"):
        needed = sum(request.tp_size * request.bundle.get(resource, 0.0) for request in requests)
        total = math.fsum(_amount(node, resource) for node in nodes)
        if needed > total:
            raise ConfigError(f"all groups together need {needed:g} {resource}s and the cluster has {total:g} in total")
    return placements


def _plan_group(request: GroupRequest, nodes: Sequence[NodeResources]) -> GroupPlacement:
    if not request.bundle:
        raise ConfigError(
            f"{request.name}: cpus_per_rank is 0, which device cuda alone allows; on device cpu it must be at least 0.0001"
        )
    places = [_ranks_on(node, request) for node in nodes]
    if request.tp_size > sum(places):
        wanted = " and ".join(f"{request.tp_size * amount:g} {name}s" for name, amount in request.bundle.items())
        had = " and ".join(
            f"{math.fsum(_amount(n, name) for n in nodes):g} {name}s (at most "
            f"{max((_amount(n, name) for n in nodes), default=0):g} a node)"
            for name in request.bundle
        )
        raise ConfigError(
            f"{request.name}: {request.tp_size} ranks need {wanted}; the cluster has {had}, "
            f"which is room for {sum(places)} ranks"
        )
    strategy = "STRICT_PACK" if _is_packed(request, nodes) else "PACK"
    return GroupPlacement(bundles=(request.bundle,) * request.tp_size, strategy=strategy)


def _is_packed(request: GroupRequest, nodes: Sequence[NodeResources]) -> bool:
    return request.tp_size <= max((_ranks_on(node, request) for node in nodes), default=0)


def _ranks_on(node: NodeResources, request: GroupRequest) -> int:
    """Ranks that an otherwise empty node can hold."""
    return min(int(_amount(node, name) / amount + 1e-9) for name, amount in request.bundle.items())


def _amount(node: NodeResources, resource: str) -> float:
    return node.num_gpus if resource == "GPU" else node.num_cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLocation:
    """Where the actor of one bundle has come to lie."""

    bundle: int
    node_id: str
    ip: str
    pid: int
    gpu_ids: tuple[int, ...] = ()


def order_ranks(locations: Sequence[RankLocation], leader_node_id: str) -> list[RankLocation]:
    """Locations by rank: the leader's node first, then node by node, and by device on each.

    Neighbouring ranks share a node, and rank 0, whose answer the leader waits for, is near it.
    """
    return sorted(locations, key=lambda at: (at.node_id != leader_node_id, at.node_id, at.gpu_ids, at.bundle))
