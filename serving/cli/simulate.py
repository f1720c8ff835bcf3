"""The `packtrain simulate` commands: what a cluster would do, before there is one. What they need is imported when they run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from model_parallel.errors import ConfigError
from model_parallel.machine import read_machine
from serving.cli.terminal import standard_output

if TYPE_CHECKING:
    from bench.simulation.fleet import Fleet
    from bench.simulation.run import OnProgress
    from bench.simulation.scenario import SimulationScenario

EXIT_NOT_POSSIBLE = 1
TP_SIZES = (1, 2, 4, 8)
TRACE_MODEL = "llama-2-70b-chat"

app = typer.Typer(
    help="Say what a cluster would do: the real scheduler, routing and quotas on a virtual clock.", no_args_is_help=True
)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")]
ScenarioFile = Annotated[Path, typer.Argument(help="YAML file; docs/simulation.md has the keys.")]


@app.command()
def run(scenario: ScenarioFile, json_file: JsonFile = None) -> None:
    """Simulate a scenario and print its figures."""
    from bench.json_files import check_can_be_written, write_json
    from bench.simulation.run import simulate
    from bench.simulation.scenario import load_scenario

    check_can_be_written(json_file, "--json")
    loaded = load_scenario(scenario)
    with _bars() as progress:
        summary, _ = simulate(loaded, on_progress=_bar_of(progress, loaded))
    print_summary(summary, standard_output())
    if json_file is not None:
        write_json(summary, json_file)


@app.command()
def compare(
    scenario: ScenarioFile,
    variants: Annotated[
        list[str], typer.Argument(help="Each like 'one: failures.migration=true groups.num_groups=8'.")
    ],
    json_file: JsonFile = None,
) -> None:
    """Simulate variants of a scenario, which get the same requests, and print them side by side."""
    from bench.json_files import check_can_be_written, write_json
    from bench.simulation.compare import COMPARED, read_variants
    from bench.simulation.run import resolve, simulate
    from bench.simulation.scenario import parse_scenario, read_scenario

    check_can_be_written(json_file, "--json")
    made = read_variants(read_scenario(scenario), variants)
    parsed = [(name, parse_scenario(changed, origin=f"{scenario}, {name}")) for name, changed in made.items()]
    found: dict[str, Any] = {}
    name = ""
    try:
        for name, changed_scenario in parsed:  # noqa: B007  # of the message
            resolve(changed_scenario.groups)  # refused before anything is simulated
        with _bars() as progress:
            for name, changed_scenario in parsed:
                progress.console.print(f"simulating {name}", markup=False, highlight=False)
                found[name], _ = simulate(changed_scenario, on_progress=_bar_of(progress, changed_scenario))
    except ConfigError as error:
        raise ConfigError(f"variant {name!r}: {error}") from error
    finally:
        if found:
            print_comparison(found, COMPARED, standard_output())
    if json_file is not None:
        write_json(found, json_file)


@app.command()
def capacity(
    slo: Annotated[str, typer.Option(help="Like ttft_p99=2s,tpot_p99=200ms.")],
    gpu: Annotated[str, typer.Option("--gpu", help="A profile: a100-80g, h100, h200, or a file.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A known name, or a checkpoint. The scenario's when not given; of a trace a fitted profile's, or "
            f"{TRACE_MODEL}."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests with their times: CSV, Azure's or BurstGPT's, or Mooncake's JSON lines."),
    ] = None,
    scenario: Annotated[Path | None, typer.Option(help="Instead of a trace: the load of a scenario.")] = None,
    tp: Annotated[
        list[int] | None,
        typer.Option(
            "--tp",
            min=1,
            help="Ranks of a group; several may be given. 1, 2, 4 and 8, or a fitted profile's, when not given.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 with a shipped profile, its own with a fitted one. The scenario's when not given, else bfloat16."
        ),
    ] = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option(
            help="none, int8, fp8, or packed with a profile fitted to it; several may be given. The scenario's when not given, "
            "else none."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences that a group runs at a time. The scenario's, or as serve chooses.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens computed in one step. The scenario's, or as serve chooses.")
    ] = None,
    max_groups: Annotated[int, typer.Option(min=1, help="Give up beyond so many.")] = 2000,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of one GPU for an hour.")] = None,
    speed: Annotated[
        float | None, typer.Option(min=0.001, help="Replay the trace so many times as fast.", show_default="1")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Shapes that are tried side by side.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Find the fewest GPUs that serve a load within a service level, and what that costs.

    Ends with status 1 when no shape does.
    """
    from bench.json_files import check_can_be_written, write_json
    from bench.simulation.capacity import Progress as Trying
    from bench.simulation.capacity import Question, Shape, answer_all, cheapest, parse_slo
    from bench.simulation.profiles import StepsFile, read_profile
    from bench.simulation.run import step_sizes_of
    from bench.simulation.scenario import parse_scenario, read_scenario, scenario_of_trace

    check_can_be_written(json_file, "--json")
    bounds = parse_slo(slo)
    if (trace is None) == (scenario is None):
        raise ConfigError("either trace or scenario must be given")
    if speed is not None and trace is None:
        raise ConfigError("--speed is of a --trace; a scenario says work.speed of each")
    flags: dict[str, Any] = {
        "model": model, "dtype": dtype, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens,
    }  # fmt: skip
    groups: dict[str, Any] = {name: value for name, value in flags.items() if value is not None} | {"profile": gpu}
    file, sizes_tried = read_profile(gpu), list(TP_SIZES)
    of_trace: dict[str, Any] = {"model": TRACE_MODEL}
    if isinstance(file, StepsFile):  # it is of one shape of one model
        sizes_tried = [file.tensor_parallel_size]
        of_trace = {"model": file.model, "dtype": file.dtype, "quantization": file.quantization or None}
    if trace is not None:
        loaded = scenario_of_trace(trace, of_trace | groups, speed=1.0 if speed is None else speed)
    else:
        assert scenario is not None
        data = read_scenario(scenario)
        if isinstance(data["groups"], dict):  # else it is refused by its name
            data["groups"] |= groups
        loaded = parse_scenario(data, origin=str(scenario))
    sizes = step_sizes_of(loaded.groups)
    kinds = [
        None if kind == "none" else kind
        for kind in dict.fromkeys(quantization or [loaded.groups.quantization or "none"])
    ]
    if unknown := [kind for kind in kinds if kind not in (None, "int8", "fp8", "packed")]:
        raise ConfigError(f"quantization is {unknown[0]!r}; allowed: none, int8, fp8, packed")
    questions = [
        Question(
            scenario=loaded,
            shape=Shape(profile=gpu, tensor_parallel_size=size, dtype=loaded.groups.dtype, quantization=kind),
            slo=bounds,
            price_per_gpu_hour=price,
            max_groups=max_groups,
        )
        for kind in kinds
        for size in dict.fromkeys(tp or sizes_tried)
    ]
    with _bars() as progress:
        tasks: dict[str, TaskID] = {}

        def show(trying: Trying) -> None:
            if trying.shape not in tasks:
                tasks[trying.shape] = progress.add_task("", total=1.0)
            what = f"{escape(trying.shape)}, {trying.num_groups} groups"
            progress.update(tasks[trying.shape], description=what, completed=trying.share)
            if trying.outcome:
                progress.console.print(f"{what}: {trying.outcome}", highlight=False, soft_wrap=True)

        answers = answer_all(questions, min(processes, read_machine().num_cpus), show)
    best = cheapest(answers)
    print_capacity(answers, best, f"{slo}: {loaded.groups.model}, {sizes}", standard_output())
    if json_file is not None:
        asked = {"slo": slo, "model": loaded.groups.model, **sizes._asdict()}
        write_json({**asked, "answers": answers, "best": best and best["shape"]}, json_file)
    if best is None:
        raise typer.Exit(EXIT_NOT_POSSIBLE)


@app.command()
def fit(
    source: Annotated[
        str,
        typer.Option(
            "--from", help="A file of JSON lines, or the address of a gateway's metrics: http://host:9464/steps."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Write the profile here.")],
    request_ms: Annotated[float, typer.Option(min=0, help="From a request's arrival until the engine has it.")] = 3.0,
    output_ms: Annotated[float, typer.Option(min=0, help="From a step's end until a client has its token.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda: what the groups ran on.")] = "cpu",
) -> None:
    """Fit the cost of a step to the steps that a running group has timed."""
    import msgspec

    from bench.json_files import check_can_be_written
    from bench.simulation.fit import encode_profile, read_samples
    from bench.simulation.fit import fit as fit_reports

    check_can_be_written(out, "--out")
    if out.resolve() == Path(source).resolve():
        raise ConfigError(f"--out is {out}, and so is --from; the profile needs a file of its own")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}; allowed: cpu, cuda")
    profile = fit_reports(read_samples(source), origin=f"fitted from {source}")
    profile = msgspec.structs.replace(profile, request_s=request_ms / 1e3, output_s=output_ms / 1e3, device=device)
    out.write_bytes(encode_profile(profile))
    typer.echo(
        f"{out}: {profile.model}, TP={profile.tensor_parallel_size}, {profile.quantization or profile.dtype}; "
        f"{profile.num_steps} steps, median error {profile.median_error:.1%}, p90 {profile.p90_error:.1%}"
    )


@app.command()
def profiles() -> None:
    """List the shipped profiles and where their figures are from."""
    from bench.simulation.profiles import read_profile, shipped_profiles

    table = Table("name", "kind", "origin")
    for name in shipped_profiles():
        file = read_profile(name)
        table.add_row(escape(name), str(type(file).__struct_config__.tag), escape(file.origin))
    standard_output().print(table)


def _bars() -> Progress:
    """On a terminal's last lines; of a pipe only what is printed beside them."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _bar_of(progress: Progress, scenario: "SimulationScenario") -> "OnProgress":
    """A bar for one simulation."""
    task = progress.add_task("simulating", total=scenario.duration_s + scenario.drain_s)

    def show(fleet: "Fleet") -> None:
        at_s = fleet.clock.now_s
        what = f"{at_s:,.0f} s simulated, {fleet.num_unsettled:,} requests open"
        progress.update(task, completed=at_s, description=what)

    return show


def print_comparison(found: Mapping[str, Mapping[str, Any]], keys: Iterable[str], console: Console) -> None:
    """A column for each variant that was simulated."""
    table = Table("", *map(escape, found))
    for key in keys:
        table.add_row(key, *(_number(summary.get(key)) for summary in found.values()))
    console.print(table)
    _print_notes([f"{name}: {note}" for name, summary in found.items() for note in summary["notes"]], console)


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Figures of one simulation as tables."""
    groups, profile = summary["groups"], summary["profile"]
    shape = f"{groups['model']}, TP={groups['tensor_parallel_size']}, {groups['quantization'] or groups['dtype']}"
    sizes = f"steps of at most {groups['max_num_seqs']} sequences and {groups['max_num_batched_tokens']:,} tokens"
    title = escape(f"{summary['name']}: {groups['num_groups']} groups of {shape}; {sizes}")
    table = Table("", "all", *map(escape, summary["tenants"]), title=title)
    for key in (
        "sent", "finished", "refused", "failed", "cancelled", "request_throughput", "output_throughput", "median_ttft_ms",
        "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms", "p99_e2el_ms",
    ):  # fmt: skip
        table.add_row(key, _number(summary.get(key)), *(_number(one.get(key)) for one in summary["tenants"].values()))
    console.print(table)
    rest = Table(show_header=False)
    for key in (
        "by_status", "jain_index", "num_preemptions", "num_failures", "num_migrations", "prefix_hit_share", "busy_share",
        "gpu_hours", "energy_kwh", "num_steps", "num_steps_jumped", "num_cut",
    ):  # fmt: skip
        value = summary[key]
        text = ", ".join(f"{name} {n:,}" for name, n in value.items()) if isinstance(value, dict) else _number(value)
        rest.add_row(key, text)
    console.print(rest)
    _print_notes(summary["notes"], console)
    kind = "timed" if profile["is_measured"] else "derived"
    console.print(f"profile {profile['name']} ({kind}): {profile['origin']}", soft_wrap=True, markup=False)


def print_capacity(answers: list[dict[str, Any]], best: Mapping[str, Any] | None, asked: str, console: Console) -> None:
    """A row for each shape, and the curve around the best."""
    table = Table(
        "shape",
        "groups",
        "GPUs",
        "tokens/s",
        "busy",
        "cost / 1M tokens",
        "kWh / 1M tokens",
        title=escape(f"fewest GPUs, {asked}"),
    )
    for found in answers:
        row = found["best"]
        if row is None:
            table.add_row(escape(found["shape"]), "none", escape(found["problem"]), "", "", "", "")
            continue
        table.add_row(
            escape(found["shape"]) + (" *" if found is best else ""), str(row["num_groups"]), str(row["num_gpus"]),
            _number(row["output_tokens_per_s"]), f"{row['busy_share']:.0%}", _number(row["cost_per_million_output_tokens"]),
            _number(row["kwh_per_million_output_tokens"]),
        )  # fmt: skip
    console.print(table)
    _print_notes(dict.fromkeys(note for found in answers for note in found["notes"]), console)
    if best is None:
        console.print("[bold red]no shape keeps the service level[/]")
        return
    names = [key for key in best["curve"][0] if key.endswith("_s") and "tokens" not in key]
    curve = Table(
        "groups",
        "GPUs",
        "holds",
        *names,
        "refused, failed",
        "busy",
        "cost / 1M tokens",
        title=escape(f"around {best['shape']}"),
    )
    for row in best["curve"]:
        curve.add_row(
            str(row["num_groups"]), str(row["num_gpus"]), "yes" if row["holds"] else "no",
            *(_number(row[name]) for name in names),
            str(row["refused"] + row["failed"]), f"{row['busy_share']:.0%}", _number(row["cost_per_million_output_tokens"]),
        )  # fmt: skip
    console.print(curve)
    if not best["is_measured"]:
        console.print(f"nothing was timed on this machine; {best['origin']}", soft_wrap=True, markup=False)


def _print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def register(parent: typer.Typer) -> None:
    """Add the commands to the command line."""
    parent.add_typer(app, name="simulate")
