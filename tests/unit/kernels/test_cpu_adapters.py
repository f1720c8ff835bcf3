"""What the C++ kernels add to products for adapters, against float64; and that nothing else changes a row."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.cpu.backend import PackedWeight
from model_parallel.kernels.cpu.recording import Workspace
from model_parallel.kernels.interface import Adapted, AdaptedRun, LowRankPart, LowRankUpdate

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of sums of about a hundred products of standard normal numbers, in float32 and, at last or on their way, of that dtype."""


def _update(
    draw: random.Random, num_inputs: int, num_outputs: int, dtype: torch.dtype, bounds: list[int]
) -> LowRankUpdate:
    """Parts of odd sizes at odd places; some outputs belong to none."""
    edges = sorted(
        {*draw.sample(range(1, num_outputs), min(num_outputs - 1, draw.randint(0, 4))), *bounds, 0, num_outputs}
    )
    parts = []
    for first, last in pairwise(edges):
        if draw.random() < 0.75 or (not parts and last == num_outputs):
            rank = draw.choice([1, 2, 3, 8, 16, 17])
            parts.append(
                LowRankPart(
                    first_output=first,
                    down_RI=torch.randn(rank, num_inputs).to(dtype) / num_inputs**0.5,
                    up_OR=torch.randn(last - first, rank).to(dtype) / rank**0.5,
                )
            )
    return LowRankUpdate(num_outputs=num_outputs, parts=tuple(parts))


def _added(update: LowRankUpdate, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], update.num_outputs, dtype=torch.float64)
    for part in update.parts:
        out[:, part.first_output : part.last_output] += x.double() @ part.down_RI.double().T @ part.up_OR.double().T
    return out


@given(
    st.tuples(st.integers(1, 40), st.integers(2, 100), st.integers(2, 130)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 999),
)
def test_products_with_adapters(
    kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, is_gated: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    num_rows, num_inputs, num_columns = shape
    num_outputs = 2 * num_columns if is_gated else num_columns
    x = torch.randn(num_rows, num_inputs).to(dtype)
    weight = torch.randn(num_outputs, num_inputs).to(dtype) / num_inputs**0.5
    packed = kernels.pack_gated(weight) if is_gated else kernels.pack_linear(weight)
    bounds = [num_columns] if is_gated else []  # no part holds columns of gate and of up
    updates = [_update(draw, num_inputs, num_outputs, dtype, bounds) for _ in range(3)]
    adapters = [kernels.pack_adapter([None, update, None], gated=[1] if is_gated else []) for update in updates]
    # Rows from nowhere, of one adapter, of the next; the third's product is one that it does not change.
    cuts = sorted(draw.randint(0, num_rows) for _ in range(3))
    spans = [(first, last - first) for first, last in zip(cuts, [*cuts[1:], num_rows], strict=True)]
    runs = [AdaptedRun(first, count, adapter) for (first, count), adapter in zip(spans, adapters, strict=True) if count]
    rows = kernels.adapted_rows(runs)

    def product(x: torch.Tensor, adapted: Adapted | None) -> torch.Tensor:
        return kernels.gated_linear(x, packed, adapted) if is_gated else kernels.partial_sum(x, packed, adapted)

    out = product(x, Adapted(rows, 1))
    plain = product(x, None)
    assert torch.equal(product(x, Adapted(rows, 0)), plain), "an adapter may change other products alone"
    exact = x.double() @ weight.double().T
    for update, (first, count) in zip(updates, spans, strict=True):
        exact[first : first + count] += _added(update, x[first : first + count])
    expected = F.silu(exact[:, :num_columns]) * exact[:, num_columns:] if is_gated else exact
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(out[: cuts[0]], plain[: cuts[0]]), "rows without an adapter keep their bits"
    for (first, count), adapter in zip(spans, adapters, strict=True):
        for row in {first, first + count - 1} if count else ():
            alone = kernels.adapted_rows([AdaptedRun(0, 1, adapter)])
            assert torch.equal(product(x[row : row + 1], Adapted(alone, 1))[0], out[row]), "alone as in the batch"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize(("num_adapters", "num_rows_each"), [(9, 1), (8, 2), (5, 3), (3, 100)])
def test_rows_of_many_adapters_have_the_bits_of_each_alone(
    kernels: CpuKernels, num_adapters: int, num_rows_each: int, is_gated: bool, dtype: torch.dtype
) -> None:
    """Adapters of one rank are multiplied together; products of more than 128 rows, 128 at a time."""
    torch.manual_seed(5)
    x = torch.randn(num_adapters * num_rows_each, 71).to(dtype)
    weight = torch.randn(96, 71).to(dtype) / 8
    packed = kernels.pack_gated(weight) if is_gated else kernels.pack_linear(weight)
    product = kernels.gated_linear if is_gated else kernels.partial_sum

    def part(first_output: int) -> LowRankPart:
        down_RI, up_OR = torch.randn(16, 71).to(dtype) / 8, torch.randn(48, 16).to(dtype) / 4
        return LowRankPart(first_output=first_output, down_RI=down_RI, up_OR=up_OR)

    updates = [LowRankUpdate(num_outputs=96, parts=(part(0), part(48))) for _ in range(num_adapters)]
    adapters = [kernels.pack_adapter([update], gated=[0] if is_gated else []) for update in updates]
    runs = [AdaptedRun(i * num_rows_each, num_rows_each, adapter) for i, adapter in enumerate(adapters)]
    together = product(x, packed, Adapted(kernels.adapted_rows(runs), 0))
    assert not torch.equal(together, product(x, packed)), "the adapters change something"
    for run, rows in zip(runs, together.split(num_rows_each), strict=True):
        for row in {0, num_rows_each - 1}:
            alone = Adapted(kernels.adapted_rows([AdaptedRun(0, 1, run.adapter)]), 0)
            at = run.first_row + row
            assert torch.equal(product(x[at : at + 1], packed, alone)[0], rows[row])


def _square(kernels: CpuKernels) -> tuple[PackedWeight, torch.Tensor]:
    torch.manual_seed(3)
    return kernels.pack_linear(torch.randn(48, 48)), torch.randn(4, 48)


def test_a_recorded_product_finds_the_rows_of_each_run(kernels: CpuKernels) -> None:
    """The memory is the same, what it says is not."""
    packed, x = _square(kernels)
    updates = [_update(random.Random(seed), 48, 48, torch.float32, []) for seed in (1, 2)]
    adapters = [kernels.pack_adapter([update], gated=[]) for update in updates]
    rows = kernels.adapted_rows([AdaptedRun(0, 1, adapters[0]), AdaptedRun(1, 3, adapters[1])])
    rows.load([])
    with kernels.recording(workspace := Workspace(4)) as program:
        out = workspace.kept(kernels.partial_sum(x, packed, Adapted(rows, 0)))
    assert torch.equal(out, kernels.partial_sum(x, packed))
    for runs in ([AdaptedRun(1, 2, adapters[0])], [AdaptedRun(0, 1, adapters[1]), AdaptedRun(3, 1, adapters[0])], []):
        rows.load(runs)
        assert program.run() == 0
        assert torch.equal(out, kernels.partial_sum(x, packed, Adapted(kernels.adapted_rows(runs), 0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_stays_alone(kernels: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(40, 33).to(dtype), torch.randn(6, 33).to(dtype)
    packed = kernels.pack_linear(weight)
    adapter = kernels.pack_adapter([_update(random.Random(4), 33, 40, dtype, [])], gated=[])
    adapted = Adapted(kernels.adapted_rows([AdaptedRun(0, 6, adapter)]), 0)
    before = kernels.partial_sum(x, packed, adapted)
    x[2] = torch.nan
    after = kernels.partial_sum(x, packed, adapted)
    assert after[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(after[others], before[others])
