"""Backends to run a test with, and steps to feed them."""

from collections.abc import Sequence

import pytest
import torch

from model_parallel.errors import EngineError
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.interface import AttentionPlan, Heads, Kernels, LayerCache, SequenceRun
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.native import INSTRUCTION_SETS

BACKENDS = ("cpu", "reference")
__all__ = ["BACKENDS", "INSTRUCTION_SETS", "attention_plan", "cpu_kernels", "poisoned_cache", "use_backend"]


def cpu_kernels(instruction_set: str, *, num_threads: int) -> CpuKernels:
    """Skips the test on a machine that lacks the instruction set."""
    try:
        return CpuKernels(num_threads=num_threads, isa=instruction_set)
    except EngineError as error:
        pytest.skip(str(error))


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make every rank of this process compute with the backend of that name: of BACKENDS, or "cpu-" and an instruction set.

    Skips the test on a machine that lacks the instruction set.
    """
    kind, _, instruction_set = name.partition("-")
    if instruction_set:
        cpu_kernels(instruction_set, num_threads=1)

    def select(device: str, dtype: torch.dtype, num_threads: int, *, deterministic: bool) -> Kernels:
        if kind == "cpu":
            return CpuKernels(num_threads=num_threads, isa=instruction_set)
        return ReferenceKernels(num_threads=num_threads, device=device)

    monkeypatch.setattr("model_parallel.runtime.rank.select_kernels", select)


def attention_plan(
    runs: Sequence[tuple[int, int, Sequence[int]]], *, block_size: int, head_dim: int, theta: float = 100.0
) -> AttentionPlan:
    """A step of (number of tokens, start, block table) runs, laid out one after another."""
    spans = [range(start, start + count) for count, start, _ in runs]
    positions = torch.tensor([p for span in spans for p in span], dtype=torch.float32)
    slots = [
        table[p // block_size] * block_size + p % block_size
        for span, (_, _, table) in zip(spans, runs, strict=True)
        for p in span
    ]
    angles_TD = torch.outer(positions, theta ** (-torch.arange(0, head_dim, 2) / head_dim)).repeat(1, 2)
    rows, numbers, blocks = 0, [], []
    for count, start, table in runs:
        numbers.append((rows, count, start, len(blocks)))
        rows += count
        blocks += table
    return AttentionPlan(
        slots_T=torch.tensor(slots, dtype=torch.int64),
        cos_TD=angles_TD.cos(),
        sin_TD=angles_TD.sin(),
        runs=tuple(
            SequenceRun(first_row=row, num_tokens=count, start=start, block_table=torch.tensor(table))
            for (row, count, start, _), (_, _, table) in zip(numbers, runs, strict=True)
        ),
        runs_S4=torch.tensor(numbers, dtype=torch.int64).reshape(-1, 4),
        blocks=torch.tensor(blocks, dtype=torch.int64),
    )


def poisoned_cache(kernels: Kernels, num_blocks: int, block_size: int, heads: Heads, dtype: torch.dtype) -> LayerCache:
    """Full of NaN: whatever is read without having been written shows."""
    cache = kernels.allocate_cache(
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        dtype=dtype,
    )
    return LayerCache(cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan))
