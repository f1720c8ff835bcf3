"""The CUDA backends: products by torch, everything between them in Triton; or all in Triton, where a row's bits must not depend
on the others. Import it where a GPU is used only: it needs Triton.
"""

from model_parallel.kernels.cuda.backend import CudaKernels
from model_parallel.kernels.cuda.invariant import InvariantCudaKernels

__all__ = ["CudaKernels", "InvariantCudaKernels"]
