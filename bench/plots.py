"""The plots of docs/performance.md, from the result of `bench.growth`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.stats import fit_line

COLOURS = ("#1f77b4", "#d95f02")
"""Of the shapes, in their order."""
LIMIT_STYLE = {"color": "#444444", "linestyle": "--", "linewidth": 1.2}


def step_floor_s(result: Mapping[str, Any], batch: int, context: int) -> float:
    """What a decode step takes at least: weights and caches are read once, every weight is multiplied once a sequence."""
    num_bytes: int = (
        result["num_parameters"] * result["bytes_per_weight"] + batch * context * result["kv_bytes_per_token"]
    )
    num_operations: int = 2 * result["num_parameters"] * batch
    return float(max(num_bytes / result["bandwidth"], num_operations / result["rate"]))


def over_batch(result: Mapping[str, Any], shape: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(batch, seconds of a step) at the context that all batches were measured at."""
    return [(batch, step_s) for batch, context, step_s in shape["points"] if context == result["batch_context"]]


def over_context(shape: Mapping[str, Any], batch: int) -> list[tuple[int, float]]:
    """(context, seconds of a step) of a batch that was measured at several contexts."""
    return sorted((context, step_s) for b, context, step_s in shape["points"] if b == batch)


def context_batches(result: Mapping[str, Any]) -> list[int]:
    """Batches that were measured at several contexts."""
    contexts: dict[int, set[int]] = {}
    for batch, context, _ in result["shapes"][0]["points"]:
        contexts.setdefault(batch, set()).add(context)
    return sorted(batch for batch, found in contexts.items() if len(found) > 1)


def draw_all(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes the plots; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    # Text stays text, and the same data gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "packtrain", "font.size": 10}):
        paths = []
        for name, draw in (("throughput", _throughput), ("cost-per-token", _cost), ("context", _context)):
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            axes = figure.add_subplot()
            draw(result, axes)
            axes.grid(visible=True, color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
            paths.append(directory / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _throughput(result: Mapping[str, Any], axes: Axes) -> None:
    batches: list[int] = []
    for shape, colour in zip(result["shapes"], COLOURS, strict=False):
        points = over_batch(result, shape)
        batches = [batch for batch, _ in points]
        axes.plot(batches, [batch / step_s for batch, step_s in points], "o-", color=colour, label=shape["name"])
    floors = [batch / step_floor_s(result, batch, result["batch_context"]) for batch in batches]
    axes.plot(batches, floors, label="limit of the machine", **LIMIT_STYLE)  # type: ignore[arg-type]
    _label_batches(axes, batches)
    axes.set(ylabel="output tokens/s", title=f"Decode rate, context {result['batch_context']}", ylim=(0, None))


def _cost(result: Mapping[str, Any], axes: Axes) -> None:
    batches: list[int] = []
    for shape, colour in zip(result["shapes"], COLOURS, strict=False):
        points = over_batch(result, shape)
        batches = [batch for batch, _ in points]
        axes.plot(batches, [step_s / batch * 1e3 for batch, step_s in points], "o-", color=colour, label=shape["name"])
    floors = [step_floor_s(result, batch, result["batch_context"]) / batch * 1e3 for batch in batches]
    axes.plot(batches, floors, label="limit of the machine", **LIMIT_STYLE)  # type: ignore[arg-type]
    _label_batches(axes, batches)
    axes.set(ylabel="milliseconds a token", title=f"Cost of a token, context {result['batch_context']}", yscale="log")


def _label_batches(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("sequences in the batch")


def _context(result: Mapping[str, Any], axes: Axes) -> None:
    for batch, marker in zip(context_batches(result), ("o", "s"), strict=False):
        for shape, colour in zip(result["shapes"], COLOURS, strict=False):
            contexts, steps = zip(*over_context(shape, batch), strict=True)
            line = fit_line(contexts, steps)
            label = f"{shape['name']}, batch {batch}"
            axes.plot(contexts, [step_s * 1e3 for step_s in steps], marker, color=colour, label=label)
            axes.plot(contexts, [(line.intercept + line.slope * c) * 1e3 for c in contexts], color=colour, linewidth=1)
    axes.set(xlabel="tokens of context", ylabel="milliseconds a step", title="Decode step over context", ylim=(0, None))
