"""The simulation beside the real stack on this machine: the same requests at the same moments, and both figures in one table.

For each number of groups and ranks the stack is started, closed loops measure its capacity, and then both mixes of lengths
arrive at parts of that (Poisson, open loop). A cost model is fitted to the steps that the leaders report meanwhile, of all
loads together. What gateways and clients add to the time to the first token is measured with requests that come one at a time.
The simulation is given the same arrivals, and the pace of the machine in every five seconds: how many times as long as the cost
model says steps took all together, those that only decode and those with prompts, since a machine that others share does not
keep its speed (the column has the pace of the whole load). What the table tells is whether queues, batches, routing and
refusals are as in the real stack. The number of figures that agree without the paces is told too. A gateway chooses at random
among groups with as much to do, so several groups are simulated nine times. A figure agrees when the measured one is within 10
%, or within `FLOOR`, of what was simulated, from the least to the most of those: a percentile of few requests cannot be told
closer than that, and a count not closer than its own chance. With `--repeats` each load comes several times, and the table
tells what the machine itself does not repeat within 10 %.

What was measured can be kept (`--record`) and simulated again without the stack (`--from`, several recordings make one table).

    python -m bench.simulation_truth [--groups 1 2] [--tp 1 2] [--loads 0.3 0.6 0.9 1.2] [--seconds 60] [--repeats 1]
        [--record FILE] [--json FILE]
    python -m bench.simulation_truth --from FILE... [--json FILE]
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.json_files import plain
from bench.machine import machine_facts
from bench.markdown import table
from bench.simulation.fit import encode_profile
from bench.simulation.profiles import StepsFile
from bench.truth.measuring import measure_shape
from bench.truth.recording import LoadRecord, Recording, ShapeRecord, read_recording, write_recording
from bench.truth.simulating import STEADY, Paces, measured, pace_of, paces_of, profile_of, run_fleet, simulated
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "simulation_truth.json"
TOLERANCE = 0.10
NUM_DRAWS = 9
AT_MEAN_PACE = "simulated_at_mean_pace"
FLOOR = {"ttft": 0.010, "tpot": 0.001}
"""Seconds that a latency may differ by whatever it is."""


def agrees(name: str, real: float, span: tuple[float, float]) -> bool:
    """Whether one figure is as close as it has to be to what the simulation gives, from the least to the most of its draws."""
    ours = min(max(real, span[0]), span[1])
    if name in ("refused", "preempted"):  # a count is within 10 %, or two standard deviations of a Poisson count
        return abs(real - ours) <= max(TOLERANCE * real, 2 * math.sqrt(max(real, ours)), 3)
    return abs(real - ours) <= max(TOLERANCE * real, FLOOR.get(name.partition("_")[0], 0.0))


def compare(shape: ShapeRecord) -> dict[str, Any]:
    """One shape of the stack."""
    profile = profile_of(shape)
    loads: dict[tuple[str, float], list[LoadRecord]] = {}
    for cell in shape.cells:
        loads.setdefault((cell.mix, cell.share or 0.0), []).append(cell)
    cells = [
        {
            "groups": shape.num_groups,
            "tp": shape.tp_size,
            "mix": mix,
            "load": share,
            "rate": records[0].rate,
            "sent": len(records[0].requests),
            "late_s": max(record.late_s for record in records),
            "pace": [[round(part, 3) for part in pace_of(profile, record)] for record in records],
            "real": [measured(record) for record in records],
            "simulated": [draws(profile, shape, record, paces_of(profile, record)) for record in records],
            AT_MEAN_PACE: [draws(profile, shape, record, STEADY) for record in records],
        }
        for (mix, share), records in loads.items()
    ]
    return {"capacity": shape.capacity, "profile": json.loads(encode_profile(profile)), "cells": cells}


def draws(profile: StepsFile, shape: ShapeRecord, record: LoadRecord, paces: Paces) -> dict[str, list[float]]:
    """Each figure: the least, the median and the most. A gateway chooses at random among groups with as much to do, and nobody
    knows what it drew, so several groups are simulated several times."""
    num_draws = NUM_DRAWS if shape.num_groups > 1 else 1
    found = [simulated(run_fleet(profile, record.requests, shape.num_groups, seed, paces)) for seed in range(num_draws)]
    ordered = {name: sorted(figures[name] for figures in found) for name in found[0]}
    return {name: [values[0], median(values), values[-1]] for name, values in ordered.items()}


def as_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A row for each repeat of a cell: measured / the median of what was simulated; what does not agree is bold."""
    names = list(cells[0]["real"][0]) if cells else []
    rows = []
    for cell in cells:
        for pace, measured_figures, simulated_figures in zip(
            cell["pace"], cell["real"], cell["simulated"], strict=True
        ):
            row = [str(cell["groups"]), str(cell["tp"]), cell["mix"], f"{cell['load']:.0%}", str(cell["sent"])]
            row.append(" / ".join(f"{part:.2f}" for part in pace))
            for name in names:
                real, ours = measured_figures[name], simulated_figures[name]
                scale, digits = (1e3, 1) if name.endswith("_s") and "per" not in name else (1.0, 0)
                text = f"{real * scale:.{digits}f} / {ours[1] * scale:.{digits}f}"
                row.append(text if agrees(name, real, (ours[0], ours[-1])) else f"**{text}**")
            rows.append(row)
    heads = [name.replace("_s", " ms") if name.endswith("_s") and "per" not in name else name for name in names]
    return table(["groups", "TP", "mix", "load", "sent", "pace", *heads], rows)


def as_json(machine: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]) -> str:
    """Five digits of each number, a line for each shape and cell; without what was simulated at the mean pace."""

    def told(value: Any) -> str:
        rounded = json.loads(json.dumps(plain(value)), parse_float=lambda text: float(f"{float(text):.5g}"))
        return json.dumps(rounded, allow_nan=False)

    lines = []
    for shape in shapes:
        cells = [{name: value for name, value in cell.items() if name != AT_MEAN_PACE} for cell in shape["cells"]]
        rest = told({name: value for name, value in shape.items() if name != "cells"})
        lines.append(f'{rest[:-1]}, "cells": [\n  ' + ",\n  ".join(map(told, cells)) + "]}")
    return f'{{"machine": {json.dumps(machine)},\n "shapes": [\n ' + ",\n ".join(lines) + "]}\n"


def checks(cells: Sequence[Mapping[str, Any]], simulated_as: str) -> list[bool]:
    """Of each figure, whether it agrees."""
    return [
        agrees(name, real[name], (ours[name][0], ours[name][-1]))
        for cell in cells
        for real, ours in zip(cell["real"], cell[simulated_as], strict=True)
        for name in real
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9, 1.2], help="parts of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals in each cell")
    parser.add_argument("--repeats", type=int, default=1, help="of each cell, with the same arrivals")
    parser.add_argument("--record", type=Path, help="keep what was measured in this file")
    parser.add_argument("--from", dest="recordings", type=Path, nargs="+", help="measure nothing: simulate these")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    if arguments.recordings:
        recordings = [read_recording(path) for path in arguments.recordings]
        machine, shapes = recordings[0].machine, [shape for recording in recordings for shape in recording.shapes]
    else:
        prepare_environment()
        machine, shapes = machine_facts(), []

        def keep(shape: ShapeRecord) -> None:
            if arguments.record:
                write_recording(arguments.record, Recording(machine=machine, shapes=[*shapes, shape]))

        for num_groups in arguments.groups:
            for tp_size in arguments.tp:
                shapes.append(
                    measure_shape(
                        num_groups, tp_size, arguments.loads, arguments.seconds, arguments.repeats, console.print, keep
                    )
                )
    found = [compare(shape) for shape in shapes]
    arguments.json.write_text(as_json(machine, found))
    cells = [cell for shape in found for cell in shape["cells"]]
    console.print(as_table(cells), soft_wrap=True)
    found_agree, without_paces = checks(cells, "simulated"), checks(cells, AT_MEAN_PACE)
    console.print(
        f"{sum(found_agree)} of {len(found_agree)} figures agree, {sum(without_paces)} where steps always take as long as the "
        "cost model says; each cell is measured / simulated, bold where they do not"
    )
    sys.exit(not all(found_agree))


if __name__ == "__main__":
    main()
