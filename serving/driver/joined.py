"""A Ray cluster that was there before, such as KubeRay's: what its nodes must have, how they are waited for, what runs there."""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version

from cluster import ray_api
from cluster.placement import GroupPlacement, GroupRequest, NodeResources, plan_groups
from model_parallel.errors import ConfigError
from serving.config import ModelEntry, RayConfig, ServingConfig
from serving.contracts.served import Served
from serving.gateway.core.resume_tokens import KEY_BYTES
from serving.models.group_spec import GroupSpec

GATEWAY_SHARE = 0.001
ENVIRONMENT_TIMEOUT_S = 60.0
_FINGERPRINT_KEY = "packtrain/deployed"
_RESUME_KEY = "packtrain/resume-key"
_POLL_S = 1.0


def check_environment(required: Mapping[str, str]) -> None:
    """Nodes of a cluster that was there before must have been started with the variables that a private one gets.

    Raises ConfigError naming each node and what it lacks, and TimeoutError when a node does not answer.
    """
    if message := environment_problem(required):
        raise ConfigError(message)


def environment_problem(required: Mapping[str, str]) -> str:
    """The same as a sentence; "" when no node lacks anything. Raises TimeoutError, RayError."""
    return missing_settings(required, ray_api.environment_by_node(tuple(required), ENVIRONMENT_TIMEOUT_S))


def missing_settings(required: Mapping[str, str], found: Mapping[str, Mapping[str, str | None]]) -> str:
    """What is wrong with the environment of which node (by its address); "" when nothing is."""
    wrong: dict[str, list[str]] = {}
    for node, environment in found.items():
        for name, value in required.items():
            if environment.get(name) != value:
                wrong.setdefault(f"{name}={value}", []).append(node)
    if not wrong:
        return ""
    parts = "; ".join(f"{setting} on {', '.join(sorted(nodes))}" for setting, nodes in sorted(wrong.items()))
    return f"ray.address: nodes of this cluster were started without settings that Packtrain needs in their environment: {parts}"


def check_replaceable(
    found: Served | None, section: RayConfig, has_driver: Callable[[str], bool] = ray_api.has_driver
) -> None:
    """Raises ConfigError when what the cluster serves is not for this command to replace: while the command that has deployed it
    runs, and where it is to outlive its command, unless what this one deploys is so too."""
    if found is None or not found.models or found.owner is None:
        return
    what = f"ray.address (--ray-address): the cluster at {section.address} serves {', '.join(found.models)} already"
    if found.owner.is_detached:
        if not section.detached:
            raise ConfigError(
                f"{what}, deployed with ray.detached: true, and ray.detached is false here; make it true to change what is "
                "served there, or join another cluster"
            )
    elif has_driver(found.owner.job):
        raise ConfigError(
            f"{what}, for another packtrain serve that runs (Ray's job {found.owner.job}); stop that one first, or join another "
            "cluster"
        )


def requests_of(entries: Sequence[ModelEntry]) -> list[GroupRequest]:
    """Of all groups, before there is a node by which the rest of their sizes could be chosen."""
    return [
        GroupRequest(
            name=entry.name,
            tp_size=entry.tensor_parallel_size,
            device="cuda" if entry.device == "cuda" else "cpu",
            cpus_per_rank=entry.cpus_per_rank,
        )
        for entry in entries
        if entry.device == "cuda" or entry.cpus_per_rank  # auto, which turns out to be a GPU, needs no CPU
        for _ in range(entry.num_groups)
    ]


def requests_of_specs(specs: Sequence[GroupSpec]) -> list[GroupRequest]:
    """One for each group of each model, whose name it has."""
    return [
        GroupRequest(
            name=spec.card.name,
            tp_size=spec.parallel.tp_size,
            device=spec.parallel.device,
            cpus_per_rank=spec.cpus_per_rank,
        )
        for spec in specs
        for _ in range(spec.card.num_groups)
    ]


def ask_for_nodes(requests: Sequence[GroupRequest]) -> AbstractContextManager[None]:
    """Within the block Ray's autoscaler is asked for room for these groups."""
    return ray_api.asking_for_nodes([[request.bundle] * request.tp_size for request in requests])


def wait_for_places(
    requests: Sequence[GroupRequest],
    timeout_s: float,
    report: Callable[[str], None],
    *,
    others: Sequence[GroupRequest] = (),
    ask: Callable[[Sequence[GroupRequest]], AbstractContextManager[None]] = ask_for_nodes,
    nodes: Callable[[], Sequence[NodeResources]] = ray_api.alive_nodes,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[GroupPlacement]:
    """Placements of all groups, as soon as the cluster has nodes for them beside the `others`, which have theirs. A cluster that
    scales itself is asked for the nodes; it may have had none. Raises ConfigError, with what is missing, when they have not come
    within `timeout_s`."""
    deadline_s = clock() + timeout_s
    told = ""
    with ExitStack() as asking:
        while True:
            try:
                return plan_groups([*requests, *others], nodes())[: len(requests)]
            except ConfigError as error:
                if clock() >= deadline_s:
                    raise
                if not told:
                    asking.enter_context(ask(requests))
                if str(error) != told:
                    told = str(error)
                    report(f"waiting for nodes: {told}")
            sleep(_POLL_S)


def fingerprint(config: ServingConfig, specs: Sequence[GroupSpec]) -> str:
    """Of everything that decides what is deployed, the program's version included."""
    parts = [version("packtrain"), config.model_dump_json(exclude={"ray"}), *map(repr, specs)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def was_deployed(mark: str) -> bool:
    """Whether a driver with this fingerprint was the last that has deployed everything."""
    return ray_api.read_note(_FINGERPRINT_KEY) == mark


def resume_key() -> bytes:
    """Key of the deployment's resume tokens, drawn by the first that asks and kept as long as the cluster lives."""
    if (kept := ray_api.read_note(_RESUME_KEY)) is None:
        kept = secrets.token_hex(KEY_BYTES)
        ray_api.write_note(_RESUME_KEY, kept)
    return bytes.fromhex(kept)


def remember_deployed(mark: str | None) -> None:
    """None while a deployment is under way: a driver that comes back in the middle begins anew."""
    ray_api.write_note(_FINGERPRINT_KEY, mark)
