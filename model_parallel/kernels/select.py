"""Which backend computes."""

import logging

import torch

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.cpu.backend import TYPES
from model_parallel.kernels.interface import Kernels
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.native import NativeBuildError

logger = logging.getLogger(__name__)


def select_kernels(device: str, dtype: torch.dtype, num_threads: int) -> Kernels:
    """The fastest backend for `device` ("cpu" or "cuda") and `dtype`. Falls back to the reference, and logs why.

    May compile, for some seconds, the first time on a machine.
    """
    reason = _why_not_native(device, dtype)
    if not reason:
        try:
            kernels = CpuKernels(num_threads=num_threads)
            logger.info("kernels: %s, %d threads", kernels.name, num_threads)
            return kernels
        except NativeBuildError as error:
            reason = str(error)
    logger.warning("kernels: reference (slow), because %s", reason)
    return ReferenceKernels(num_threads=num_threads, device=device)


def _why_not_native(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"there are no kernels for {device} yet"
    if dtype not in TYPES:
        return f"the C++ kernels do not know {dtype}"
    return ""
