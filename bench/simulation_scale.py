"""How fast simulations run as they grow from one group to 1,250 of TP=8 (10,000 GPUs), each under the same load a group.

The load of an hour has a daily rhythm and about 806 requests a group, so that 1,250 groups get 1,007,500. Processor time is told
beside that of a fixed loop, since a shared machine's is worth less: `cost` is processor time of the simulation over that of the
loop run before and after it.

    python -m bench.simulation_scale [--groups 1 10 100 1250] [--seconds 3600] [--json FILE]
"""

import argparse
import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import machine_facts
from bench.markdown import table
from bench.simulation.run import simulate
from bench.simulation.scenario import SimulationScenario, parse_scenario

RESULT = Path(__file__).parent / "results" / "simulation_scale.json"
REQUESTS_A_GROUP_PER_S = 0.224
LOOP_ITERATIONS = 3_000_000
MAX_WALL_S = 600.0
MAX_BYTES = 8e9
MAX_GROWTH = 1.3
"""Cost a request may be so many times that of a tenth of the groups: growth is linear but for caches of the processor."""


def scenario(num_groups: int, seconds: float) -> SimulationScenario:
    """One hour of chat, whatever part of it is simulated."""
    return parse_scenario(
        {
            "name": f"{num_groups} groups",
            "duration_s": seconds,
            "groups": {
                "model": "llama-2-70b-chat", "profile": "a100-80g", "tensor_parallel_size": 8, "num_groups": num_groups,
                "prefix_caching": False,
                "max_num_seqs": 64, "max_num_batched_tokens": 512,  # so that sizes of today compare with those of before
            },
            "tenants": [
                {
                    "name": f"tenant-{number}",
                    "work": {
                        "kind": "synthetic",
                        "input_tokens": {"kind": "lognormal", "mean": 1000, "sigma": 0.9, "max": 3500},
                        "output_tokens": {"kind": "lognormal", "mean": 220, "sigma": 0.8, "max": 500},
                    },
                    "arrivals": {
                        "process": "poisson", "rate": REQUESTS_A_GROUP_PER_S * num_groups / 4,
                        "diurnal": {"period_s": 3600, "amplitude": 0.5, "peak_at_s": 1800},
                    },
                }
                for number in range(4)
            ],
        },
        origin="the benchmark's scenario",
    )  # fmt: skip


def loop_s() -> float:
    """Processor time of a fixed piece of Python."""
    began_s, total = time.process_time(), 0
    for number in range(LOOP_ITERATIONS):
        total += number * number % 7
    return time.process_time() - began_s


def measure(num_groups: int, seconds: float) -> dict[str, Any]:
    """One size."""
    before_s, wall_s, cpu_s = loop_s(), time.monotonic(), time.process_time()
    summary, _ = simulate(scenario(num_groups, seconds))
    wall_s, cpu_s = time.monotonic() - wall_s, time.process_time() - cpu_s
    loop = (before_s + loop_s()) / 2
    return {
        "num_groups": num_groups,
        "seconds": seconds,
        "requests": summary["sent"],
        "finished": summary["finished"],
        "steps": summary["num_steps"],
        "jumped_share": summary["num_steps_jumped"] / summary["num_steps"],
        "busy_share": summary["busy_share"],
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "loop_s": loop,
        "cost_a_request": cpu_s / loop / summary["sent"],
        "simulated_s_per_s": seconds / wall_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 10, 100, 1250], help="from few to many")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of arrivals; 3600 is the whole hour")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    sizes = []
    for num_groups in arguments.groups:
        sizes.append(measure(num_groups, arguments.seconds))
        console.print(f"{num_groups} groups: {sizes[-1]['cpu_s']:.1f} s")
    holds = {
        "wall time": sizes[-1]["wall_s"] <= MAX_WALL_S,
        "memory": sizes[-1]["peak_bytes"] <= MAX_BYTES,
        "linear": all(
            after["cost_a_request"] <= MAX_GROWTH * before["cost_a_request"] for before, after in pairwise(sizes[1:])
        ),
    }
    arguments.json.write_text(json.dumps({"machine": machine_facts(), "sizes": sizes, "holds": holds}, indent=1) + "\n")
    rows = [
        [
            f"{size['num_groups']:,}", f"{size['requests']:,}", f"{size['steps']:,}", f"{size['jumped_share']:.1%}",
            f"{size['wall_s']:.1f}", f"{size['cpu_s']:.1f}", f"{size['loop_s']:.2f}",
            f"{size['cost_a_request'] * 1e3:.2f}", f"{size['simulated_s_per_s']:,.1f}", f"{size['peak_bytes'] / 1e9:.2f}",
        ]
        for size in sizes
    ]  # fmt: skip
    heads = [
        "groups",
        "requests",
        "steps",
        "jumped",
        "wall s",
        "CPU s",
        "loop s",
        "loops / 1,000 requests",
        "simulated s / s",
        "GB",
    ]
    console.print(table(heads, rows), soft_wrap=True)
    for name, held in holds.items():
        console.print(f"{name}: {'holds' if held else 'does not hold'}")
    sys.exit(not all(holds.values()))


if __name__ == "__main__":
    main()
