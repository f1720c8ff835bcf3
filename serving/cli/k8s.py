"""`packtrain k8s`: values of the Helm chart from a configuration, checked by arithmetic, and what its pods run around Ray."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from model_parallel.errors import ConfigError
from model_parallel.memory import DEVICES, GIB
from serving.cli.plan import choose_device
from serving.config import load_config, ray_address
from serving.contracts.yaml_files import read_yaml
from serving.driver import kubernetes
from serving.driver.chart_values import merged
from serving.driver.kubernetes import Machine

EXIT_DOES_NOT_FIT = 1
_POLL_S = 0.5

k8s = typer.Typer(help="Packtrain on Kubernetes: see helm/packtrain and docs/operations.md.", no_args_is_help=True)

Gpu = Annotated[str | None, typer.Option(help=f"Kind of GPU: one of {', '.join(DEVICES)}.")]
MemoryGib = Annotated[float | None, typer.Option(min=0.001, help="Memory of a GPU of another kind, in GiB.")]
SameAs = Annotated[
    list[str] | None,
    typer.Option("--same-as", help="NAME=KNOWN, for a model whose files are not here: chat=llama-2-70b-chat."),
]


@k8s.command()
def render(
    config: Annotated[Path, typer.Argument(help="YAML file that `packtrain serve` reads.")],
    gpu: Gpu = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of a machine; 0 for CPUs alone.")] = 0,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs of a machine; worked out if unset.")] = None,
    memory_per_node_gib: Annotated[
        int | None, typer.Option(min=1, help="Memory of a machine, in GiB; worked out if unset.")
    ] = None,
    gpu_memory_gib: MemoryGib = None,
    claim: Annotated[str | None, typer.Option(help="PersistentVolumeClaim with the weights, for /models.")] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="You have accepted the LLAMA 2 Community License.")
    ] = False,
    tls_secret: Annotated[str | None, typer.Option(help="Secret with the certificate of gateway.tls.")] = None,
    database_secret: Annotated[
        str | None, typer.Option(help="Secret with the password of tenancy.database, under `password`.")
    ] = None,
    same_as: SameAs = None,
) -> None:
    """Print values of the Helm chart for a configuration, with machines, memory and timeouts worked out.

    Ends with status 1 and the numbers when such machines cannot hold it, or the values would not pass `check`.
    """
    serving = load_config(config)
    machine = Machine(
        num_gpus=gpus_per_node,
        gpu=choose_device(gpu, memory_gib=gpu_memory_gib, bandwidth_gb_per_s=1.0 if gpu_memory_gib else None)
        if gpus_per_node
        else None,
        num_cpus=cpus_per_node,
        memory_bytes=None if memory_per_node_gib is None else memory_per_node_gib * GIB,
    )
    pairs = _pairs(same_as)
    plan = kubernetes.plan(serving, machine, kubernetes.model_configs(serving, pairs))
    if plan.problems:
        _refuse(plan.problems)
    values = kubernetes.values(
        serving,
        plan,
        claim=claim,
        accepts_licence=accept_license,
        tls_secret=tls_secret,
        database_secret=database_secret,
    )
    if problems := kubernetes.check(values, machine.gpu, pairs).problems:
        _refuse(problems)
    for line in kubernetes.explained(serving, plan):
        typer.echo(f"# {line}")
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


@k8s.command()
def check(
    values: Annotated[list[Path], typer.Argument(help="Value files of the Helm chart, the later over the earlier.")],
    gpu: Gpu = None,
    gpu_memory_gib: MemoryGib = None,
    same_as: SameAs = None,
) -> None:
    """Say whether the chart with these values can work: its schema, weights, KV cache, GPUs, machines, memory, timeouts.

    Ends with status 1 when not. What would be insecure `helm template` tells, which has the chart's other rules.
    """
    given: dict[str, Any] = {}
    for path in values:
        given = merged(given, _read_values(path))
    device = None
    if gpu is not None or gpu_memory_gib is not None:
        device = choose_device(gpu, memory_gib=gpu_memory_gib, bandwidth_gb_per_s=1.0 if gpu_memory_gib else None)
    verdict = kubernetes.check(given, device, _pairs(same_as))
    for line in verdict.lines:
        typer.echo(line)
    if verdict.problems:
        _refuse(verdict.problems)
    typer.echo("these values can work")


@k8s.command()
def drain(
    timeout_s: Annotated[float, typer.Option(min=0, help="How long requests on this node may go on.")] = 60.0,
    address: Annotated[str | None, typer.Option(help="Ray's control store; $RAY_ADDRESS if unset.")] = None,
) -> None:
    """What a pod runs before it ends: its gateway and its groups take nothing new and end when their requests have.

    The head and the driver wait instead for other nodes that are ending. Status 0 in any case: the pod ends whatever this says.
    """
    from serving.driver.drain import drain_node  # Ray takes seconds

    where = address or ray_address()
    if where is None:
        raise ConfigError("the address of Ray's control store is missing: give --address, or set RAY_ADDRESS")
    # kubelet has its own clock for this; nothing here may outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    typer.echo(drain_node(where, timeout_s))


@k8s.command("wait-for-weights")
def wait_for_weights(
    directory: Annotated[Path, typer.Argument(help="Where the weights come to lie.")],
    marker: Annotated[str, typer.Argument(help="File there that the copy of these weights ends with.")],
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to wait.")] = 4 * 3600.0,
    every_s: Annotated[float, typer.Option(min=0.1, help="How often to tell how far it is.")] = 10.0,
) -> None:
    """Wait until the copy of the weights is complete, and tell how many bytes there are and how fast they come."""
    deadline_s = time.monotonic() + timeout_s
    before, told_s = 0, time.monotonic()
    while not (directory / marker).exists():
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise ConfigError(f"{directory} has no {marker} after {timeout_s:g} s: see the log of the weights Job")
        if now_s - told_s >= every_s:
            there = kubernetes.bytes_below(directory)
            rate = max(0, there - before) / (now_s - told_s)
            typer.echo(f"{there / GIB:.2f} GiB of weights are there, {rate / 1e6:.0f} MB/s")
            before, told_s = there, now_s
        time.sleep(_POLL_S)
    typer.echo(f"{kubernetes.bytes_below(directory) / GIB:.2f} GiB of weights are complete")


def _pairs(same_as: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in same_as or []:
        name, equals, known = text.partition("=")
        if not (name and equals and known):
            raise ConfigError(f"--same-as is {text!r} and must be NAME=KNOWN, as in chat=llama-2-70b-chat")
        pairs[name] = known
    return pairs


def _read_values(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(data).__name__}")
    return data


def _refuse(problems: tuple[str, ...]) -> None:
    console = Console(stderr=True, highlight=False)
    for problem in problems:
        console.print(f"[bold red]does not work:[/] {problem}", soft_wrap=True)
    raise typer.Exit(EXIT_DOES_NOT_FIT)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(k8s, name="k8s")
