"""The calls to Ray Serve that the autoscaler makes. Each has a deadline."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.autoscaler import ScalingError
from serving.autoscaling.retirement import Deployed, Replica
from serving.contracts.start_failure import plain_reason

TIMEOUT_S = 10.0
"""For the controller. It may be starting again."""
ANSWER_TIMEOUT_S = 2.0
"""For groups and gateways."""


class ServeControl:
    """Of some deployments."""

    def __init__(self, apps: Mapping[str, str]) -> None:
        """`apps`: Serve's application of each deployment."""
        self._apps = apps
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def deployed(self) -> dict[str, Deployed]:
        """Those of the deployments that there are, by name. Raises ScalingError."""
        # What GET /api/serve/applications/ of Ray's dashboard answers.
        details = self._ask_controller("get_serve_instance_details")
        found = {
            name: details["applications"].get(app, {}).get("deployments", {}).get(name)
            for name, app in self._apps.items()
        }
        if not any(found.values()):
            raise ScalingError("nothing is deployed")
        return {
            name: Deployed(
                target=deployment["target_num_replicas"],
                given_up=plain_reason(deployment["message"]) if deployment["status"] == "DEPLOY_FAILED" else "",
                replicas=tuple(
                    Replica(
                        id=replica["replica_id"],
                        state=str(replica["state"].value),
                        started_s=replica["start_time_s"],
                        node_id=replica.get("node_id") or "",
                        actor=replica["actor_name"],
                    )
                    for replica in deployment["replicas"]
                ),
            )
            for name, deployment in found.items()
            if deployment
        }

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        """What the running replicas answer in time, in no order."""
        try:
            broadcast = self._handle(deployment).broadcast(method, *arguments)
            items = broadcast.results(timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []
        return [item for item in items if isinstance(item, bytes)]

    def _handle(self, deployment: str) -> DeploymentHandle[Any]:
        if deployment not in self._handles:
            handle: DeploymentHandle[Any] = DeploymentHandle(deployment, self._apps[deployment])
            # The cluster's setting puts routers into the event loop of their process, and this thread has none.
            handle._init(_run_router_in_separate_loop=True)
            self._handles[deployment] = handle
        return self._handles[deployment]

    def set_target(self, deployment: str, num_replicas: int) -> None:
        """Raises ScalingError."""
        self._ask_controller(
            "update_deployment_replicas", DeploymentID(deployment, self._apps[deployment]), num_replicas
        )

    def kill(self, replica: Replica) -> None:
        """Raises ScalingError."""
        try:
            with suppress(ValueError):  # no actor of that name
                ray.kill(ray.get_actor(replica.actor, SERVE_NAMESPACE), no_restart=True)
        except RayError as error:
            raise ScalingError(f"{replica.id} cannot be ended: {error}") from error

    def _ask_controller(self, method: str, *arguments: object) -> Any:
        try:
            client = _get_global_client()
            if client is None:
                raise ScalingError("Serve does not run")
            controller: Any = client._controller
            return ray.get(getattr(controller, method).remote(*arguments), timeout=TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError, ValueError) as error:
            raise ScalingError(f"Serve's controller: {type(error).__name__}: {error}") from error
