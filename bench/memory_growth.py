"""Whether the served stack grows under a steady mixed load: memory, descriptors and threads of its processes.

Requests differ in length, sampling, log-probabilities and shared beginnings; some are cancelled half way and some are wrong.
Memory is what the system cannot take back: anonymous pages, and shared ones divided among those who share them. Pages of mapped
files come and go with what else runs on the machine. Growth is from the median of the first tenth after the warm-up to that of
the last tenth, over all processes: gateway, leader, ranks, and Ray's own.

    python -m bench.memory_growth [--minutes 30] [--warm-up-minutes 5] [--streams 16] [--json FILE]
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from rich.console import Console

from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.stack import running, stack_config
from bench.stats import fit_line, growth
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "memory_growth.json"
MAX_GROWTH_BYTES = 5_000_000
MAX_GROWTH_HANDLES = 2
"""Descriptors or threads that a process may have more in the end: Ray opens one now and then, a leak would be of hundreds."""
PART = 0.1
SAMPLE_S = 5.0
REQUEST_TIMEOUT_S = 120.0
MB = 1e6
RAY = "Ray's own"
PART_CANCELLED, PART_WRONG, PART_SHARED = 0.05, 0.02, 0.3


def random_request(draw: random.Random) -> pb.GenerateRequest:
    """Prompts of 1 to 512 tokens, three tenths with one of four beginnings; answers of 1 to 128 tokens."""
    ids = [draw.randrange(100, 30_000) for _ in range(int(2 ** draw.uniform(0, 9)))]
    if draw.random() < PART_SHARED:
        beginning = random.Random(draw.randrange(4))
        ids = [beginning.randrange(100, 30_000) for _ in range(128)] + ids[:256]
    sampling = pb.Sampling(
        temperature=draw.choice((0.0, 0.7, 1.0)),
        top_p=draw.choice((1.0, 0.9)),
        max_tokens=int(2 ** draw.uniform(0, 7)),
        ignore_eos=True,
        seed=draw.randrange(1 << 32),
    )
    if draw.random() < 0.2:
        sampling.repetition_penalty = 1.1
    if draw.random() < 0.2:
        sampling.logprobs = 3
    if draw.random() < PART_WRONG:
        sampling.temperature = -1.0
    return pb.GenerateRequest(model=MODEL, prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)), sampling=sampling)


async def keep_asking(address: str, num_streams: int, until_s: float, ends: Counter[str]) -> None:
    """`num_streams` clients, each with one request after another; `ends` counts how requests ended."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)

        async def client(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < until_s:
                cancels = draw.random() < PART_CANCELLED
                call = stub.GenerateStream(random_request(draw), timeout=REQUEST_TIMEOUT_S)
                try:
                    async for _ in call:
                        if cancels:
                            call.cancel()
                    ends["finished"] += 1
                except asyncio.CancelledError:
                    ends["cancelled"] += 1
                except grpc.aio.AioRpcError as error:
                    ends[error.code().name] += 1

        await asyncio.gather(*(client(seed) for seed in range(num_streams)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process, or of several together."""

    held_bytes: int
    num_fds: int
    num_threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> "Usage":
        """At this moment. Raises OSError or psutil.NoSuchProcess when it has ended."""
        with open(f"/proc/{process.pid}/smaps_rollup") as rollup:
            kib = {line.split()[0]: int(line.split()[1]) for line in rollup.readlines()[1:]}
        return cls(1024 * (kib["Pss_Anon:"] + kib["Pss_Shmem:"]), process.num_fds(), process.num_threads())

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.held_bytes + other.held_bytes, self.num_fds + other.num_fds, self.num_threads + other.num_threads
        )


Samples = dict[str, list[Usage]]
"""By process, one every SAMPLE_S."""


def served_processes() -> dict[str, psutil.Process]:
    """Gateway, leader and ranks of the running stack, by name."""
    from ray import serve  # noqa: PLC0415  # after prepare_environment

    from serving.contracts.served import app_name, deployment_name  # noqa: PLC0415

    handle: Any = serve.get_deployment_handle(deployment_name(MODEL), app_name(MODEL))
    leader, *ranks = handle.pids.remote().result(timeout_s=30)
    gateways = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if (line := " ".join(process.cmdline())).startswith("ray::ServeReplica") and "Gateway" in line
    ]
    pids = {f"gateway {index}": pid for index, pid in enumerate(gateways)} | {"leader": leader}
    pids |= {f"rank {rank}": pid for rank, pid in enumerate(ranks)}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def usage_of_ray(served: Mapping[str, psutil.Process]) -> Usage:
    """Of all other processes that the stack has started, those that came and went since included."""
    total = Usage(0, 0, 0)
    for process in psutil.Process().children(recursive=True):
        if process not in served.values():
            try:
                total += Usage.of(process)
            except (OSError, psutil.NoSuchProcess):
                continue  # it has just ended
    return total


def sample(served: Mapping[str, psutil.Process], until_s: float) -> Samples:
    samples: Samples = {name: [] for name in (*served, RAY)}
    waiting = threading.Event()
    due_s = time.monotonic()
    while due_s < until_s:
        waiting.wait(max(0.0, due_s - time.monotonic()))
        due_s += SAMPLE_S
        for name, process in served.items():
            samples[name].append(Usage.of(process))
        samples[RAY].append(usage_of_ray(served))
    return samples


def judge(samples: Samples, num_warm_up: int) -> dict[str, Any]:
    """What each process grew by after the warm-up, and whether all together stay within the bounds."""
    rows: list[dict[str, Any]] = []
    for name, values in samples.items():
        steady = values[num_warm_up:]
        held = [usage.held_bytes for usage in steady]
        rows.append(
            {
                "process": name,
                "start_bytes": held[0],
                "growth_bytes": growth(held, PART),
                "slope_bytes_per_hour": fit_line(range(len(held)), held).slope / SAMPLE_S * 3600,
                "growth_fds": growth([usage.num_fds for usage in steady], PART),
                "growth_threads": growth([usage.num_threads for usage in steady], PART),
            }
        )
    together = [sum(usage.held_bytes for usage in each) for each in zip(*samples.values(), strict=True)]
    total = growth(together[num_warm_up:], PART)
    handles = max(row[kind] for row in rows for kind in ("growth_fds", "growth_threads"))
    return {
        "processes": rows,
        "growth_bytes": total,
        "max_growth_bytes": MAX_GROWTH_BYTES,
        "holds": total <= MAX_GROWTH_BYTES and handles <= MAX_GROWTH_HANDLES,
    }


def measure(minutes: float, warm_up_minutes: float, num_streams: int, tp_size: int, console: Console) -> dict[str, Any]:
    facts = machine_facts()
    ends: Counter[str] = Counter()
    with running(stack_config({"tensor_parallel_size": tp_size}), console.print) as app:
        served = served_processes()
        until_s = time.monotonic() + 60 * (minutes + warm_up_minutes)
        load = threading.Thread(target=lambda: asyncio.run(keep_asking(app.address, num_streams, until_s, ends)))
        load.start()
        samples = sample(served, until_s)
        load.join(REQUEST_TIMEOUT_S)
    return {
        "machine": facts,
        "model": MODEL,
        "minutes": minutes,
        "warm_up_minutes": warm_up_minutes,
        "streams": num_streams,
        "tp_size": tp_size,
        "requests": dict(ends),
        **judge(samples, round(60 * warm_up_minutes / SAMPLE_S)),
        "sample_s": SAMPLE_S,
        "held_bytes": {name: [usage.held_bytes for usage in values] for name, values in samples.items()},
        "num_fds": {name: [usage.num_fds for usage in values] for name, values in samples.items()},
        "num_threads": {name: [usage.num_threads for usage in values] for name, values in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    result = measure(arguments.minutes, arguments.warm_up_minutes, arguments.streams, arguments.tp, console)
    arguments.json.write_text(json.dumps(result) + "\n")
    for row in result["processes"]:
        grown, slope = row["growth_bytes"] / MB, row["slope_bytes_per_hour"] / MB
        console.print(
            f"{row['process']}: {grown:+.2f} MB, slope {slope:+.2f} MB an hour, "
            f"{row['growth_fds']:+g} descriptors, {row['growth_threads']:+g} threads"
        )
    decision = "holds" if result["holds"] else "does not hold"
    console.print(f"requests: {result['requests']}")
    console.print(f"growth {result['growth_bytes'] / MB:+.2f} MB; at most {MAX_GROWTH_BYTES / MB:g} MB: {decision}")
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
