"""How fast and how lean ranks load: bytes a second against a plain memory copy, and each rank's peak memory.

    python -m bench.checkpoint_loading                 # a synthetic Llama 2 7B of eight layers, in both formats, TP 1 and 2
    python -m bench.checkpoint_loading --checkpoint DIR --tp 4

Ranks are processes that load at the same time, as in a group. The files have been read once before, so that they are in the
system's cache and the disk is not measured. The copy is the same in number of processes and threads: 1 GiB from memory to
memory that has been written before. Of both the best of three counts; the first load is told too, since a virtual machine that
touches memory for the first time waits for its host. "whole rank" is the peak of a rank of a real group, which also packs its
weights for the kernels.
"""

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.support.synthetic_llama import full_width
from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import load_shard
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig
from model_parallel.model.partition import shard_table
from model_parallel.runtime.executors import SpawnedExecutor
from model_parallel.runtime.rank import DTYPES

MIB = 1 << 20
COPY_BYTES = 1 << 30
TIMEOUT_S = 600.0
ALLOWANCE = 0.10
ALLOWANCE_BYTES = 600 * 1000 * 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One rank's load."""

    rank: int
    shard_bytes: int
    first_s: float
    load_s: float
    """Best of three."""
    copy_bytes_per_s: float
    peak_bytes: int
    """Of the process that loaded, interpreter and libraries included."""

    @property
    def allowed_bytes(self) -> float:
        return self.shard_bytes * (1 + ALLOWANCE) + ALLOWANCE_BYTES


def peak_bytes(pid: int | str = "self") -> int:
    """Most memory that a process ever had resident (getrusage would count that of the process it was forked from)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def copy_rate(barrier: Barrier) -> float:
    """Bytes a second of `copy_`, while the other ranks copy too."""
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
    best_s = float("inf")
    for _ in range(3):
        barrier.wait(TIMEOUT_S)
        started_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - started_s)
    return COPY_BYTES / best_s


def load_rank(path: Path, rank: int, tp_size: int, dtype: str, barrier: Barrier, results: Any) -> None:
    """In a process of its own: peak memory is a process's, and never falls."""
    torch.set_num_threads(1)
    info = describe(path)
    table = shard_table(info.config, tp_size, rank)
    times_s = []
    for _ in range(3):
        barrier.wait(TIMEOUT_S)
        started_s = time.perf_counter()
        weights = load_shard(info, table, dtype=DTYPES[dtype], device=torch.device("cpu"))
        times_s.append(time.perf_counter() - started_s)
        shard_bytes = sum(tensor.nbytes for tensor in weights.values())
        weights.clear()
    peak = peak_bytes()
    results.put(
        Measurement(
            rank=rank,
            shard_bytes=shard_bytes,
            first_s=times_s[0],
            load_s=min(times_s),
            copy_bytes_per_s=copy_rate(barrier),
            peak_bytes=peak,
        )
    )


def measure(path: Path, tp_size: int, dtype: str) -> list[Measurement]:
    """All ranks of a group at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(tp_size), context.Queue()
    processes = [
        context.Process(target=load_rank, args=(path, rank, tp_size, dtype, barrier, results))
        for rank in range(tp_size)
    ]
    for process in processes:
        process.start()
    try:
        return sorted((results.get(timeout=TIMEOUT_S) for _ in processes), key=lambda m: m.rank)
    finally:
        for process in processes:
            process.join(TIMEOUT_S)


def whole_rank_peaks(path: Path, tp_size: int, dtype: str) -> list[int]:
    """Peak memory of each rank of a real group: loaded, packed for its kernels, with a small cache."""
    config = GroupConfig(
        checkpoint_path=str(path),
        parallel=ParallelConfig(tp_size=tp_size, dtype=dtype, start_timeout_s=TIMEOUT_S),
        cache=CacheConfig(num_blocks=8),
        epoch=1,
    )
    executor = SpawnedExecutor(config)
    try:
        return [peak_bytes(pid) for pid in executor.pids]
    finally:
        executor.shutdown()


def report(name: str, measured: list[Measurement], rank_peaks: list[int], console: Console) -> None:
    table = Table(
        "rank",
        "shard",
        "first",
        "best",
        "rate",
        "copy",
        "rate / copy",
        "peak",
        "whole rank",
        "allowed",
        title=f"{name}, TP={len(measured)}",
    )
    for m, rank_peak in zip(measured, rank_peaks, strict=True):
        rate = m.shard_bytes / m.load_s
        table.add_row(
            str(m.rank), f"{m.shard_bytes / MIB:,.0f} MiB", f"{m.first_s:.2f} s", f"{m.load_s:.2f} s", f"{rate / 1e9:.2f} GB/s",
            f"{m.copy_bytes_per_s / 1e9:.2f} GB/s", f"{rate / m.copy_bytes_per_s:.0%}",
            f"{m.peak_bytes / MIB:,.0f} MiB", f"{rank_peak / MIB:,.0f} MiB", f"{m.allowed_bytes / MIB:,.0f} MiB",
        )  # fmt: skip
    console.print(table)


def warm(path: Path) -> None:
    """Read every weight file once."""
    buffer = bytearray(16 * MIB)
    for file_path in describe(path).weight_files:
        with file_path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="directory or GGUF file; a synthetic Llama 2 if unset")
    parser.add_argument("--size", choices=("7b", "13b", "70b"), default="7b", help="of the synthetic model")
    parser.add_argument("--layers", type=int, default=8, help="of the synthetic model")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    arguments = parser.parse_args()
    console = Console(width=130)
    with tempfile.TemporaryDirectory() as directory:
        if arguments.checkpoint is not None:
            paths = [arguments.checkpoint]
        else:
            model = full_width(arguments.size, num_layers=arguments.layers)
            console.print(f"writing a synthetic Llama 2 {arguments.size.upper()} of {arguments.layers} layers")
            paths = [
                model.write(Path(directory) / "hugging-face", "hf", dtype=torch.bfloat16),
                model.write(Path(directory) / "meta", "meta"),
            ]
        for path in paths:
            warm(path)
            for tp_size in arguments.tp:
                measured = measure(path, tp_size, arguments.dtype)
                report(path.name, measured, whole_rank_peaks(path, tp_size, arguments.dtype), console)


if __name__ == "__main__":
    main()
