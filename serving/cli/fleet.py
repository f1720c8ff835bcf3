"""`packtrain status` and `packtrain autoscaler`: the replica groups, and why there are so many."""

import time
import urllib.error
import urllib.request
from datetime import datetime
from http.client import HTTPException
from typing import Annotated

import msgspec
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving.cli.durations import duration_s
from serving.cli.terminal import standard_output
from serving.contracts.addresses import Target, parse_target
from serving.contracts.fleet import Fleet, FleetDecision, FleetModel

DEFAULT_METRICS_PORT = 9464
DEFAULT_METRICS_ADDRESS = f"127.0.0.1:{DEFAULT_METRICS_PORT}"
TIMEOUT_S = 10.0
MAX_BYTES = 16 << 20
NUM_SHOWN = 5
"""Decisions of `status`."""

autoscaler = typer.Typer(help="Why there are as many replica groups as there are.", no_args_is_help=True)

MetricsAddress = Annotated[
    str, typer.Option("--address", help="Where a gateway shows its metrics (admin.metrics_port): HOST:PORT or a port.")
]


def status(
    address: MetricsAddress = DEFAULT_METRICS_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and look every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show the replica groups, what they do, and the last decisions of the autoscaler."""
    if not watch:
        standard_output().print(render(read_fleet(address), time.time()))
        return
    with Live(render(read_fleet(address), time.time()), console=standard_output(), auto_refresh=False) as live:
        while True:
            time.sleep(2.0)
            live.update(render(read_fleet(address), time.time()), refresh=True)


@autoscaler.command()
def explain(
    address: MetricsAddress = DEFAULT_METRICS_ADDRESS,
    since: Annotated[str, typer.Option(help="How far to go back: 90s, 15m, 1h, 2d.")] = "1h",
    model: Annotated[str | None, typer.Option(help="Of this model alone.")] = None,
) -> None:
    """Say what the autoscaler has decided, and why. Decisions that say the same are one line."""
    from_s = time.time() - duration_s(since, "--since")
    fleet = read_fleet(address)
    known = {*fleet.models, *(made.model for made in fleet.decisions)}
    if model is not None and model not in known:
        raise typer.BadParameter(
            f"no model {model[:128]!r} is served; served: {', '.join(sorted(fleet.models)) or 'none'}",
            param_hint="--model",
        )
    decisions = [made for made in fleet.decisions if made.last_s >= from_s and (model is None or made.model == model)]
    if not decisions:
        typer.echo(f"no decision since {_moment(from_s)}: no model has autoscaling, or nothing was seen")
    for made in decisions:
        typer.echo(sentence(made))


def read_fleet(address: str) -> Fleet:
    """Raises ConnectionError, which says what to do, and BadParameter."""
    target = parse_target(address, DEFAULT_METRICS_PORT)
    try:
        with _opener(target).open(f"http://{target.address}/fleet", timeout=TIMEOUT_S) as answer:
            return msgspec.json.decode(answer.read(MAX_BYTES), type=Fleet)
    except HTTPException as error:
        raise ConnectionError(
            f"what answers at {target.address} does not speak HTTP: give the port of the metrics (--address, admin.metrics_port) "
            "and not that of gRPC"
        ) from error
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"no gateway shows its groups at {target.address} (--address, admin.metrics_port): {reason}"
        ) from error
    except msgspec.DecodeError as error:
        raise ConnectionError(f"what answers at {target.address} is no gateway: {error}") from error


def _opener(target: Target) -> urllib.request.OpenerDirector:
    """No proxy of the environment stands between this machine and itself."""
    proxies = urllib.request.ProxyHandler({} if target.is_on_this_machine else None)
    return urllib.request.build_opener(proxies)


def render(fleet: Fleet, now_s: float) -> Group:
    """Two tables: groups, and the last decisions where there are any."""
    groups = Table("model", "mode", "groups", "group", "state", "for", "running", "waiting", "KV cache")
    for model, seen in fleet.models.items():
        bounds = f"{seen.target}" if seen.mode == "off" else f"{seen.target} ({seen.min_groups}-{seen.max_groups})"
        for place, group in enumerate(seen.groups):
            groups.add_row(
                *((_named(model, seen), seen.mode, bounds) if not place else ("", "", "")),
                group.group,
                group.state,
                "-" if group.since_s is None else _length(now_s - group.since_s),
                "-" if group.num_running is None else str(group.num_running),
                "-" if group.num_waiting is None else str(group.num_waiting),
                "-" if group.kv_usage is None else f"{group.kv_usage:.0%}",
            )
        if not seen.groups:
            groups.add_row(_named(model, seen), seen.mode, bounds, "-", "-", "-", "-", "-", "-")
    return Group(groups, *(Text(sentence(made)) for made in fleet.decisions[-NUM_SHOWN:]))


def _named(model: str, seen: FleetModel) -> Text:
    return Text(model if seen.state == "serving" else f"{model} ({seen.state})")


def sentence(made: FleetDecision) -> str:
    """One decision in a line."""
    until = "" if made.last_s - made.first_s < 1 else f" to {_moment(made.last_s)}"
    advice = "" if made.mode == "on" else f" ({made.mode})"
    rest = "".join(f"; warning: {warning}" for warning in made.warnings)
    failed = f"; not carried out: {made.error}" if made.error else ""
    return f"{_moment(made.first_s)}{until} {made.model}{advice}, {made.cause}: {made.reason}{rest}{failed}"


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")


def _length(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(status)
    app.add_typer(autoscaler, name="autoscaler")
