"""Matrix products, norms and softmax sums of the C++ kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.interface import Int8Matrix

# Errors of one rounding, relative: to nearest, so half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDING)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 120))


def _random(*shape: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Standard normal, starting `offset` elements after an aligned address."""
    buffer = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)
    buffer[offset:] = torch.randn(len(buffer) - offset).to(dtype)
    return buffer[offset:].view(shape)


def _int8(num_outputs: int, num_inputs: int) -> tuple[Int8Matrix, torch.Tensor]:
    """Random, and the matrix that it stands for."""
    values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    matrix = Int8Matrix(values, torch.rand(num_outputs) / 64)
    return matrix, values.double() * matrix.scales_O.double().unsqueeze(1)


def _product_bound(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x · weightᵀ in float64, and how far a chain of float32 multiply-adds and a last rounding may be off (Higham 2002, §3)."""
    exact = x.double() @ weight.double().T
    chain = (x.shape[1] + 2) * ROUNDING[torch.float32] * (x.double().abs() @ weight.double().abs().T)
    return exact, chain + ROUNDING[out_dtype] * (exact.abs() + chain)


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), offset=st.integers(0, 3))
def test_products(kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, offset: int) -> None:
    torch.manual_seed(seed)
    num_rows, num_inputs, num_outputs = shape
    x = _random(num_rows, num_inputs, dtype=dtype, offset=offset)
    weight = _random(num_outputs, num_inputs, dtype=dtype, offset=offset)
    packed = kernels.pack_linear(weight)
    for out, out_dtype in ((kernels.linear(x, packed), dtype), (kernels.partial_sum(x, packed), torch.float32)):
        exact, bound = _product_bound(x, weight, out_dtype)
        assert out.dtype == out_dtype
        assert ((out.double() - exact).abs() <= bound).all()


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_logits_are_not_rounded(
    kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1]).to(dtype)
    exact, bound = _product_bound(x, weight, torch.float32)
    assert ((kernels.logits(x, kernels.pack_head(weight)).double() - exact).abs() <= bound).all()


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), offset=st.integers(0, 3))
def test_int8_products(
    kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, offset: int
) -> None:
    """Values are exact in either dtype, so only the sums and the product with the scale are rounded."""
    torch.manual_seed(seed)
    num_rows, num_inputs, num_outputs = shape
    x = _random(num_rows, num_inputs, dtype=dtype, offset=offset)
    matrix, weight = _int8(num_outputs, num_inputs)
    packed, head = kernels.pack_linear(matrix), kernels.pack_head(matrix)
    results = (kernels.linear(x, packed), dtype), (kernels.partial_sum(x, packed), torch.float32)
    for out, out_dtype in (*results, (kernels.logits(x.float(), head), torch.float32)):
        exact, bound = _product_bound(x, weight, out_dtype)
        assert out.dtype == out_dtype
        assert ((out.double() - exact).abs() <= bound).all()


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), is_int8=st.booleans(), seed=st.integers(0, 99))
def test_gated_products(
    kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, is_int8: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    num_rows, num_inputs, num_outputs = shape
    x = torch.randn(num_rows, num_inputs).to(dtype)
    gate_up: torch.Tensor = torch.randn(2 * num_outputs, num_inputs).to(dtype)
    matrix: torch.Tensor | Int8Matrix = gate_up
    if is_int8:
        matrix, gate_up = _int8(2 * num_outputs, num_inputs)
    out = kernels.gated_linear(x, kernels.pack_gated(matrix))
    gate, gate_bound = _product_bound(x, gate_up[:num_outputs], torch.float32)
    up, up_bound = _product_bound(x, gate_up[num_outputs:], torch.float32)
    exact = F.silu(gate) * up
    # silu's slope is below 1.1; its exponential and division err by a few units in the last place.
    bound = 1.1 * gate_bound * (up.abs() + up_bound) + F.silu(gate).abs() * up_bound
    bound += (16 * ROUNDING[torch.float32] + ROUNDING[dtype]) * (exact.abs() + bound) + 1e-30
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_far_from_zero_stays_finite(kernels: CpuKernels, dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[1.0], [1.0]], dtype=dtype)
    x = torch.tensor([[-1000.0], [-90.0], [0.0], [90.0], [1000.0]], dtype=dtype)
    out = kernels.gated_linear(x, kernels.pack_gated(gate_up)).double()
    assert torch.allclose(out, F.silu(x.double()) * x.double(), rtol=2.0**-8, atol=1e-30)


@given(rows=st.integers(1, 20), columns=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_norms(kernels: CpuKernels, rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, residual, weight = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns).to(dtype)
    alone = kernels.rms_norm(x, weight, 1e-5)
    both, total = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(total, x + residual)
    for out, value in ((alone, x), (both, x + residual)):
        exact = F.rms_norm(value.double(), (columns,), weight.double(), 1e-5)
        tolerance = (columns + 8) * ROUNDING[torch.float32] + ROUNDING[dtype]
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() <= tolerance * exact.abs()).all()


@given(rows=st.integers(1, 5), columns=st.integers(1, 5000), seed=st.integers(0, 99))
def test_softmax_parts(kernels: CpuKernels, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(rows, columns) * 10).round(decimals=1)  # with ties
    parts = kernels.softmax_parts(logits)
    assert torch.equal(parts[:, 0], logits.amax(1).double())
    assert parts[:, 2].tolist() == [row.index(max(row)) for row in logits.tolist()]
    exact = (logits.double() - parts[:, :1]).exp().sum(1)
    assert torch.allclose(parts[:, 1], exact, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_softmax_parts_show_what_is_not_finite(kernels: CpuKernels, bad: float) -> None:
    for index in (0, 5, 40):
        logits = torch.zeros(2, 41)
        logits[0, index] = bad
        finite = kernels.softmax_parts(logits)[:, :2].isfinite().all(1)
        assert finite.tolist() == [False, True]


def test_nan_and_infinity_stay_in_their_rows(kernels: CpuKernels) -> None:
    weight = kernels.pack_linear(torch.randn(50, 33).bfloat16())
    x = torch.randn(9, 33).bfloat16()
    clean = kernels.linear(x, weight)
    x[4, 32], x[6, 0] = float("nan"), float("inf")
    out = kernels.linear(x, weight)
    assert out[4].isnan().all() and not out[6].isfinite().any()
    others = [r for r in range(9) if r not in (4, 6)]
    assert torch.equal(out[others], clean[others])


def test_no_rows(kernels: CpuKernels) -> None:
    weight = torch.randn(20, 10)
    assert kernels.linear(torch.empty(0, 10), kernels.pack_linear(weight)).shape == (0, 20)
    assert kernels.rms_norm(torch.empty(0, 10), torch.ones(10), 1e-5).shape == (0, 10)
    assert kernels.softmax_parts(torch.empty(0, 10)).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_a_row_does_not_depend_on_its_neighbours(kernels: CpuKernels, is_int8: bool, dtype: torch.dtype) -> None:
    """Bit for bit, for every number of rows up to several register tiles, and whatever the number of threads."""
    torch.manual_seed(3)
    weight, gate_up, head = (_int8(n, 77)[0] if is_int8 else torch.randn(n, 77).to(dtype) for n in (70, 96, 130))
    x = torch.randn(64, 77).to(dtype)
    one_thread = CpuKernels(num_threads=1, isa=kernels.name.removeprefix("cpu-"))
    whole = []
    for backend in (kernels, one_thread):
        packed = backend.pack_linear(weight), backend.pack_gated(gate_up), backend.pack_head(head)
        norm_weight = torch.ones(77, dtype=dtype)
        whole.append(_every_operation(backend, x, packed, norm_weight))
        for count in (*range(1, 33), 63):
            for first in (0, 64 - count):
                part = _every_operation(backend, x[first : first + count], packed, norm_weight)
                assert all(torch.equal(a, b[first : first + count]) for a, b in zip(part, whole[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_many_rows_have_the_bits_of_few(kernels: CpuKernels, is_int8: bool, dtype: torch.dtype) -> None:
    """x of many rows may be converted before a product, 128 of them at a time; that of few is converted within it."""
    torch.manual_seed(4)
    weight = _int8(70, 301)[0] if is_int8 else torch.randn(70, 301).to(dtype)
    packed, x = kernels.pack_linear(weight), torch.randn(300, 301).to(dtype)
    whole = kernels.partial_sum(x, packed)
    for count in (1, 3, 4, 128, 129):
        for first in (0, 100, 300 - count):
            rows = slice(first, first + count)
            assert torch.equal(kernels.partial_sum(x[rows], packed), whole[rows])


def _every_operation(
    kernels: CpuKernels, x: torch.Tensor, packed: tuple[object, ...], norm_weight: torch.Tensor
) -> list[torch.Tensor]:
    linear, gated, head = packed
    logits = kernels.logits(x.float(), head)  # type: ignore[arg-type]
    return [
        kernels.linear(x, linear),  # type: ignore[arg-type]
        kernels.partial_sum(x, linear),  # type: ignore[arg-type]
        kernels.gated_linear(x, gated),  # type: ignore[arg-type]
        logits,
        kernels.rms_norm(x.float(), norm_weight, 1e-5),
        kernels.softmax_parts(logits),
    ]
