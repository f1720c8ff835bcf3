"""Starting and stopping the whole stack: Ray, the replica groups, the gateways.

`prepare_environment` must run before this module is imported, because Ray reads its switches when it is imported.
"""

import logging
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.guard import Guard
from cluster.placement import GroupPlacement
from cluster.ray_api import (
    alive_nodes,
    cluster_problem,
    job_of_installed_modules,
    keeping_sigterm,
    only_needed_processes,
    patient_start,
    require_cluster,
    run_on_node,
    short_messages,
    this_job,
)
from model_parallel.errors import ConfigError
from model_parallel.machine import read_machine
from serving.admin.thread import AdminThread
from serving.autoscaling.actor import stop_autoscaler
from serving.config import ServingConfig, TenancyConfig
from serving.contracts.addresses import host_port, to_connect_to
from serving.contracts.errors import ChangeError, StoreUnavailableError
from serving.contracts.served import APP_NAME, Owner, Served, app_name
from serving.contracts.start_failure import StartError, plain_reason
from serving.driver import applications, joined
from serving.driver.applications import STOP_TIMEOUT_S
from serving.driver.caretaker import Caretaker
from serving.driver.environment import (
    CLUSTER_VARIABLES,
    OBJECT_STORE_BYTES,
    PROCESS_TIMEOUT_S,
    cluster_environment,
    object_store_directory,
)
from serving.driver.held_ports import HeldPorts
from serving.driver.nodes import NodeFollower
from serving.driver.operations import ClusterOperations
from serving.driver.preflight import Preflight, begin
from serving.driver.record import first_served, read_served, write_served
from serving.gateway.deployment import Gateway
from serving.gateway.server import Ports
from serving.models.group_spec import GroupSpec, resolve_models
from serving.models.sizes import Host, look_at_node, this_host
from serving.replica.progress import watched_progress

# Modules of tenants are imported where they are needed: sqlalchemy takes half a second, which a start without tenants is spared.

logger = logging.getLogger(__name__)

_PLACES_FOR_OTHERS = 256
"""CPUs that a private cluster has beside those of its machine, for models that are deployed later. What they may take is decided
by memory; nothing else goes by the number."""


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
    operations: ClusterOperations
    caretaker: Caretaker
    ports: HeldPorts
    nodes: NodeFollower | None = None
    """Of a cluster that was joined."""
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

    def wait(self) -> None:
        """Until it cannot go on. Raises StartError, which says why."""
        self.caretaker.is_over.wait()
        raise StartError(
            f"{self.caretaker.what_ended} ended for good, and no group that is lost would come back: start again"
        )

    def stop(self) -> None:
        """Drain the gateways, then end groups, ranks and, when it is private, the cluster. A detached application goes on, and so
        does what another command has deployed in its place."""
        try:
            self._stop()
        finally:
            self.ports.close()

    def _stop(self) -> None:
        self.caretaker.close()
        self.operations.close()
        if self.nodes is not None:
            self.nodes.close()
        try:
            if _ends_here(self.guard):
                require_cluster()
                stop_autoscaler(STOP_TIMEOUT_S)
                gateways = applications.handle(Gateway.__name__, APP_NAME)
                gateways.broadcast("drain").results(timeout_s=self.config.gateway.drain_timeout_s + STOP_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("gateways could not be drained: %s", error)
        finally:
            try:
                if self.admin is not None:
                    self.admin.stop()
            finally:
                shut_down(self.config, self.guard)


def _ends_here(guard: Guard | None) -> bool:
    """Whether what is served is to end with this process: in a private cluster (that of `guard`) all of it; in one that was
    joined what this process has deployed, unless that is detached. Raises RayError."""
    if guard is not None:
        return True
    served = _read_served() if ray.is_initialized() else None
    return served is not None and served.owner == Owner(job=this_job(), is_detached=False)


def shut_down(config: ServingConfig, guard: Guard | None) -> None:
    """End a private cluster (that of `guard`) with all in it; from a joined one, take away what ends with this process, and
    leave."""
    try:
        if guard is None and _ends_here(guard):
            stop_autoscaler(STOP_TIMEOUT_S)
            applications.delete(applications.our_applications(), 4 * STOP_TIMEOUT_S)
            write_served(Served(generation=0, models={}))
            _stop_authority()
            if not applications.all_applications():
                serve.shutdown()
        elif guard is not None and config.tenancy is not None and not cluster_problem():
            _stop_authority()  # it gives up the database, for the next server
    except (RayError, RayServeException, TimeoutError) as error:
        logger.error("groups and gateways cannot be ended: %s", error)
    finally:
        ray.shutdown()
        if guard is not None:
            guard.dismiss()


def start(
    config: ServingConfig,
    report: Callable[[str], None],
    on_load: Callable[[int, int], None] | None = None,
    preflight: Preflight | None = None,
    leaving: Callable[[Callable[[], None]], AbstractContextManager[None]] | None = None,
) -> RunningApp:
    """Bring the stack up; `report` is told each stage, and `on_load` (bytes loaded, bytes in all) while ranks of a private
    cluster load. `preflight` is that of the configuration, when somebody has begun it. Nothing is left running when it fails.
    A private cluster starts within the block that `leaving` makes of what ends it: a signal in the middle of that may end this
    process, and an exception that a signal raises would be lost in Ray, or Ray's threads crash when Python ends.

    Raises ConfigError, CheckpointError, FetchError, StartRefusedError, StartError.
    """
    if preflight is None:
        report("checking")
        preflight = begin(config)
        for line in (*preflight.notes, *preflight.warnings):
            report(line)
    try:
        return _start(preflight, report, on_load, leaving or (lambda clean_up: nullcontext()))
    finally:
        preflight.close()


def _start(
    preflight: Preflight,
    report: Callable[[str], None],
    on_load: Callable[[int, int], None] | None,
    leaving: Callable[[Callable[[], None]], AbstractContextManager[None]],
) -> RunningApp:
    config = preflight.config
    if config.tenancy is not None:
        _check_database(config.tenancy)
    preflight.finish()
    report("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    keep_logs = logging.getLogger().isEnabledFor(logging.DEBUG)
    guard = None if preflight.parent is None else Guard(preflight.parent, keep_directory=keep_logs)
    if guard is None:
        return _bring_up(preflight, None, report, on_load)
    with leaving(partial(_give_up, guard, preflight)):
        return _bring_up(preflight, guard, report, on_load)


def _give_up(guard: Guard, preflight: Preflight) -> None:
    """End a private cluster that serves nobody yet, without a call to Ray."""
    preflight.close()
    guard.dismiss()


def _bring_up(
    preflight: Preflight,
    guard: Guard | None,
    report: Callable[[str], None],
    on_load: Callable[[int, int], None] | None,
) -> RunningApp:
    config, specs = preflight.config, preflight.specs
    try:
        _join_ray(config, specs, guard)
        if guard is None:
            joined.check_replaceable(_served_before(), config.ray)
            joined.wait_for_places(joined.requests_of(config.models), config.ray.wait_for_nodes_s, report)
            specs = resolve_models(config.models, _host_of_cluster())
        report("placing replica groups and loading weights")
        if guard is not None:
            specs = [replace(spec, progress_directory=str(guard.directory)) for spec in specs]
        with watched_progress(guard.directory, on_load) if guard and on_load else nullcontext():
            ports, metrics_port, operations = _deploy(config, specs, report, this_host if guard else _host_of_cluster)
        admin = None
        if config.serves_admin:
            admin = AdminThread(config, operations)
    except (
        RayError,
        RayServeException,
        ChangeError,
        StoreUnavailableError,
        RuntimeError,
        TimeoutError,
        OSError,
    ) as error:
        message = plain_reason(f"{applications.messages()}\n{error}")
        shut_down(config, guard)
        raise StartError(message) from error
    except BaseException:
        shut_down(config, guard)
        raise
    return RunningApp(
        host=config.gateway.host,
        port=ports.grpc,
        http_port=ports.http,
        config=config,
        guard=guard,
        admin=admin,
        operations=operations,
        caretaker=Caretaker([*([guard.revive] if guard else []), operations.revive_autoscaler]),
        ports=preflight.take_ports(),
        # From none on: a command that takes over does not know how many there are.
        nodes=NodeFollower(0 if config.ray.num_gateways is None else None) if guard is None else None,
        metrics_port=metrics_port,
    )


def _stop_authority() -> None:
    from serving.tenants.authority.actor import stop_authority  # noqa: PLC0415

    stop_authority(STOP_TIMEOUT_S)


def _check_database(tenancy: TenancyConfig) -> None:
    """Also brings its schema up to date. Raises ConfigError, StartError."""
    from serving.tenants.store.database import Database  # noqa: PLC0415
    from serving.tenants.store.store import database_url  # noqa: PLC0415

    try:
        Database(database_url(tenancy)).close()
    except StoreUnavailableError as error:
        raise StartError(str(error)) from error


def _join_ray(config: ServingConfig, specs: Sequence[GroupSpec], guard: Guard | None) -> None:
    """Raises StartError for whatever Ray has against it: it raises plain Exception too."""
    try:
        with short_messages(), keeping_sigterm():
            if guard is None:
                ray.init(
                    address=config.ray.address,
                    job_config=job_of_installed_modules(),
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            else:
                _start_private_cluster(config, specs, guard)
        applications.forget_other_clusters()
        if guard is None:
            joined.check_environment(CLUSTER_VARIABLES)
    except ConfigError:
        raise
    except Exception as error:
        what = "did not start" if guard else f"at {config.ray.address} (--ray-address) cannot be joined"
        raise StartError(f"Ray {what}: {plain_reason(str(error))}") from error


def _start_private_cluster(config: ServingConfig, specs: Sequence[GroupSpec], guard: Guard) -> None:
    needed = sum(s.cpus_per_rank * s.parallel.tp_size * s.entry.most_groups for s in specs)
    with suppress(FileNotFoundError):
        tempfile.gettempdir()  # this process keeps its own, whatever its children get
    with (
        _environment(cluster_environment(guard.directory)),
        only_needed_processes(),
        patient_start(PROCESS_TIMEOUT_S),
        _no_hang_up(),
    ):
        ray.init(
            address="local",
            job_config=job_of_installed_modules(),
            num_cpus=config.ray.num_cpus or max(read_machine().num_cpus, math.ceil(needed)) + _PLACES_FOR_OTHERS,
            # One machine: no name, no route and no firewall of its network matters.
            _node_ip_address="127.0.0.1",
            # Nothing goes through it but what Serve keeps of deployments.
            object_store_memory=OBJECT_STORE_BYTES,
            _plasma_directory=str(object_store_directory(guard.directory)),
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
def _no_hang_up() -> Iterator[None]:
    """What is started within the block never gets SIGHUP, which a terminal that is closed sends to all that was started from it:
    Ray's processes are needed until this one has drained. Here it waits for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    config: ServingConfig, specs: Sequence[GroupSpec], report: Callable[[str], None], look_at_host: Callable[[], Host]
) -> tuple[Ports, int | None, ClusterOperations]:
    """Where the first gateway listens, where it shows metrics, and what changes that which is served."""
    before = _served_before()
    joined.check_replaceable(before, config.ray)  # again: another command may have deployed something since
    placements = _placements(config, specs, report)
    if config.tenancy is not None:
        from serving.tenants.authority.actor import start_authority  # noqa: PLC0415
        from serving.tenants.store.store import database_url  # noqa: PLC0415

        start_authority(database_url(config.tenancy), refresh_s=config.tenancy.refresh_s)
    mark = joined.fingerprint(config, specs)
    is_taken_over = config.ray.detached and joined.was_deployed(mark) and APP_NAME in applications.our_applications()
    if before is None or not is_taken_over:
        joined.remember_deployed(None)
        stop_autoscaler(STOP_TIMEOUT_S)  # one of before knows other groups
        owner = Owner(job=this_job(), is_detached=config.ray.detached)
        served = first_served(config.models, specs, before, owner)
        write_served(served)
        try:
            handle = _run(config, served, specs, placements, report)
        except BaseException:
            if before is not None:  # gateways that are left go on as before
                write_served(msgspec.structs.replace(before, generation=served.generation + 1, owner=owner))
            raise
        joined.remember_deployed(mark if config.ray.detached else None)
        operations = ClusterOperations(config, served, look_at_host)
    else:
        report("taking over what is deployed already")
        handle = applications.handle(Gateway.__name__, APP_NAME)
        # The command before, where it still runs, sees by the generation that it is no longer the one that decides.
        before = msgspec.structs.replace(
            before, generation=before.generation + 1, owner=Owner(job=this_job(), is_detached=True)
        )
        write_served(before)
        operations = ClusterOperations(config, before, look_at_host)
        operations.finish_interrupted(report)
    # A broadcast, unlike a call that is routed, asks nobody how busy he is, and so leaves nothing behind when that is late.
    ports: list[Ports] = handle.broadcast("ready").results(timeout_s=STOP_TIMEOUT_S)
    metrics_ports: list[int | None] = handle.broadcast("metrics_port").results(timeout_s=STOP_TIMEOUT_S)
    operations.start_autoscaler()
    return ports[0], metrics_ports[0], operations


def _served_before() -> Served | None:
    """What the cluster serves, unless its groups and gateways have gone since it was written down. Raises RayError."""
    return _read_served() if applications.our_applications() else None


def _read_served() -> Served | None:
    """None too for a record of another version: its stack is deployed anew."""
    try:
        return read_served()
    except msgspec.DecodeError as error:
        logger.warning("what was served before cannot be read, and everything is deployed anew: %s", error)
        return None


def _placements(
    config: ServingConfig, specs: Sequence[GroupSpec], report: Callable[[str], None]
) -> dict[str, GroupPlacement]:
    """Of a group of each model, by the model's name. Raises ConfigError."""
    requests = joined.requests_of_specs(specs)
    planned = joined.wait_for_places(requests, config.ray.wait_for_nodes_s, report)
    return {request.name: placement for request, placement in zip(requests, planned, strict=True)}


def _run(
    config: ServingConfig,
    served: Served,
    specs: Sequence[GroupSpec],
    placements: Mapping[str, GroupPlacement],
    report: Callable[[str], None],
) -> DeploymentHandle[Any]:
    """All applications; those of models that are served no more are ended first, for their places."""
    serve.start(proxy_location="Disabled")
    wanted = {APP_NAME, *(app_name(spec.card.name) for spec in specs)}
    if gone := applications.our_applications() - wanted:
        report(f"ending {', '.join(sorted(gone))}")
        applications.delete(gone, config.gateway.drain_timeout_s + 2 * STOP_TIMEOUT_S)
    models = [
        applications.model_target(
            config,
            spec,
            placements[spec.card.name],
            num_groups=spec.card.num_groups,
            revision=served.models[spec.card.name].revision,
        )
        for spec in specs
    ]
    return applications.run([*models, applications.gateway_target(config)], wait=True)[-1]
