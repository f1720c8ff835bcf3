"""What it brings that prompts which are not computed yet count in routing: simulations with and without, the same requests.

A gateway sends a request to the group with the least to do, counted in open sequences; a prompt that is not computed yet counts
as one more for each `loads.PROMPT_TOKENS_A_SEQUENCE` of its tokens. Rates are parts of the one that a group keeps up with (99 %
of first tokens within 2 s), which is found by bisection.

    python -m bench.routing [--profile h200] [--model llama-2-7b] [--tp 1] [--groups 2 8] [--loads 0.6 0.9] [--counted 256 64 16]
        [--seconds 600] [--input sharegpt] [--kv-tokens N] [--json FILE]
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.markdown import table
from bench.simulation.run import simulate
from bench.simulation.scenario import SimulationScenario, parse_scenario
from serving.gateway.groups import loads

NOT_COUNTED = 1 << 40
"""Tokens that no prompt has."""
FIGURES = ("median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "num_preemptions")
KEEPS_UP_MS = 2000.0
"""99th percentile of the time to the first token of a group that keeps up."""
NUM_HALVINGS = 7
TRIAL_S = 120.0


def scenario(arguments: argparse.Namespace, num_groups: int, rate: float, seconds: float) -> SimulationScenario:
    """So many requests a second for all groups together."""
    groups: dict[str, Any] = {
        "model": arguments.model,
        "profile": arguments.profile,
        "tensor_parallel_size": arguments.tp,
        "num_groups": num_groups,
        "prefix_caching": False,
        "max_num_seqs": 64,  # with which the figures in docs/simulation.md were made
        "max_num_batched_tokens": 512,
    }
    if arguments.kv_tokens:
        groups["kv_cache_tokens"] = arguments.kv_tokens
    lengths = {"kind": arguments.input} if arguments.input == "sharegpt" else int(arguments.input)
    work = {"kind": "synthetic", "input_tokens": lengths, "output_tokens": {"kind": "sharegpt", "max": 512}}
    tenant = {"work": work, "arrivals": {"process": "poisson", "rate": rate}}
    data = {"name": "routing", "duration_s": seconds, "groups": groups, "tenants": [tenant]}
    return parse_scenario(data, origin="bench.routing")


def most_rate(arguments: argparse.Namespace) -> float:
    """Requests a second that one group keeps up with."""
    low, high = 0.0, 1.0
    while _keeps_up(arguments, high):
        low, high = high, 2 * high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _keeps_up(arguments, middle) else (low, middle)
    return low


def _keeps_up(arguments: argparse.Namespace, rate: float) -> bool:
    summary, _ = simulate(scenario(arguments, 1, rate, TRIAL_S))
    return bool(summary["refused"] == 0 and summary["p99_ttft_ms"] <= KEEPS_UP_MS)


@contextmanager
def counted(num_tokens: int) -> Iterator[None]:
    """So many tokens of a prompt count as one sequence."""
    before, loads.PROMPT_TOKENS_A_SEQUENCE = loads.PROMPT_TOKENS_A_SEQUENCE, num_tokens
    try:
        yield
    finally:
        loads.PROMPT_TOKENS_A_SEQUENCE = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.9], help="parts of what a group can do")
    parser.add_argument("--counted", type=int, nargs="+", default=[256, 64, 16], help="prompt tokens a sequence")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--input", default="sharegpt", help="lengths of prompts: sharegpt, or a number")
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    rate = most_rate(arguments)
    console.print(f"one group can do {rate:.2f} requests/s")
    rows, results = [], []
    for num_groups in arguments.groups:
        for load in arguments.loads:
            for num_tokens in (NOT_COUNTED, *arguments.counted):
                with counted(num_tokens):
                    summary, _ = simulate(scenario(arguments, num_groups, load * rate * num_groups, arguments.seconds))
                told = "sequences alone" if num_tokens == NOT_COUNTED else f"prompts, {num_tokens} tokens as one"
                figures = {name: summary[name] for name in FIGURES}
                results.append({"groups": num_groups, "load": load, "counted": told, **figures})
                rows.append([str(num_groups), f"{load:.0%}", told, *(f"{figures[name]:.1f}" for name in FIGURES)])
    console.print(table(["groups", "load", "counted", *FIGURES], rows), soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rate": rate, "cells": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
