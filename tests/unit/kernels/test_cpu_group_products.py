"""Products of the C++ kernels with weights in groups: against float64 of the dequantised weights, and bit for bit alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.interface import Adapted, AdaptedRun, LowRankPart, LowRankUpdate, joined
from model_parallel.kernels.reference import ReferenceKernels
from tests.support.group_matrices import FORMATS, product_bound, random_matrix

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDING)


@given(
    name=st.sampled_from(list(FORMATS)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 70)),
    num_before=st.integers(0, 40),
    reordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_products(
    kernels: CpuKernels,
    name: str,
    shape: tuple[int, int, int],
    num_before: int,
    reordered: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_rows, num_inputs, num_outputs = shape
    matrix = random_matrix(FORMATS[name], num_outputs, num_inputs, num_before=num_before, reordered=reordered)
    x = torch.randn(num_rows, num_inputs).to(dtype)
    exact, bound = product_bound(x, matrix)
    packed = kernels.pack_linear(matrix)
    for out, out_dtype in ((kernels.linear(x, packed), dtype), (kernels.partial_sum(x, packed), torch.float32)):
        assert out.dtype == out_dtype
        assert ((out.double() - exact).abs() <= bound + ROUNDING[out_dtype] * (exact.abs() + bound)).all()
    reference = ReferenceKernels(num_threads=1, device="cpu")
    out = reference.partial_sum(x.float(), reference.pack_linear(matrix))
    assert ((out.double() - exact).abs() <= bound + num_inputs * ROUNDING[torch.float32] * bound.abs() + bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_gated_products_and_parts(kernels: CpuKernels, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate, up = (random_matrix(FORMATS[name], 50, 300) for _ in range(2))
    dense = torch.randn(7, 300).to(dtype)
    x = torch.randn(9, 300).to(dtype) / 16
    out = kernels.gated_linear(x, kernels.pack_gated(joined([gate, up]))).double()
    exact_gate, exact_up = product_bound(x, gate)[0], product_bound(x, up)[0]
    exact = F.silu(exact_gate) * exact_up
    assert ((out - exact).abs() <= 2 * ROUNDING[dtype] * exact.abs() + 1e-3 * exact.abs().amax()).all()
    rows = kernels.linear(x, kernels.pack_linear((gate, dense, up)))
    alone = [kernels.linear(x, kernels.pack_linear(part)) for part in (gate, dense, up)]
    assert torch.equal(rows, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_an_embedding(kernels: CpuKernels, name: str) -> None:
    torch.manual_seed(2)
    matrix = random_matrix(FORMATS[name], 40, 296)
    ids = torch.tensor([7, 45, 10, 46, 6, 10])
    out = kernels.embed(ids, kernels.pack_head(matrix), 7)
    weight = matrix.dequantized(torch.float64)
    expected = torch.stack([weight[0], weight[38], weight[3], weight[39], torch.zeros(296), weight[3]])
    assert ((out.double() - expected).abs() <= 4 * 2.0**-24 * expected.abs().amax()).all()
    reference = ReferenceKernels(num_threads=1, device="cpu")
    assert torch.equal(reference.embed(ids, reference.pack_head(matrix), 7), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "zeros 32", "symmetric 128"])
def test_a_row_does_not_depend_on_its_neighbours(kernels: CpuKernels, name: str, dtype: torch.dtype) -> None:
    """Bit for bit, for few rows and many, which take other paths, and whatever the number of threads."""
    torch.manual_seed(3)
    matrix, gate_up = random_matrix(FORMATS[name], 45, 1100), random_matrix(FORMATS[name], 60, 1100)
    x = torch.randn(140, 1100).to(dtype)
    one_thread = CpuKernels(num_threads=1, isa=kernels.name.removeprefix("cpu-"))
    whole = []
    for backend in (kernels, one_thread):
        packed, gated = backend.pack_linear(matrix), backend.pack_gated(gate_up)
        whole.append((backend.partial_sum(x, packed), backend.gated_linear(x, gated)))
        for count in (1, 2, 4, 5, 6, 7, 13, 129):
            for first in (0, 140 - count):
                part = x[first : first + count]
                assert torch.equal(backend.partial_sum(part, packed), whole[0][0][first : first + count])
                assert torch.equal(backend.gated_linear(part, gated), whole[0][1][first : first + count])
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


def test_what_is_not_finite_stays_in_its_row_and_column(kernels: CpuKernels) -> None:
    torch.manual_seed(4)
    matrix = random_matrix(FORMATS["Q4_1"], 40, 64)
    x = torch.randn(9, 64)
    clean = kernels.partial_sum(x, kernels.pack_linear(matrix))
    matrix.scales_OS[5, 1] = torch.inf
    x[4, 3] = torch.nan
    out = kernels.partial_sum(x, kernels.pack_linear(matrix))
    assert out[4].isnan().all() and not out[:, 5].isfinite().any()
    rows, columns = [r for r in range(9) if r != 4], [c for c in range(40) if c != 5]
    assert torch.equal(out[rows][:, columns], clean[rows][:, columns])


def test_float16_scales_of_every_size(kernels: CpuKernels) -> None:
    """Also those below the smallest normal number."""
    every = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16)
    matrix = random_matrix(FORMATS["Q8_0"], len(every), 32)
    matrix.values_OB.fill_(1)
    matrix.scales_OS.copy_(every.unsqueeze(1))
    x = torch.zeros(1, 32)
    x[0, 0] = 1.0
    assert torch.equal(kernels.partial_sum(x, kernels.pack_linear(matrix))[0], every.float())
    assert torch.equal(kernels.embed(torch.arange(len(every)), kernels.pack_head(matrix), 0)[:, 0], every.float())


def test_adapters_are_added_to_products_with_weights_in_groups(kernels: CpuKernels) -> None:
    """To one matrix and to parts of one, for more rows than are prepared at a time."""
    torch.manual_seed(5)
    parts = [random_matrix(FORMATS[name], num_outputs, 256) for name, num_outputs in (("Q4_K", 96), ("Q6_K", 40))]
    down, up = torch.randn(8, 256) / 16, torch.randn(136, 8) / 4
    update = LowRankUpdate(136, (LowRankPart(0, down, up),))
    runs = ((0, 3), (100, 60))
    x = torch.randn(170, 256)
    for matrices in (tuple(parts), (random_matrix(FORMATS["Q4_K"], 136, 256),)):
        packed = kernels.pack_linear(matrices)
        adapter = kernels.pack_adapter([update], gated=())
        rows = kernels.adapted_rows([AdaptedRun(first, count, adapter) for first, count in runs])
        out, plain = kernels.partial_sum(x, packed, Adapted(rows, 0)), kernels.partial_sum(x, packed)
        expected = plain.double()
        for first, count in runs:
            part = slice(first, first + count)
            expected[part] += x[part].double() @ down.double().T @ up.double().T
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        untouched = [row for row in range(170) if not any(first <= row < first + count for first, count in runs)]
        assert torch.equal(out[untouched], plain[untouched])
