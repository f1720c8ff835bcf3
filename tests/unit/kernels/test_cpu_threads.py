"""The pool of threads under the C++ kernels."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model_parallel.errors import EngineError
from model_parallel.kernels.cpu import CpuKernels


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
    kernels = CpuKernels(num_threads=4)
    packed = kernels.pack_linear(torch.randn(600, 64))
    kernels.linear(torch.randn(1, 64), packed)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25  # one that spins would take 0.5


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match="avx1024"):
        CpuKernels(num_threads=1, isa="avx1024")
