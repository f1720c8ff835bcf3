"""Rotation, paged cache and attention of the C++ kernels against float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.interface import Heads
from tests.support.effort import is_night, rest_by_night
from tests.support.kernels import attention_plan, poisoned_cache

# bfloat16: rotated queries and keys are rounded to 8 bits, so a score of standard normal vectors is off by about 2⁻⁷, and so
# is a weighted mean of values of a few units; the result is rounded once more. float32: sums of some hundred terms.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def _heads(kv_of_query: list[int], num_kv_heads: int, head_dim: int) -> Heads:
    return Heads(
        num_query_heads=len(kv_of_query),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        kv_of_query_H=torch.tensor(kv_of_query),
    )


def _exact(qkv_TX: torch.Tensor, heads: Heads, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """float64 [T, H · D] of one sequence that is computed whole."""
    parts = (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
    q, k, v = qkv_TX.double().unflatten(-1, (-1, heads.head_dim)).split(parts, dim=1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos_TD.double().unsqueeze(1) + torch.cat((-second, first), -1) * sin_TD.double().unsqueeze(1)

    q, k, v = rotated(q).transpose(0, 1), rotated(k)[:, heads.kv_of_query_H].transpose(0, 1), v[:, heads.kv_of_query_H]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v.transpose(0, 1), is_causal=True)
    return out.transpose(0, 1).flatten(1)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 8, 16, 33, 128]),
    head_dim=st.sampled_from([2, 14, 32, 64, 72, 128]),
    kv_of_query=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_whole_sequences(
    kernels: CpuKernels,
    lengths: list[int],
    block_size: int,
    head_dim: int,
    kv_of_query: list[int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    heads = _heads(kv_of_query, 3, head_dim)
    counts = [-(-length // block_size) for length in lengths]
    ids = torch.randperm(sum(counts)).split(counts)
    runs = [(length, 0, table.tolist()) for length, table in zip(lengths, ids, strict=True)]
    plan = attention_plan(runs, block_size=block_size, head_dim=head_dim)
    qkv = torch.randn(sum(lengths), (len(kv_of_query) + 6) * head_dim).to(dtype)
    out = kernels.attention(qkv, plan, poisoned_cache(kernels, sum(counts), block_size, heads, dtype), heads)
    for run in plan.runs:
        rows = slice(run.first_row, run.first_row + run.num_tokens)
        exact = _exact(qkv[rows], heads, plan.cos_TD[rows], plan.sin_TD[rows])
        assert (out[rows].double() - exact).abs().max() <= TOLERANCE[dtype]


KV_OF_QUERY = {"gqa": [0, 0, 0, 1, 1, 1, 2, 2, 2], "any": [2, 0, 1, 0], "mqa": [0] * 60}
CHUNKED = list(itertools.product(KV_OF_QUERY, [3, 16], TOLERANCE))
CHUNKED_BY_DAY = [case for index, case in enumerate(CHUNKED) if index % 4 in (0, 3)]
"""Each kind of heads with either size of block and either dtype."""


@pytest.mark.parametrize(("name", "block_size", "dtype"), rest_by_night(CHUNKED, by_day=CHUNKED_BY_DAY, has_names=True))
def test_chunks_and_neighbours_change_nothing(
    kernels: CpuKernels, name: str, block_size: int, dtype: torch.dtype
) -> None:
    """Bit for bit: whole, in chunks, and token by token among others whose blocks are full of NaN."""
    torch.manual_seed(1)
    kv_of_query, length, dim = KV_OF_QUERY[name], 150, 16
    heads = _heads(kv_of_query, 3, dim)
    num_blocks = -(-length // block_size)
    table, others = list(range(1, num_blocks + 1)), list(range(num_blocks + 1, 2 * num_blocks + 1))
    qkv = torch.randn(length, (len(kv_of_query) + 6) * dim).to(dtype)
    noise = torch.full((1, qkv.shape[1]), torch.nan, dtype=dtype)

    def run_in_chunks(chunk: int, with_neighbour: bool) -> torch.Tensor:
        cache, parts = poisoned_cache(kernels, 2 * num_blocks + 1, block_size, heads, dtype), []
        for start in range(0, length, chunk):
            count = min(chunk, length - start)
            runs, rows = [(count, start, table)], qkv[start : start + count]
            if with_neighbour:
                runs, rows = [(1, start, others), *runs], torch.cat([noise, rows])
            plan = attention_plan(runs, block_size=block_size, head_dim=dim)
            parts.append(kernels.attention(rows, plan, cache, heads)[-count:])
        return torch.cat(parts)

    whole = run_in_chunks(length, False)
    assert whole.isfinite().all()
    for chunk in (1, 7, 64, length):
        for with_neighbour in (False, True) if chunk > 1 or is_night() else (True,):
            assert torch.equal(run_in_chunks(chunk, with_neighbour), whole), f"chunks of {chunk}"


def test_a_nan_of_its_own_reaches_later_tokens_only(kernels: CpuKernels) -> None:
    heads = _heads([0, 0], 1, 8)
    plan = attention_plan([(90, 0, list(range(6)))], block_size=16, head_dim=8)
    qkv = torch.randn(90, 32)
    qkv[70] = torch.nan
    out = kernels.attention(qkv, plan, poisoned_cache(kernels, 6, 16, heads, torch.float32), heads)
    assert out[:70].isfinite().all() and out[70:].isnan().all()


def test_no_runs(kernels: CpuKernels) -> None:
    heads = _heads([0, 0], 1, 8)
    plan = attention_plan([], block_size=16, head_dim=8)
    cache = poisoned_cache(kernels, 1, 16, heads, torch.float32)
    assert kernels.attention(torch.empty(0, 32), plan, cache, heads).shape == (0, 16)
