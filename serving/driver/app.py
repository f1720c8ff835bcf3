"""Starting and stopping the whole stack: Ray, the replica groups, the gateways.

`prepare_environment` must run before this module is imported, because Ray reads its switches when it is imported.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.guard import Guard
from cluster.placement import GroupPlacement, GroupRequest, plan_groups
from cluster.ray_api import alive_nodes
from serving.admin.thread import AdminThread
from serving.config import ServingConfig, tracing_is_on
from serving.contracts.errors import StoreUnavailableError
from serving.gateway.deployment import Gateway
from serving.gateway.server import Ports, check_admin_listening, check_listening
from serving.models.group_spec import GroupSpec, check_memory, free_memory_bytes, resolve_model
from serving.replica.deployment import ReplicaGroup
from serving.replica.progress import watched_progress
from serving.tenants.authority.actor import start_authority, stop_authority
from serving.tenants.store.database import Database
from serving.tenants.store.store import database_url

logger = logging.getLogger(__name__)

APP_NAME = "packtrain"
STOP_TIMEOUT_S = 30.0
"""For what should take no time at all once requests are drained."""
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 5.0

# For the processes of a private cluster, and not for this one.
_CLUSTER_ENVIRONMENT = {
    # Our code and Serve's router run in one event loop: no token changes threads on its way.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # What start-up leaves is not looked through again by every garbage collection; request logs are written in bulk.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Ten looks a second at a handful of replicas cost 5 % of what two cores can serve; two are enough.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's control store would keep a record of each of the last 100,000 calls: 37 MB an hour at seven requests a second.
    "RAY_task_events_report_interval_ms": "0",
    # Nobody reads Ray's own metrics; sending them every ten seconds made its node manager grow by 7 MB an hour.
    "RAY_enable_metrics_collection": "0",
    # The C library gives 8 lots of memory a core to a process's threads, and each grows to a high-water mark of its own.
    "MALLOC_ARENA_MAX": "4",
}


class StartError(Exception):
    """The stack did not come up. The message is for the person who started it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningApp:
    """A stack that serves."""

    host: str
    port: int
    """Of gRPC."""
    http_port: int | None
    config: ServingConfig
    guard: Guard | None
    """Of a private cluster."""
    admin: AdminThread | None

    @property
    def address(self) -> str:
        """Of gRPC."""
        return f"{self.host}:{self.port}"

    @property
    def http_url(self) -> str | None:
        """None when HTTP is turned off."""
        if self.http_port is None:
            return None
        return f"{'http' if self.config.gateway.tls is None else 'https'}://{self.host}:{self.http_port}"

    def stop(self) -> None:
        """Drain the gateways, then end groups, ranks and, when it is a private one, the cluster."""
        try:
            gateways = serve.get_deployment_handle(Gateway.__name__, APP_NAME)
            gateways.broadcast("drain").results(timeout_s=self.config.gateway.drain_timeout_s + STOP_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("gateways could not be drained: %s", error)
        finally:
            try:
                if self.admin is not None:
                    self.admin.stop()
            finally:
                shut_down(self.guard)


def shut_down(guard: Guard | None) -> None:
    """End a private cluster (that of `guard`) with all in it; from a joined one, take our application away and leave."""
    try:
        if guard is None and ray.is_initialized():
            serve.delete(APP_NAME)
            stop_authority(STOP_TIMEOUT_S)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()
        if guard is not None:
            guard.dismiss()


def start(
    config: ServingConfig, report: Callable[[str], None], on_load: Callable[[int, int], None] | None = None
) -> RunningApp:
    """Bring the stack up; `report` is told each stage, and `on_load` (bytes loaded, bytes in all) while ranks of a private
    cluster load. Nothing is left running when it fails.

    Raises ConfigError, CheckpointError, FetchError, StartError.
    """
    report("reading the models' configurations")
    specs = [resolve_model(entry) for entry in config.models]
    check_listening(config.gateway, has_keys=config.tenancy is not None)
    check_admin_listening(config.admin, has_keys=config.tenancy is not None, insecure=config.gateway.insecure)
    tracing_is_on()  # A wrong setting is told here, before anything starts.
    if config.tenancy is not None:
        _check_database(database_url(config.tenancy))
    on_cpu = [spec for spec in specs if spec.parallel.device == "cpu"]
    if config.ray.address is None and on_cpu:
        check_memory(on_cpu, free_memory_bytes())
    report("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    guard = Guard() if config.ray.address is None else None
    try:
        _join_ray(config, specs, guard)
        report("placing replica groups and loading weights")
        if guard is not None:
            specs = [replace(spec, progress_directory=str(guard.directory)) for spec in specs]
        with watched_progress(guard.directory, on_load) if guard and on_load else nullcontext():
            host, ports = _deploy(config, specs)
        admin = None
        if config.tenancy is not None and config.admin.port is not None:
            admin = AdminThread(config, config.tenancy)
    except (RayError, RayServeException, StoreUnavailableError, RuntimeError, TimeoutError, ConnectionError) as error:
        message = _deployment_messages() or str(error)
        shut_down(guard)
        raise StartError(message) from error
    except BaseException:
        shut_down(guard)
        raise
    return RunningApp(host=host, port=ports.grpc, http_port=ports.http, config=config, guard=guard, admin=admin)


def _check_database(url: str) -> None:
    """Also brings its schema up to date. Raises ConfigError, StartError."""
    try:
        Database(url).close()
    except StoreUnavailableError as error:
        raise StartError(str(error)) from error


def _join_ray(config: ServingConfig, specs: Sequence[GroupSpec], guard: Guard | None) -> None:
    if guard is not None:
        needed = sum(s.cpus_per_rank * s.parallel.tp_size * s.card.num_groups for s in specs)
        num_cpus = config.ray.num_cpus or max(os.cpu_count() or 1, math.ceil(needed))
        with _environment(_CLUSTER_ENVIRONMENT):
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=str(guard.directory),
            )
    else:
        ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for what is started within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _deploy(config: ServingConfig, specs: Sequence[GroupSpec]) -> tuple[str, Ports]:
    nodes = alive_nodes()
    requests = [
        GroupRequest(
            name=spec.card.name,
            tp_size=spec.parallel.tp_size,
            device=spec.parallel.device,
            cpus_per_rank=spec.cpus_per_rank,
        )
        for spec in specs
    ]
    every_group = [r for r, spec in zip(requests, specs, strict=True) for _ in range(spec.card.num_groups)]
    placements = dict(zip(every_group, plan_groups(every_group, nodes), strict=True))
    groups = {
        spec.card.name: _group_application(spec, placements[request], config)
        for spec, request in zip(specs, requests, strict=True)
    }
    gateway = serve.deployment(
        num_replicas=len({node.ip for node in nodes}),
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0},
        **_lifecycle(config),
    )(Gateway)
    cards = [spec.card for spec in specs]
    serve.start(proxy_location="Disabled")
    if config.tenancy is not None:
        start_authority(database_url(config.tenancy), refresh_s=config.tenancy.refresh_s)
    application = gateway.bind(config.gateway, config.limits, cards, groups, config.admin, config.tenancy)
    handle: DeploymentHandle[Any] = serve.run(application, name=APP_NAME, route_prefix=None)
    # A broadcast, unlike a call that is routed, asks nobody how busy he is, and so leaves nothing behind when that is late.
    ports: list[Ports] = handle.broadcast("ready").results(timeout_s=STOP_TIMEOUT_S)
    return config.gateway.host, ports[0]


def _group_application(spec: GroupSpec, placement: GroupPlacement, config: ServingConfig) -> serve.Application:
    """All replica groups of one model: each replica is a leader in the first bundle of a placement group of its own."""
    scheduler = spec.scheduler
    deployment = serve.deployment(
        name=f"ReplicaGroup-{spec.card.name.replace('/', '-')}",
        num_replicas=spec.card.num_groups,
        placement_group_bundles=list(placement.bundles),
        placement_group_strategy=placement.strategy,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class="serving.gateway.groups.router.LeastLoadedRouter"  # type: ignore[arg-type]  # its **kwargs are typed wrongly
        ),
        # The engine's own bounds decide what is refused; Serve's only keep it from queueing without bound.
        max_ongoing_requests=2 * (scheduler.max_num_seqs + scheduler.max_waiting_requests),
        max_queued_requests=scheduler.max_waiting_requests,
        **_lifecycle(config),
    )(ReplicaGroup)
    application: serve.Application = deployment.bind(spec, config.gateway.drain_timeout_s)
    return application


def _lifecycle(config: ServingConfig) -> dict[str, Any]:
    """How Serve watches and ends replicas of either kind. A leader outlives the streams that its gateways drain."""
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": config.gateway.drain_timeout_s + STOP_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
    }


def _deployment_messages() -> str:
    """Why deployments are not healthy, as Serve tells it; empty when it does not."""
    if not ray.is_initialized():  # Serve would look for a cluster, and wait
        return ""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException, RuntimeError):
        return ""
    deployments = applications[APP_NAME].deployments if APP_NAME in applications else {}
    return "; ".join(f"{name}: {status.message}" for name, status in deployments.items() if status.message)
