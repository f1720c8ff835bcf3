"""Ten times more requests than the stack can serve, for a minute: what it still finishes, how fast it refuses, what it holds.

Peak is a closed loop that saturates the stack. Then requests arrive at ten times the peak's rate, all with a deadline, from a
process of its own that sends nothing again; goodput is the tokens of answers that came within their deadline. When arrivals stop,
one request after another tells when latency is normal again. The clients run on the server's cores, and what they take is told.

    python -m bench.overload [--seconds 60] [--times 10] [--json FILE]
"""

import argparse
import json
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from bench.clients import Ended, Load, Outcome, Shape, client_processes, closed_loop, open_loop, percentile
from bench.machine import machine_facts
from bench.memory_growth import served_processes
from bench.peers.environments import MODEL
from bench.stack import NO_ADMIN, on_all_cores, running, stack_config
from serving.config import ServingConfig
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "overload.json"
SHAPE = Shape(prompt_tokens=(64,), new_tokens=tuple(range(192, 321)))
PROBE = Shape(prompt_tokens=(64,), new_tokens=(256,))
DEADLINE_S = 5.0
"""Bounds the queue too: the group refuses what would not be ready in time."""
MAX_NUM_SEQS = 8
"""An answer then takes about half of the deadline on two cores. More at a time make more tokens, and each answer takes longer."""
PEAK_STREAMS = 16
WARM_UP_S = 5.0
PEAK_S = 40.0
UNLOADED_S = 10.0
START_S = 5.0
"""Within which a client process has its requests ready."""
RECOVERY_S = 30.0
MIN_GOODPUT = 0.9
MAX_REJECT_S = 0.025
MAX_RECOVERY_S = 5.0
NORMAL = 1.5
"""Times the unloaded latency."""
MAX_HELD_BYTES = 100_000_000
"""What all processes together may hold more than before: answers in flight, and what allocators keep."""
MAX_GROWTH_BYTES = 10_000_000
"""What they may grow by from the middle third of the overload to the last one: a queue that grows does not stop to."""
SAMPLE_S = 1.0
MB = 1e6


class Sampler:
    """Resident bytes and processor seconds of each process, every second until the block ends."""

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self._processes = processes
        self.memory: list[tuple[float, dict[str, int]]] = []
        """(monotonic, resident bytes by process)."""
        self.cpu: list[tuple[float, dict[str, float]]] = []
        """(monotonic, seconds since its start by process)."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            now_s = time.monotonic()
            self.memory.append((now_s, {name: process.memory_info().rss for name, process in self._processes.items()}))
            times = {name: process.cpu_times() for name, process in self._processes.items()}
            self.cpu.append((now_s, {name: used.user + used.system for name, used in times.items()}))


def cores(cpu: Sequence[tuple[float, Mapping[str, float]]], from_s: float, until_s: float) -> dict[str, float]:
    """How many cores each process kept busy between two moments."""
    within = [sample for sample in cpu if from_s <= sample[0] <= until_s]
    (first_s, first), (last_s, last) = within[0], within[-1]
    return {name: (last[name] - first[name]) / (last_s - first_s) for name in first}


def finished_rate(requests: Sequence[Ended], from_s: float, until_s: float) -> tuple[float, float]:
    """Answers, and their tokens, a second that were complete between two moments."""
    finished = [r.num_tokens for r in requests if r.code == "OK" and from_s <= r.ended_s < until_s]
    return len(finished) / (until_s - from_s), sum(finished) / (until_s - from_s)


def recovery(probes: Sequence[Ended], stopped_s: float, normal_s: float) -> float:
    """Seconds from the end of the load until a request was sent that then took no more than `normal_s`; inf if none did."""
    normal = (probe.sent_s - stopped_s for probe in probes if probe.code == "OK" and probe.took_s <= normal_s)
    return next(normal, math.inf)


def judge_refusals(requests: Sequence[Ended]) -> dict[str, Any]:
    """How fast refusals came, and whether each says why and when to come back."""
    refused = [r for r in requests if r.code == "RESOURCE_EXHAUSTED"]
    took_s = [r.took_s for r in refused]
    return {
        "num_refused": len(refused),
        "median_s": percentile(took_s, 50) if refused else None,
        "p99_s": percentile(took_s, 99) if refused else None,
        "reasons": Counter(r.reason for r in refused),
        "num_with_retry_info": sum(r.retry_after_s is not None for r in refused),
        "median_retry_after_s": statistics.median(r.retry_after_s or 0.0 for r in refused) if refused else None,
    }


def judge_memory(samples: Sequence[tuple[float, Mapping[str, int]]], began_s: float, ended_s: float) -> dict[str, Any]:
    """Before, at its highest and after, of each process; and whether it came to an end of growing."""

    def within(from_s: float, until_s: float) -> list[Mapping[str, int]]:
        return [held for at_s, held in samples if from_s <= at_s < until_s]

    third_s = (ended_s - began_s) / 3
    before, during, after = within(0, began_s)[-1], within(began_s, ended_s), samples[-1][1]
    rows = {
        name: {"before": before[name], "peak": max(held[name] for held in during), "after": after[name]}
        for name in before
    }
    middle, last = (
        [sum(held.values()) for held in within(began_s + index * third_s, began_s + (index + 1) * third_s)]
        for index in (1, 2)
    )
    return {
        "processes": rows,
        "held_bytes": max(sum(held.values()) for held in during) - sum(before.values()),
        "growth_bytes": statistics.median(last) - statistics.median(middle),
    }


def decisions(result: Mapping[str, Any]) -> dict[str, bool]:
    """The statement to be shown, part by part."""
    refusals, memory = result["refusals"], result["memory"]
    return {
        "goodput": result["goodput"] >= MIN_GOODPUT,
        "rejects": bool(refusals["num_refused"]) and refusals["median_s"] <= MAX_REJECT_S,
        "reasons": refusals["num_with_retry_info"] == refusals["reasons"]["OVERLOADED"] == refusals["num_refused"],
        "memory": memory["held_bytes"] <= MAX_HELD_BYTES and memory["growth_bytes"] <= MAX_GROWTH_BYTES,
        "recovery": result["recovery_s"] <= MAX_RECOVERY_S,
    }


def _after_warm_up(outcome: Outcome, start_s: float, seconds: float) -> tuple[float, float]:
    return finished_rate(outcome.requests, start_s + WARM_UP_S, start_s + seconds)


def _probes(pool: ProcessPoolExecutor, address: str, seconds: float) -> list[Ended]:
    """One request after another, also after one that was refused."""
    load = Load(address=address, shape=PROBE, seconds=seconds, timeout_s=DEADLINE_S, seed=time.monotonic_ns())
    return pool.submit(closed_loop, load, 1).result(timeout=seconds + 2 * DEADLINE_S).requests


def measure(address: str, seconds: float, times: float, report: Callable[[str], None]) -> dict[str, Any]:
    """All phases against a running stack, which serves nobody else."""
    with client_processes(2) as pool, Sampler(served_processes()) as sampler:
        _probes(pool, address, WARM_UP_S)
        unloaded_s = statistics.median(probe.took_s for probe in _probes(pool, address, UNLOADED_S))
        report(f"unloaded: {unloaded_s * 1e3:.0f} ms a request")
        start_s, peak_s = time.monotonic() + START_S, WARM_UP_S + PEAK_S
        load = Load(address=address, shape=SHAPE, seconds=peak_s, timeout_s=60.0, seed=1, start_s=start_s)
        saturated = pool.submit(closed_loop, load, PEAK_STREAMS).result(timeout=peak_s + 2 * load.timeout_s)
        peak, peak_tokens = _after_warm_up(saturated, start_s, peak_s)
        cores_at_peak = cores(sampler.cpu, start_s + WARM_UP_S, start_s + peak_s)
        report(f"peak: {peak:.2f} requests/s, {peak_tokens:.0f} tokens/s")
        report(f"now {times * peak:.1f} requests/s arrive for {seconds:g} s")
        start_s = time.monotonic() + START_S
        load = Load(address=address, shape=SHAPE, seconds=seconds, timeout_s=DEADLINE_S, seed=2, start_s=start_s)
        future = pool.submit(open_loop, load, times * peak)
        time.sleep(max(0.0, start_s + seconds - time.monotonic()))
        probes = _probes(pool, address, RECOVERY_S)
        overload = future.result(timeout=2 * DEADLINE_S)
        time.sleep(2 * SAMPLE_S)
    finished, finished_tokens = _after_warm_up(overload, start_s, seconds)
    return {
        "unloaded_s": unloaded_s,
        "peak_requests_per_s": peak,
        "peak_tokens_per_s": peak_tokens,
        "sent_requests_per_s": len(overload.requests) / seconds,
        "finished_requests_per_s": finished,
        "finished_tokens_per_s": finished_tokens,
        "goodput": finished_tokens / peak_tokens,
        "codes": Counter(request.code for request in overload.requests),
        "refusals": judge_refusals(overload.requests),
        "memory": judge_memory(sampler.memory, start_s, start_s + seconds),
        "recovery_s": recovery(probes, start_s + seconds, NORMAL * unloaded_s),
        "cores": {
            "peak": {"clients": saturated.cpu_s / peak_s} | cores_at_peak,
            "overload": {"clients": overload.cpu_s / seconds}
            | cores(sampler.cpu, start_s + WARM_UP_S, start_s + seconds),
        },
        "latest_s": overload.late_s,
    }


def describe(result: Mapping[str, Any]) -> list[str]:
    """What was found, a line for each decision."""
    refusals, memory, holds = result["refusals"], result["memory"], result["holds"]
    decision = {name: "holds" if held else "does not hold" for name, held in holds.items()}
    median_ms, p99_ms = ((refusals[name] or math.nan) * 1e3 for name in ("median_s", "p99_s"))
    lines = [
        f"goodput {result['finished_tokens_per_s']:.0f} of {result['peak_tokens_per_s']:.0f} tokens/s, "
        f"{result['goodput']:.1%} of peak; at least {MIN_GOODPUT:.0%}: {decision['goodput']}",
        f"{refusals['num_refused']} refused, median {median_ms:.1f} ms, p99 {p99_ms:.1f} ms; "
        f"median at most {MAX_REJECT_S * 1e3:g} ms: {decision['rejects']}",
        f"reasons {dict(refusals['reasons'])}, {refusals['num_with_retry_info']} with a time to come back: "
        f"{decision['reasons']}",
        f"memory {memory['held_bytes'] / MB:+.1f} MB at most, {memory['growth_bytes'] / MB:+.1f} MB from the middle third "
        f"to the last: {decision['memory']}",
        f"normal again after {result['recovery_s']:.2f} s; at most {MAX_RECOVERY_S:g} s: {decision['recovery']}",
        f"all answers: {dict(result['codes'])}; requests were sent {result['latest_s'] * 1e3:.0f} ms late at most",
    ]
    for when, used in result["cores"].items():
        lines.append(f"  cores at {when}: " + ", ".join(f"{name} {cores:.2f}" for name, cores in used.items()))
    for name, held in memory["processes"].items():
        parts = ", ".join(f"{when} {num_bytes / MB:.0f} MB" for when, num_bytes in held.items())
        lines.append(f"  {name}: {parts}")
    return lines


def configuration(tp_size: int) -> ServingConfig:
    """What is not said here is the default."""
    return stack_config({"max_num_seqs": MAX_NUM_SEQS} | on_all_cores(tp_size), admin=NO_ADMIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--times", type=float, default=10.0, help="the peak's rate")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    facts = machine_facts()
    with running(configuration(arguments.tp), console.print) as app:
        result = measure(app.address, arguments.seconds, arguments.times, console.print)
    result = {
        "machine": facts,
        "model": MODEL,
        "tp_size": arguments.tp,
        "shape": {
            "prompt_tokens": [min(SHAPE.prompt_tokens), max(SHAPE.prompt_tokens)],
            "new_tokens": [min(SHAPE.new_tokens), max(SHAPE.new_tokens)],
            "deadline_s": DEADLINE_S,
        },
        "seconds": arguments.seconds,
        "times": arguments.times,
        **result,
        "holds": decisions(result),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in describe(result):
        console.print(line)
    sys.exit(not all(result["holds"].values()))


if __name__ == "__main__":
    main()
