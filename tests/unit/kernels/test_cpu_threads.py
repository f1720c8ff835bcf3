"""The pool of threads under the C++ kernels."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model_parallel.errors import EngineError
from model_parallel.kernels.cpu import CpuKernels
from tests.support.waiting import wait_until

SWITCHES = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")


def test_more_threads_than_cores_and_several_pools_at_once() -> None:
    """Ranks of one process, each with more threads than the machine has cores, all get what one thread computes."""
    weight, x = torch.randn(600, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    alone = CpuKernels(num_threads=1)
    expected = alone.linear(x, alone.pack_linear(weight))

    def run(_: int) -> bool:
        kernels = CpuKernels(num_threads=8)
        packed = kernels.pack_linear(weight)
        return all(torch.equal(kernels.linear(x, packed), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as ranks:
        assert all(ranks.map(run, range(4)))


def test_idle_threads_sleep() -> None:
    """By what the kernel says of them: they wait, and nobody wakes them, not even a clock."""
    tasks = Path("/proc/self/task")
    before = {task.name for task in tasks.iterdir()}
    kernels = CpuKernels(num_threads=4)
    threads = [task for task in tasks.iterdir() if task.name not in before]
    assert len(threads) == 3, "the caller is the fourth"
    packed = kernels.pack_linear(torch.randn(600, 64))
    kernels.linear(torch.randn(1, 64), packed)

    def look() -> list[dict[str, str]]:
        lines = [(task / "status").read_text().splitlines() for task in threads]
        status = [dict(line.split(":\t", 1) for line in each if ":\t" in line) for each in lines]
        return [{name: each[name] for name in ("State", *SWITCHES)} for each in status]

    def are_asleep() -> bool:
        first = look()
        time.sleep(0.1)
        return look() == first and {each["State"] for each in first} == {"S (sleeping)"}

    assert wait_until(are_asleep)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="avx1024"):
        CpuKernels(num_threads=1, isa="avx1024")
    monkeypatch.setenv("PACKTRAIN_CPU_ISA", "avx1024")
    with pytest.raises(
        EngineError, match="does not have avx1024; PACKTRAIN_CPU_ISA is avx512_bf16, avx512, avx2, scalar or not set"
    ):
        CpuKernels(num_threads=1)


def test_the_instruction_set_can_be_chosen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_CPU_ISA", "scalar")
    assert CpuKernels(num_threads=1).name == "cpu-scalar"
