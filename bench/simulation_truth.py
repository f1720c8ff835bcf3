"""The simulation beside the real stack on this machine: the same requests at the same moments, and both figures in one table.

For each number of groups and ranks the stack is started, closed loops measure its capacity, and a cost model is fitted to the
steps that its leaders report meanwhile. What gateways and clients add to the time to the first token is measured with requests
that come one at a time. Nothing else is fitted. Then both mixes of lengths arrive at parts of that capacity (Poisson, open loop),
and the simulation is given the same arrivals. A figure agrees when it is within 10 % of the measured one or within `FLOOR` of it:
a percentile of few requests cannot be told closer than that, and a count not closer than its own chance. With `--repeats` each
load comes several times, and the table tells what the machine itself does not repeat within 10 %.

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
from typing import Any

from rich.console import Console

from bench.machine import machine_facts
from bench.markdown import table
from bench.simulation.fit import encode_profile
from bench.truth.measuring import measure_shape
from bench.truth.recording import LoadRecord, Recording, ShapeRecord, read_recording, write_recording
from bench.truth.simulating import measured, profile_of, run_fleet, simulated
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "simulation_truth.json"
TOLERANCE = 0.10
FLOOR = {"ttft": 0.010, "tpot": 0.001}
"""Seconds that a latency may differ by whatever it is."""


def agrees(name: str, real: float, ours: float) -> bool:
    """Whether one figure of the simulation is as close as it has to be."""
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
            "real": [measured(record) for record in records],
            "simulated": [
                simulated(run_fleet(profile, record.requests, shape.num_groups, seed))
                for seed, record in enumerate(records)
            ],
        }
        for (mix, share), records in loads.items()
    ]
    return {"capacity": shape.capacity, "profile": json.loads(encode_profile(profile)), "cells": cells}


def as_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A row for each repeat of a cell: measured / simulated; what does not agree is bold."""
    names = list(cells[0]["real"][0]) if cells else []
    rows = []
    for cell in cells:
        for measured_figures, simulated_figures in zip(cell["real"], cell["simulated"], strict=True):
            row = [str(cell["groups"]), str(cell["tp"]), cell["mix"], f"{cell['load']:.0%}", str(cell["sent"])]
            for name in names:
                real, ours = measured_figures[name], simulated_figures[name]
                scale, digits = (1e3, 1) if name.endswith("_s") and "per" not in name else (1.0, 0)
                text = f"{real * scale:.{digits}f} / {ours * scale:.{digits}f}"
                row.append(text if agrees(name, real, ours) else f"**{text}**")
            rows.append(row)
    heads = [name.replace("_s", " ms") if name.endswith("_s") and "per" not in name else name for name in names]
    return table(["groups", "TP", "mix", "load", "sent", *heads], rows)


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
    arguments.json.write_text(json.dumps({"machine": machine, "shapes": found}, indent=1) + "\n")
    cells = [cell for shape in found for cell in shape["cells"]]
    console.print(as_table(cells), soft_wrap=True)
    checks = [
        agrees(name, real[name], ours[name])
        for cell in cells
        for real, ours in zip(cell["real"], cell["simulated"], strict=True)
        for name in real
    ]
    console.print(
        f"{sum(checks)} of {len(checks)} figures agree; each cell is measured / simulated, bold where they do not"
    )
    sys.exit(not all(checks))


if __name__ == "__main__":
    main()
