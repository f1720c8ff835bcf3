"""The `packtrain chaos` command: faults for a stack that runs on this machine, and whether its clients noticed."""

from pathlib import Path
from typing import Annotated

import typer

from model_parallel.errors import ConfigError
from serving.cli.terminal import standard_output
from serving.config import api_key
from serving.contracts.addresses import parse_target


def chaos(
    address: Annotated[str, typer.Option(help="Where a gateway on this machine listens.")] = "127.0.0.1:50051",
    faults: Annotated[
        str, typer.Option(help="With commas between them: kill, stop, short-stop, slow, partition; in turn.")
    ] = "kill",
    at: Annotated[
        str, typer.Option(help="When, by the tokens that have come: start, middle, end or random.")
    ] = "random",
    turns: Annotated[int, typer.Option(min=1, help="Faults.")] = 10,
    streams: Annotated[int, typer.Option(min=1, max=256, help="Of each turn.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Of each stream.")] = 120,
    seed: Annotated[int, typer.Option(help="The same seed draws the same faults.")] = 1,
    model: Annotated[str, typer.Option(help="Served model; needed when there are several.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
    yes_i_own_this: Annotated[
        bool, typer.Option("--yes-i-own-this", help="Allow an address of this machine beyond loopback.")
    ] = False,
) -> None:
    """Kill, stop and slow down processes of a running stack, and cut its clients off, while streams run.

    Each stream is compared with what it brings alone; each fault must have been seen to happen. Ends with status 1 when anything
    is wrong. Other clients of that stack notice as much as these.
    """
    from bench.chaos.campaign import Campaign, Plan
    from bench.chaos.processes import LocalStack
    from bench.chaos.proxy import Proxy
    from bench.json_files import check_can_be_written, write_json
    from bench.recovery import percentiles

    check_can_be_written(json_file, "--json")
    target = parse_target(address)
    where = target.host_and_port
    if where is None or target.uses_tls:
        raise ConfigError(f"--address is {address!r}; it must be HOST:PORT of a gateway without TLS")
    if not (target.is_on_this_machine or yes_i_own_this):
        raise ConfigError(
            f"--address is {address!r}, which others can reach: its clients would be disturbed; --yes-i-own-this allows it"
        )
    plan = Plan(
        faults=tuple(name.strip() for name in faults.split(",") if name.strip()),
        point=at,
        num_turns=turns,
        num_streams=streams,
        num_tokens=tokens,
        seed=seed,
        model=model,
        api_key=api_key(),
    )
    console = standard_output()
    with Proxy(*where) as proxy:
        outcome = Campaign(plan, LocalStack(where[1]), proxy, lambda line: console.print(line, markup=False)).run()
    pauses = {name: percentiles(seconds) for name, seconds in outcome.pauses_s.items()}
    for name, figures in pauses.items():
        console.print(
            f"{name}: {outcome.observed[name]} of {outcome.planned[name]} happened; longest pause of a stream: median "
            f"{figures['p50_s']:.2f} s, p99 {figures['p99_s']:.2f} s, longest {figures['max_s']:.2f} s"
        )
    for line in outcome.found:
        console.print(line, markup=False)
    console.print("nothing was wrong" if not outcome.found else f"{len(outcome.found)} things were wrong")
    if json_file is not None:
        result = {
            "planned": outcome.planned,
            "observed": outcome.observed,
            "found": outcome.found,
            "pauses": pauses,
            "pauses_s": outcome.pauses_s,
        }
        write_json(result, json_file)
    if outcome.found:
        raise typer.Exit(1)


def register(parent: typer.Typer) -> None:
    """Add the command to the command line."""
    parent.command()(chaos)
