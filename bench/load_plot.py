"""Draws the picture of docs/load-testing.md from what `packtrain load --sweep … --json` writes.

python -m bench.load_plot SWEEP.json docs/plots/load-sweep.svg
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SIZE = (7.0, 3.2)


def sweep(data: Mapping[str, Any]) -> Figure:
    """Latency over the throughput that each rate brought: the bend is where the server is full."""
    figure = Figure(figsize=SIZE, layout="constrained")
    runs = data["points"]
    throughput = [run["output_throughput"] for run in runs]
    for axis, measure, label in zip(
        figure.subplots(1, 2), ("ttft", "tpot"), ("time to first token", "time per output token"), strict=True
    ):
        for part in ("median", "p99"):
            axis.plot(throughput, [run[f"{part}_{measure}_ms"] for run in runs], marker="o", label=part)
        for run, at in zip(runs, throughput, strict=True):
            axis.annotate(
                f"{run['request_throughput']:.1f}/s",
                (at, run[f"median_{measure}_ms"]),
                textcoords="offset points",
                xytext=(4, -10),
                fontsize="x-small",
            )
        axis.set_xlabel("output tokens/s")
        axis.set_ylabel(f"{label} (ms)")
        axis.set_yscale("log")
        axis.legend(fontsize="small")
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "packtrain"  # the same data gives the same file
    sweep(json.loads(arguments.result.read_text(encoding="utf-8"))).savefig(
        arguments.svg, format="svg", metadata={"Date": None}
    )


if __name__ == "__main__":
    main()
