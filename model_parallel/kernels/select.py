"""Which backend computes."""

import importlib.util
import logging

import torch

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.cpu.backend import TYPES
from model_parallel.kernels.interface import Kernels
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.native import NativeBuildError

logger = logging.getLogger(__name__)

OLDEST_GPU = (8, 0)
"""Compute capability: Ampere, the first with bfloat16."""


def select_kernels(device: str, dtype: torch.dtype, num_threads: int, *, deterministic: bool = False) -> Kernels:
    """The fastest backend for `device` ("cpu" or "cuda") and `dtype`. Falls back to the reference, and logs why.

    deterministic: the fastest of those that are batch invariant, where the device has one. May compile, for some seconds, the
    first time on a machine.
    """
    reason = _why_not_cuda() if device == "cuda" else _why_not_native(dtype)
    if not reason:
        try:
            kernels = (
                _cuda_kernels(dtype, deterministic=deterministic)
                if device == "cuda"
                else CpuKernels(num_threads=num_threads)
            )
            logger.info("kernels: %s%s", kernels.name, f", {num_threads} threads" if device == "cpu" else "")
            return kernels
        except NativeBuildError as error:
            reason = str(error)
    logger.warning("kernels: reference (slow), because %s", reason)
    return ReferenceKernels(num_threads=num_threads, device=device)


def _cuda_kernels(dtype: torch.dtype, *, deterministic: bool) -> Kernels:
    # They need Triton, which a CPU does without.
    from model_parallel.kernels.cuda import CudaKernels, InvariantCudaKernels  # noqa: PLC0415

    properties = torch.cuda.get_device_properties()
    if not deterministic:
        return CudaKernels(num_multiprocessors=properties.multi_processor_count)
    kernels = InvariantCudaKernels(
        num_multiprocessors=properties.multi_processor_count, architecture=f"sm_{properties.major}{properties.minor}"
    )
    kernels.settle_tiles(dtype)
    return kernels


def _why_not_cuda() -> str:
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        return f"this GPU has compute capability {capability}, and the Triton kernels need {OLDEST_GPU}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; CUDA builds of torch for Linux bring it"
    return ""


def _why_not_native(dtype: torch.dtype) -> str:
    return "" if dtype in TYPES else f"the C++ kernels do not know {dtype}"
