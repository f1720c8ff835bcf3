"""The `packtrain` command. Ray and torch are imported only by the commands that need them."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from model_parallel.errors import EngineError
from protos import inference_pb2 as pb
from serving.cli import bench as bench_commands
from serving.cli import inspect, plan
from serving.cli import tenants as tenants_cli
from serving.client.client import Client, StreamTimes, chat_prompt, explain
from serving.client.tls import CaFile, CertFile, KeyFile, UseTls, client_tls
from serving.config import ServingConfig, api_key, load_config, parse_config, prepare_environment
from serving.models.fetch import KNOWN_MODELS, FetchError, fetch_model

if TYPE_CHECKING:
    from serving.driver.app import RunningApp

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ADDRESS = "127.0.0.1:50051"
EXIT_CONFIG = 78
"""sysexits.h EX_CONFIG: starting again will not help."""
DEMO_QUESTION = "What is the capital of France?"
REQUEST_TIMEOUT_S = 600.0

app = typer.Typer(
    name="packtrain",
    help="Llama 2 on your own machines: tensor-parallel replica groups over Ray, behind a gRPC gateway.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, highlight=False)

Address = Annotated[str, typer.Option(help="Where the gateway listens.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Served model; needed when there are several.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to answer with.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer. Drawn when not given.")]


def main() -> None:
    """Entry point: errors that a user can mend end in one line and a telling exit status."""
    try:
        app()
    except (EngineError, FetchError) as error:
        _fail(str(error), EXIT_CONFIG)
    except ConnectionError as error:
        _fail(str(error), 1)
    except grpc.RpcError as error:
        _fail(explain(error), 1)


def _fail(message: str, status: int) -> None:
    console.print(f"[bold red]error:[/] {message}", soft_wrap=True)
    sys.exit(status)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it, one small model is served.")] = None,
    source: Annotated[
        str | None, typer.Option("--model", help="Serve this instead: a known name, directory or GGUF file.")
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks of each group.")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Replica groups of each model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int8: weights in eight bits.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of gRPC; 0 picks a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of HTTP; 0 picks a free one.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening beyond loopback without keys.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help='Ray cluster to join ("auto"); a private one is started if unset.')
    ] = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain and stop."""
    loaded = load_config(config) if config else default_config()
    model_flags = {
        "source": source,
        "tensor_parallel_size": tp,
        "num_groups": groups,
        "dtype": dtype,
        "quantization": quantization,
        "device": device,
    }
    if source is not None:
        model_flags["name"] = Path(source).stem if Path(source).exists() else source
    gateway_flags = {"host": host, "port": port, "http_port": http_port, "insecure": insecure or None}
    final = _overridden(loaded, models=model_flags, gateway=gateway_flags, ray={"address": ray_address})
    with _running(final) as running:
        names = ", ".join(entry.name for entry in final.models)
        http = "" if running.http_url is None else f" and [bold]{running.http_url}/v1[/] (HTTP)"
        console.print(f"[bold green]serving[/] {names} at [bold]{running.address}[/] (gRPC){http}. Ctrl-C stops.")
        if running.admin is not None:
            console.print(f"packtrain.v1.Admin at [bold]{final.admin.host}:{running.admin.port}[/], for admin keys")
        tls = "" if final.gateway.tls is None else "--tls "
        console.print(f'try: packtrain generate {tls}--address {running.address} "{DEMO_QUESTION}"')
        _wait_for_signal()


@app.command()
def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = DEMO_QUESTION,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")] = 2,
) -> None:
    """Start the whole stack on this machine, ask one question over gRPC, print the streamed answer, stop."""
    started_s = time.perf_counter()
    config = _overridden(
        default_config(), models={"tensor_parallel_size": tp}, gateway={"port": 0, "http_port": 0}, ray={}
    )
    with _running(config) as running, Client(running.address) as client:
        console.print(
            f"up after {time.perf_counter() - started_s:.1f} s; {tp} tensor-parallel ranks, gRPC at {running.address}"
        )
        console.print(f"[bold]{question}[/]")
        request = pb.GenerateRequest(
            model=DEFAULT_MODEL,
            prompt=chat_prompt([("user", question)]),
            sampling=pb.Sampling(temperature=0.0, max_tokens=128),
        )
        _, times, usage = _print_stream(client, request)
        _print_speed(times, usage)
        console.print("stopping")
    console.print(f"done after {time.perf_counter() - started_s:.1f} s")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask, or with --raw the text to continue.")],
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens of this mass.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat format.")] = False,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """LeaseRequest a running gateway once and print the answer as it comes."""
    with _client(address, tls, ca, cert, key) as client:
        client.wait_until_connected()
        sampling = pb.Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop or [])
        if seed is not None:
            sampling.seed = seed
        request = pb.GenerateRequest(
            model=model or _only_model(client),
            prompt=pb.Prompt(text=prompt) if raw else chat_prompt([("user", prompt)]),
            sampling=sampling,
        )
        _, times, usage = _print_stream(client, request)
        _print_speed(times, usage)


@app.command()
def chat(
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Talk with a running gateway; an empty line or Ctrl-D ends it."""
    with _client(address, tls, ca, cert, key) as client:
        client.wait_until_connected()
        name = model or _only_model(client)
        messages: list[tuple[str, str]] = [("system", system)] if system else []
        while line := _ask():
            messages.append(("user", line))
            request = pb.GenerateRequest(
                model=name,
                prompt=chat_prompt(messages),
                sampling=pb.Sampling(temperature=temperature, max_tokens=max_tokens),
            )
            answer, _, _ = _print_stream(client, request)
            messages.append(("assistant", answer))


@app.command()
def models(
    address: Address = DEFAULT_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """List what a running gateway serves."""
    with _client(address, tls, ca, cert, key) as client:
        client.wait_until_connected()
        table = Table("model", "parameters", "length", "dtype", "device", "TP", "groups", "chat", "licence")
        for card in client.models():
            size = f"{card.num_parameters / 1e6:,.0f} M"
            table.add_row(
                card.name, size, str(card.max_model_len), card.dtype, card.device, str(card.tensor_parallel_size),
                str(card.num_groups), card.chat_format or "-", card.licence.name,
            )  # fmt: skip
        Console().print(table)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model that Packtrain knows where to get.")] = DEFAULT_MODEL,
) -> None:
    """Get a model's files into the cache; quick when they are there."""
    with _fetch_progress(name) as progress:
        path = fetch_model(name, progress)
    typer.echo(path)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version("packtrain"))


inspect.register(app)
plan.register(app)
bench_commands.register(app)
tenants_cli.register(app)


def default_config() -> ServingConfig:
    """One small model on this machine, as `make serve` and `make demo` run it."""
    entry = {"name": DEFAULT_MODEL, "source": DEFAULT_MODEL, "tensor_parallel_size": 2, "dtype": "bfloat16"}
    return parse_config({"models": [entry]}, origin="the default configuration")


def _overridden(
    config: ServingConfig, *, models: dict[str, Any], gateway: dict[str, Any], ray: dict[str, Any]
) -> ServingConfig:
    """`config` with the given flags in place; None leaves a field alone."""
    data = config.model_dump()
    for section, flags in (
        (data["gateway"], gateway),
        (data["ray"], ray),
        *((entry, models) for entry in data["models"]),
    ):
        section.update({key: value for key, value in flags.items() if value is not None})
    return parse_config(data, origin="the configuration with the flags given")


@contextmanager
def _running(config: ServingConfig) -> "Iterator[RunningApp]":
    """The whole stack, stopped when the block is left, also by SIGTERM and Ctrl-C."""
    _raise_on_sigterm()
    for entry in config.models:
        if entry.source in KNOWN_MODELS:
            with _fetch_progress(entry.source) as progress:
                fetch_model(entry.source, progress)
    prepare_environment()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _stage("importing Ray") as stage:
        from serving.driver.app import start

        running = start(config, stage.report, stage.on_load)
    _raise_on_sigterm()
    try:
        yield running
    finally:
        with _stage("draining and stopping"):
            running.stop()


def _raise_on_sigterm() -> None:
    """Leave in good order on SIGTERM.

    To be called again after Ray has started, which puts a handler in front: that one aborts the process three seconds later.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        signal.alarm(0)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)


def _wait_for_signal() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("stopping: no new requests, running ones may finish")


@dataclass(frozen=True, slots=True)
class _Stage:
    """A line that says what is going on, for how long and, where that is known, how far it is."""

    progress: Progress
    task: TaskID

    def report(self, stage: str) -> None:
        """A new stage begins; it is also printed where there is no terminal."""
        self.progress.update(self.task, description=stage, completed=0, total=None)
        if not console.is_terminal:
            console.print(stage)

    def on_load(self, done_bytes: int, total_bytes: int) -> None:
        self.progress.update(self.task, completed=done_bytes, total=total_bytes)


@contextmanager
def _stage(first: str) -> Iterator[_Stage]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        stage = _Stage(progress, progress.add_task(first, total=None))
        stage.report(first)
        yield stage


@contextmanager
def _fetch_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _only_model(client: Client) -> str:
    names = [card.name for card in client.models()]
    if len(names) != 1:
        raise typer.BadParameter(
            f"{len(names)} models are served ({', '.join(names)}); choose one", param_hint="--model"
        )
    return names[0]


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _client(address: str, tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> Client:
    return Client(address, api_key=api_key(), tls=client_tls(tls, ca, cert, key))


def _print_stream(client: Client, request: pb.GenerateRequest) -> tuple[str, StreamTimes, pb.Usage]:
    chunks, times = client.stream(request, timeout_s=REQUEST_TIMEOUT_S)
    parts: list[str] = []
    usage = pb.Usage()
    for chunk in chunks:
        parts.append(chunk.text)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        if chunk.HasField("usage"):
            usage = chunk.usage
    sys.stdout.write("\n")
    return "".join(parts), times, usage


def _print_speed(times: StreamTimes, usage: pb.Usage) -> None:
    first = "-" if times.ttft_s is None else f"{times.ttft_s * 1e3:.0f} ms"
    rate = "-" if times.tokens_per_s is None else f"{times.tokens_per_s:.1f} tokens/s"
    console.print(
        f"time to first token {first}, then {rate}; {usage.prompt_tokens} prompt and {usage.completion_tokens} answer tokens"
    )


if __name__ == "__main__":
    main()
