"""Writes the tables of docs/performance.md, between their marks, and its plots, from what lies in bench/results.

python -m bench.report
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import engine, growth, memory_growth, ready, serving_overhead
from bench.machine import describe_machine
from bench.markdown import replace_section, table
from bench.plots import context_batches, draw_all, over_batch, over_context, step_floor_s
from bench.stats import fit_line
from bench.targets import decisions
from bench.timing import Timing, as_rows

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
PLOTS = DOCS / "plots"
MB = 1e6


def render_engine(result: Mapping[str, Any]) -> str:
    header, rows = as_rows([Timing.from_data(row) for row in result["timings"]])
    details = {row["name"]: row for row in result["contenders"]}
    lines = [table([*header, "ready after"], [[*row, _ready(details.get(row[0]))] for row in rows]), ""]
    lines += [f"- {name}: {row['detail']}" for name, row in details.items()]
    lines += [f"- {name}: **{reason}**" for name, reason in result["missing"].items()]
    return "\n".join([f"{describe_machine(result['machine'])}; medians of {result['num_repeats']}.", "", *lines])


def _ready(contender: Mapping[str, Any] | None) -> str:
    return f"{contender['ready_s']:.1f} s" if contender and "ready_s" in contender else ""


def render_growth(result: Mapping[str, Any]) -> str:
    context = result["batch_context"]
    shapes = result["shapes"]
    batches = [batch for batch, _ in over_batch(result, shapes[0])]
    rows = []
    for batch in batches:
        steps = [dict(over_batch(result, shape))[batch] for shape in shapes]
        floor_s = step_floor_s(result, batch, context)
        costs = [f"{step_s / batch * 1e3:.2f}" for step_s in [*steps, floor_s]]
        rows.append([str(batch), *costs, f"{floor_s / min(steps):.0%}"])
    names = [shape["name"] for shape in shapes]
    lines = [
        f"{describe_machine(result['machine'])}; limit: {result['limit']}.",
        "",
        "![tokens a second over the batch](plots/throughput.svg)",
        "![cost of a token over the batch](plots/cost-per-token.svg)",
        "",
        f"Milliseconds a token at a context of {context}:",
        "",
        table(["batch", *names, "limit", "of the limit"], rows),
        "",
        "![step time over the context](plots/context.svg)",
        "",
    ]
    lines.append(table(["line through the step times", "fixed", "per 1,000 tokens of context", "R²"], _lines(result)))
    return "\n".join(lines)


def _lines(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for shape in result["shapes"]:
        for batch in context_batches(result):
            line = fit_line(*zip(*over_context(shape, batch), strict=True))
            fixed, slope = f"{line.intercept * 1e3:.2f} ms", f"{line.slope * 1e6:.2f} ms"
            rows.append([f"{shape['name']}, batch {batch}", fixed, slope, f"{line.r_squared:.4f}"])
    return rows


def render_ready(result: Mapping[str, Any]) -> str:
    times = ", ".join(f"{start['seconds']:.1f}" for start in result["starts"])
    return (
        f"{describe_machine(result['machine'])}.\n\n"
        f"**{result['median_s']:.1f} s** at TP={result['tp_size']}, median of {times} s; at most 15 s are wanted."
    )


def render_memory(result: Mapping[str, Any]) -> str:
    rows = [
        [
            row["process"],
            f"{row['start_bytes'] / MB:.0f} MB",
            f"{row['growth_bytes'] / MB:+.2f} MB",
            f"{row['slope_bytes_per_hour'] / MB:+.2f} MB",
            f"{row['growth_fds']:+g}",
            f"{row['growth_threads']:+g}",
        ]
        for row in result["processes"]
    ]
    requests = ", ".join(f"{count} {name}" for name, count in sorted(result["requests"].items()))
    decision = "within" if result["holds"] else "**more than**"
    return "\n".join(
        [
            f"{describe_machine(result['machine'])}; {result['minutes']:g} minutes after {result['warm_up_minutes']:g} of "
            f"warm-up, {result['streams']} streams, TP={result['tp_size']}; requests: {requests}.",
            "",
            table(["process", "holds", "growth", "slope an hour", "descriptors", "threads"], rows),
            "",
            f"In all {result['growth_bytes'] / MB:+.2f} MB, {decision} the {result['max_growth_bytes'] / MB:g} MB allowed.",
        ]
    )


def render_serving(result: Mapping[str, Any]) -> str:
    rows = [
        [
            str(entry["tensor_parallel_size"]),
            str(entry["threads_per_rank"]),
            str(entry["streams"]),
            f"{entry['engine']:.0f}",
            f"{entry['served']:.0f}",
            f"{entry['ratio']:.2f}",
        ]
        for entry in result["shapes"]
    ]
    header = ["TP", "threads each", "streams", "engine alone, tokens/s", "served, tokens/s", "served / engine"]
    return f"{describe_machine(result['machine'])}.\n\n{table(header, rows)}"


SECTIONS: tuple[tuple[str, Path, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("engine", engine.RESULT, "python -m bench.engine", render_engine),
    ("targets", engine.RESULT, "python -m bench.engine", decisions),
    ("growth", growth.RESULT, "python -m bench.growth", render_growth),
    ("serving", serving_overhead.RESULT, "python -m bench.serving_overhead", render_serving),
    ("ready", ready.RESULT, "python -m bench.ready", render_ready),
    ("memory", memory_growth.RESULT, "python -m bench.memory_growth", render_memory),
)


def write_page(text: str, results: Mapping[Path, Mapping[str, Any]]) -> str:
    """The page with every section rendered from its result, or saying how to get it."""
    for name, path, command, render in SECTIONS:
        content = render(results[path]) if path in results else f"Not measured yet: `{command}`."
        text = replace_section(text, name, content)
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    paths = {path for _, path, _, _ in SECTIONS if path.exists()}
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"written: {PAGE}")
    if growth.RESULT in results:
        print(*(f"written: {path}" for path in draw_all(results[growth.RESULT], PLOTS)), sep="\n")


if __name__ == "__main__":
    main()
