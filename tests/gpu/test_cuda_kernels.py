"""The CUDA backend on a GPU against float64, at the sizes of Llama 2."""

import random

import pytest
import torch

pytest.importorskip("triton")

from model_parallel.gpus import OLDEST_WITH_FP8
from model_parallel.kernels.cuda import CudaKernels, InvariantCudaKernels
from model_parallel.kernels.fp8 import FP8
from tests.support import cuda_checks
from tests.support.cuda_checks import DTYPES, make_heads
from tests.support.group_matrices import FORMATS, random_matrix

pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels() -> CudaKernels:
    """With memory that is full of NaN, so that an output left unwritten shows."""
    poison = torch.full((256 << 20,), torch.nan, device="cuda")
    del poison
    torch.manual_seed(1)
    return CudaKernels(num_multiprocessors=torch.cuda.get_device_properties().multi_processor_count)


@pytest.fixture(params=DTYPES)
def invariant(request: pytest.FixtureRequest, kernels: CudaKernels) -> tuple[InvariantCudaKernels, torch.dtype]:
    """With the tiles that the dtype gets on this GPU."""
    chosen = InvariantCudaKernels(num_multiprocessors=kernels.num_multiprocessors)
    chosen.settle_tiles(request.param)
    return chosen, request.param


@pytest.mark.parametrize("seed", range(10))
def test_a_tokens_bits_do_not_depend_on_the_step(
    invariant: tuple[InvariantCudaKernels, torch.dtype], seed: int
) -> None:
    kernels, dtype = invariant
    draw = random.Random(seed)
    num_kv_heads = draw.randint(1, 8)
    kv_of_query = [draw.randrange(num_kv_heads) for _ in range(draw.randint(1, 40))]
    heads = make_heads(kernels, kv_of_query, num_kv_heads, draw.choice([2, 24, 64, 80, 128]))
    lengths = [draw.randint(1, 100), draw.randint(100, 900), 1, draw.randint(1, 2000)]
    how = {"block_size": draw.choice([1, 3, 16, 33, 64]), "dtype": dtype, "seed": seed}
    cuda_checks.check_attention_is_invariant(kernels, heads, lengths, **how)
    cuda_checks.check_chunks(kernels, heads, lengths, **how)


@pytest.mark.parametrize("num_rows", [5, 64, 65, 700])
@pytest.mark.parametrize("shape", [(4096, 515), (4096, 4096), (577, 129)])
def test_a_rows_bits_do_not_depend_on_the_others(
    invariant: tuple[InvariantCudaKernels, torch.dtype], shape: tuple[int, int], num_rows: int
) -> None:
    kernels, dtype = invariant
    num_inputs, num_outputs = shape
    dense = torch.randn(num_outputs, num_inputs, device="cuda").to(dtype)
    for weight in (dense, cuda_checks.random_int8(kernels, num_outputs, num_inputs)):
        cuda_checks.check_rows_are_invariant(kernels, weight, num_inputs, num_rows, dtype)
    x = torch.randn(num_rows, num_inputs, device="cuda").to(dtype)
    cuda_checks.check_products(kernels, x, dense, dense.double())


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "zeros 32"])
@pytest.mark.parametrize("num_rows", [5, 65, 300])
def test_a_rows_bits_with_weights_in_groups(
    invariant: tuple[InvariantCudaKernels, torch.dtype], num_rows: int, name: str
) -> None:
    kernels, dtype = invariant
    weight = kernels.pack_linear(random_matrix(FORMATS[name], 515, 4096).to(torch.device("cuda")))
    cuda_checks.check_rows_are_invariant(kernels, weight, 4096, num_rows, dtype)


def test_special_rows_of_a_softmax(invariant: tuple[InvariantCudaKernels, torch.dtype]) -> None:
    cuda_checks.check_softmax_of_special_rows(invariant[0])


@pytest.mark.parametrize("seed", range(30))
def test_sequences_in_chunks_beside_each_other(kernels: CudaKernels, seed: int) -> None:
    """Random maps and shapes."""
    draw = random.Random(seed)
    num_kv_heads = draw.randint(1, 8)
    kv_of_query = [draw.randrange(num_kv_heads) for _ in range(draw.randint(1, 40))]
    heads = make_heads(kernels, kv_of_query, num_kv_heads, draw.choice([2, 24, 64, 80, 128]))
    lengths = [draw.randint(1, 100), draw.randint(100, 900), 1, draw.randint(1, 2000)]
    block_size = draw.choice([1, 3, 16, 33, 64])
    cuda_checks.check_chunks(kernels, heads, lengths, block_size=block_size, dtype=DTYPES[seed % 3], seed=seed)


multiplies_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST_WITH_FP8,
    reason="the device has no e4m3 numbers",
)


@multiplies_fp8
@pytest.mark.parametrize("seed", range(9))
def test_a_cache_in_e4m3(kernels: CudaKernels, seed: int) -> None:
    draw = random.Random(seed)
    num_kv_heads = draw.randint(1, 8)
    kv_of_query = [draw.randrange(num_kv_heads) for _ in range(draw.randint(1, 40))]
    heads = make_heads(kernels, kv_of_query, num_kv_heads, draw.choice([64, 80, 128]))
    lengths = [draw.randint(1, 100), draw.randint(100, 900), 1, draw.randint(1, 2000)]
    cuda_checks.check_chunks(kernels, heads, lengths, block_size=16, dtype=DTYPES[seed % 3], seed=seed, cache_dtype=FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "num_queries_num_kv", [(32, 32), (8, 1), (64, 8), (71, 1)], ids=["7b", "70b-tp8", "70b", "mqa"]
)
@pytest.mark.parametrize("length", [1, 17, 129, 4096])
def test_a_long_context(
    kernels: CudaKernels, num_queries_num_kv: tuple[int, int], length: int, dtype: torch.dtype
) -> None:
    num_queries, num_kv_heads = num_queries_num_kv
    kv_of_query = [query * num_kv_heads // num_queries for query in range(num_queries)]
    heads = make_heads(kernels, kv_of_query, num_kv_heads, 128)
    cuda_checks.check_long_decode(kernels, heads, length, dtype=dtype)


def test_neighbours_that_are_not_finite(kernels: CudaKernels) -> None:
    cuda_checks.check_neighbours(kernels)


def test_no_rows(kernels: CudaKernels) -> None:
    cuda_checks.check_no_rows(kernels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters(kernels: CudaKernels, dtype: torch.dtype) -> None:
    cuda_checks.check_adapters(kernels, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 33, 576, 4096, 5120, 8192])
def test_norms(kernels: CudaKernels, num_columns: int, dtype: torch.dtype) -> None:
    cuda_checks.check_norms(kernels, 65, num_columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 33, 11008])
def test_swiglu(kernels: CudaKernels, num_columns: int, dtype: torch.dtype) -> None:
    cuda_checks.check_swiglu(kernels, 65, num_columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 70), (5, 4096, 515), (64, 4096, 4096), (300, 577, 129)])
def test_products(kernels: CudaKernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_rows, num_inputs, num_outputs = shape
    x, weight = (torch.randn(n, num_inputs, device="cuda").to(dtype) for n in (num_rows, num_outputs))
    cuda_checks.check_products(kernels, x, weight, weight.double())
    cuda_checks.check_int8(kernels, *shape, dtype)


@multiplies_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (65, 11008), (300, 28672), (7, 515)])
def test_rows_in_e4m3(kernels: CudaKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cuda_checks.check_fp8_rows(kernels, *shape, dtype)


@multiplies_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, 12288), (8, 11008, 4096), (17, 1376, 516), (64, 4096, 22016), (300, 577, 130), (2048, 4096, 4096)],
)
def test_fp8_products(kernels: CudaKernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Sizes of 7B, a rank's part of it at TP=8, and sizes that are padded."""
    cuda_checks.check_fp8(kernels, *shape, dtype)


@multiplies_fp8
def test_fp8_products_in_a_graph(kernels: CudaKernels) -> None:
    """As decode steps hold them."""
    weight = kernels.pack_gated(cuda_checks.random_fp8(kernels, 22016, 4096))
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    expected = kernels.gated_linear(x, weight)
    held = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.gated_linear(held, weight)
    held.copy_(x)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (5, 11008, 515), (64, 4096, 4096), (300, 1100, 129)])
@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "symmetric 128", "zeros 32", "zeros 8 bits"]
)
def test_products_with_weights_in_groups(
    kernels: CudaKernels, name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    cuda_checks.check_groups(kernels, name, *shape, dtype)
    cuda_checks.check_groups(kernels, name, *shape, dtype, num_before=33)
    cuda_checks.check_groups(kernels, name, *shape, dtype, reordered=True)


def test_softmax_parts(kernels: CudaKernels) -> None:
    logits = (torch.randn(64, 32000, device="cuda") * 10).round(decimals=1)  # with ties
    parts = kernels.softmax_parts(logits)
    assert torch.equal(parts[:, 0], logits.amax(1).double())
    assert parts[:, 2].tolist() == [row.index(max(row)) for row in logits.tolist()]
    torch.testing.assert_close(parts[:, 1], (logits.double() - parts[:, :1]).exp().sum(1), rtol=1e-5, atol=0)
