"""Whether the served stack grows under a steady mixed load: resident memory of gateway, leader and ranks, once a second.

Requests differ in length, sampling, log-probabilities and shared beginnings; some are cancelled half way and some are wrong.
Growth is from the median of the first tenth after the warm-up to that of the last tenth, over all processes.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from rich.console import Console

from bench.peers.environments import MODEL
from bench.stats import fit_line, growth
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.bench.machine import machine_facts
from serving.config import parse_config, prepare_environment

RESULT = Path(__file__).parent / "results" / "memory_growth.json"
MAX_GROWTH_BYTES = 5_000_000
PART = 0.1
SAMPLE_S = 1.0
MAX_SAMPLES_KEPT = 360
REQUEST_TIMEOUT_S = 120.0
MB = 1e6
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


def served_processes() -> dict[str, psutil.Process]:
    """Gateway, leader and ranks of the running stack, by name."""
    from ray import serve  # noqa: PLC0415  # after prepare_environment

    from serving.app import APP_NAME  # noqa: PLC0415

    handle: Any = serve.get_deployment_handle(f"ReplicaGroup-{MODEL}", APP_NAME)
    leader, *ranks = handle.pids.remote().result(timeout_s=30)
    gateways = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if (line := " ".join(process.info["cmdline"] or [])).startswith("ray::ServeReplica") and "Gateway" in line
    ]
    pids = {f"gateway {index}": pid for index, pid in enumerate(gateways)} | {"leader": leader}
    pids |= {f"rank {rank}": pid for rank, pid in enumerate(ranks)}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def sample(processes: Mapping[str, psutil.Process], until_s: float) -> dict[str, list[int]]:
    """Resident bytes of every process, every SAMPLE_S."""
    samples: dict[str, list[int]] = {name: [] for name in processes}
    waiting = threading.Event()
    while time.monotonic() < until_s:
        for name, process in processes.items():
            samples[name].append(process.memory_info().rss)
        waiting.wait(SAMPLE_S)
    return samples


def judge(samples: Mapping[str, Sequence[int]], num_warm_up: int) -> dict[str, Any]:
    """Growth and slope of each process after the warm-up, and whether all together stay within the bound."""
    rows = []
    total = 0.0
    for name, values in samples.items():
        steady = values[num_warm_up:]
        grown = growth(steady, PART)
        total += grown
        slope = fit_line(range(len(steady)), steady).slope / SAMPLE_S * 3600
        rows.append({"process": name, "start_bytes": steady[0], "growth_bytes": grown, "slope_bytes_per_hour": slope})
    return {
        "processes": rows,
        "growth_bytes": total,
        "max_growth_bytes": MAX_GROWTH_BYTES,
        "holds": total <= MAX_GROWTH_BYTES,
    }


def measure(minutes: float, warm_up_minutes: float, num_streams: int, tp_size: int, console: Console) -> dict[str, Any]:
    from serving.app import start  # noqa: PLC0415  # after prepare_environment

    entry = {"name": MODEL, "source": MODEL, "dtype": "bfloat16", "tensor_parallel_size": tp_size}
    config = parse_config(
        {"models": [entry], "gateway": {"port": 0, "http_port": None}}, origin="the benchmark's configuration"
    )
    facts = machine_facts()
    ends: Counter[str] = Counter()
    app = start(config, console.print)
    try:
        processes = served_processes()
        until_s = time.monotonic() + 60 * (minutes + warm_up_minutes)
        load = threading.Thread(target=lambda: asyncio.run(keep_asking(app.address, num_streams, until_s, ends)))
        load.start()
        samples = sample(processes, until_s)
        load.join(REQUEST_TIMEOUT_S)
    finally:
        app.stop()
    num_warm_up = int(len(next(iter(samples.values()))) * warm_up_minutes / (minutes + warm_up_minutes))
    return {
        "machine": facts,
        "model": MODEL,
        "minutes": minutes,
        "warm_up_minutes": warm_up_minutes,
        "streams": num_streams,
        "tp_size": tp_size,
        "requests": dict(ends),
        **judge(samples, num_warm_up),
        "samples": {name: values[:: max(1, len(values) // MAX_SAMPLES_KEPT)] for name, values in samples.items()},
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
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["processes"]:
        slope = row["slope_bytes_per_hour"] / MB
        console.print(f"{row['process']}: {row['growth_bytes'] / MB:+.2f} MB, slope {slope:+.2f} MB an hour")
    verdict = "holds" if result["holds"] else "does not hold"
    console.print(f"requests: {result['requests']}")
    console.print(f"growth {result['growth_bytes'] / MB:+.2f} MB; at most {MAX_GROWTH_BYTES / MB:g} MB: {verdict}")
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
