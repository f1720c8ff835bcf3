"""GPUs as the driver's command lists them."""

import pytest
import torch

from model_parallel.gpus import Gpu, torch_has_cuda, visible_gpus

LISTED = """\
0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 80000
1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 81559, 1024
"""


def indices(visible: str | None, listed: str = LISTED) -> list[int]:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return [gpu.index for gpu in visible_gpus(environment, lambda command: listed)]


def test_a_gpu_is_read() -> None:
    (first, _) = visible_gpus({}, lambda command: LISTED)
    assert first == Gpu(index=0, name="NVIDIA H100 80GB HBM3", total_bytes=81559 << 20, free_bytes=80000 << 20)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1]), ("", []), (" ", []), ("1", [1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("-1", []),
        ("0,7,1", [0]), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_visible_devices(visible: str | None, expected: list[int]) -> None:
    assert indices(visible) == expected


@pytest.mark.parametrize(
    "listed", ["", "Failed to initialize NVML: Driver/library version mismatch\n", "0, x, y, [N/A], 1\n"]
)
def test_a_driver_that_does_not_work_is_no_gpu(listed: str) -> None:
    assert indices(None, listed) == []


def test_torchs_build_is_read_without_importing_it() -> None:
    assert torch_has_cuda() == (torch.version.cuda is not None)
