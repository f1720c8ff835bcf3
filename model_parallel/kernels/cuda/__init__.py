"""The CUDA backend: products by torch, everything between them in Triton. Import it where a GPU is used only: it needs Triton."""

from model_parallel.kernels.cuda.backend import CudaKernels

__all__ = ["CudaKernels"]
