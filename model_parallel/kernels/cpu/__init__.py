"""The C++ backend for CPUs: weights packed into panels at load, every operation one native call on a pool of threads.

Compiled when first needed (model_parallel/native.py). The instruction set is chosen at run time: AVX-512 with bfloat16 products
or without, AVX2, or plain C++, each a library of its own. Each gives the same bits for a row whatever stands beside it; two
different ones do not agree in the last bits.
"""

from model_parallel.kernels.cpu.backend import CpuKernels

__all__ = ["CpuKernels"]
