"""The engine alone on fixed work, beside transformers' generate and what the machine can do at most, all timed in one run.

The work is (sequences, prompt tokens, new tokens) of random token ids, greedy, without prefix caching and with end-of-sequence
ignored; a time counts prefill and decode together, and the best of the repeats is quoted. Quote ratios: machines drift.

    python -m bench.engine [--repeats 3] [--json FILE] [--without-transformers]
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model_parallel.checkpoint.detect import describe
from model_parallel.config import CacheConfig, GroupConfig, ModelConfig, ParallelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.executor import Executor
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.runtime.executors import InProcessExecutor, SpawnedExecutor
from serving.fetch import fetch_model

MODEL = "smollm2-135m-instruct"
WORKLOADS = ((1, 32, 128), (8, 128, 128), (32, 128, 128), (1, 1024, 4))
SHAPES = ((1, 2), (2, 1))
"""(tensor-parallel ranks, threads of each): the same two cores, used in two ways."""
Workload = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Timing:
    """One engine on one workload."""

    engine: str
    workload: Workload
    best_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time."""
        return self.workload[0] * self.workload[2] / self.best_s


def prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids from a fixed seed."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 30_000) for _ in range(length)] for _ in range(batch)]


def best_of(repeats: int, run: Callable[[int], object]) -> float:
    """Seconds of the fastest of `repeats`, after one that does not count."""
    times = []
    for repeat in range(repeats + 1):
        began_s = time.perf_counter()
        run(repeat)
        times.append(time.perf_counter() - began_s)
    return min(times[1:])


def time_packtrain(path: Path, tp_size: int, num_threads: int, repeats: int) -> list[Timing]:
    """The engine in this process at TP=1, and over spawned ranks otherwise."""
    config = GroupConfig(
        checkpoint_path=str(path),
        parallel=ParallelConfig(tp_size=tp_size, dtype="bfloat16", num_threads=num_threads),
        cache=CacheConfig(num_blocks=1024, enable_prefix_caching=False),
        epoch=1,
    )
    executor: Executor = InProcessExecutor(config) if tp_size == 1 else SpawnedExecutor(config)
    scheduler = Scheduler(SchedulerConfig(max_model_len=2048), config.cache, epoch=1)
    engine = Engine(executor, scheduler)

    def run(workload: Workload, repeat: int) -> None:
        batch, length, new = workload
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for index, prompt in enumerate(prompts(batch, length, repeat)):
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
        while engine.has_work:
            engine.step()

    name = f"packtrain TP={tp_size}, {num_threads} thread{'s' * (num_threads > 1)} a rank"
    try:
        return [Timing(name, work, best_of(repeats, partial(run, work))) for work in WORKLOADS]
    finally:
        executor.shutdown()


def time_transformers(path: Path, repeats: int) -> list[Timing]:
    """transformers' generate in bfloat16 on the same weights."""
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: PLC0415  # seconds, and not always wanted
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415

    torch.set_num_threads(2)
    # Any: its stubs do not agree with its classes.
    model: Any = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded["tensors"], strict=False)
    model.bfloat16().eval()

    def run(workload: Workload, repeat: int) -> None:
        batch, length, new = workload
        ids = torch.tensor(prompts(batch, length, repeat))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    return [Timing("transformers generate", work, best_of(repeats, partial(run, work))) for work in WORKLOADS]


def time_limit(model: ModelConfig) -> tuple[list[Timing], str]:
    """The floor that read bandwidth and bfloat16 arithmetic of two threads set, as torch reaches them."""
    torch.set_num_threads(2)
    data = torch.ones(128 << 20)
    bandwidth = data.nbytes / best_of(6, lambda _: data.sum())
    x, weight = torch.randn(1024, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    rate = 2 * 1024 * 4096 * 4096 / best_of(6, lambda _: torch.nn.functional.linear(x, weight))
    limits = []
    for batch, length, new in WORKLOADS:
        prefill_s = 2 * model.num_parameters * batch * length / rate
        step_s = max(2 * model.num_parameters / bandwidth, 2 * model.num_parameters * batch / rate)
        limits.append(Timing("limit", (batch, length, new), prefill_s + new * step_s))
    return limits, f"read {bandwidth / 1e9:.1f} GB/s, bfloat16 product {rate / 1e9:.0f} GFLOP/s (torch, 2 threads)"


def show(timings: list[Timing], machine: str) -> None:
    """A row an engine, a column a workload."""
    table = Table("output tokens/s", *(f"{b} × {n}→{m}" for b, n, m in WORKLOADS), title=machine)
    for engine in dict.fromkeys(timing.engine for timing in timings):
        table.add_row(engine, *(f"{timing.tokens_per_s:.1f}" for timing in timings if timing.engine == engine))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    path = fetch_model(MODEL)
    timings: list[Timing] = []
    for tp_size, num_threads in SHAPES:
        timings += time_packtrain(path, tp_size, num_threads, arguments.repeats)
    if not arguments.without_transformers:
        timings += time_transformers(path, 1)
    limits, machine = time_limit(describe(path).config)
    show(timings + limits, machine)
    if arguments.json:
        rows = [asdict(timing) | {"tokens_per_s": timing.tokens_per_s} for timing in timings + limits]
        arguments.json.write_text(json.dumps({"machine": machine, "timings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
