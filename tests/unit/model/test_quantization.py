"""Weights to int8 and what is left of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.interface import Int8Matrix
from model_parallel.model.quantization import largest_weights, quantize


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
    whole = _quantize(weight)
    monkeypatch.setattr("model_parallel.model.quantization._CHUNK_ELEMENTS", 24)
    pieces = _quantize(weight)
    assert torch.equal(pieces.values_OI, whole.values_OI) and torch.equal(pieces.scales_O, whole.scales_O)
