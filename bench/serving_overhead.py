"""What serving costs: tokens/s through gateway, Serve and leader, against the engine alone on the same requests.

Both are timed in turn in one run, in rounds, because the machine's speed drifts; quote the ratio.

    python -m bench.serving_overhead [--streams 16] [--rounds 5] [--json FILE]
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from bench.machine import machine_facts
from model_parallel.config import GroupConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.runtime.executors import SpawnedExecutor
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import ServingConfig, parse_config
from serving.driver.environment import prepare_environment
from serving.models.group_spec import GroupSpec, resolve_model

RESULT = Path(__file__).parent / "results" / "serving_overhead.json"
MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS = 64
NEW_TOKENS = 96
TIMEOUT_S = 300.0
SHAPES = ((1, 2), (2, 1))
"""(tensor-parallel ranks, threads of each): the same two cores, used in two ways."""


def prompts(num_streams: int, seed: int) -> list[list[int]]:
    """Random token ids, so that no two requests share a prefix."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 30_000) for _ in range(PROMPT_TOKENS)] for _ in range(num_streams)]


def engine_alone(engine: Engine, batch: Sequence[Sequence[int]], seed: int) -> float:
    """Tokens/s of the batch, added at once and run to its end in the caller's thread."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    began_s = time.perf_counter()
    for index, prompt in enumerate(batch):
        engine.add(EngineRequest(request_id=f"{seed}-{index}", prompt_token_ids=tuple(prompt), sampling=sampling))
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    return num_tokens / (time.perf_counter() - began_s)


async def served(address: str, batch: Sequence[Sequence[int]]) -> float:
    """Tokens/s of the same batch as concurrent gRPC streams, until the last chunk has been read."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)

        async def one(prompt: Sequence[int]) -> int:
            request = pb.GenerateRequest(
                model=MODEL,
                prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
                sampling=pb.Sampling(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True),
            )
            return sum([len(chunk.token_ids) async for chunk in stub.GenerateStream(request, timeout=TIMEOUT_S)])

        await channel.channel_ready()
        began_s = time.perf_counter()
        counts = await asyncio.gather(*(one(prompt) for prompt in batch))
        return sum(counts) / (time.perf_counter() - began_s)


def run(measurement: Coroutine[Any, Any, float]) -> float:
    """In uvloop, which Ray's processes use too: the client shares the machine with what it measures."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measurement)


def make_engine(spec: GroupSpec) -> tuple[Engine, SpawnedExecutor]:
    """The engine on ranks of the same shape as the served ones, without Ray."""
    config = GroupConfig(checkpoint_path=spec.card.source, parallel=spec.parallel, cache=spec.cache, epoch=1)
    executor = SpawnedExecutor(config)
    return Engine(executor, Scheduler(spec.scheduler, spec.cache, epoch=1)), executor


def measure(config: ServingConfig, num_streams: int, num_rounds: int) -> list[tuple[float, float]]:
    """(engine alone, served) tokens/s of each round, after one round that is not counted."""
    from serving.driver.app import start  # noqa: PLC0415  # after prepare_environment

    engine, executor = make_engine(resolve_model(config.models[0]))
    app = start(config, print)
    try:
        rounds = []
        for index in range(num_rounds + 1):
            batch = prompts(num_streams, index)
            rounds.append((engine_alone(engine, batch, index), run(served(app.address, batch))))
            print(f"round {index}: engine alone {rounds[-1][0]:.1f}, served {rounds[-1][1]:.1f} tokens/s", flush=True)
        return rounds[1:]
    finally:
        app.stop()
        executor.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--streams", type=int, default=16, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    facts = machine_facts()
    results = []
    for tp_size, num_threads in SHAPES:
        entry = {
            "name": MODEL, "source": MODEL, "dtype": arguments.dtype,
            "tensor_parallel_size": tp_size, "threads_per_rank": num_threads,
        }  # fmt: skip
        config = parse_config(
            {"models": [entry], "gateway": {"port": 0, "http_port": None}}, origin="the benchmark's configuration"
        )
        rounds = measure(config, arguments.streams, arguments.rounds)
        alone, through = (statistics.median(side) for side in zip(*rounds, strict=True))
        ratio = statistics.median(served / engine for engine, served in rounds)
        print(
            f"TP={tp_size}, threads a rank {num_threads}: medians engine alone {alone:.1f} tokens/s, "
            f"served {through:.1f} tokens/s; served/engine {ratio:.3f}",
            flush=True,
        )
        results.append(
            entry | {"streams": arguments.streams, "rounds": rounds, "engine": alone, "served": through, "ratio": ratio}
        )
    result = {"machine": facts, "shapes": results}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
