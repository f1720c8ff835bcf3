"""The whole Llama 2 7B, served: all 32 layers at full width in bfloat16, with random weights, through the real stack.

Writes the checkpoint (13.5 GB) into a temporary directory, serves it at TP=2 on this machine's CPUs, streams 16 tokens over
gRPC, prints load time, peak memory and speed, and deletes what it wrote.

    python -m bench.proof_7b [--format hf|meta] [--directory DIR]
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.support.synthetic_llama import SIZES, Format
from model_parallel.machine import read_machine
from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.config import parse_config
from serving.driver.environment import prepare_environment

NAME = "llama-2-7b"
TP_SIZE = 2
NUM_TOKENS = 16
KV_CACHE_TOKENS = 512
CHECKPOINT_BYTES = 13_600_000_000
NEEDED_MEMORY_BYTES = 17_500_000_000
"""The weights, two interpreters with torch, a float32 head where the kernels want one, Ray, the cache."""
TIMEOUT_S = 900.0
GB = 1e9


def check_room(directory: Path) -> None:
    """End the program, saying what lacks, when this machine cannot hold it."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < CHECKPOINT_BYTES:
        sys.exit(f"{directory} has {free_bytes / GB:.1f} GB free; {CHECKPOINT_BYTES / GB:.1f} GB are needed")
    available = read_machine().available_memory_bytes
    if available < NEEDED_MEMORY_BYTES:
        sys.exit(f"{available / GB:.1f} GB of memory are available; {NEEDED_MEMORY_BYTES / GB:.1f} GB are needed")


def peak_memory_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def rank_pids() -> list[int]:
    """Of the only group, in rank order."""
    from ray import serve  # noqa: PLC0415  # after prepare_environment
    from ray.serve.handle import DeploymentHandle  # noqa: PLC0415

    from serving.contracts.served import app_name, deployment_name  # noqa: PLC0415

    handle: DeploymentHandle[Any] = serve.get_deployment_handle(deployment_name(NAME), app_name(NAME))
    pids: tuple[int, ...] = handle.pids.remote().result(timeout_s=30)
    return list(pids[1:])


def stream(address: str, console: Console) -> tuple[float, float]:
    """(seconds to the first token, tokens a second after it)."""
    request = pb.GenerateRequest(
        model=NAME,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1, *range(300, 315)])),
        sampling=pb.Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    with Client(address) as client:
        chunks, times = client.stream(request, timeout_s=TIMEOUT_S)
        tokens = [token for chunk in chunks for token in chunk.token_ids]
    console.print(f"token ids: {tokens}")
    if len(tokens) != NUM_TOKENS or times.ttft_s is None or times.tokens_per_s is None:
        sys.exit(f"{len(tokens)} tokens came; {NUM_TOKENS} were asked for")
    return times.ttft_s, times.tokens_per_s


def prove(path: Path, console: Console) -> None:
    from serving.driver.app import start  # noqa: PLC0415  # after prepare_environment

    entry = {
        "name": NAME, "source": str(path), "tensor_parallel_size": TP_SIZE, "dtype": "bfloat16",
        "kv_cache_tokens": KV_CACHE_TOKENS, "start_timeout_s": TIMEOUT_S, "step_timeout_s": TIMEOUT_S,
    }  # fmt: skip
    config = parse_config(
        {"models": [entry], "gateway": {"port": 0, "http_port": 0}}, origin="the proof's configuration"
    )
    stages: dict[str, float] = {}

    def report(stage: str) -> None:
        stages[stage] = time.perf_counter()
        console.print(stage)

    app = start(config, report)
    try:
        load_s = time.perf_counter() - max(stages.values())
        ttft_s, tokens_per_s = stream(app.address, console)
        peaks = [peak_memory_bytes(pid) for pid in rank_pids()]
    finally:
        app.stop()
    table = Table(show_header=False, title=f"Llama 2 7B, {SIZES['7b'].n_layers} layers, bfloat16, TP={TP_SIZE}")
    table.add_row("place, load and connect", f"{load_s:.1f} s")
    for rank, peak in enumerate(peaks):
        table.add_row(f"peak memory of rank {rank}", f"{peak / GB:.2f} GB")
    table.add_row("time to first token", f"{ttft_s:.2f} s")
    table.add_row("decode", f"{tokens_per_s:.2f} tokens/s")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("hf", "meta"), default="hf", dest="form")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to write for the while"
    )
    arguments = parser.parse_args()
    form: Format = arguments.form
    console = Console()
    check_room(arguments.directory)
    prepare_environment()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="packtrain-7b-") as directory:
        started_s = time.perf_counter()
        console.print("writing 13.5 GB of random weights")
        path = SIZES["7b"].write(Path(directory) / NAME, form, dtype=torch.bfloat16)
        console.print(f"written in {time.perf_counter() - started_s:.0f} s")
        prove(path, console)


if __name__ == "__main__":
    main()
