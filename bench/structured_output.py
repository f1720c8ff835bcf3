"""What a form costs: two engines, one with and one without a grammar, in turn every few steps.

Inter-token latency: a full batch decodes at temperature 1, each request held to a long text, or to nothing. Time to the first
token: a request alone, whose grammar the ranks have already, or that has none; and one whose grammar is new.

    python -m bench.structured_output [--batch 32] [--repeats 5] [--tp 1] [--only FORM ...] [--json FILE]
"""

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import describe_machine, machine_facts
from bench.markdown import table
from bench.turns import Run, ratio_of_turns, take_turns
from model_parallel.checkpoint.detect import describe
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.runtime.executors import SpawnedExecutor
from serving.gateway.core.constraints import JsonSchema, Regex, grammar_of
from serving.gateway.core.tools import Tool, ToolUse, tool_grammar
from serving.models.chat import resolve_text
from serving.models.fetch import fetch_model
from serving.text.token_table import token_table

RESULT = Path(__file__).parent / "results" / "structured_output.json"
MODEL = "smollm2-135m-instruct"
NUM_NEW_TOKENS = 32
NUM_PROMPT_TOKENS = 64
NUM_STEPS_IN_TURN = 4
NUM_FIRST_TOKENS = 10
"""Requests of a repeat whose first token is timed, of each kind."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS = {
    "JSON schema": grammar_of(
        JsonSchema(field="schema", schema={"type": "array", "items": PERSON, "minItems": 40}), strips_space=False
    ).text,
    "any JSON": grammar_of(
        JsonSchema(field="schema", schema={"type": "array", "items": True, "minItems": 400}), strips_space=False
    ).text,
    "regular expression": grammar_of(
        Regex(field="regex", pattern=r"([A-Za-z ,.]{1,200}\n){100,}"), strips_space=False
    ).text,
    "functions, auto": tool_grammar(
        ToolUse(tools=tuple(Tool(name=f"f{i}", parameters=PERSON) for i in range(8))), None, strips_space=False
    ).text,
}


class Group:
    """Ranks, each a process, and their engine, as they serve."""

    def __init__(self, tp_size: int, num_threads: int, batch: int) -> None:
        info = describe(fetch_model(MODEL))
        text = resolve_text(info)
        self.eos_token_ids = text.eos_token_ids
        self.vocab_size = info.config.vocab_size
        cache = CacheConfig(
            num_blocks=(batch + 1) * (NUM_PROMPT_TOKENS + NUM_NEW_TOKENS) // 16 + 64, enable_prefix_caching=False
        )
        parallel = ParallelConfig(tp_size=tp_size, dtype="bfloat16", num_threads=num_threads)
        config = GroupConfig(checkpoint_path=str(info.path), parallel=parallel, cache=cache, epoch=1)
        table_of_tokens = token_table(text.tokenizer, self.vocab_size, text.eos_token_ids)
        self.executor = SpawnedExecutor(replace(config, tokens=table_of_tokens))
        scheduler = SchedulerConfig(max_model_len=1024, max_num_seqs=max(64, batch), max_num_batched_tokens=4096)
        self.engine = Engine(self.executor, Scheduler(scheduler, cache, epoch=1))
        self.num_requests = 0

    def request(self, grammar: str, num_new_tokens: int) -> EngineRequest:
        """Another one, with a prompt of its own."""
        self.num_requests += 1
        prompt = tuple((7919 * self.num_requests + 31 * i) % 40_000 + 100 for i in range(NUM_PROMPT_TOKENS))
        sampling = SamplingParams(seed=self.num_requests, max_tokens=num_new_tokens, ignore_eos=True)
        return EngineRequest(
            request_id=str(self.num_requests),
            prompt_token_ids=prompt,
            sampling=sampling,
            eos_token_ids=self.eos_token_ids,
            grammar=grammar,
        )

    def begin(self, batch: int, grammar: str) -> Run:
        """A batch whose prompts have been read."""
        return Run(self.engine, [self.request(grammar, NUM_NEW_TOKENS) for _ in range(batch)])

    def first_token_s(self, grammar: str) -> float:
        """Of a request alone."""
        began_s = time.perf_counter()
        self.engine.add(self.request(grammar, 1))
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - began_s


def measure(batch: int, num_repeats: int, tp_size: int, forms: dict[str, str], report: Any) -> dict[str, Any]:
    """The whole run, as plain data."""
    facts, num_threads = machine_facts(), max(1, (os.cpu_count() or 1) // tp_size)
    itl_s: dict[str, list[float]] = {name: [] for name in ("none", *forms)}
    itl_ratios: dict[str, list[float]] = {name: [] for name in forms}
    ttft: dict[str, list[float]] = {"none": [], **{name: [] for name in forms}, "JSON schema, new": []}
    num_new = 0
    with ExitStack() as stack:
        free, group = Group(tp_size, num_threads, batch), Group(tp_size, num_threads, batch)
        stack.callback(free.executor.shutdown)
        stack.callback(group.executor.shutdown)
        take_turns(
            [each.begin(batch, "") for each in (free, group)], NUM_STEPS_IN_TURN
        )  # compiles, records, touches memory
        for grammar in ("", *forms.values()):
            group.first_token_s(grammar)
        for repeat in range(num_repeats):
            for name, grammar in forms.items():
                runs = [free.begin(batch, ""), group.begin(batch, grammar)]
                take_turns(runs, NUM_STEPS_IN_TURN)
                itl_s["none"] += runs[0].step_times_s
                itl_s[name] += runs[1].step_times_s
                itl_ratios[name].append(ratio_of_turns(runs[1], runs[0]))
            for _ in range(NUM_FIRST_TOKENS):
                for name in ("none", *forms):
                    ttft[name].append(group.first_token_s(forms.get(name, "")))
                num_new += 1
                fresh = {"type": "array", "items": PERSON, "minItems": 40 + num_new}
                new = grammar_of(JsonSchema(field="schema", schema=fresh), strips_space=False).text
                ttft["JSON schema, new"].append(group.first_token_s(new))
            ratios = ", ".join(f"{name} {of[-1]:.3f}" for name, of in itl_ratios.items())
            report(f"repeat {repeat + 1}: load average {os.getloadavg()[0]:.1f}, ITL beside no form: {ratios}")
    base_ttft = statistics.median(ttft["none"])
    return {
        "machine": facts | {"load_average_at_the_end": round(os.getloadavg()[0], 2)},
        "model": MODEL,
        "tp_size": tp_size,
        "batch": batch,
        "num_repeats": num_repeats,
        "rows": [
            {
                "form": name,
                "itl_ms": round(1e3 * statistics.median(itl_s[name]), 2) if name in itl_s else None,
                "itl_ratio": round(statistics.median(itl_ratios[name]), 3) if name in itl_ratios else None,
                "ttft_ms": round(1e3 * statistics.median(times), 2),
                "ttft_ratio": round(statistics.median(times) / base_ttft, 3),
            }
            for name, times in ttft.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1, help="ranks, which share the cores")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS), help="of the forms")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    result = measure(
        arguments.batch, arguments.repeats, arguments.tp, {name: FORMS[name] for name in arguments.only}, console.print
    )
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(describe_machine(result["machine"]))
    rows = [
        [str(row[key]) for key in ("form", "itl_ms", "itl_ratio", "ttft_ms", "ttft_ratio")] for row in result["rows"]
    ]
    console.print(table(["form", "ITL, ms", "ratio", "TTFT, ms", "ratio"], rows))


if __name__ == "__main__":
    main()
