"""The `packtrain` command. Ray and torch are imported only by the commands that need them."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.table import Table

from model_parallel.errors import EngineError
from protos import inference_pb2 as pb
from serving import __version__
from serving.cli import adapters, doctor, fleet, inspect, k8s, operations, plan, serve, simulate
from serving.cli import bench as bench_commands
from serving.cli import chaos as chaos_command
from serving.cli import load as load_command
from serving.cli import tenants as tenants_cli
from serving.cli.asking import print_speed, print_stream
from serving.cli.terminal import EXIT_CONFIG, fail, fetch_progress, help_width, standard_output
from serving.client.client import CONNECT_TIMEOUT_S, Client, chat_prompt, explain
from serving.client.conversation import fit
from serving.client.tls import CaFile, CertFile, KeyFile, UseTls, client_tls
from serving.config import api_key
from serving.contracts.addresses import parse_target
from serving.contracts.start_failure import StartError
from serving.models.fetch import FetchError, fetch_model

DEFAULT_ADDRESS = "127.0.0.1:50051"
EXIT_BUG = 70
"""sysexits.h EX_SOFTWARE."""

app = typer.Typer(
    name="packtrain",
    help="Llama 2 on your own machines: tensor-parallel replica groups over Ray, behind a gRPC gateway.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut long paths and words, also where no terminal shows them
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": help_width()},
)

Address = Annotated[
    str,
    typer.Option(
        help="Where the gateway listens: HOST:PORT, a URL, or a port. With commas between several of them, another one goes "
        "on when one is lost."
    ),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Served model; needed when there are several.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to answer with.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same answer. Drawn when not given.")
]


def main() -> None:
    """Entry point: whatever goes wrong ends in a line or two and a telling exit status. `--debug`, anywhere on the command
    line, shows tracebacks and what Ray and Serve say."""
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
        logging.basicConfig(level=logging.DEBUG)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(*_account(error))


def _account(error: Exception) -> tuple[str, int]:
    """(what is told, exit status)."""
    if isinstance(error, EngineError | FetchError):
        return str(error), EXIT_CONFIG
    if isinstance(error, grpc.RpcError):
        return explain(error), 1
    if isinstance(error, ConnectionError | TimeoutError | StartError):
        return str(error), 1
    if isinstance(error, UnicodeEncodeError) and error.encoding not in ("utf-8", "utf-16-le"):
        return (
            f"{error.encoding}, the encoding of the output, has no {error.object[error.start]!r}; set PYTHONIOENCODING=utf-8"
        ), EXIT_CONFIG
    if isinstance(error, UnicodeError):
        return "text that was given is not UTF-8, or has half of a character", EXIT_CONFIG
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", EXIT_CONFIG
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first} (a bug, or something unforeseen; --debug shows where)", EXIT_BUG


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def packtrain(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what Ray and Serve log.")] = False,
) -> None:
    """Llama 2 on your own machines: tensor-parallel replica groups over Ray, behind a gRPC gateway."""


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
    """Ask a running gateway once and print the answer as it comes."""
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
        _, times, usage = print_stream(client, request)
        print_speed(times, usage)


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
        card = client.stub.GetModel(pb.GetModelRequest(model=name), timeout=CONNECT_TIMEOUT_S).model
        messages: list[tuple[str, str]] = [("system", system)] if system else []
        while line := _ask():
            room = fit(client.stub, card, [*messages, ("user", line)], max_tokens)
            if room is None:
                sys.stderr.write(f"that is too long for this model, which reads {card.max_model_len} tokens in all\n")
                continue
            if room.num_left_out:
                sys.stderr.write(f"({room.num_left_out} earlier messages no longer fit the model and are left out)\n")
            request = pb.GenerateRequest(
                model=name,
                prompt=chat_prompt(room.messages),
                sampling=pb.Sampling(temperature=temperature, max_tokens=room.max_tokens),
            )
            answer, _, _ = print_stream(client, request)
            messages = [*room.messages, ("assistant", answer)]


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
        standard_output().print(table)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model that Packtrain knows where to get.")] = serve.DEFAULT_MODEL,
) -> None:
    """Get a model's files into the cache; quick when they are there."""
    with fetch_progress(name) as progress:
        path = fetch_model(name, progress)
    typer.echo(path)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


serve.register(app)
doctor.register(app)
inspect.register(app)
plan.register(app)
bench_commands.register(app)
load_command.register(app)
chaos_command.register(app)
tenants_cli.register(app)
simulate.register(app)
k8s.register(app)
fleet.register(app)
operations.register(app)
adapters.register(app)


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
    # A comma at the end separates nothing; where there is nothing besides, that is told.
    targets = [parse_target(each) for each in address.split(",") if each.strip()] or [parse_target("")]
    uses_tls = tls or any(target.uses_tls for target in targets)
    return Client(*(target.address for target in targets), api_key=api_key(), tls=client_tls(uses_tls, ca, cert, key))


if __name__ == "__main__":
    main()
