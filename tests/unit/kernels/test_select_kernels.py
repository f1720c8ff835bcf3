"""Which backend a rank gets, and what it says."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from model_parallel import native
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.kernels.select import select_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_kernels_are_the_choice_on_cpu(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        kernels = select_kernels("cpu", dtype, 2)
    assert isinstance(kernels, CpuKernels)
    assert kernels.name in caplog.text


def test_float16_runs_on_the_reference_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(select_kernels("cpu", torch.float16, 1), ReferenceKernels)
    assert "float16" in caplog.text


def test_without_a_compiler_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "library_directories", lambda: iter([tmp_path]))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert isinstance(select_kernels("cpu", torch.bfloat16, 1), ReferenceKernels)
    assert "g++ is not installed" in caplog.text
