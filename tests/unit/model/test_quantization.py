"""Weights to int8 and fp8, and what is left of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.kernels.fp8 import quantized_rows
from model_parallel.kernels.interface import Fp8Matrix, Int8Matrix
from model_parallel.model.partition import EMBEDDING, LM_HEAD
from model_parallel.model.quantization import converter, largest_weights, quantize, quantize_fp8


def _quantize(weight: torch.Tensor) -> Int8Matrix:
    return quantize(weight, largest_weights(weight))


@given(rows=st.integers(1, 9), columns=st.integers(1, 50), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_moves_by_more_than_half_a_step(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    matrix = _quantize(weight)
    error = (matrix.values_OI.double() * matrix.scales_O.double().unsqueeze(1) - weight.double()).abs()
    # Besides the rounding to a whole number, float32's own of the quotient, which is at most 127.
    assert (error <= matrix.scales_O.double().unsqueeze(1) * (0.5 + 127 * 2.0**-23)).all()
    assert matrix.values_OI.abs().amax(1).eq(127).all()


def test_whole_numbers_times_a_power_of_two_are_exact() -> None:
    values = torch.randint(-127, 128, (5, 40), dtype=torch.int8)
    values[:, 7] = 127
    matrix = _quantize(values.float() / 512)
    assert torch.equal(matrix.values_OI, values)
    assert matrix.scales_O.eq(1 / 512).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    matrix = _quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert matrix.values_OI.tolist() == [[0, 0], [64, -127]] and matrix.scales_O[0] == 0


def test_what_is_not_finite_does_not_become_a_number() -> None:
    weight = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 2.0]])
    matrix = _quantize(weight)
    assert matrix.scales_O.isfinite().tolist() == [False, False, True]


def test_many_rows_are_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 8)
    whole, whole_fp8 = _quantize(weight), _quantize_fp8(weight)
    monkeypatch.setattr("model_parallel.model.quantization._CHUNK_ELEMENTS", 24)
    pieces, pieces_fp8 = _quantize(weight), _quantize_fp8(weight)
    assert torch.equal(pieces.values_OI, whole.values_OI) and torch.equal(pieces.scales_O, whole.scales_O)
    assert torch.equal(pieces_fp8.dequantized(torch.float64), whole_fp8.dequantized(torch.float64))


def _quantize_fp8(weight: torch.Tensor) -> Fp8Matrix:
    return quantize_fp8(weight, largest_weights(weight))


@given(rows=st.integers(1, 9), columns=st.integers(1, 50), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_e4m3_moves_a_number_by_a_sixteenth_at_most(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    matrix = _quantize_fp8(weight)
    error = (matrix.dequantized(torch.float64) - weight.double()).abs()
    # Normal numbers have four digits; smaller ones are 2⁻⁹ apart. Besides, float32's own rounding of the quotient.
    half_step = torch.maximum(weight.double().abs() / 16, matrix.scales_O.double().unsqueeze(1) * 2.0**-10)
    assert (error <= half_step * (1 + 2.0**-20)).all()
    assert matrix.values_OI.float().abs().amax(1).eq(448).all()


def test_rows_of_activations_are_scaled_alone_and_zeros_stay() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [448.0, 17.0, -1.0], [1e30, 2e30, 0.0], [1e-40, 0.0, -1e-40]])
    values, scales = quantized_rows(x)
    assert scales[1] == 1.0
    assert values.float()[:2].tolist() == [[0.0, 0.0, 0.0], [448.0, 16.0, -1.0]], "17 lies between 16 and 18"
    assert values.float()[2].tolist() == [224.0, 448.0, 0.0] and not values.float()[3].any()


def test_what_is_not_finite_does_not_become_a_number_in_fp8() -> None:
    weight = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 2.0]])
    for result in (_quantize_fp8(weight).dequantized(torch.float32), torch.mul(*_columns(quantized_rows(weight)))):
        assert result.sum(1).isfinite().tolist() == [False, False, True]


def _columns(rows: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[0].float(), rows[1].unsqueeze(1)


@pytest.mark.parametrize(("quantization", "head"), [("int8", Int8Matrix), ("fp8", torch.Tensor)])
def test_what_stays_in_dtype(quantization: str, head: type) -> None:
    convert = converter(quantization, {}, SoloCollectives())
    assert convert is not None and converter("packed", {}, SoloCollectives()) is None
    weight = torch.randn(4, 6)
    assert isinstance(convert(LM_HEAD, weight), head)
    assert convert(EMBEDDING, weight) is weight and convert("model.norm.weight", weight[0]).ndim == 1  # type: ignore[union-attr]
    assert isinstance(convert("model.layers.0.mlp.down_proj.weight", weight), Int8Matrix | Fp8Matrix)
