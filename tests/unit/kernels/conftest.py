"""The C++ kernels with every instruction set that this machine has, and poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from model_parallel.errors import EngineError
from model_parallel.kernels.cpu import CpuKernels


@pytest.fixture(scope="session", params=["avx512_bf16", "avx2", "scalar"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        return CpuKernels(num_threads=2, isa=request.param)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch then fills what it allocates uninitialised with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
