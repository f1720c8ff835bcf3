"""The Triton kernels as the backend launches them, compiled for GPUs that are not there; `make test-triton-compiled`.

The compiler is told of a device, and stops short of loading what it made. It shows that every launch compiles and asks for no
more shared memory than there is, not that the result is right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model_parallel.kernels.cuda import CudaKernels, InvariantCudaKernels
from model_parallel.kernels.cuda.adapters import add_low_rank
from model_parallel.kernels.cuda.elementwise import swiglu_kernel
from model_parallel.kernels.cuda.group_weights import GroupWeight
from model_parallel.kernels.fp8 import FP8
from model_parallel.kernels.interface import Adapted, AdaptedRun, LowRankPart, LowRankUpdate
from tests.support import cuda_checks
from tests.support.cuda_checks import DTYPES, make_heads
from tests.support.group_matrices import FORMATS, random_matrix

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Of a program, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""


HEADS = [(32, 32, 128), (5, 2, 64), (71, 1, 80)]
"""Query heads, key/value heads, head dim."""

CACHE = Path.home() / ".cache" / "packtrain" / "triton"
"""Triton keeps there what it has compiled, by a hash of all that it was made from."""


class _Driver:
    """In place of the driver of a device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=list(SHARED_BYTES), ids=["ampere", "hopper"])
def compiles_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched is compiled only, and checked for the shared memory it needs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(request.param))
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        assert "cubin" in kernel.asm
        assert kernel.metadata.shared <= SHARED_BYTES[request.param], self.__name__

    monkeypatch.setattr(JITFunction, "run", compile_only)


WITH_E4M3 = pytest.mark.parametrize("compiles_only", [90], indirect=True, ids=["hopper"])
"""What Ampere does not compute."""


@pytest.fixture
def kernels(compiles_only: None) -> CudaKernels:
    return CudaKernels(device="cpu", num_multiprocessors=132)


@pytest.fixture
def invariant(compiles_only: None) -> InvariantCudaKernels:
    return InvariantCudaKernels(device="cpu", num_multiprocessors=132)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters(kernels: CudaKernels, dtype: torch.dtype) -> None:
    part = LowRankPart(first_output=0, down_RI=torch.zeros(16, 64, dtype=dtype), up_OR=torch.zeros(32, 16, dtype=dtype))
    adapter = kernels.pack_adapter([LowRankUpdate(num_outputs=32, parts=(part,))], gated=[])
    rows = kernels.adapted_rows([AdaptedRun(0, 3, adapter)])
    add_low_rank(torch.zeros(4, 32), torch.zeros(4, 64, dtype=dtype), Adapted(rows, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=["7b", "uneven", "mqa"])
def test_attention(kernels: CudaKernels, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    _attend(kernels, heads, dtype, cached=dtype)


@WITH_E4M3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=["7b", "uneven", "mqa"])
def test_attention_over_e4m3(kernels: CudaKernels, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    _attend(kernels, heads, dtype, cached=FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=["7b", "uneven", "mqa"])
def test_attention_with_invariant_bits(
    invariant: InvariantCudaKernels, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    _attend(invariant, heads, dtype, cached=dtype)


@WITH_E4M3
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_invariant_bits_over_e4m3(invariant: InvariantCudaKernels, dtype: torch.dtype) -> None:
    _attend(invariant, HEADS[0], dtype, cached=FP8)


def _attend(kernels: CudaKernels, heads: tuple[int, int, int], dtype: torch.dtype, *, cached: torch.dtype) -> None:
    num_queries, num_kv_heads, dim = heads
    map_ = [query * num_kv_heads // num_queries for query in range(num_queries)]
    local = make_heads(kernels, map_, num_kv_heads, dim)
    runs = [(1, 40, [0, 1, 2]), (20, 0, [3, 4])]
    plan = cuda_checks.make_plan(kernels, runs, block_size=16, heads=local)
    qkv = torch.zeros(21, (num_queries + 2 * num_kv_heads) * dim, dtype=dtype)
    cache = cuda_checks.poisoned_cache(kernels, 5, 16, local, cached)
    kernels.attention(qkv, plan, cache, local)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(kernels: CudaKernels, dtype: torch.dtype) -> None:
    for num_columns in (576, 8192):
        x, weight = torch.zeros(3, num_columns), torch.ones(num_columns, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-5)
        kernels.add_rms_norm(x, x, weight, 1e-5)
        kernels.swiglu(torch.zeros(3, 2 * num_columns, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 40, 128])
def test_int8_products(kernels: CudaKernels, num_rows: int, dtype: torch.dtype) -> None:
    weight = cuda_checks.random_int8(kernels, 64, 4096)
    kernels.partial_sum(torch.zeros(num_rows, 4096, dtype=dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_wide_tiles", [False, True], ids=["narrow", "wide"])
def test_products_with_invariant_bits(
    invariant: InvariantCudaKernels, has_wide_tiles: bool, dtype: torch.dtype
) -> None:
    invariant.has_wide_tiles = has_wide_tiles
    x = torch.zeros(300, 4096, dtype=dtype)
    for weight in (torch.zeros(512, 4096, dtype=dtype), cuda_checks.random_int8(invariant, 512, 4096)):
        invariant.linear(x, weight)
        invariant.partial_sum(x, weight)


def test_products_in_groups_and_sums_with_invariant_bits(invariant: InvariantCudaKernels) -> None:
    weight = invariant.pack_linear(random_matrix(FORMATS["Q4_K"], 64, 4096))
    invariant.partial_sum(torch.zeros(300, 4096, dtype=torch.bfloat16), weight)
    for dtype in (torch.float32, torch.float64):
        invariant.normalisers(torch.zeros(3, 32000, dtype=dtype))


@WITH_E4M3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [4096, 28672])
def test_fp8_products(kernels: CudaKernels, num_inputs: int, dtype: torch.dtype) -> None:
    weight = kernels.pack_linear(cuda_checks.random_fp8(kernels, 64, num_inputs))
    x = torch.zeros(3, num_inputs, dtype=dtype)
    kernels.partial_sum(x, weight)
    kernels.linear(x, weight)
    kernels.gated_linear(x, weight)


@pytest.mark.parametrize("num_rows", [1, 64])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Q4_K", torch.bfloat16),
        ("Q4_K", torch.float32),
        ("Q6_K", torch.bfloat16),
        ("Q8_0", torch.float16),
        ("symmetric 128", torch.bfloat16),
        ("zeros 32", torch.float16),
        ("zeros 8 bits", torch.float32),
    ],
)
def test_products_with_weights_in_groups(kernels: CudaKernels, name: str, num_rows: int, dtype: torch.dtype) -> None:
    weight = kernels.pack_linear(random_matrix(FORMATS[name], 64, 4096, reordered=name == "symmetric 128"))
    assert isinstance(weight, GroupWeight)
    weight.product(torch.zeros(num_rows, 4096, dtype=dtype), 132)
    weight.rows(torch.arange(3), 0, dtype)


def test_who_watches_can_see_that_a_kernel_is_being_compiled(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    compiled = triton.knobs.runtime.jit_post_compile_hook

    def at_the_end(**facts: Any) -> bool:
        seen.append(kernels.is_compiling)
        return bool(compiled(**facts))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", at_the_end)
    for device in list(swiglu_kernel.device_caches):
        del swiglu_kernel.device_caches[device]  # as if nothing had been compiled in this process
    kernels.swiglu(torch.empty(3, 154), torch.bfloat16)
    assert (seen, kernels.is_compiling) == ([True], False)
