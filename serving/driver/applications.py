"""The applications of Ray Serve that a stack is made of: one of the gateways, and one for each model.

Serve replaces the groups of a model whose application is run again: it stops as many as `max_unavailable` says, starts as many,
and goes on when these run. A replacement that does not start ends that, and the groups that are left stay as they are.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.generated import serve_pb2
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.autoscaler import ScalingError
from cluster.placement import GATEWAY_RESOURCE, GroupPlacement
from cluster.ray_api import alive_nodes, require_cluster
from serving.autoscaling.retirement import Retirements
from serving.autoscaling.serve_control import ServeControl
from serving.config import ServingConfig
from serving.contracts.served import APP_NAME, app_name, deployment_name, is_ours
from serving.contracts.start_failure import StartError, plain_reason
from serving.driver.changes import GONE
from serving.driver.joined import GATEWAY_SHARE, resume_key
from serving.gateway.deployment import Gateway
from serving.models.group_spec import GroupSpec
from serving.replica.deployment import ReplicaGroup

STOP_TIMEOUT_S = 30.0
"""For what should take no time at all once requests are drained."""
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 5.0
CONTROLLER_TIMEOUT_S = 60.0
"""Serve's controller answers within milliseconds, but on a machine whose cores all import it may need many seconds."""
_POLL_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """The deployment of a model, as Serve sees it."""

    status: str
    """Serve's name of it."""
    message: str
    target: int
    """Groups that there should be."""
    replicas: Mapping[str, str]
    """State (Serve's name) of each group, by its id."""

    @property
    def running(self) -> frozenset[str]:
        """Ids of the groups that take requests."""
        return frozenset(group for group, state in self.replicas.items() if state in ("RUNNING", "PENDING_MIGRATION"))

    @property
    def present(self) -> frozenset[str]:
        """Ids of all groups that are not being stopped."""
        return frozenset(group for group, state in self.replicas.items() if state not in GONE)

    @property
    def failure(self) -> str:
        """Why no more groups will come of it; "" when some may."""
        return plain_reason(self.message) if self.status == "DEPLOY_FAILED" else ""


def gateway_target(config: ServingConfig) -> serve.RunTarget:
    """The application of the gateways."""
    only_there = {GATEWAY_RESOURCE: GATEWAY_SHARE} if config.ray.num_gateways else {}
    deployment = serve.deployment(
        num_replicas=config.ray.num_gateways or len({node.ip for node in alive_nodes()}),
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "resources": only_there},
        **_lifecycle(config),
    )(Gateway)
    application = deployment.bind(config.gateway, config.limits, config.admin, config.tenancy, resume_key())
    return serve.RunTarget(target=application, name=APP_NAME, route_prefix=None, external_scaler_enabled=True)


def model_target(
    config: ServingConfig,
    spec: GroupSpec,
    placement: GroupPlacement,
    *,
    num_groups: int,
    revision: int = 1,
    max_unavailable: int = 1,
) -> serve.RunTarget:
    """All replica groups of one model: each replica is a leader in the first bundle of a placement group of its own.

    Run again with the same `revision`, its groups stay; with another one they are replaced.
    """
    scheduler = spec.scheduler
    deployment = serve.deployment(
        name=deployment_name(spec.card.name),
        num_replicas=num_groups,
        placement_group_bundles=list(placement.bundles),
        placement_group_strategy=placement.strategy,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class="serving.gateway.groups.router.LeastLoadedRouter"  # type: ignore[arg-type]  # its **kwargs are typed wrongly
        ),
        # The engine's own bounds decide what is refused; Serve's only keep it from queueing without bound.
        max_ongoing_requests=2 * (scheduler.max_num_seqs + scheduler.max_waiting_requests),
        max_queued_requests=scheduler.max_waiting_requests,
        rolling_update_percentage=rollout_share(max_unavailable, num_groups),
        **_lifecycle(config),
    )(ReplicaGroup)
    deployment._version = str(revision)  # otherwise Serve draws one, and replaces what need not be
    keeps_spares = config.ray.address is None and config.ray.spare_processes
    application = deployment.bind(spec, config.gateway.drain_timeout_s, keeps_spares)
    # Always by hand or by our own autoscaler: Serve's would count ongoing calls, which are near none.
    return serve.RunTarget(
        target=application, name=app_name(spec.card.name), route_prefix=None, external_scaler_enabled=True
    )


def rollout_share(max_unavailable: int, num_groups: int) -> float:
    """What Serve wants to be told: it takes the whole part of this share of the groups, and 1 at least."""
    return min(1.0, (max_unavailable + 0.5) / max(1, num_groups))


def run(targets: Sequence[serve.RunTarget], *, wait: bool) -> list[DeploymentHandle[Any]]:
    """Deploy applications on Serve, which has started; with `wait`, until all of their replicas run. Raises RuntimeError with
    Serve's reason, RayError."""
    require_cluster()
    handles = list(serve.run_many(list(targets), wait_for_applications_running=False))
    for target in targets if wait else ():
        _wait_until_running(target.name)
    return handles


def _wait_until_running(app: str) -> None:
    """Serve's own wait looks once a second. The groups' start_timeout_s bounds it."""
    while True:
        found = all_applications().get(app)
        if found is None:
            raise RuntimeError(f"the application {app} is gone")
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(f"Deploying application {app} failed: {found.message}")
        if found.status == ApplicationStatus.RUNNING:
            return
        time.sleep(_POLL_S)


def set_num_groups(model: str, num_groups: int) -> None:
    """So many groups there are to be. Raises StartError."""
    _ask_controller("update_deployment_replicas", DeploymentID(deployment_name(model), app_name(model)), num_groups)


def shrink(model: str, num_groups: int, timeout_s: float, sleep: Callable[[float], None]) -> None:
    """So many groups there are to be, and the others end: those with the least to move. Returns when they have. Raises
    StartError, and what `sleep` raises."""
    deployment = deployment_name(model)
    control = ServeControl({deployment: app_name(model)})
    try:
        Retirements(control=control, deployment=deployment, sleep=sleep).shrink(num_groups, timeout_s)
    except ScalingError as error:
        raise StartError(str(error)) from error


def set_num_gateways(num_gateways: int) -> None:
    """So many gateways there are to be. Raises StartError."""
    _ask_controller("update_deployment_replicas", DeploymentID(Gateway.__name__, APP_NAME), num_gateways)


def deployed(model: str) -> Deployed | None:
    """None when the model is not deployed. Raises StartError when Serve's controller does not answer."""
    details = _ask_controller("get_serve_instance_details")
    app = details["applications"].get(app_name(model), {})
    found = app.get("deployments", {}).get(deployment_name(model))
    if found is None:
        return None
    return Deployed(
        status=str(getattr(found["status"], "value", found["status"])),
        message=found["message"],
        target=found["target_num_replicas"],
        replicas={replica["replica_id"]: str(replica["state"].value) for replica in found["replicas"]},
    )


def revision(model: str) -> int:
    """Of the groups of a model, as Serve was told last. Raises StartError."""
    encoded = _ask_controller("get_deployment_info", deployment_name(model), app_name(model))
    messages: Any = serve_pb2
    return int(messages.DeploymentRoute.FromString(encoded).deployment_info.version)


def forget_other_clusters() -> None:
    """Serve keeps a client of the cluster that this process was in before, and would ask that one."""
    _set_global_client(None)


def all_applications() -> Mapping[str, ApplicationStatusOverview]:
    """Of Serve, by name, those that are being deleted included. Raises RayError, RayServeException."""
    _require_controller()
    return serve.status().applications


def our_applications() -> set[str]:
    """Names of those that are deployed, those that are being deleted included. Raises RayError, RayServeException."""
    return {name for name in all_applications() if is_ours(name)}


def handle(deployment: str, app: str) -> DeploymentHandle[Any]:
    """To call the replicas of a deployment that there is. Raises RayError, RayServeException."""
    require_cluster()
    # Whether there is one, Serve would ask its controller, and wait for it without a deadline.
    found: DeploymentHandle[Any] = serve.get_deployment_handle(deployment, app, _check_exists=False)
    return found


def delete(apps: Iterable[str], timeout_s: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """End applications, all at once, and wait until they are gone. Raises TimeoutError, RayError."""
    names = set(apps)
    _require_controller()
    for name in names:
        serve.delete(name, _blocking=False)
    deadline_s = time.monotonic() + timeout_s
    while left := names & our_applications():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{', '.join(sorted(left))} did not end within {timeout_s:g} s")
        sleep(_POLL_S)


def messages() -> str:
    """Why deployments are not healthy, as Serve tells it; empty when it does not."""
    with suppress(RayError, RayServeException, RuntimeError):
        return "; ".join(
            f"{name}: {status.message}"
            for app, application in all_applications().items()
            if is_ours(app)
            for name, status in application.deployments.items()
            if status.message
        )
    return ""


def _lifecycle(config: ServingConfig) -> dict[str, Any]:
    """How Serve watches and ends replicas of either kind. A leader outlives the streams that its gateways drain."""
    return {
        # What a constructor refuses once it refuses again. When a replica that once ran is replaced, Serve tries for ever.
        "max_constructor_retry_count": 1,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": config.gateway.drain_timeout_s + STOP_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
    }


def _require_controller() -> None:
    """Raises RayError when Serve's controller does not answer in time: Serve's own calls wait for it without a deadline. Nothing
    happens where Serve does not run."""
    require_cluster()
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        ray.get(client._controller.check_alive.remote(), timeout=CONTROLLER_TIMEOUT_S)


def _ask_controller(method: str, *arguments: object) -> Any:
    try:
        require_cluster()
        client = _get_global_client()
        if client is None:
            raise StartError("Serve does not run")
        controller: Any = client._controller
        return ray.get(getattr(controller, method).remote(*arguments), timeout=CONTROLLER_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError, ValueError) as error:
        raise StartError(f"Serve's controller: {plain_reason(str(error))}") from error
