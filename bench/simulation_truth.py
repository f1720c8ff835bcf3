"""The simulation beside the real stack on this machine: the same requests at the same moments, and both figures in one table.

For each number of groups and ranks the stack is started, a closed loop measures its capacity, and a cost model is fitted to the
steps that its leaders report meanwhile. What gateways and clients add to the time to the first token is measured with requests
that come one at a time. Nothing else is fitted. Then both mixes of lengths arrive at parts of that capacity (Poisson, open loop),
and the simulation is given the same arrivals. A figure agrees when it is within 10 % of the measured one or within `FLOOR` of it:
a percentile of few requests cannot be told closer than that, and a count not closer than its own chance.

    python -m bench.simulation_truth [--groups 1 2] [--tp 1 2] [--loads 0.3 0.6 0.9 1.2] [--seconds 60] [--json FILE]
"""

import argparse
import json
import math
import random
import socket
import sys
import time
import urllib.request
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from bench.clients import Ended, Load, Shape, client_processes, closed_loop, open_loop, poisson_arrivals
from bench.machine import machine_facts
from bench.markdown import table
from bench.simulation.clock import to_ticks
from bench.simulation.cost import CostTable, StepCost
from bench.simulation.fit import encode_profile, fit, read_samples
from bench.simulation.fleet import Fleet
from bench.simulation.parts import FleetSpec, GroupShape
from bench.simulation.profiles import StepsFile
from bench.simulation.report import Columns
from bench.simulation.requests import REFUSED, Requests, Status, TenantTraits
from bench.stack import on_all_cores, running, stack_config
from model_parallel.config import CacheConfig, SchedulerConfig
from protos import inference_pb2 as pb
from serving.config import ServingConfig
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "simulation_truth.json"
MIXES = {
    "short": Shape(prompt_tokens=tuple(range(32, 97)), new_tokens=tuple(range(32, 97))),
    "long": Shape(prompt_tokens=tuple(range(128, 385)), new_tokens=tuple(range(96, 193))),
}
MAX_NUM_SEQS = 16
KV_TOKENS = 4096
"""Less than 16 of the long sequences may need, so that some are preempted."""
MAX_WAITING = 16
ENTRY = {
    "max_num_seqs": MAX_NUM_SEQS,
    "speculation": "off",  # as it is simulated
    "kv_cache_tokens": KV_TOKENS,
    "max_waiting_requests": MAX_WAITING,
    "prefix_caching": False,
}
TIMEOUT_S = 300.0
PEAK_S = 20.0
ALONE_S = 8.0
TOLERANCE = 0.10
FLOOR = {"ttft": 0.010, "tpot": 0.001}
"""Seconds that a latency may differ by whatever it is."""


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def configuration(num_groups: int, tp_size: int, metrics_port: int) -> ServingConfig:
    """What is not said is the default."""
    entry = ENTRY | on_all_cores(tp_size * num_groups) | {"tensor_parallel_size": tp_size, "num_groups": num_groups}
    return stack_config(entry, admin={"port": None, "metrics_port": metrics_port})


def arrivals(shape: Shape, rate: float, seconds: float, seed: int) -> list[tuple[float, int, int]]:
    """(time, prompt tokens, answer tokens) of what `open_loop` sends with the same seed."""
    draw = random.Random(seed)
    found = []
    for at_s in poisson_arrivals(rate, seconds, draw):
        body, num_tokens = shape.request(draw)
        found.append((at_s, len(pb.GenerateRequest.FromString(body).prompt.token_ids.ids), num_tokens))
    return found


def figures(
    ttft_s: Sequence[float], tpot_s: Sequence[float], num_tokens: float, seconds: float, refused: int, preempted: int
) -> dict[str, float]:
    """What is compared."""
    nothing = [math.nan]
    return {
        "ttft_median_s": float(np.median(ttft_s or nothing)),
        "ttft_p99_s": float(np.percentile(ttft_s or nothing, 99)),
        "tpot_median_s": float(np.median(tpot_s or nothing)),
        "tpot_p99_s": float(np.percentile(tpot_s or nothing, 99)),
        "tokens_per_s": num_tokens / seconds,
        "refused": refused,
        "preempted": preempted,
    }


def measured(requests: Sequence[Ended], num_preempted: int) -> dict[str, float]:
    """Of the real stack."""
    done = [r for r in requests if r.code == "OK" and r.first_s is not None]
    codes = Counter(r.code for r in requests)
    if unexpected := set(codes) - {"OK", "RESOURCE_EXHAUSTED"}:
        raise RuntimeError(f"requests ended with {', '.join(sorted(unexpected))}")
    first_s, last_s = min(r.sent_s for r in requests), max(r.ended_s for r in done)
    return figures(
        [r.first_s - r.sent_s for r in done if r.first_s is not None],
        [(r.ended_s - r.first_s) / (r.num_tokens - 1) for r in done if r.first_s is not None and r.num_tokens > 1],
        sum(r.num_tokens for r in done),
        last_s - first_s,
        codes["RESOURCE_EXHAUSTED"],
        num_preempted,
    )


def simulated(
    profile: StepsFile, sent: Sequence[tuple[float, int, int]], num_groups: int, seed: int
) -> dict[str, float]:
    """The same requests."""
    requests = Requests(
        tenants=[TenantTraits(name="default")],
        ticks=array("q", [to_ticks(at_s) for at_s, _, _ in sent]),
        tenant=array("H", [0] * len(sent)),
        prompt_tokens=array("i", [prompt for _, prompt, _ in sent]),
        output_tokens=array("i", [answer for _, _, answer in sent]),
        max_tokens=array("i", [answer for _, _, answer in sent]),
    )
    cost = StepCost(
        knots=tuple(profile.knots), row_s=profile.row_s, context_s=profile.context_s,
        pair_s=profile.pair_s, empty_s=profile.empty_s,
    )  # fmt: skip
    shape = GroupShape(
        costs=CostTable(cost),
        scheduler=SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS, max_waiting_requests=MAX_WAITING, max_model_len=profile.max_position
        ),
        cache=CacheConfig(num_blocks=KV_TOKENS // 16, enable_prefix_caching=False),
    )
    spec = FleetSpec(shape=shape, num_groups=num_groups, request_s=profile.request_s, output_s=profile.output_s)
    fleet = Fleet(spec, requests, seed=seed)
    fleet.run()
    columns = Columns(fleet)
    done = columns.status == Status.FINISHED
    return figures(
        list(columns.ttft_s[done]),
        list(columns.tpot_s(done)),
        float(columns.num_output[done].sum()),
        float((columns.arrived_s + columns.e2e_s)[done].max() - columns.arrived_s.min()),
        int(sum((columns.status == status).sum() for status in REFUSED)),
        fleet.num_preemptions,
    )


def agrees(name: str, real: float, ours: float) -> bool:
    """Whether one figure of the simulation is as close as it has to be."""
    if name in ("refused", "preempted"):  # a count is within 10 %, or two standard deviations of a Poisson count
        return abs(real - ours) <= max(TOLERANCE * real, 2 * math.sqrt(max(real, ours)), 3)
    return abs(real - ours) <= max(TOLERANCE * real, FLOOR.get(name.partition("_")[0], 0.0))


def num_preemptions(port: int) -> int:
    """All groups', since they started."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    lines = (line for line in page.splitlines() if line.startswith("vllm:num_preemptions_total"))
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def calibrate(
    address: str, port: int, num_groups: int, report: Callable[[str], None]
) -> tuple[StepsFile, dict[str, float]]:
    """Profile of the groups, and requests a second of each mix that they finish in a closed loop."""
    capacity: dict[str, float] = {}
    steps_url = f"http://127.0.0.1:{port}/steps"
    reports = []
    with client_processes(1) as pool:
        for index, (name, shape) in enumerate(MIXES.items()):
            for streams, seconds in ((MAX_NUM_SEQS // 4, PEAK_S / 2), (MAX_NUM_SEQS + 4, PEAK_S)):
                start_s = time.monotonic() + 1.0
                load = Load(
                    address=address, shape=shape, seconds=seconds, timeout_s=TIMEOUT_S, seed=900 + index,
                    start_s=start_s, is_streamed=True,
                )  # fmt: skip
                outcome = pool.submit(closed_loop, load, streams * num_groups).result()
                reports += read_samples(steps_url)
                ended = [r for r in outcome.requests if r.code == "OK" and r.ended_s >= start_s + seconds / 4]
            within = [r for r in ended if r.ended_s < start_s + seconds]
            capacity[name] = len(within) / (seconds * 3 / 4)
            report(f"capacity, {name}: {capacity[name]:.2f} requests/s")
        profile = fit(reports, origin="bench.simulation_truth")
        extra = []
        for index, shape in enumerate(MIXES.values()):
            rate = 0.5
            load = Load(
                address=address, shape=shape, seconds=ALONE_S, timeout_s=TIMEOUT_S, seed=800 + index,
                start_s=time.monotonic() + 1.0, is_streamed=True,
            )  # fmt: skip
            real = measured(pool.submit(open_loop, load, rate).result().requests, 0)
            ours = simulated(profile, arrivals(shape, rate, ALONE_S, 800 + index), num_groups, 0)
            extra.append(real["ttft_median_s"] - ours["ttft_median_s"])
    profile = msgspec.structs.replace(profile, request_s=max(0.0, float(np.mean(extra))))
    report(
        f"{profile.num_steps} steps, median error {profile.median_error:.1%}, p90 {profile.p90_error:.1%}; "
        f"outside the engine {profile.request_s * 1e3:.1f} ms"
    )
    return profile, capacity


def compare(num_groups: int, tp_size: int, loads: Sequence[float], seconds: float, console: Console) -> dict[str, Any]:
    """One shape of the stack."""
    port = free_port()
    cells = []
    with running(configuration(num_groups, tp_size, port), console.print) as app:
        profile, capacity = calibrate(app.address, port, num_groups, console.print)
        with client_processes(1) as pool:
            for number, load_share in enumerate(loads):
                for mix, shape in MIXES.items():
                    rate, seed = load_share * capacity[mix], 100 * number + len(mix)
                    load = Load(
                        address=app.address, shape=shape, seconds=seconds, timeout_s=TIMEOUT_S, seed=seed,
                        start_s=time.monotonic() + 2.0, is_streamed=True,
                    )  # fmt: skip
                    before = num_preemptions(port)
                    outcome = pool.submit(open_loop, load, rate).result()
                    time.sleep(5.0)  # until the gateway has the groups' numbers
                    real = measured(outcome.requests, num_preemptions(port) - before)
                    ours = simulated(profile, arrivals(shape, rate, seconds, seed), num_groups, seed)
                    cells.append({
                        "groups": num_groups, "tp": tp_size, "mix": mix, "load": load_share, "rate": rate,
                        "sent": len(outcome.requests), "late_s": outcome.late_s, "real": real, "simulated": ours,
                    })  # fmt: skip
                    console.print(
                        f"groups {num_groups}, TP {tp_size}, {mix}, {load_share:.0%}: {len(outcome.requests)} requests"
                    )
    return {"capacity": capacity, "profile": json.loads(encode_profile(profile)), "cells": cells}


def as_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A row for each cell: measured, simulated; what does not agree is bold."""
    names = list(cells[0]["real"]) if cells else []
    rows = []
    for cell in cells:
        row = [str(cell["groups"]), str(cell["tp"]), cell["mix"], f"{cell['load']:.0%}", str(cell["sent"])]
        for name in names:
            real, ours = cell["real"][name], cell["simulated"][name]
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
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    result: dict[str, Any] = {"machine": machine_facts(), "seconds": arguments.seconds, "shapes": []}
    for num_groups in arguments.groups:
        for tp_size in arguments.tp:
            result["shapes"].append(compare(num_groups, tp_size, arguments.loads, arguments.seconds, console))
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    cells = [cell for shape in result["shapes"] for cell in shape["cells"]]
    console.print(as_table(cells), soft_wrap=True)
    checks = [agrees(name, cell["real"][name], cell["simulated"][name]) for cell in cells for name in cell["real"]]
    console.print(
        f"{sum(checks)} of {len(checks)} figures agree; each cell is measured / simulated, bold where they do not"
    )
    sys.exit(not all(checks))


if __name__ == "__main__":
    main()
