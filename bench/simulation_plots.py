"""Draws the pictures of docs/simulation.md from the JSON files that `packtrain simulate … --json` writes.

python -m bench.simulation_plots over-time RESULT.json docs/plots/simulation-over-time.svg
python -m bench.simulation_plots curve CAPACITY.json docs/plots/simulation-capacity.svg
python -m bench.simulation_plots scale bench/results/simulation_scale.json docs/plots/simulation-scale.svg
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.simulation.capacity import parse_slo

SIZE = (7.0, 3.2)


def over_time(data: Mapping[str, Any]) -> Figure:
    """Groups and sequences of a run."""
    samples = data["over_time"]
    figure = Figure(figsize=SIZE, layout="constrained")
    load, groups = figure.subplots(2, 1, sharex=True)
    load.plot(samples["at_s"], samples["num_running"], label="running")
    load.plot(samples["at_s"], samples["num_waiting"], label="waiting")
    load.set_ylabel("sequences")
    load.legend(loc="upper right")
    groups.step(samples["at_s"], samples["num_groups"], where="post", label="held")
    groups.step(samples["at_s"], samples["num_serving"], where="post", label="serving")
    groups.set_ylabel("groups")
    groups.set_xlabel("simulated seconds")
    groups.set_ylim(bottom=0)
    groups.legend(loc="lower right")
    return figure


def curve(data: Mapping[str, Any]) -> Figure:
    """What the service level is about over the number of GPUs, for each shape that was tried."""
    figure = Figure(figsize=SIZE, layout="constrained")
    bounds = parse_slo(data["slo"])
    axes = figure.subplots(1, len(bounds), squeeze=False)[0]
    for axis, bound in zip(axes, bounds, strict=True):
        for found in data["answers"]:
            rows = [row for row in found["curve"] if row[f"{bound.name}_s"] is not None]  # null: too many were lost
            reached_s = [row[f"{bound.name}_s"] for row in rows]
            axis.plot([row["num_gpus"] for row in rows], reached_s, marker="o", label=found["shape"])
        axis.axhline(bound.seconds, linestyle=":", color="black", label="service level")
        axis.set_yscale("log")
        axis.set_ylabel(f"{bound.name} (s)")
        axis.set_xlabel("GPUs")
    axes[0].legend(fontsize="small")
    return figure


def scale(data: Mapping[str, Any]) -> Figure:
    """Cost over the number of requests."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    sizes = data["sizes"]
    requests = [size["requests"] for size in sizes]
    costs = [size["cost_a_request"] * size["requests"] for size in sizes]
    axis.loglog(requests, costs, marker="o", label="measured")
    axis.loglog(
        requests, [costs[-1] * number / requests[-1] for number in requests], linestyle=":", label="in proportion"
    )
    for size, x, y in zip(sizes, requests, costs, strict=True):
        axis.annotate(f"{size['num_groups']:,} groups", (x, y), textcoords="offset points", xytext=(6, -10))
    axis.set_xlabel("requests")
    axis.set_ylabel("processor time (fixed loops)")
    axis.legend()
    return figure


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {"over-time": over_time, "curve": curve, "scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("result", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "packtrain"  # the same data gives the same file
    figure = PICTURES[arguments.picture](json.loads(arguments.result.read_text(encoding="utf-8")))
    figure.savefig(arguments.svg, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
