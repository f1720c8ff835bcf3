"""Starting and stopping the whole stack: Ray, the replica groups, the gateways.

`prepare_environment` must run before this module is imported, because Ray reads its switches when it is imported.
"""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.guard import Guard
from cluster.placement import GATEWAY_RESOURCE, GroupPlacement, GroupRequest
from cluster.ray_api import alive_nodes, run_on_node
from model_parallel.errors import ConfigError
from model_parallel.machine import read_machine
from serving.admin.thread import AdminThread
from serving.autoscaling.actor import start_autoscaler, stop_autoscaler
from serving.autoscaling.settings import settings_of
from serving.config import ServingConfig
from serving.contracts.addresses import host_port, to_connect_to
from serving.contracts.errors import StoreUnavailableError
from serving.contracts.start_failure import StartError, plain_reason
from serving.driver import joined
from serving.driver.environment import CLUSTER_VARIABLES, cluster_environment
from serving.driver.preflight import Preflight, begin
from serving.gateway.deployment import Gateway
from serving.gateway.server import Ports
from serving.models.group_spec import GroupSpec, resolve_models
from serving.models.sizes import Host, look_at_node
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
_OBJECT_STORE_BYTES = 80 << 20
"""Ray takes no less than 75 MiB."""


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
    metrics_port: int | None = None
    """Of the first gateway; None when metrics are turned off."""

    @property
    def address(self) -> str:
        """Of gRPC, for a client on this machine."""
        return host_port(to_connect_to(self.host), self.port)

    @property
    def http_url(self) -> str | None:
        """None when HTTP is turned off."""
        if self.http_port is None:
            return None
        scheme = "http" if self.config.gateway.tls is None else "https"
        return f"{scheme}://{host_port(to_connect_to(self.host), self.http_port)}"

    @property
    def metrics_url(self) -> str | None:
        """None when metrics are turned off."""
        if self.metrics_port is None:
            return None
        return f"http://{host_port(to_connect_to(self.config.admin.host), self.metrics_port)}/metrics"

    @property
    def admin_address(self) -> str | None:
        """Of packtrain.v1.Admin; None when it is turned off."""
        if self.admin is None:
            return None
        return host_port(to_connect_to(self.config.admin.host), self.admin.port)

    def stop(self) -> None:
        """Drain the gateways, then end groups, ranks and, when it is private, the cluster. A detached application goes on."""
        if self.config.ray.detached:
            try:
                if self.admin is not None:
                    self.admin.stop()
            finally:
                ray.shutdown()
            return
        try:
            stop_autoscaler(STOP_TIMEOUT_S)
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
            stop_autoscaler(STOP_TIMEOUT_S)
            serve.delete(APP_NAME)
            stop_authority(STOP_TIMEOUT_S)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()
        if guard is not None:
            guard.dismiss()


def start(
    config: ServingConfig,
    report: Callable[[str], None],
    on_load: Callable[[int, int], None] | None = None,
    preflight: Preflight | None = None,
) -> RunningApp:
    """Bring the stack up; `report` is told each stage, and `on_load` (bytes loaded, bytes in all) while ranks of a private
    cluster load. `preflight` is that of the configuration, when somebody has begun it. Nothing is left running when it fails.

    Raises ConfigError, CheckpointError, FetchError, StartRefusedError, StartError.
    """
    if preflight is None:
        report("checking")
        preflight = begin(config)
        for line in (*preflight.notes, *preflight.warnings):
            report(line)
    try:
        return _start(preflight, report, on_load)
    finally:
        preflight.close()


def _start(
    preflight: Preflight, report: Callable[[str], None], on_load: Callable[[int, int], None] | None
) -> RunningApp:
    config, specs = preflight.config, preflight.specs
    if config.tenancy is not None:
        _check_database(database_url(config.tenancy))
    preflight.finish()
    report("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    keep_logs = logging.getLogger().isEnabledFor(logging.DEBUG)
    guard = None if preflight.parent is None else Guard(preflight.parent, keep_directory=keep_logs)
    try:
        _join_ray(config, specs, guard)
        if guard is None:
            joined.wait_for_places(joined.requests_of(config.models), config.ray.wait_for_nodes_s, report)
            specs = resolve_models(config.models, _host_of_cluster())
        report("placing replica groups and loading weights")
        if guard is not None:
            specs = [replace(spec, progress_directory=str(guard.directory)) for spec in specs]
        with watched_progress(guard.directory, on_load) if guard and on_load else nullcontext():
            ports, metrics_port = _deploy(config, specs, report)
        admin = None
        if config.tenancy is not None and config.admin.port is not None:
            admin = AdminThread(config, config.tenancy)
    except (RayError, RayServeException, StoreUnavailableError, RuntimeError, TimeoutError, OSError) as error:
        message = plain_reason(f"{_deployment_messages()}\n{error}")
        _give_up(config, guard)
        raise StartError(message) from error
    except BaseException:
        _give_up(config, guard)
        raise
    return RunningApp(
        host=config.gateway.host,
        port=ports.grpc,
        http_port=ports.http,
        config=config,
        guard=guard,
        admin=admin,
        metrics_port=metrics_port,
    )


def _give_up(config: ServingConfig, guard: Guard | None) -> None:
    """After a start that failed: a detached application, which may be an older one that serves, is left as it is."""
    if config.ray.detached:
        ray.shutdown()
    else:
        shut_down(guard)


def _check_database(url: str) -> None:
    """Also brings its schema up to date. Raises ConfigError, StartError."""
    try:
        Database(url).close()
    except StoreUnavailableError as error:
        raise StartError(str(error)) from error


def _join_ray(config: ServingConfig, specs: Sequence[GroupSpec], guard: Guard | None) -> None:
    """Raises StartError for whatever Ray has against it: it raises plain Exception too."""
    try:
        if guard is None:
            ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.CRITICAL)
            joined.check_environment(CLUSTER_VARIABLES)
        else:
            _start_private_cluster(config, specs, guard)
    except ConfigError:
        raise
    except Exception as error:
        what = "did not start" if guard else f"at {config.ray.address} (--ray-address) cannot be joined"
        raise StartError(f"Ray {what}: {plain_reason(str(error))}") from error


def _start_private_cluster(config: ServingConfig, specs: Sequence[GroupSpec], guard: Guard) -> None:
    needed = sum(s.cpus_per_rank * s.parallel.tp_size * s.entry.most_groups for s in specs)
    with suppress(FileNotFoundError):
        tempfile.gettempdir()  # this process keeps its own, whatever its children get
    with _environment(cluster_environment(guard.directory)):
        ray.init(
            address="local",
            num_cpus=config.ray.num_cpus or max(read_machine().num_cpus, math.ceil(needed)),
            # One machine: no name, no route and no firewall of its network matters.
            _node_ip_address="127.0.0.1",
            # Nothing goes through it but what Serve keeps of deployments.
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=str(guard.directory),
        )


def _host_of_cluster() -> Host:
    """Of a cluster that is joined: one node, which has GPUs if any has, else the most CPUs, and the GPUs of all."""
    nodes = alive_nodes()
    node = max(nodes, key=lambda node: (node.num_gpus, node.num_cpus))
    machine, gpus = run_on_node(look_at_node, node.node_id, STOP_TIMEOUT_S)
    return Host(machine=machine, gpus=gpus, num_gpus=int(sum(node.num_gpus for node in nodes)))


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


def _deploy(
    config: ServingConfig, specs: Sequence[GroupSpec], report: Callable[[str], None]
) -> tuple[Ports, int | None]:
    """Where the first gateway listens, and where it shows metrics."""
    if config.tenancy is not None:
        start_authority(database_url(config.tenancy), refresh_s=config.tenancy.refresh_s)
    mark = joined.fingerprint(config, specs)
    handle = joined.deployed_before(APP_NAME, mark) if config.ray.detached else None
    if handle is None:
        joined.remember_deployed(None)
        stop_autoscaler(STOP_TIMEOUT_S)  # one of before knows other groups
        handle = _run(config, specs, report)
        joined.remember_deployed(mark if config.ray.detached else None)
    else:
        report("taking over what is deployed already")
    # A broadcast, unlike a call that is routed, asks nobody how busy he is, and so leaves nothing behind when that is late.
    ports: list[Ports] = handle.broadcast("ready").results(timeout_s=STOP_TIMEOUT_S)
    metrics_ports: list[int | None] = handle.broadcast("metrics_port").results(timeout_s=STOP_TIMEOUT_S)
    scaling = settings_of(
        config, APP_NAME, Gateway.__name__, {spec.card.name: _deployment_name(spec.card.name) for spec in specs}
    )
    if scaling is not None:
        start_autoscaler(scaling, STOP_TIMEOUT_S)
    return ports[0], metrics_ports[0]


def _requests(specs: Sequence[GroupSpec]) -> list[GroupRequest]:
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


def _run(config: ServingConfig, specs: Sequence[GroupSpec], report: Callable[[str], None]) -> DeploymentHandle[Any]:
    requests = _requests(specs)
    planned = joined.wait_for_places(requests, config.ray.wait_for_nodes_s, report)
    placements = {request.name: placement for request, placement in zip(requests, planned, strict=True)}
    groups = {spec.card.name: _group_application(spec, placements[spec.card.name], config) for spec in specs}
    only_there = {GATEWAY_RESOURCE: joined.GATEWAY_SHARE} if config.ray.num_gateways else {}
    gateway = serve.deployment(
        num_replicas=config.ray.num_gateways or len({node.ip for node in alive_nodes()}),
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "resources": only_there},
        **_lifecycle(config),
    )(Gateway)
    cards = [spec.card for spec in specs]
    serve.start(proxy_location="Disabled")
    application = gateway.bind(config.gateway, config.limits, cards, groups, config.admin, config.tenancy)
    is_scaled = any(entry.autoscaling and entry.autoscaling.mode == "on" for entry in config.models)
    handle: DeploymentHandle[Any] = serve.run(
        application, name=APP_NAME, route_prefix=None, external_scaler_enabled=is_scaled
    )
    return handle


def _deployment_name(model: str) -> str:
    """Of the deployment whose replicas are the groups of a model."""
    return f"ReplicaGroup-{model.replace('/', '-')}"


def _group_application(spec: GroupSpec, placement: GroupPlacement, config: ServingConfig) -> serve.Application:
    """All replica groups of one model: each replica is a leader in the first bundle of a placement group of its own."""
    scheduler = spec.scheduler
    deployment = serve.deployment(
        name=_deployment_name(spec.card.name),
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
        # What a constructor refuses once it refuses again. When a replica that once ran is replaced, Serve tries for ever.
        "max_constructor_retry_count": 1,
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
