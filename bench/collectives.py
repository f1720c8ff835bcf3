"""Times the all-reduce of CPU ranks: shared memory against Gloo. python -m bench.collectives [--output FILE]

Ranks are processes; every figure is the median over batches of operations on rank 0, in one run.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model_parallel.collectives.gloo import TorchCollectives
from model_parallel.collectives.interface import Collectives
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.config import ParallelConfig
from model_parallel.machine import read_machine
from model_parallel.runtime.leader import LOOPBACK, store_file

WIDTH = 576
ROWS = (1, 32, 512)
SIZES = (2, 3, 4)
BACKENDS = ("shared memory", "gloo")
BATCHES = 15
BATCH_S = 0.05
"""About this long is timed at once, so that reading the clock and a scheduling tick weigh little."""


def join(backend: str, rank: int, size: int, path: str) -> Collectives:
    if backend == "gloo":
        where = Rendezvous(bind_host=LOOPBACK, store_path=path)
        return TorchCollectives(ParallelConfig(tp_size=size), rank, where)
    return SharedMemoryCollectives(path, rank, size, timeout_s=60)


def run_rank(backend: str, rank: int, size: int, path: str, results: Connection) -> None:
    """Send the seconds of one operation for each of ROWS, in its order."""
    torch.set_num_threads(1)
    collectives = join(backend, rank, size, path)
    for rows in ROWS:
        x = torch.zeros(rows, WIDTH)
        began = time.perf_counter()
        for _ in range(20):
            collectives.all_reduce(x)
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        repeats = max(1, int(BATCH_S / (float(collectives.all_gather(took).mean()) / 20)))
        batches = []
        for _ in range(BATCHES):
            collectives.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                collectives.all_reduce(x)
            batches.append((time.perf_counter() - began) / repeats)
        results.send(statistics.median(batches))
    collectives.barrier()
    collectives.close()


def measure(backend: str, size: int) -> list[float]:
    """Seconds of one operation, in the order of ROWS."""
    spawning = multiprocessing.get_context("spawn")
    pipes = [spawning.Pipe(duplex=False) for _ in range(size)]
    with store_file() as path:
        ranks = [
            spawning.Process(target=run_rank, args=(backend, rank, size, path, pipes[rank][1])) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        seconds: list[float] = [pipes[0][0].recv() for _ in ROWS]
        for process in ranks:
            process.join(60)
    return seconds


def machine() -> str:
    machine = read_machine()
    memory_gib = machine.total_memory_bytes / 2**30
    return f"{machine.num_cpus} cores ({platform.machine()}), {memory_gib:.0f} GiB, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    output: Path | None = parser.parse_args().output
    columns = " | ".join(f"{rows} × {WIDTH}" for rows in ROWS)
    lines = [
        "# All-reduce of float32 between CPU ranks",
        "",
        f"{date.today()}, {machine()}. Microseconds an operation, median of {BATCHES} batches.",
        "",
        f"| ranks | backend | {columns} |",
        "|---|---|" + "---|" * len(ROWS),
    ]
    for size in SIZES:
        for backend in BACKENDS:
            cells = " | ".join(f"{seconds * 1e6:.1f}" for seconds in measure(backend, size))
            lines.append(f"| {size} | {backend} | {cells} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    main()
