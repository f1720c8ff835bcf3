"""Draws of the C++ kernels, which take few logarithms, against torch's, which take those of all tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.randomness import best_draws, draw_key


@given(
    num_rows=st.integers(1, 5),
    num_values=st.integers(1, 1500),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 3.0, 100.0, 1e6]),
    is_double=st.booleans(),
    seed=st.integers(0, 2**32),
    first_id=st.integers(0, 200_000),
    data=st.data(),
)
def test_the_same_tokens_are_drawn(
    kernels: CpuKernels,
    num_rows: int,
    num_values: int,
    spread: float,
    is_double: bool,
    seed: int,
    first_id: int,
    data: st.DataObject,
) -> None:
    values = torch.randn(num_rows, num_values, generator=torch.Generator().manual_seed(seed)) * spread
    values[values > spread] = -math.inf if data.draw(st.booleans()) else spread  # ties at the top, or fewer tokens
    values = values.double() if is_double else values
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=6))
    temperatures = [data.draw(st.sampled_from([1e-5, 0.3, 1.0, 1.7, 50.0])) for _ in rows]
    keys = [draw_key(seed, choice, num_values) for choice in range(len(rows))]
    masked = data.draw(st.sampled_from([0.0, 0.5, 0.99]))
    masks = [torch.rand(num_values) < masked if data.draw(st.booleans()) else None for _ in rows]
    found = kernels.best_draws(values, rows, temperatures, keys, first_id, masks)
    assert torch.equal(found, best_draws(values, rows, temperatures, keys, first_id, masks))


def test_every_token_of_an_even_row_is_drawn_about_as_often(kernels: CpuKernels) -> None:
    values, num_draws = torch.zeros(1, 50), 5000
    keys = [draw_key(1, 0, position) for position in range(num_draws)]
    counts = kernels.best_draws(values, [0] * num_draws, [1.0] * num_draws, keys, 0, [None] * len(keys)).bincount(
        minlength=50
    )
    assert counts.sum() == num_draws
    assert 60 <= counts.min() <= counts.max() <= 140  # four standard deviations about 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_some_place_and_disturbs_no_other(kernels: CpuKernels, bad: float) -> None:
    values = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    keys = [draw_key(7, 0, 1)] * 3
    before = kernels.best_draws(values, range(3), [1.0] * 3, keys, 0, [None] * len(keys))
    values[1] = bad
    values[1, 17] = 0.5
    after = kernels.best_draws(values, range(3), [1.0] * 3, keys, 0, [None] * len(keys))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert 0 <= after[1] < 400


def test_a_row_without_tokens_is_refused(kernels: CpuKernels) -> None:
    with pytest.raises(ValueError, match="no token can be drawn"):
        kernels.best_draws(torch.empty(2, 0), [0], [1.0], [draw_key(1, 0, 1)], 0, [None])
