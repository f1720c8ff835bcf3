"""Checks a node with GPUs end to end: the tests, one GPU's steps, the links between GPUs, the speed of groups of 1 to 8 ranks.

Needs nothing but the node: checkpoints have random weights and are written to --directory for the time of the run (7B: 13.5 GB;
70B cut to an eighth of its layers: 18 GB). A stage that fails does not stop the others; the exit status is 1 if one has failed.

    python -m bench.gpu_node [--stages tests steps links scaling] [--sizes 7b 70b] [--directory DIR] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.engine_timing import EngineContender
from bench.support.synthetic_llama import SIZES, SyntheticLlama, full_width, twin
from bench.timing import Workload
from model_parallel.collectives.interface import Collectives
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.config import ParallelConfig
from model_parallel.runtime.leader import LOOPBACK, store_file

NUM_LAYERS = {"7b": 32, "13b": 40, "70b": 10}
WORKLOADS = (Workload(1, 128, 128), Workload(8, 128, 128), Workload(32, 128, 128), Workload(1, 2048, 4))
TINY_WORKLOADS = (Workload(1, 16, 8), Workload(4, 16, 8))
SUM_ROWS, TINY_SUM_ROWS = (1, 64, 2048), (1, 8)
SUM_WIDTH = 8192
"""A sum over ranks is of so many rows of a 70B model's hidden size, in float32."""
NUM_SUMS = 50
STAGE_TIMEOUT_S = 1800.0
_ANSWER_TIMEOUT_S = 300.0


def sizes_up_to(num_devices: int) -> list[int]:
    """Powers of two."""
    return [1 << i for i in range(num_devices.bit_length())]


def describe_devices() -> dict[str, Any]:
    count = torch.cuda.device_count()
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch": str(torch.__version__),
        "peers": [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)],
    }


def run_command(*arguments: str) -> None:
    """With its output where ours goes. Raises RuntimeError when it fails."""
    done = subprocess.run([sys.executable, "-m", *arguments], check=False, timeout=STAGE_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {done.returncode}")


def _join(device: str, rank: int, size: int, path: str) -> Collectives:
    if device == "cpu":
        return SharedMemoryCollectives(path, rank, size, timeout_s=60)
    from model_parallel.collectives.cuda import join_gpus  # noqa: PLC0415  # needs a build of torch with CUDA

    return join_gpus(ParallelConfig(tp_size=size, device="cuda"), rank, Rendezvous(bind_host=LOOPBACK, store_path=path))


def time_sums(device: str, rank: int, size: int, path: str, num_rows: Sequence[int], results: Connection) -> None:
    """A rank: sends how the ranks exchange, and the median seconds of a sum for each number of rows."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # before CUDA starts in this process
    collectives = _join(device, rank, size, path)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for rows in num_rows:
        x = torch.ones(rows, SUM_WIDTH, device=device)
        times = []
        for _ in range(NUM_SUMS):
            collectives.barrier()
            wait()
            began_s = time.perf_counter()
            total = collectives.all_reduce(x.clone())
            wait()
            times.append(time.perf_counter() - began_s)
            if not bool((total == size).all()):
                raise RuntimeError(f"rank {rank}: the sum of {size} ones is not {size}")
        seconds.append(statistics.median(times))
    results.send((type(collectives).__name__, seconds))
    collectives.barrier()
    collectives.close()


def measure_links(device: str, size: int, num_rows: Sequence[int]) -> dict[str, Any]:
    """Raises RuntimeError when a rank ends without an answer."""
    spawning = multiprocessing.get_context("spawn")
    receiving, sending = spawning.Pipe(duplex=False)
    _, unheard = spawning.Pipe(duplex=False)
    with store_file() as path:
        ranks = [
            spawning.Process(
                target=time_sums, args=(device, rank, size, path, num_rows, unheard if rank else sending), daemon=True
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
            while not receiving.poll(1.0):
                if time.monotonic() > deadline_s or any(process.exitcode for process in ranks):
                    raise RuntimeError(f"sums of {size} ranks: no answer; see the output above")
            way, seconds = receiving.recv()
        finally:
            for process in ranks:
                process.join(10)
                process.kill()
    moved_bytes = [2 * (size - 1) / size * rows * SUM_WIDTH * 4 for rows in num_rows]
    return {
        "ranks": size,
        "collectives": way,
        "rows": list(num_rows),
        "seconds": seconds,
        "bytes_per_s_of_a_rank": [moved / took for moved, took in zip(moved_bytes, seconds, strict=True)],
    }


def measure_scaling(path: Path, name: str, parallel: ParallelConfig, workloads: Sequence[Workload]) -> dict[str, Any]:
    """Output tokens a second of a whole engine, over prefill and decode."""
    longest = max(w.num_prompt_tokens + w.num_new_tokens for w in workloads)
    num_kv_tokens = max(w.batch * (w.num_prompt_tokens + w.num_new_tokens + 16) for w in workloads)
    contender = EngineContender(path, parallel, num_kv_tokens=num_kv_tokens, max_model_len=longest)
    try:
        tokens_per_s = {}
        for workload in workloads:
            contender.run(workload, 0)
            took_s = statistics.median(contender.run(workload, seed) for seed in (1, 2, 3))
            tokens_per_s[str(workload)] = workload.batch * workload.num_new_tokens / took_s
        return {
            "model": name,
            "tensor_parallel_size": parallel.tp_size,
            "how": contender.detail,
            "ready_s": contender.ready_s,
            "tokens_per_s": tokens_per_s,
        }
    finally:
        contender.close()


def links_table(links: Sequence[dict[str, Any]]) -> Table:
    columns = [f"{rows} × {SUM_WIDTH}" for rows in links[0]["rows"]]
    table = Table("ranks", "by", *columns, title="A sum of float32 over ranks: µs, and GB/s that each rank sends")
    for link in links:
        cells = [
            f"{took * 1e6:.0f} ({rate / 1e9:.1f})"
            for took, rate in zip(link["seconds"], link["bytes_per_s_of_a_rank"], strict=True)
        ]
        table.add_row(str(link["ranks"]), link["collectives"], *cells)
    return table


def scaling_table(runs: Sequence[dict[str, Any]]) -> Table:
    columns = list(runs[0]["tokens_per_s"])
    table = Table("model", "TP", "ready after", *columns, title="Output tokens a second, prefill and decode")
    for run in runs:
        cells = [f"{run['tokens_per_s'][column]:.1f}" for column in columns]
        table.add_row(run["model"], str(run["tensor_parallel_size"]), f"{run['ready_s']:.1f} s", *cells)
    return table


class Report:
    """What the stages found, and which have failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.result: dict[str, Any] = {"date": str(date.today()), "failed": {}}

    def stage(self, name: str, run: Callable[[], object]) -> None:
        """Run it; a failure is kept and shown, and does not stop the next one."""
        self.console.rule(name)
        try:
            found = run()
        except Exception as error:  # whatever a driver, a link or a kernel makes of it
            self.console.print(f"[red]{name} failed:[/red] {error}")
            self.result["failed"][name] = str(error)
        else:
            if found is not None:
                self.result.setdefault(name.partition(":")[0], []).append(found)


def check(given: argparse.Namespace, report: Report) -> None:
    """All stages that are wanted."""
    device, count = given.device, given.ranks or torch.cuda.device_count()
    if device == "cuda":
        report.stage("devices", describe_devices)
    if "tests" in given.stages:
        report.stage("tests", partial(run_command, "pytest", "-m", "gpu", "tests/gpu", "-q"))
    if "steps" in given.stages:
        report.stage("steps", partial(run_command, "bench.gpu", "--deterministic", "--shapes", *given.sizes))
    if "links" in given.stages:
        for size in sizes_up_to(count)[1:]:
            report.stage(
                f"links: {size} ranks", partial(measure_links, device, size, TINY_SUM_ROWS if given.tiny else SUM_ROWS)
            )
    if "scaling" in given.stages:
        for name in given.sizes:
            with tempfile.TemporaryDirectory(dir=given.directory) as directory:
                path = Path(directory, name)
                model = twin(name) if given.tiny else full_width(name, num_layers=NUM_LAYERS[name])
                report.stage(f"writing: {name}", partial(_write, model, path))
                for size in sizes_up_to(count) if path.exists() else ():
                    parallel = ParallelConfig(tp_size=size, device=device, dtype=given.dtype)
                    run = partial(measure_scaling, path, name, parallel, TINY_WORKLOADS if given.tiny else WORKLOADS)
                    report.stage(f"scaling: {name} at TP={size}", run)


def _write(model: SyntheticLlama, path: Path) -> None:
    model.write(path, "hf", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("tests", "steps", "links", "scaling")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=("7b", "70b"))
    parser.add_argument("--ranks", type=int, help="as many as there are GPUs unless given")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--directory", type=Path, help="for checkpoints; the temporary directory unless given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the script without a GPU")
    parser.add_argument("--tiny", action="store_true", help="small checkpoints and little work")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "no GPU is visible here; `packtrain doctor` says why. --device cpu --tiny tries the script without one"
        )
    if given.ranks is not None and given.ranks < 1:
        parser.error(f"--ranks is {given.ranks}; at least 1")
    if given.device == "cpu" and given.ranks is None:
        parser.error("--device cpu needs --ranks")
    report = Report(Console(width=140))
    check(given, report)
    for name, table in (("links", links_table), ("scaling", scaling_table)):
        if report.result.get(name):
            report.console.print(table(report.result[name]))
    if given.json is not None:
        given.json.write_text(json.dumps(report.result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if report.result["failed"] else 0)


if __name__ == "__main__":
    main()
