"""`packtrain doctor`: is this machine, and this configuration, fit to serve?"""

import datetime
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from model_parallel.directories import cache_choice
from model_parallel.errors import ConfigError, EngineError
from model_parallel.gpus import torch_has_cuda, visible_gpus
from model_parallel.machine import Machine, read_machine
from model_parallel.memory import GIB
from model_parallel.native import is_ready
from serving.cli.serve import configured, default_config
from serving.cli.terminal import EXIT_CONFIG, standard_output
from serving.config import ServingConfig
from serving.driver.checks import (
    StartRefusedError,
    check_cache,
    check_compiler,
    check_file_size,
    check_loopback,
    check_ports,
    check_threads,
)
from serving.driver.environment import SHARED_MEMORY, cluster_parent, why_no_object_store
from serving.models.fetch import FetchError
from serving.models.sizes import STACK_BYTES, num_ranks

_OLDEST_CLOCK = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""Certificates and keys that were made for this version are valid after it."""


class Level(StrEnum):
    """How a finding counts."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Level
    subject: str
    text: str


def look_at_machine() -> Iterator[Finding]:
    """Everything that does not depend on a configuration."""
    machine = read_machine()
    yield from _cpus_and_memory(machine)
    yield _either("compiler", check_compiler(), _compiler())
    yield from _directories()
    yield _shared_memory()
    yield _gpus()
    yield from _surroundings()


def _cpus_and_memory(machine: Machine) -> Iterator[Finding]:
    limit = f", limited by {machine.cpu_limit}" if machine.cpu_limit else ""
    yield Finding(Level.OK, "CPUs", f"{machine.num_cpus} of {machine.num_host_cpus}{limit}")
    free, limit = machine.available_memory_bytes, ""
    if machine.memory_limit:
        limit = f", limited to {machine.total_memory_bytes / GIB:.2f} GiB by {machine.memory_limit}"
    text = f"{free / GIB:.2f} of {machine.total_memory_bytes / GIB:.2f} GiB are free{limit}"
    if free < STACK_BYTES:
        text += f"; Ray and the gateway alone take {STACK_BYTES / GIB:.2f} GiB: give it more memory"
    yield Finding(Level.PROBLEM if free < STACK_BYTES else Level.OK, "memory", text)


def _compiler() -> str:
    kept = "compiled before" if is_ready() else "code is compiled at the first start"
    return f"{shutil.which('g++') or 'none is needed'}; {kept}"


def _directories() -> Iterator[Finding]:
    path, _ = cache_choice()
    yield _either("cache", check_cache(), str(path))
    try:
        parent = cluster_parent()
    except ConfigError as error:
        yield Finding(Level.PROBLEM, "temporary files", str(error))
        return
    wanted = os.environ.get("TMPDIR")
    if wanted and Path(wanted).absolute() != parent:
        text = f"{parent}; TMPDIR ({wanted}) is missing, full, read-only, or its path is too long or not ASCII"
        yield Finding(Level.WARNING, "temporary files", text)
    else:
        yield Finding(Level.OK, "temporary files", str(parent))


def _shared_memory() -> Finding:
    if reason := why_no_object_store():
        text = f"{SHARED_MEMORY} {reason}: Ray keeps its objects with the temporary files; give a container more (--shm-size 1g)"
        return Finding(Level.WARNING, "shared memory", text)
    free = shutil.disk_usage(SHARED_MEMORY).free
    return Finding(Level.OK, "shared memory", f"{SHARED_MEMORY} has {free / GIB:.2f} GiB free")


def _gpus() -> Finding:
    gpus = visible_gpus()
    if not gpus:
        return Finding(Level.OK, "GPUs", "none; ranks compute on CPUs")
    names = ", ".join(
        f"{gpu.name} ({gpu.free_bytes / GIB:.0f} of {gpu.total_bytes / GIB:.0f} GiB free, compute capability "
        f"{'.'.join(map(str, gpu.capability))})"
        for gpu in gpus
    )
    if not torch_has_cuda():
        return Finding(
            Level.PROBLEM,
            "GPUs",
            f"{names}; the torch that is installed was built without CUDA: install a build with CUDA",
        )
    nccl = "NCCL" if importlib.util.find_spec("nvidia.nccl") or importlib.util.find_spec("triton") else "no NCCL found"
    level = Level.WARNING if nccl != "NCCL" and len(gpus) > 1 else Level.OK
    return Finding(level, "GPUs", f"{names}; {nccl}")


def _surroundings() -> Iterator[Finding]:
    proxies = sorted(
        name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    )
    text = f"{', '.join(proxies)}: not used for this machine's own addresses" if proxies else "none"
    yield Finding(Level.OK, "proxies", text)
    ray = sorted(name for name in os.environ if name.startswith("RAY_"))
    if ray:
        yield Finding(Level.OK, "Ray's variables", f"{', '.join(ray)}: not used by a private cluster")
    now = datetime.datetime.now(datetime.UTC)
    if now < _OLDEST_CLOCK:
        yield Finding(Level.PROBLEM, "clock", f"it says {now:%Y-%m-%d}: certificates will not be valid; set it")
    else:
        yield Finding(Level.OK, "clock", f"{now:%Y-%m-%d %H:%M:%S} UTC")
    try:
        check_loopback()
        yield Finding(Level.OK, "loopback", "127.0.0.1 connects")
    except ConfigError as error:
        yield Finding(Level.PROBLEM, "loopback", str(error))


def _either(subject: str, warning: str, fine: str) -> Finding:
    return Finding(Level.WARNING, subject, warning) if warning else Finding(Level.OK, subject, fine)


def look_at_config(config: ServingConfig) -> Iterator[Finding]:
    """What `packtrain serve` would refuse, and what it would choose."""
    _, moved, problems = check_ports(config)
    for text in moved:
        yield Finding(Level.WARNING, "ports", text)
    for text in problems:
        yield Finding(Level.PROBLEM, "ports", text)
    if problems:
        return
    from serving.driver.preflight import begin

    try:
        preflight = begin(config)
        try:
            preflight.finish()
        finally:
            preflight.close()
    except StartRefusedError as error:
        yield from (Finding(Level.PROBLEM, "configuration", text) for text in error.problems)
        return
    except (EngineError, FetchError) as error:
        yield Finding(Level.PROBLEM, "configuration", str(error))
        return
    for note in preflight.notes:
        if note not in moved:
            yield Finding(Level.OK, "model", note)
    yield Finding(Level.OK, "configuration", "can be served here")


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, model directory or GGUF file to check as well.")
    ] = None,
    source: Annotated[str | None, typer.Option("--model", help="Check this model as well.")] = None,
) -> None:
    """Check this machine, and a configuration or model if one is given. Ends with status 78 when something must be mended."""
    findings = [*look_at_machine(), *_checked(config, source)]
    console = standard_output()
    style = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
    for finding in findings:
        console.print(f"[{style[finding.level]}]{finding.level:>7}[/] ", end="")
        console.print(f"{finding.subject}: {finding.text}", markup=False, soft_wrap=True)
    if any(finding.level is Level.PROBLEM for finding in findings):
        raise typer.Exit(EXIT_CONFIG)


def _checked(config: Path | None, source: str | None) -> Iterator[Finding]:
    if config is None and source is None:
        yield from _default_limits()
        yield from _default_ports()
        return
    try:
        loaded = configured(config, source)
    except ConfigError as error:
        yield Finding(Level.PROBLEM, "configuration", str(error))
        return
    yield from look_at_config(loaded)


def _default_limits() -> Iterator[Finding]:
    """What a configuration's own checks look at where there is one."""
    from serving.gateway.http.listener import make_room

    config = default_config()
    checks: dict[str, Callable[[], None]] = {
        "processes": partial(check_threads, read_machine(), sum(map(num_ranks, config.models))),
        "open files": partial(make_room, config.gateway),
        "file size": check_file_size,
    }
    for subject, check in checks.items():
        try:
            check()
        except ConfigError as error:
            yield Finding(Level.PROBLEM, subject, str(error))
        else:
            yield Finding(Level.OK, subject, "enough for the default configuration")


def _default_ports() -> Iterator[Finding]:
    _, moved, problems = check_ports(default_config())
    for text in (*problems, *moved):
        yield Finding(Level.WARNING, "ports", text)
    if not (problems or moved):
        yield Finding(Level.OK, "ports", "those of the default configuration are free")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)
