"""The `packtrain load` command: a load test of a running server, from flags or from a scenario file."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_parallel.errors import ConfigError
from serving.cli.terminal import standard_output
from serving.client.tls import CaFile, CertFile, KeyFile, client_tls
from serving.config import load_test_secret

if TYPE_CHECKING:
    from bench.loadtest.campaign import Wanted

_OF_JOIN = frozenset({"join", "processes", "yes_i_own_this", "ca", "cert", "key"})


def _what(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="What is sent", **more)


def _when(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="When", **more)


def _who(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="To whom, by whom", **more)


def _out(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="What is measured and written", **more)


def _many(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Several runs", **more)


def load(
    context: typer.Context,
    target: Annotated[str, _who("grpc://, grpcs://, http:// or https://, then HOST:PORT.")] = "grpc://127.0.0.1:50051",
    api: Annotated[
        str | None, _who("generate-stream, generate or score over gRPC; chat or completions over HTTP.")
    ] = None,
    model: Annotated[str | None, _who("Served model; needed when there are several.")] = None,
    processes: Annotated[int, _who("That send, on this machine.", min=1, max=256)] = 1,
    machines: Annotated[int, _who("Processes on other machines to wait for; they --join.", min=0, max=256)] = 0,
    listen: Annotated[str, _who("HOST:PORT where they join.")] = "127.0.0.1:50060",
    join: Annotated[str | None, _who("Send for the test that is led at HOST:PORT, and do nothing else.")] = None,
    yes_i_own_this: Annotated[bool, _who("Allow targets beyond loopback.", "--yes-i-own-this")] = False,
    scenario: Annotated[Path | None, _what("YAML file with tenants, their work and arrivals.")] = None,
    dataset_name: Annotated[str, _what("random, jsonl, sharegpt, azure, burstgpt, mooncake or csv.")] = "random",
    dataset_path: Annotated[Path | None, _what("File of that dataset.")] = None,
    input_len: Annotated[int, _what("Tokens of a random prompt.", min=1)] = 128,
    output_len: Annotated[int, _what("Tokens of an answer.", min=1)] = 128,
    prefix_len: Annotated[int | None, _what("Tokens at the beginning that requests share.", min=1)] = None,
    num_prefixes: Annotated[int, _what("Different beginnings.", min=1)] = 1,
    turns: Annotated[int, _what("Requests of a session, each with all that was said before.", min=1)] = 1,
    request_rate: Annotated[
        float | None,
        _when("Requests a second; inf sends all at once. Unset: inf with --num-prompts, else 1.", min=0.001),
    ] = None,
    burstiness: Annotated[float, _when("1: Poisson; less: bursts; more: evenly.", min=0.01)] = 1.0,
    users: Annotated[int | None, _when("A closed loop instead: users with one request after another.", min=1)] = None,
    think_time: Annotated[float, _when("Mean seconds between a user's requests, or a session's turns.", min=0.0)] = 0.0,
    num_prompts: Annotated[int | None, _when("Requests in all; with turns, sessions.", min=1)] = None,
    max_concurrency: Annotated[int | None, _when("Requests in flight at a time.", min=1)] = None,
    duration: Annotated[
        float, _when("Seconds within which requests are sent; 3600 with --num-prompts.", min=0.001)
    ] = 60.0,
    drain: Annotated[float, _when("Seconds that answers may take afterwards.", min=0.0)] = 30.0,
    timeout: Annotated[float, _when("Seconds that one request may take.", min=0.001)] = 600.0,
    retries: Annotated[int, _when("Attempts of a refused request, when the server says when.", min=1)] = 1,
    seed: Annotated[int, _when("Of prompts and arrivals.", min=0)] = 0,
    warmup: Annotated[float, _out("Seconds cut from the beginning.", min=0.0)] = 0.0,
    cooldown: Annotated[float, _out("Seconds cut from the end of the arrivals.", min=0.0)] = 0.0,
    warmup_requests: Annotated[int, _out("Sent by each process before the clock starts.", min=0)] = 0,
    goodput: Annotated[
        list[str] | None, _out("Bound in ms that a good request keeps: ttft:500, tpot:50 or e2el:9000.")
    ] = None,
    metric_percentiles: Annotated[str, _out("Comma-separated.")] = "50,90,95,99,99.9",
    assertions: Annotated[
        list[str] | None,
        _out("Status 1 unless it holds: ttft_p99<500ms, small:tpot_median<=40ms, errors==0.", "--assert"),
    ] = None,
    json_file: Annotated[Path | None, _out("Result, with the keys of `vllm bench serve`.", "--json")] = None,
    csv_file: Annotated[Path | None, _out("A line for each request.", "--csv")] = None,
    html_file: Annotated[Path | None, _out("Report with plots, in one file.", "--html")] = None,
    repeats: Annotated[int, _many("Runs, with seeds of their own.", min=1, max=100)] = 1,
    sweep: Annotated[str | None, _many("Rates (or users) to run at: 1,2,4 or FROM:TO:COUNT.")] = None,
    search: Annotated[list[str] | None, _many("Find the highest rate that keeps this, such as ttft_p99<500ms.")] = None,
    search_from: Annotated[float, _many("Rate to begin with.", min=0.001)] = 1.0,
    search_to: Annotated[float, _many("Highest rate to try.", min=0.001)] = 10_000.0,
    search_precision: Annotated[float, _many("0.05: to 5 %.", min=0.005, max=1.0)] = 0.05,
    search_repeats: Annotated[int, _many("Runs at each rate, of which the majority decides.", min=1, max=25)] = 3,
    compare: Annotated[
        tuple[Path, Path] | None, _many("Compare two results, and do nothing else.", metavar="A.json B.json")
    ] = None,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Put load on a running server, and tell how it bore it.

    Latency counts from the moment at which each request was due. A run in which the client was the bottleneck is marked invalid.
    The key is read from $PACKTRAIN_API_KEY; where there are several tenants, a scenario says where each one's is.
    """
    given = _given(context)
    if "compare" in given:
        _alone(given, frozenset({"compare"}), "--compare")
        _compare(*context.params["compare"])
    elif "join" in given:
        _alone(given, _OF_JOIN, "--join")
        raise typer.Exit(_join(context.params))
    else:
        raise typer.Exit(_run(context.params, given))


def _given(context: typer.Context) -> dict[str, Any]:
    """Flags that stand on the command line."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            given[name] = value
    return given


def _alone(given: dict[str, Any], allowed: frozenset[str], flag: str) -> None:
    if extra := sorted(set(given) - allowed):
        raise ConfigError(f"{flag} goes without {', '.join('--' + name.replace('_', '-') for name in extra)}")


def _compare(first: Path, second: Path) -> None:
    from bench.loadtest.compare import compare, read_result, warnings
    from bench.loadtest.live import print_comparison

    a, b = read_result(first), read_result(second)
    notes = [f"{path.name}: {warning}" for path, result in ((first, a), (second, b)) for warning in warnings(result)]
    print_comparison(compare(a, b), (first.name, second.name), notes, standard_output())


def _join(flags: dict[str, Any]) -> int:
    from bench.loadtest.flags import parse_address
    from bench.loadtest.sender import join_with

    host, port = parse_address(flags["join"], "--join")
    tls = client_tls(False, flags["ca"], flags["cert"], flags["key"])
    return join_with(host, port, load_test_secret(), tls, flags["processes"], owns_targets=flags["yes_i_own_this"])


def _run(flags: dict[str, Any], given: dict[str, Any]) -> int:
    from bench.loadtest.campaign import run_campaign
    from bench.loadtest.flags import parse_address, scenario_from
    from bench.loadtest.leader import Senders

    if "listen" in given and not flags["machines"]:
        raise ConfigError("--listen needs --machines")
    host, port = parse_address(flags["listen"], "--listen", lowest_port=0)
    senders = Senders(
        num_processes=flags["processes"],
        num_joined=flags["machines"],
        listen_host=host,
        listen_port=port,
        secret=load_test_secret(),
        owns_targets=flags["yes_i_own_this"],
    )
    tls = client_tls(False, flags["ca"], flags["cert"], flags["key"])
    return int(asyncio.run(run_campaign(scenario_from(given), senders, tls, _wanted(flags, given), standard_output())))


def _wanted(flags: dict[str, Any], given: dict[str, Any]) -> "Wanted":
    from bench.loadtest.assertions import parse_assertion
    from bench.loadtest.campaign import Search, Wanted
    from bench.loadtest.flags import parse_percentiles, parse_sweep

    search = None
    if flags["search"]:
        if flags["repeats"] != 1:
            raise ConfigError("--repeats is not of a search, where --search-repeats says it")
        search = Search(
            slo=[parse_assertion(text, "--search") for text in flags["search"]],
            start=flags["search_from"],
            highest=flags["search_to"],
            precision=flags["search_precision"],
            repeats=flags["search_repeats"],
        )
    elif loose := [name for name in given if name.startswith("search_")]:
        raise ConfigError(f"--{loose[0].replace('_', '-')} needs --search")
    return Wanted(
        repeats=flags["repeats"],
        percentiles=parse_percentiles(flags["metric_percentiles"]),
        assertions=[parse_assertion(text) for text in flags["assertions"] or ()],
        sweep=parse_sweep(flags["sweep"]) if flags["sweep"] else (),
        search=search,
        json_file=flags["json_file"],
        csv_file=flags["csv_file"],
        html_file=flags["html_file"],
    )


def register(parent: typer.Typer) -> None:
    """Add the command to the command line."""
    parent.command()(load)
