"""How a decode step's time grows with the batch (1 to 64 sequences) and with the context (128 to 4,096 tokens).

A sequence's prompt is computed once; after that the prefix cache gives it back, so that every point can be measured several
times, in turn with all others. Contexts longer than the model was made for give no sensible text, and take the same time.
Writes bench/results/growth.json; `python -m bench.report` draws it.

    python -m bench.growth [--rounds 10] [--json FILE]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench.engine_timing import EngineContender, Limit, default_shapes
from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.timing import PAUSE_S
from model_parallel.checkpoint.detect import describe
from model_parallel.config import DTYPE_BYTES, ModelConfig, ParallelConfig
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.machine import read_machine
from serving.models.fetch import fetch_model

RESULT = Path(__file__).parent / "results" / "growth.json"
DTYPE = "bfloat16"
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXTS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096)
BATCH_CONTEXT = 128
"""Context of the points over the batch."""
CONTEXT_BATCHES = (1, 8)
"""Batches of the points over the context."""
NUM_STEPS = 24
"""Timed at each point in each round, after NUM_SKIPPED that are not."""
NUM_SKIPPED = 4
NUM_KV_TOKENS = 65_536
"""Room for all prompts, so that none is computed twice, and for what is decoded meanwhile."""


class Point(NamedTuple):
    """So many sequences, each with so many tokens before the one that is decoded."""

    batch: int
    context: int


POINTS = tuple(
    dict.fromkeys(
        [Point(batch, BATCH_CONTEXT) for batch in BATCHES]
        + [Point(batch, context) for batch in CONTEXT_BATCHES for context in CONTEXTS]
    )
)


def prompt(sequence: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """The first tokens of a sequence: a longer prompt begins with every shorter one, and no two sequences are alike."""
    draw = random.Random(sequence)
    return tuple(draw.randrange(100, vocab_size) for _ in range(length))


def requests(point: Point, vocab_size: int, num_new_tokens: int) -> Iterator[EngineRequest]:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True)
    for sequence in range(point.batch):
        ids = prompt(sequence, point.context, vocab_size)
        yield EngineRequest(request_id=str(sequence), prompt_token_ids=ids, sampling=sampling)


def fill_cache(contender: EngineContender) -> None:
    """Compute every prompt that a point needs."""
    for point in (Point(max(BATCHES), BATCH_CONTEXT), Point(max(CONTEXT_BATCHES), max(CONTEXTS))):
        for request in requests(point, contender.vocab_size, 1):
            contender.engine.add(request)
        while contender.engine.has_work:
            contender.engine.step()


def step_times(contender: EngineContender, point: Point) -> list[float]:
    """Seconds from the results of one step to those of the next, while all sequences decode."""
    engine = contender.engine
    num_steps = NUM_STEPS + NUM_SKIPPED
    added = list(requests(point, contender.vocab_size, 2 * num_steps))
    for request in added:
        engine.add(request)
    moments: list[float] = []
    while len(moments) <= num_steps:
        if sum(len(output.token_ids) for output in engine.step()) == point.batch:
            moments.append(time.perf_counter())
        else:  # some are still in prefill
            moments.clear()
    for request in added:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()
    return [after - before for before, after in pairwise(moments)][NUM_SKIPPED:]


def kv_bytes_per_token(model: ModelConfig) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[DTYPE]


def start_shapes(path: Path, stack: ExitStack) -> list[EngineContender]:
    """An engine of every shape, with all prompts computed; ended with the stack."""
    contenders = []
    for tp_size, num_threads in default_shapes(read_machine().num_cpus):
        contender = EngineContender(
            path,
            ParallelConfig(tp_size=tp_size, dtype=DTYPE, num_threads=num_threads),
            num_kv_tokens=NUM_KV_TOKENS,
            max_model_len=2 * max(CONTEXTS),
            enable_prefix_caching=True,
        )
        stack.callback(contender.close)
        fill_cache(contender)
        contenders.append(contender)
    return contenders


def measure(path: Path, num_rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Every shape at every point, and the machine's limits, in turn in every round."""
    facts = machine_facts()
    model = describe(path).config
    limit = Limit(model, bytes_per_weight=DTYPE_BYTES[DTYPE], num_threads=read_machine().num_cpus, name="limit")
    with ExitStack() as stack:
        contenders = start_shapes(path, stack)
        report("all prompts are computed")
        times: dict[tuple[str, Point], list[float]] = {}
        for index in range(num_rounds):
            limit.measure()
            time.sleep(PAUSE_S)
            for point in POINTS:
                for contender in contenders:
                    times.setdefault((contender.name, point), []).extend(step_times(contender, point))
            report(f"round {index + 1} of {num_rounds}")
        shapes = [
            {
                "name": contender.name,
                "detail": contender.detail,
                "points": [[*point, statistics.median(times[contender.name, point])] for point in POINTS],
            }
            for contender in contenders
        ]
    return {
        "machine": facts,
        "model": MODEL,
        "num_parameters": model.num_parameters,
        "bytes_per_weight": DTYPE_BYTES[DTYPE],
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "batch_context": BATCH_CONTEXT,
        "limit": limit.detail,
        "bandwidth": statistics.median(limit.bandwidths),
        "rate": statistics.median(limit.rates),
        "shapes": shapes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    result = measure(fetch_model(MODEL), arguments.rounds, console.print)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {arguments.json}; `python -m bench.report` draws it")


if __name__ == "__main__":
    main()
