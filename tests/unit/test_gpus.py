"""GPUs as the driver's command lists them."""

import pytest
import torch

from model_parallel.errors import ConfigError
from model_parallel.gpus import Gpu, check_multiplies_fp8, torch_has_cuda, visible_gpus

LISTED = """\
0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 80000, 9.0
1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 81559, 1024, 9.0
"""


def indices(visible: str | None, listed: str = LISTED) -> list[int]:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return [gpu.index for gpu in visible_gpus(environment, lambda command: listed)]


def test_a_gpu_is_read() -> None:
    (first, _) = visible_gpus({}, lambda command: LISTED)
    assert first == Gpu(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        total_bytes=81559 << 20,
        free_bytes=80000 << 20,
        capability=(9, 0),
    )


@pytest.mark.parametrize(
    ("device", "capability", "told"),
    [
        ("cpu", None, "the device is cpu; use int8"),
        ("NVIDIA A100", (8, 0), "the device is NVIDIA A100, which has 8.0; "),
    ],
)
def test_what_does_not_multiply_e4m3_is_refused_by_name(
    device: str, capability: tuple[int, int] | None, told: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"^models\.m\.quantization is fp8, which needs GPUs of compute capability 8\.9 or"
    ) as error:
        check_multiplies_fp8("models.m.quantization", device, capability)
    assert told in str(error.value)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 1)])
def test_what_multiplies_e4m3(capability: tuple[int, int]) -> None:
    check_multiplies_fp8("models.m.quantization", "a GPU", capability)


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
    "listed", ["", "Failed to initialize NVML: Driver/library version mismatch\n", "0, x, y, [N/A], 1, 9.0\n"]
)
def test_a_driver_that_does_not_work_is_no_gpu(listed: str) -> None:
    assert indices(None, listed) == []


def test_torchs_build_is_read_without_importing_it() -> None:
    assert torch_has_cuda() == (torch.version.cuda is not None)
