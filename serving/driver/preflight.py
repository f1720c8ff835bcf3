"""The start's checks in their order, and what they decide: ports, sizes, and where things lie."""

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from model_parallel.native import check_wanted_instruction_set, is_ready
from model_parallel.python_process import module_command
from serving.admin.operator_key import check_operator_key
from serving.config import ChatConfig, ModelEntry, ServingConfig, TenancyConfig, log_format, log_level
from serving.driver.checks import (
    StartRefusedError,
    check_cache,
    check_compiler,
    check_cpus,
    check_file_size,
    check_gpus,
    check_loopback,
    check_ports,
    check_threads,
)
from serving.driver.environment import cluster_parent
from serving.driver.held_ports import HeldPorts
from serving.gateway.core.resume_tokens import load_key
from serving.gateway.http.listener import make_room
from serving.gateway.server import check_admin_listening, check_listening, check_protobuf
from serving.gateway.tls import load_tls
from serving.models.fetch import KNOWN_MODELS
from serving.models.group_spec import GroupSpec, check_memory, resolve_models
from serving.models.sizes import Host, describe_sizes, num_ranks, this_host
from serving.observability.tracing import open_tracing

CHECK_TIMEOUT_S = 300.0
"""Of a checkpoint's files; comparing a tied head reads it."""


@dataclass(kw_only=True, slots=True)
class Preflight:
    """A configuration that was checked. `finish` waits for what is still looked at beside."""

    config: ServingConfig
    """With ports moved where that was needed."""
    specs: list[GroupSpec]
    """Of a private cluster; of one that is joined they are made when its nodes are known."""
    parent: Path | None
    """Where a private cluster's directory is made."""
    notes: list[str] = field(default_factory=list)
    """What was chosen, for the terminal."""
    warnings: list[str] = field(default_factory=list)
    ports: HeldPorts = field(default_factory=HeldPorts)
    _checks: "list[subprocess.Popen[str]]" = field(default_factory=list)
    _compilation: "subprocess.Popen[bytes] | None" = None

    def finish(self) -> None:
        """Wait for the checks of the checkpoints. Raises StartRefusedError."""
        problems = []
        try:
            for process in self._checks:
                output, _ = process.communicate(timeout=CHECK_TIMEOUT_S)
                problems += _problems(process.returncode, output)
        except subprocess.TimeoutExpired as error:
            raise StartRefusedError([f"the checkpoint could not be checked within {CHECK_TIMEOUT_S:g} s"]) from error
        finally:
            self._end_checks()
        if problems:
            self.close()
            raise StartRefusedError(problems)

    def take_ports(self) -> HeldPorts:
        """For a stack that has started, which closes them when it has stopped."""
        taken, self.ports = self.ports, HeldPorts()
        return taken

    def close(self) -> None:
        """Free the ports; end what runs beside. Compilation that nobody waits for is ended too; ranks would begin anew."""
        self.ports.close()
        self._end_checks()
        if self._compilation is not None:
            self._compilation.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._compilation.wait(10.0)

    def _end_checks(self) -> None:
        for process in self._checks:
            if process.poll() is None:
                process.kill()
            process.wait(10.0)
            if process.stdout is not None:
                process.stdout.close()
        self._checks = []


def _problems(status: int | None, output: str) -> list[str]:
    """Of a check's process: JSON on its last line, and anything else is a crash."""
    with suppress(ValueError, IndexError):
        return [str(problem) for problem in json.loads(output.strip().splitlines()[-1])]
    return [f"the checkpoint could not be checked: its process ended with status {status}"]


def check_environment() -> None:
    """Tell wrong settings of this process here, before others that inherit them start. Raises ConfigError."""
    open_tracing().close()
    log_level()
    log_format()
    check_wanted_instruction_set()


def begin(config: ServingConfig, host: Host | None = None) -> Preflight:
    """Check everything that takes no time, and begin the rest. Raises StartRefusedError with all problems of a kind, and
    ConfigError, CheckpointError, FetchError."""
    joins = config.ray.address is not None
    has_keys = config.tenancy is not None
    check_protobuf()
    check_listening(config.gateway, has_keys=has_keys)
    check_admin_listening(config.admin, has_keys=has_keys, insecure=config.gateway.insecure)
    check_environment()
    if config.tenancy is not None:
        _check_database(config.tenancy, joins=joins)
    elif config.serves_admin:
        check_operator_key()
    if config.gateway.tls is not None:
        load_tls(config.gateway.tls)
    if config.gateway.resume_key_file is not None:
        load_key(config.gateway.resume_key_file)
    if not joins:  # the gateways of another cluster run on other machines
        check_loopback()
        make_room(config.gateway)
        check_file_size()
    ports = HeldPorts()
    try:
        return _begin_holding(ports, config, host)
    except BaseException:
        ports.close()
        raise


def _begin_holding(ports: HeldPorts, config: ServingConfig, host: Host | None) -> Preflight:
    """What follows when all that the configuration names is well."""
    joins = config.ray.address is not None
    config, notes, problems = check_ports(config, ports.hold)
    if problems:
        raise StartRefusedError(problems)
    parent = None if joins else cluster_parent()
    warnings = [warning for warning in (check_cache(),) if warning]
    specs: list[GroupSpec] = []
    if not joins:
        host = host or this_host()
        if problem := check_gpus(config.models, host.num_gpus):
            raise StartRefusedError([problem])
        check_threads(host.machine, sum(map(num_ranks, config.models)))
        specs, told, worries = _sizes(config, host)
        notes += told
        warnings += worries
    checks = [check for entry in config.models for check in _checkpoint_checks(entry)]
    return Preflight(
        config=config,
        specs=specs,
        parent=parent,
        notes=notes,
        warnings=warnings,
        ports=ports,
        _checks=checks,
        _compilation=_begin_compilation() if any(spec.parallel.device == "cpu" for spec in specs) else None,
    )


def _check_database(tenancy: TenancyConfig, *, joins: bool) -> None:
    """A server that joins a cluster may find its own authority there, which has the database."""
    from serving.tenants.store.owner import check_not_in_use  # noqa: PLC0415  # sqlalchemy is imported where there are tenants
    from serving.tenants.store.store import database_url  # noqa: PLC0415
    from serving.tenants.store.url import checked_url  # noqa: PLC0415

    url = database_url(tenancy)
    checked_url(url)
    if not joins:
        check_not_in_use(url)


def check_model(entry: ModelEntry, host: Host, *, is_private: bool) -> Preflight:
    """The same for one model that comes to a stack that runs, or that replaces one of its own. `host` is what it finds there.
    Returns when all is checked. Raises what `begin` and `finish` raise."""
    config = ServingConfig(models=(entry,))
    if is_private:
        specs, notes, warnings = _sizes(config, host)
    else:
        specs = resolve_models(config.models, host)
        notes, warnings = [describe_sizes(spec.entry, spec.model) for spec in specs], list(specs[0].warnings)
    checked = Preflight(
        config=config,
        specs=specs,
        parent=None,
        notes=notes,
        warnings=warnings,
        _checks=_checkpoint_checks(entry),
    )
    checked.finish()
    return checked


def _sizes(config: ServingConfig, host: Host) -> tuple[list[GroupSpec], list[str], list[str]]:
    """(specifications, what was chosen, warnings). Raises ConfigError for what does not fit."""
    specs = resolve_models(config.models, host)
    on_cpu = [spec for spec in specs if spec.parallel.device == "cpu"]
    if on_cpu:
        check_memory(on_cpu, host.machine)
    num_threads = sum(num_ranks(spec.entry) * spec.parallel.num_threads for spec in on_cpu)
    worries = [check_cpus(host.machine, num_threads), check_compiler() if on_cpu else ""]
    return (
        specs,
        [describe_sizes(spec.entry, spec.model) for spec in specs],
        [
            *(worry for worry in worries if worry),
            *(warning for spec in specs for warning in spec.warnings),
        ],
    )


def _checkpoint_checks(entry: ModelEntry) -> "list[subprocess.Popen[str]]":
    """Of the model's files, and of its draft model's, which nobody chats with. Known models were checked when they were
    fetched."""
    wanted = [(entry.source, entry.chat)]
    if entry.draft_model is not None:
        wanted.append((entry.draft_model, ChatConfig(format="none")))
    return [_checkpoint_check(source, chat) for source, chat in wanted if source not in KNOWN_MODELS]


def _checkpoint_check(source: str, chat: ChatConfig | None) -> "subprocess.Popen[str]":
    """In a process of its own, which may load torch while this one loads Ray."""
    settings = [] if chat is None else [chat.model_dump_json(exclude_unset=True)]
    return subprocess.Popen(
        module_command("serving.models.verify", source, *settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _begin_compilation() -> "subprocess.Popen[bytes] | None":
    """Compile what ranks will need while Ray starts; they wait for it, and none compiles by itself."""
    if is_ready():
        return None
    return subprocess.Popen(
        module_command("model_parallel.native"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
