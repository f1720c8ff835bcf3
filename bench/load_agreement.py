"""The same load by `packtrain load`, guidellm and `vllm bench serve`, on one mock server of a given pace: do they tell the same?

    python -m bench.load_agreement [--guidellm PROGRAM] [--vllm PYTHON] [--repeats 3] [--json FILE]

guidellm's program, and a Python that has vLLM, are those of environments of their own (`python -m bench.peers install vllm`, `pip
install guidellm`). Both are unmodified. Each tool runs in turn, so many times; medians of the runs are compared. guidellm calls
inter-token latency what vLLM calls time per output token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.load_client import mock_process
from bench.machine import machine_facts

RESULT = Path(__file__).parent / "results" / "load_agreement.json"
FIRST_TOKEN_S, TOKEN_S = 0.25, 0.02
NUM_REQUESTS, NUM_USERS, INPUT_TOKENS, OUTPUT_TOKENS = 160, 8, 32, 64
TOLERANCE = 0.03
TIMEOUT_S = 600.0
Figures = dict[str, float]
"""Output tokens a second, and medians of the time to the first token and of the time per output token, in ms."""


def by_packtrain(url: str, directory: Path) -> Figures:
    """`packtrain load` over HTTP chats."""
    out = directory / "packtrain.json"
    _run(
        [sys.executable, "-m", "serving.cli", "load", "--target", url, "--api", "chat", "--users", str(NUM_USERS),
         "--num-prompts", str(NUM_REQUESTS), "--input-len", str(INPUT_TOKENS), "--output-len", str(OUTPUT_TOKENS),
         "--json", str(out)]
    )  # fmt: skip
    return _vllm_keys(out)


def by_guidellm(program: str, url: str, directory: Path) -> Figures:
    """guidellm's concurrent profile."""
    out = directory / "guidellm.json"
    _run(
        [program, "run", "--backend", f"kind=openai_http,target={url},model=mock",
         "--profile", f"kind=concurrent,streams={NUM_USERS}", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
         "--tokenizer", f"kind=hf_auto,model={directory / 'tokenizer'}",
         "--data", f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}",
         "--output", f"kind=json,path={out}", "--disable-console"]
    )  # fmt: skip
    (run,) = json.loads(out.read_text())["benchmarks"]
    metrics = run["metrics"]
    return {
        "output_throughput": metrics["output_token_count"]["successful"]["total_sum"] / run["duration"],
        "median_ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
        "median_tpot_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    }


def by_vllm(python: str, url: str, directory: Path) -> Figures:
    """`vllm bench serve` on chats, without a model's name."""
    out = directory / "vllm.json"
    _run(
        [python, "-m", "bench.peers.run_vllm_bench", "--base-url", url, "--backend", "openai-chat",
         "--endpoint", "/v1/chat/completions", "--tokenizer", str(directory / "tokenizer"), "--dataset-name", "random",
         "--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos",
         "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", str(NUM_USERS), "--percentile-metrics", "ttft,tpot",
         "--save-result", "--result-filename", str(out)]
    )  # fmt: skip
    return _vllm_keys(out)


def write_tokenizer(directory: Path) -> None:
    """A token a byte, for tools that make their texts of tokens."""
    directory.mkdir()
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(vocabulary), "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def _vllm_keys(path: Path) -> Figures:
    found: dict[str, Any] = json.loads(path.read_text())
    return {key: float(found[key]) for key in ("output_throughput", "median_ttft_ms", "median_tpot_ms")}


def _run(command: list[str]) -> None:
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def compare(tools: dict[str, Callable[[str, Path], Figures]], repeats: int) -> dict[str, Figures]:
    """Medians of each tool's runs, which take turns."""
    runs: dict[str, list[Figures]] = {name: [] for name in tools}
    with (
        tempfile.TemporaryDirectory() as made,
        mock_process("--first-token-s", str(FIRST_TOKEN_S), "--token-s", str(TOKEN_S)) as ports,
    ):
        directory = Path(made)
        write_tokenizer(directory / "tokenizer")
        for _ in range(repeats):
            for name, measure in tools.items():
                runs[name].append(measure(f"http://127.0.0.1:{ports['http']}", directory))
                print(f"{name}: {runs[name][-1]}", flush=True)
    return {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}


def differences(figures: dict[str, Figures]) -> dict[str, Figures]:
    """What each other tool tells, as a share of what `packtrain load` does, less one."""
    ours = figures["packtrain load"]
    return {
        name: {key: value / ours[key] - 1 for key, value in of.items()}
        for name, of in figures.items()
        if name != "packtrain load"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", help="guidellm's program")
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    tools: dict[str, Callable[[str, Path], Figures]] = {"packtrain load": by_packtrain}
    if program := arguments.guidellm:
        tools["guidellm"] = lambda url, directory: by_guidellm(program, url, directory)
    if python := arguments.vllm:
        tools["vllm bench serve"] = lambda url, directory: by_vllm(python, url, directory)
    if len(tools) == 1:
        parser.error("name at least one of --guidellm and --vllm")
    figures = compare(tools, arguments.repeats)
    told = differences(figures)
    holds = all(abs(value) <= TOLERANCE for of in told.values() for value in of.values())
    for name, of in told.items():
        print(f"{name}: " + ", ".join(f"{key} {value:+.1%}" for key, value in of.items()))
    result = {"machine": machine_facts(), "figures": figures, "differences": told, "holds": holds}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
