"""Checks of the CUDA backend that run on a GPU at full size and in Triton's interpreter at small sizes."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_parallel.kernels import fp8
from model_parallel.kernels.cuda import CudaKernels
from model_parallel.kernels.cuda.adapters import add_low_rank
from model_parallel.kernels.cuda.fp8_weights import quantized_rows
from model_parallel.kernels.cuda.group_weights import MAX_ROWS
from model_parallel.kernels.interface import (
    Adapted,
    AdaptedRun,
    AttentionPlan,
    Fp8Matrix,
    Heads,
    Int8Matrix,
    LowRankPart,
    LowRankUpdate,
)
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.model.quantization import largest_weights, quantize_fp8
from tests.support.group_matrices import FORMATS, product_bound, random_matrix
from tests.support.kernels import attention_plan, poisoned_cache

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDING)
# Of attention over standard normal vectors: a score is off by about as much as its rounded queries and keys are, and so is a mean
# of values of a few units; weights and result are rounded once more. float32: sums of some hundred terms.
ATTENTION_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
FP8_SUM_ROUNDING = 2.0**-12
"""Of sums of products of e4m3 numbers on a GPU: Hopper's matrix units align products to the largest of an instruction and keep
about 13 digits (DeepSeek-AI 2024, §3.3.2: 14 bits); not measured here yet."""
SMALLEST_ERROR = 2.0**-25
"""Of float16, which has fewer digits below 2⁻¹⁴."""


def make_heads(kernels: CudaKernels, kv_of_query: list[int], num_kv_heads: int, head_dim: int) -> Heads:
    return Heads(
        num_query_heads=len(kv_of_query),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        kv_of_query_H=torch.tensor(kv_of_query, device=kernels.device),
    )


def make_plan(
    kernels: CudaKernels, runs: Sequence[tuple[int, int, Sequence[int]]], *, block_size: int, heads: Heads
) -> AttentionPlan:
    plan = attention_plan(runs, block_size=block_size, head_dim=heads.head_dim)
    names = ("slots_T", "cos_TD", "sin_TD", "runs_S4", "blocks")
    return replace(plan, **{name: getattr(plan, name).to(kernels.device) for name in names})


def exact_attention(
    qkv_TX: Tensor, heads: Heads, plan: AttentionPlan, cache_dtype: torch.dtype | None = None
) -> Tensor:
    """float64 [T, H · D] of one sequence that is computed whole. With `cache_dtype` keys and values as a cache has them."""
    parts = (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
    q, k, v = qkv_TX.double().unflatten(-1, (-1, heads.head_dim)).split(parts, dim=1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), -1)
        return x * plan.cos_TD.double().unsqueeze(1) + turned * plan.sin_TD.double().unsqueeze(1)

    k = rotated(k)
    if cache_dtype is not None:
        k, v = (fp8.cached(x.to(qkv_TX.dtype), cache_dtype).double() for x in (k, v))
    q, k, v = rotated(q).transpose(0, 1), k[:, heads.kv_of_query_H].transpose(0, 1), v[:, heads.kv_of_query_H]
    out = F.scaled_dot_product_attention(q, k, v.transpose(0, 1), is_causal=True)
    return out.transpose(0, 1).flatten(1)


def _random_sequences(
    kernels: CudaKernels, heads: Heads, lengths: Sequence[int], *, block_size: int, dtype: torch.dtype
) -> tuple[list[list[int]], list[Tensor]]:
    """Block tables that share no block, and rows of query, key and value, of sequences of these lengths."""
    counts = [-(-length // block_size) for length in lengths]
    tables = [part.tolist() for part in torch.randperm(sum(counts)).split(counts)]
    num_columns = (heads.num_query_heads + 2 * heads.num_kv_heads) * heads.head_dim
    return tables, [torch.randn(length, num_columns, device=kernels.device).to(dtype) for length in lengths]


def check_chunks(
    kernels: CudaKernels,
    heads: Heads,
    lengths: Sequence[int],
    *,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Sequences in random chunks beside each other, single tokens among them, against each computed whole."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tables, qkv = _random_sequences(kernels, heads, lengths, block_size=block_size, dtype=dtype)
    cache = poisoned_cache(kernels, sum(map(len, tables)), block_size, heads, cache_dtype or dtype)
    done, outs = [0] * len(lengths), [[] for _ in lengths]
    while done != list(lengths):
        chosen = [i for i, length in enumerate(lengths) if done[i] < length]
        takes = [min(draw.choice([1, 5, 60, 300]), lengths[i] - done[i]) for i in chosen]
        runs = [(n, done[i], tables[i]) for n, i in zip(takes, chosen, strict=True)]
        rows = torch.cat([qkv[i][done[i] : done[i] + n] for n, i in zip(takes, chosen, strict=True)])
        plan = make_plan(kernels, runs, block_size=block_size, heads=heads)
        for i, part in zip(chosen, kernels.attention(rows, plan, cache, heads).split(takes), strict=True):
            outs[i].append(part)
            done[i] += len(part)
    for i, length in enumerate(lengths):
        whole = make_plan(kernels, [(length, 0, tables[i])], block_size=block_size, heads=heads)
        error = (torch.cat(outs[i]).double() - exact_attention(qkv[i], heads, whole, cache_dtype)).abs().max()
        assert error <= ATTENTION_TOLERANCE[dtype]


def check_attention_is_invariant(
    kernels: CudaKernels, heads: Heads, lengths: Sequence[int], *, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    """Every token's bits are those of its sequence alone and whole: in random chunks beside others, and token by token."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tables, qkv = _random_sequences(kernels, heads, lengths, block_size=block_size, dtype=dtype)

    def computed(takes_of: Sequence[Sequence[int]], chosen: Sequence[int]) -> list[Tensor]:
        """Of the chosen sequences, in steps that take so many tokens of each."""
        cache = poisoned_cache(kernels, sum(map(len, tables)), block_size, heads, dtype)
        outs: dict[int, list[Tensor]] = {i: [] for i in chosen}
        done = dict.fromkeys(chosen, 0)
        for takes in takes_of:
            parts = [(i, n) for i, n in zip(chosen, takes, strict=True) if n]
            rows = torch.cat([qkv[i][done[i] : done[i] + n] for i, n in parts])
            plan = make_plan(kernels, [(n, done[i], tables[i]) for i, n in parts], block_size=block_size, heads=heads)
            out = kernels.attention(rows, plan, cache, heads).split([n for _, n in parts])
            for (i, n), part in zip(parts, out, strict=True):
                outs[i].append(part)
                done[i] += n
        return [torch.cat(outs[i]) for i in chosen]

    left, steps = list(lengths), []
    while any(left):
        steps.append([min(n, draw.choice([0, 1, 1, 5, 64, 300])) for n in left])
        left = [n - take for n, take in zip(left, steps[-1], strict=True)]
        if not any(steps[-1]):
            steps.pop()
    together = computed(steps, range(len(lengths)))
    for i, length in enumerate(lengths):
        (alone,) = computed([[length]], [i])
        assert torch.equal(together[i], alone)
        num_single = min(length, 9)
        (at_the_end,) = computed(
            [[length - num_single], *([1] for _ in range(num_single))][length == num_single :], [i]
        )
        assert torch.equal(at_the_end, alone)


def check_rows_are_invariant(
    kernels: CudaKernels, weight: Any, num_inputs: int, num_rows: int, dtype: torch.dtype
) -> None:
    """Of products, logits, normalisers: every row alone and among others, at other places, has the same bits."""
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs, device=kernels.device).to(dtype)
    operations = [kernels.partial_sum, kernels.linear, lambda rows, packed: kernels.logits(rows.float(), packed)]
    for operation in operations:
        whole = operation(x, weight)
        for chosen in ([num_rows - 1], list(range(num_rows - 5, num_rows))):
            assert torch.equal(operation(x[chosen], weight), whole[chosen])
    for values in (kernels.partial_sum(x, weight), kernels.partial_sum(x, weight).double()):
        parts = kernels.softmax_parts(values)
        assert torch.equal(kernels.normalisers(values), parts[:, :2])
        assert torch.equal(torch.cat([kernels.softmax_parts(row) for row in values.split(1)]), parts)
        assert torch.equal(parts[:, 0], values.double().amax(1)) and torch.equal(parts[:, 2], values.argmax(1).double())
        exact = (values.double() - parts[:, :1]).exp().sum(1)
        tolerance = values.shape[1] * 2.0**-23 if values.dtype == torch.float32 else 1e-12
        assert ((parts[:, 1] - exact).abs() <= tolerance * exact).all()


def check_softmax_of_special_rows(kernels: CudaKernels) -> None:
    values = torch.zeros(5, 3000, device=kernels.device)
    values[0], values[1, 2500], values[2, 7], values[3, 2999] = -torch.inf, torch.inf, torch.nan, 1.0
    parts = kernels.softmax_parts(values)
    assert parts[0].tolist()[:2] == [-torch.inf, 0.0]
    assert not parts[1, :2].isfinite().all() and not parts[2, :2].isfinite().all()
    assert parts[3].tolist()[::2] == [1.0, 2999.0]
    assert parts[4].tolist() == [0.0, 3000.0, 0.0], "the first of the highest"


def check_long_decode(kernels: CudaKernels, heads: Heads, length: int, *, dtype: torch.dtype) -> None:
    """The last token of a long sequence, whose context is cut into parts."""
    block_size, num_blocks = 16, -(-length // 16)
    num_columns = (heads.num_query_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv = torch.randn(length, num_columns, device=kernels.device).to(dtype)
    table = list(range(num_blocks))
    cache = poisoned_cache(kernels, num_blocks, block_size, heads, dtype)
    whole, first, last = (
        make_plan(kernels, [(count, start, table)], block_size=block_size, heads=heads)
        for count, start in ((length, 0), (length - 1, 0), (1, length - 1))
    )
    kernels.attention(qkv[:-1], first, cache, heads)
    out = kernels.attention(qkv[-1:], last, cache, heads)
    assert (out.double() - exact_attention(qkv, heads, whole)[-1:]).abs().max() <= ATTENTION_TOLERANCE[dtype]


def check_neighbours(kernels: CudaKernels) -> None:
    """What is not finite stays in its own sequence, and in the blocks that nobody else reads."""
    heads = make_heads(kernels, [0, 0], 1, 4)
    qkv = torch.randn(12, 16, device=kernels.device)
    qkv[0], qkv[6:] = torch.nan, torch.nan
    plan = make_plan(kernels, [(1, 0, [4]), (5, 0, [0, 1]), (6, 0, [2, 3])], block_size=4, heads=heads)
    out = kernels.attention(qkv, plan, poisoned_cache(kernels, 5, 4, heads, torch.float32), heads)
    assert out[0].isnan().all() and out[1:6].isfinite().all() and out[6:].isnan().all()


def check_no_rows(kernels: CudaKernels) -> None:
    heads = make_heads(kernels, [0, 0], 1, 8)
    plan = make_plan(kernels, [], block_size=16, heads=heads)
    cache = poisoned_cache(kernels, 1, 16, heads, torch.float32)
    x, weight = torch.empty(0, 10, device=kernels.device), torch.ones(6, 10, device=kernels.device)
    assert kernels.attention(torch.empty(0, 32, device=kernels.device), plan, cache, heads).shape == (0, 16)
    assert kernels.rms_norm(x, weight[0], 1e-5).shape == (0, 10)
    assert kernels.gated_linear(x, weight).shape == (0, 3)
    assert kernels.linear(x, random_int8(kernels, 6, 10)).shape == (0, 6)


def check_norms(kernels: CudaKernels, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, num_rows, num_columns, device=kernels.device)
    weight = torch.randn(num_columns, device=kernels.device).to(dtype)
    alone = kernels.rms_norm(x, weight, 1e-5)
    both, total = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(total, x + residual)
    for out, value in ((alone, x), (both, x + residual)):
        exact = F.rms_norm(value.double(), (num_columns,), weight.double(), 1e-5)
        tolerance = (num_columns + 8) * ROUNDING[torch.float32] + ROUNDING[dtype]
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() <= tolerance * exact.abs() + SMALLEST_ERROR).all()


def check_swiglu(kernels: CudaKernels, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(num_rows, 2 * num_columns, device=kernels.device).to(dtype)
    gate_up[0, 0], gate_up[-1, 0] = -200.0, 200.0
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = F.silu(gate) * up
    out = kernels.swiglu(gate_up, dtype)
    assert out.dtype == dtype
    # The exponential and the division err by a few units in the last place.
    tolerance = 16 * ROUNDING[torch.float32] + ROUNDING[dtype]
    assert ((out.double() - exact).abs() <= tolerance * exact.abs() + SMALLEST_ERROR).all()


def check_adapters(kernels: CudaKernels, dtype: torch.dtype) -> None:
    """Three adapters of unlike ranks and parts in one product, and rows without one; more rows of one than a tile has."""
    torch.manual_seed(2)
    num_rows, num_inputs, sizes = 45, 70, (33, 18, 18)
    num_outputs, firsts = sum(sizes), (0, 33, 51)
    x = torch.randn(num_rows, num_inputs, device=kernels.device).to(dtype)
    exact = torch.zeros((num_rows, num_outputs), dtype=torch.float64, device=kernels.device)
    runs = []
    for first_row, count, rank, parts in ((2, 1, 3, (0, 1, 2)), (3, 34, 17, (0, 2)), (40, 5, 8, (1,))):
        made = []
        for part in parts:
            down = (torch.randn(rank, num_inputs) / num_inputs**0.5).to(dtype)
            up = (torch.randn(sizes[part], rank) / rank**0.5).to(dtype)
            made.append(LowRankPart(first_output=firsts[part], down_RI=down, up_OR=up))
            added = x[first_row : first_row + count].double().cpu() @ down.double().T @ up.double().T
            exact[first_row : first_row + count, firsts[part] : firsts[part] + sizes[part]] += added.to(kernels.device)
        update = LowRankUpdate(num_outputs=num_outputs, parts=tuple(made))
        runs.append(AdaptedRun(first_row, count, kernels.pack_adapter([None, update], gated=[])))
    rows = kernels.adapted_rows(runs)
    added = add_low_rank(torch.zeros((num_rows, num_outputs), device=kernels.device), x, Adapted(rows, 1))
    torch.testing.assert_close(added.double(), exact, atol=1e-4, rtol=1e-4)
    assert not add_low_rank(torch.zeros((num_rows, num_outputs), device=kernels.device), x, Adapted(rows, 0)).any()
    for row, run in ((2, runs[0]), (20, runs[1]), (44, runs[2])):
        alone = Adapted(kernels.adapted_rows([AdaptedRun(0, 1, run.adapter)]), 1)
        zero = torch.zeros((1, num_outputs), device=kernels.device)
        assert torch.equal(add_low_rank(zero, x[row : row + 1], alone)[0], added[row]), "alone as in the batch"
    if dtype != torch.float32 and kernels.device == "cpu":
        return  # torch has no product of such weights in float32 there
    weight = (torch.randn(num_outputs, num_inputs, device=kernels.device) / num_inputs**0.5).to(dtype)
    plain, out = kernels.partial_sum(x, weight), kernels.partial_sum(x, weight, Adapted(rows, 1))
    assert torch.equal(out, plain + added)
    assert torch.equal(kernels.linear(x, weight, Adapted(rows, 1)), out.to(dtype)), "rounded once, after the sum"
    assert kernels.gated_linear(x, weight[:68], Adapted(rows, 0)).shape == (num_rows, 34)


def random_int8(kernels: CudaKernels, num_outputs: int, num_inputs: int) -> Int8Matrix:
    values = torch.randint(-127, 128, (num_outputs, num_inputs), device=kernels.device).to(torch.int8)
    return Int8Matrix(values, torch.rand(num_outputs, device=kernels.device) + 0.1)


def check_int8(kernels: CudaKernels, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    weight = random_int8(kernels, num_outputs, num_inputs)
    matrix = weight.values_OI.double() * weight.scales_O.double().unsqueeze(1)
    check_products(kernels, torch.randn(num_rows, num_inputs, device=kernels.device).to(dtype), weight, matrix)


def random_fp8(kernels: CudaKernels, num_outputs: int, num_inputs: int) -> Fp8Matrix:
    weight = torch.randn(num_outputs, num_inputs) * (torch.rand(num_outputs, 1) + 0.1)
    return quantize_fp8(weight, largest_weights(weight)).to(torch.device(kernels.device))


def check_fp8_rows(kernels: CudaKernels, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
    """Bit for bit as kernels/fp8.py on a CPU: rows of all sizes, of zeros, and such as are not finite."""
    x = (torch.randn(num_rows, num_columns) * 10.0 ** torch.randint(-4, 4, (num_rows, 1))).to(dtype)
    x[0] = 0.0
    if num_rows > 4:
        x[1, -1], x[2, 0], x[3] = torch.nan, torch.inf, torch.nan
    expected, expected_scales = fp8.quantized_rows(x)
    num_stored = num_columns + 5
    values, scales = quantized_rows(x.to(kernels.device), num_stored=num_stored)
    values, scales = values.cpu(), scales.cpu()
    is_finite = x.isfinite().all(1)
    assert torch.equal(scales[:num_rows][is_finite], expected_scales[is_finite])
    assert torch.equal(values[:num_rows, :num_columns][is_finite].float(), expected[is_finite].float())
    result = values[:num_rows, :num_columns].float() * scales[:num_rows].unsqueeze(1)
    assert not result.sum(1)[~is_finite].isfinite().any()
    assert not values[:, num_columns:].float().any() and not values[num_rows:].float().any()


def check_fp8(kernels: CudaKernels, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    """Each product with weights in e4m3 against float64 of the rounded activations; against exact ones by how far those were
    rounded; and against the reference."""
    matrix = random_fp8(kernels, num_outputs, num_inputs)
    x = torch.randn(num_rows, num_inputs, device=kernels.device).to(dtype)
    values, scales = (part.cpu().double() for part in fp8.quantized_rows(x.cpu()))
    rounded, exact_weight = values * scales.unsqueeze(1), matrix.to(torch.device("cpu")).dequantized(torch.float64)
    exact, sizes = rounded @ exact_weight.T, rounded.abs() @ exact_weight.abs().T
    weight = kernels.pack_linear(matrix)
    out = kernels.partial_sum(x, weight)
    assert out.dtype == torch.float32 and out.shape == (num_rows, num_outputs)
    # A chain of float32 additions, scaled twice. Hopper's matrix units keep fewer digits of sums of 128 products.
    tolerance = (num_inputs + 4) * ROUNDING[torch.float32] + (0 if kernels.device == "cpu" else FP8_SUM_ROUNDING)
    assert ((out.cpu().double() - exact).abs() <= tolerance * sizes).all()
    # e4m3 rounds to 1 part in 16, or where a number is small, to 2⁻¹⁰ of the row's scale.
    moved = ((x.cpu().double() / 16).abs() + scales.unsqueeze(1) * 2.0**-10) @ exact_weight.abs().T
    error = (out.cpu().double() - x.cpu().double() @ exact_weight.T).abs()
    assert (error <= moved + tolerance * sizes).all()
    assert torch.equal(kernels.linear(x, weight), out.to(dtype)), "rounded once"
    reference = ReferenceKernels(num_threads=1, device="cpu")
    expected = reference.partial_sum(x.cpu(), reference.pack_linear(matrix.to(torch.device("cpu"))))
    assert ((out.cpu() - expected).abs() <= 2 * tolerance * sizes).all()
    if num_outputs % 2 == 0:
        gate, up = out.double().chunk(2, dim=1)
        gated = kernels.gated_linear(x, kernels.pack_gated(matrix))
        assert gated.dtype == dtype and gated.shape == (num_rows, num_outputs // 2)
        exact_gated = F.silu(gate) * up
        tolerance = 16 * ROUNDING[torch.float32] + ROUNDING[dtype]
        assert ((gated.double() - exact_gated).abs() <= tolerance * exact_gated.abs() + SMALLEST_ERROR).all()


def check_groups(
    kernels: CudaKernels, name: str, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, **cut: Any
) -> None:
    """name: of group_matrices.FORMATS. cut: see random_matrix."""
    matrix = random_matrix(FORMATS[name], num_outputs, num_inputs, **cut)
    x = torch.randn(num_rows, num_inputs).to(dtype)
    exact, bound = product_bound(x, matrix)
    weight = kernels.pack_linear(matrix.to(torch.device(kernels.device)))
    out = kernels.partial_sum(x.to(kernels.device), weight).cpu()
    if num_rows > MAX_ROWS:  # weights are rounded once
        bound = bound + 2 * ROUNDING[dtype] * (x.double().abs() @ matrix.dequantized(torch.float64).abs().T)
    assert out.dtype == torch.float32
    assert ((out.double() - exact).abs() <= bound).all()
    ids = torch.tensor([num_outputs - 1, 0, num_outputs, 3])
    rows = kernels.embed(ids.to(kernels.device) + 5, kernels.pack_head(matrix.to(torch.device(kernels.device))), 5)
    expected = torch.cat([matrix.dequantized(torch.float64), torch.zeros(1, num_inputs)])[ids]
    assert ((rows.cpu().double() - expected).abs() <= 4 * ROUNDING[torch.float32] * expected.abs().amax()).all()


def check_products(kernels: CudaKernels, x: Tensor, weight: Tensor | Int8Matrix, matrix: Tensor) -> None:
    """`partial_sum` and `logits` with a weight that stands for float64 `matrix`."""
    exact, sizes = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    out = kernels.partial_sum(x, weight)
    assert out.dtype == torch.float32
    # A chain of float32 additions (Higham 2002, §3).
    tolerance = (x.shape[1] + 2) * ROUNDING[torch.float32]
    assert ((out.double() - exact).abs() <= tolerance * sizes).all()
    # Of the logits' float32 x only 16 bits enter where weights have fewer.
    logits = kernels.logits(x.float(), weight)
    assert ((logits.double() - exact).abs() <= (tolerance + 2.0**-16) * sizes).all()
