"""Speculative decoding on and off, in turn in one run: the ratio of tokens a second, and whether every token is the same.

Kinds of work, each alone and in batches:
- copy: the prompt holds a passage of a book twice, and the model goes on with it (greedy);
- random: random token ids, and an answer drawn at temperature 1, in which nothing repeats;
- greedy: the same prompts, and the likeliest answer, which repeats itself sooner or later;
- text: a passage of the book, and what the model goes on with at temperature 0.8.

The two take turns every few steps, since the speed of a machine that others use too changes from second to second.

    python -m bench.speculation [--repeats 5] [--batches 1 32] [--tp 1 2] [--kinds copy random] [--draft exact] [--json FILE]
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.engine_timing import EngineContender
from bench.machine import describe_machine, machine_facts
from bench.support.draft_pair import save_deepened, save_random
from bench.timing import FIRST_TOKEN_ID, LAST_TOKEN_ID
from bench.turns import Run, take_turns
from model_parallel.checkpoint.detect import describe
from model_parallel.config import CPU_QUANTIZATIONS, DraftConfig, ParallelConfig
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.machine import read_machine
from model_parallel.memory import draft_memory
from serving.models.fetch import resolve_source
from serving.text.tokenizer import Tokenizer, load_tokenizer

RESULT = Path(__file__).parent / "results" / "speculation.json"
TEXT = Path(__file__).parent / "texts" / "alice-1.txt"
MODEL = "smollm2-135m-instruct"
DRAFTS = ("exact", "random")
KINDS = ("copy", "random", "greedy", "text")
PASSAGE_TOKENS, RANDOM_TOKENS = 160, 64
NEW_TOKENS = 128
NEW_TOKENS_OF_WARM_UP = 32
NUM_STEPS_IN_TURN = 16
NUM_KV_TOKENS, MAX_MODEL_LEN = 32_768, 1024
MIN_RATIO = {"copy": 1.6, "random": 0.98, "greedy": 0.98, "text": 0.98}
"""Of a sequence alone; a batch must reach 0.98."""
MIN_RATIO_OF_BATCH = 0.98


def requests(kind: str, batch: int, seed: int, tokenizer: Tokenizer, num_new_tokens: int) -> list[EngineRequest]:
    """A batch of one kind. Other seeds give other prompts."""
    draw = random.Random(seed)
    text = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    made = []
    for index in range(batch):
        if kind in ("copy", "text"):
            begin = draw.randrange(len(text) - PASSAGE_TOKENS)
            prompt = [*text[begin : begin + PASSAGE_TOKENS]] * (1 + (kind == "copy"))
        else:
            prompt = [draw.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(RANDOM_TOKENS)]
        temperature = {"random": 1.0, "text": 0.8}.get(kind, 0.0)
        sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=num_new_tokens, ignore_eos=True)
        made.append(
            EngineRequest(
                request_id=f"{kind}-{seed}-{index}", prompt_token_ids=tuple(prompt), choice=index, sampling=sampling
            )
        )
    return made


def compare(
    kind: str,
    batch: int,
    contenders: Sequence[EngineContender],
    num_repeats: int,
    tokenizer: Tokenizer,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Off and on in turn, some steps each, on the same requests. Raises RuntimeError when a token differs."""
    _off, on = contenders
    rounds: list[dict[str, float]] = []
    load = os.getloadavg()[0]
    before = on.engine.stats
    for seed in range(num_repeats + 1):  # the first one warms up
        batch_requests = requests(kind, batch, seed, tokenizer, NEW_TOKENS if seed else NEW_TOKENS_OF_WARM_UP)
        runs = [Run(contender.engine, batch_requests) for contender in contenders]
        take_turns(runs if seed % 2 else runs[::-1], NUM_STEPS_IN_TURN)
        if runs[0].answers != runs[1].answers:
            raise RuntimeError(f"{kind}, batch {batch}, seed {seed}: the answers differ")
        if seed:
            rounds.append(
                {
                    f"{name}_{unit}": value
                    for name, run in zip(("off", "on"), runs, strict=True)
                    for unit, value in (("s", run.seconds), ("cpu_s", run.leader_cpu_s), ("steps", run.num_steps))
                }
            )
        else:
            before = on.engine.stats
    after = on.engine.stats
    num_drafts = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    off_s, on_s = (sum(each[name] for each in rounds) for name in ("off_s", "on_s"))
    off_cpu_us, on_cpu_us = (
        1e6 * sum(each[f"{name}_cpu_s"] for each in rounds) / sum(each[f"{name}_steps"] for each in rounds)
        for name in ("off", "on")
    )
    num_tokens = batch * NEW_TOKENS * num_repeats
    result = {
        "kind": kind,
        "batch": batch,
        "tp_size": on.parallel.tp_size,
        "quantization": on.parallel.quantization,
        "load_average": round(load, 2),
        "rounds": rounds,
        "ratio": off_s / on_s,
        "off_tokens_per_s": num_tokens / off_s,
        "on_tokens_per_s": num_tokens / on_s,
        "off_leader_cpu_us": off_cpu_us,
        "on_leader_cpu_us": on_cpu_us,
        "num_drafts": num_drafts,
        "num_accepted": num_accepted,
        "num_tokens": num_tokens,
        "holds": off_s / on_s >= (MIN_RATIO[kind] if batch == 1 else MIN_RATIO_OF_BATCH),
    }
    report(
        f"{kind}, batch {batch}, TP={on.parallel.tp_size} {on.parallel.quantization}: {off_s / on_s:.2f} × "
        f"({num_tokens / off_s:.0f} → {num_tokens / on_s:.0f} tokens/s), {num_accepted} of {num_drafts} drafts "
        f"right in {num_tokens} tokens, leader's CPU {off_cpu_us:.0f} → {on_cpu_us:.0f} µs a step, load {load:.1f}"
    )
    return result


def as_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """For the terminal."""
    table = Table(
        "work", "batch", "TP", "off, tokens/s", "on, tokens/s", "on / off", "drafts right", "load", title=title
    )
    for row in rows:
        share = (
            f"{row['num_accepted'] / row['num_drafts']:.0%} of {row['num_drafts']}"
            if row["num_drafts"]
            else "none made"
        )
        name = f"{row['kind']} {row['quantization']}".rstrip()
        table.add_row(
            name, str(row["batch"]), str(row["tp_size"]), f"{row['off_tokens_per_s']:.0f}", f"{row['on_tokens_per_s']:.0f}",
            f"{row['ratio']:.2f}", share, f"{row['load_average']:.1f}",
        )  # fmt: skip
    return table


def _with_draft_model(source: Path, kind: str, factor: int, stack: ExitStack) -> tuple[Path, DraftConfig]:
    """A deeper model than that of `source`, and its draft model; see bench/support/draft_pair.py."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    save_deepened(source, directory / "deep", factor=factor)
    exact, other = source, directory / "random"
    if kind == "random":
        save_random(source, other)
    config = describe(source).config
    memory, deep = (
        draft_memory(each, dtype="bfloat16", max_num_seqs=64)
        for each in (config, replace(config, num_layers=factor * config.num_layers))
    )
    path = exact if kind == "exact" else other
    return directory / "deep", DraftConfig(checkpoint_path=str(path), share=memory.pass_bytes / deep.pass_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument(
        "--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel ranks, which share the cores"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quantization", choices=CPU_QUANTIZATIONS, default="")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--draft",
        choices=DRAFTS,
        help="with a draft model, and a model made deeper for it: one that guesses every token, or of random weights",
    )
    parser.add_argument("--factor", type=int, default=4, help="how many times as deep as its draft model the model is")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=150, highlight=False)
    path = source = resolve_source(arguments.model)
    tokenizer = load_tokenizer(source)
    facts, rows = machine_facts(), []
    for tp_size in arguments.tp:
        parallel = ParallelConfig(
            tp_size=tp_size,
            dtype="bfloat16",
            quantization=arguments.quantization,
            num_threads=max(1, read_machine().num_cpus // tp_size),
        )
        with ExitStack() as stack:
            draft = None
            if arguments.draft is not None:
                path, draft = _with_draft_model(source, arguments.draft, arguments.factor, stack)
            contenders = []
            for speculation in ("off", "prompt_lookup"):
                contender = EngineContender(
                    path, parallel, num_kv_tokens=NUM_KV_TOKENS, max_model_len=MAX_MODEL_LEN, speculation=speculation,
                    draft=draft if speculation != "off" else None,
                )  # fmt: skip
                stack.callback(contender.close)
                contenders.append(contender)
            for batch in arguments.batches:
                for kind in arguments.kinds:
                    num_repeats = max(1, arguments.repeats // batch)  # a batch has as many tokens as it has sequences
                    rows.append(compare(kind, batch, contenders, num_repeats, tokenizer, console.print))
    arguments.json.write_text(
        json.dumps({"machine": facts, "model": arguments.model, "draft": arguments.draft, "rows": rows}, indent=1)
        + "\n"
    )
    console.print(as_table(rows, describe_machine(facts)))
    failed = [f"{row['kind']}, batch {row['batch']}, TP={row['tp_size']}" for row in rows if not row["holds"]]
    console.print(f"too slow: {'; '.join(failed)}" if failed else "all ratios hold, and all tokens are the same")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
