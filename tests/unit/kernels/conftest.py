"""The C++ kernels with every instruction set that this machine has, and poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from model_parallel.kernels.cpu import CpuKernels
from tests.support.kernels import INSTRUCTION_SETS, cpu_kernels


@pytest.fixture(scope="session", params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return cpu_kernels(request.param, num_threads=2)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch then fills what it allocates uninitialised with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
