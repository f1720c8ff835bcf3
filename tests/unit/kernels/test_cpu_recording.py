"""Recorded programs of the C++ kernels: the same bits as calls one by one, on memory that is never given out twice."""

import gc

import pytest
import torch

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.cpu.recording import Workspace


def test_a_program_repeats_calls_on_what_its_inputs_hold_by_then() -> None:
    kernels = CpuKernels(num_threads=2)
    torch.manual_seed(0)
    first, second = (kernels.pack_linear(torch.randn(50, 50).bfloat16()) for _ in range(2))
    norm_weight = torch.ones(50)

    def compute(x: torch.Tensor) -> torch.Tensor:
        hidden = kernels.partial_sum(kernels.linear(x, first), second)
        return kernels.rms_norm(hidden, norm_weight, 1e-5)

    inputs, workspace = torch.randn(3, 50).bfloat16(), Workspace(4)
    with kernels.recording(workspace) as program:
        result = workspace.kept(compute(inputs))
    assert program.num_calls == 3
    for _ in range(3):
        inputs.copy_(torch.randn(3, 50))
        assert program.run() == 0
        assert torch.equal(result, compute(inputs))


def test_a_program_outlives_the_failure_of_its_recording() -> None:
    kernels = CpuKernels(num_threads=1)
    with pytest.raises(ZeroDivisionError), kernels.recording(Workspace(1)):
        raise ZeroDivisionError
    weight = kernels.pack_linear(torch.ones(2, 2))
    assert kernels.linear(torch.ones(1, 2), weight).tolist() == [[2.0, 2.0]]


def test_memory_is_given_out_again_only_when_nothing_shares_it() -> None:
    workspace = Workspace(8)
    first = workspace.empty((3, 16), torch.float32)
    view, address = first[1:], first.data_ptr()
    del first
    gc.collect()
    assert workspace.empty((3, 16), torch.float32).data_ptr() != address
    del view
    gc.collect()
    # Of the same bytes a row; fewer rows than before leave the rest unused.
    assert workspace.empty((2, 8), torch.float64).data_ptr() == address


def test_memory_is_sized_for_the_most_rows() -> None:
    workspace = Workspace(8)
    address = workspace.empty((1, 16), torch.float32).data_ptr()
    assert workspace.empty((8, 16), torch.float32).data_ptr() == address
    with pytest.raises(ValueError, match="9 rows"):
        workspace.empty((9, 16), torch.float32)
