"""The CUDA backend in Triton's interpreter against float64 and the reference; `make test-triton-interpreted`.

The interpreter is slow, so shapes are small. It shows that indices, masks and sums are right, not that a GPU agrees.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
if triton.__version__.startswith("3.6."):
    pytest.skip(
        "the interpreter of Triton 3.6, which torch 2.11 brings, does not work with numpy 2.4", allow_module_level=True
    )
from triton.runtime import interpreter

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.config import ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.kernels import fp8
from model_parallel.kernels.cuda import CudaKernels, InvariantCudaKernels
from model_parallel.kernels.cuda.invariant import NARROW
from model_parallel.kernels.interface import LayerCache
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.model.batch import Layout, rotary_angles, rotary_frequencies
from model_parallel.model.llama import Llama
from model_parallel.model.partition import fused_name, shard_table
from model_parallel.model.quantization import converter
from model_parallel.runtime.cuda_graphs import DecodeInputs, padded_sizes
from tests.support import cuda_checks
from tests.support.cuda_checks import DTYPES, make_heads
from tests.support.effort import by_day
from tests.support.group_matrices import FORMATS, random_matrix
from tests.support.kernels import attention_plan

GROUP_FORMATS = ["Q4_K", "Q4_0", "Q4_1", "Q8_0", "Q5_K", "Q6_K", "symmetric 128", "zeros 32", "zeros 8 bits"]

# numpy warns of infinities and NaN, of which a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def _bfloat16() -> None:
    """The interpreter holds bfloat16 as its bits, which it multiplies as they are and does not round to."""
    builder: Any = interpreter.InterpreterBuilder
    tl = interpreter.tl
    dot, extend, truncate, convert = (
        getattr(builder, f"create_{name}") for name in ("dot", "fp_ext", "fp_trunc", "si_to_fp")
    )

    def widened(self: Any, x: Any, to: Any = tl.float32) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return extend(self, x, to) if x.dtype.scalar != to.scalar else x
        bits = torch.from_numpy(np.array(x.data).view(np.int16))
        return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def rounded(self: Any, x: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16:
            return truncate(self, x, to)
        bits = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    def converted(self: Any, x: Any, to: Any) -> Any:
        return rounded(self, convert(self, x, tl.float32), to) if to.scalar == tl.bfloat16 else convert(self, x, to)

    def dot_of_wide(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(widened(self, x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    builder.create_fp_ext, builder.create_fp_trunc = widened, rounded
    builder.create_dot, builder.create_si_to_fp = dot_of_wide, converted


@pytest.fixture
def kernels() -> CudaKernels:
    return CudaKernels(device="cpu", num_multiprocessors=2)


@pytest.fixture
def dot_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a dot depends on that row alone, as on a GPU for one instruction. numpy's own depends on the number of rows."""

    def of_rows(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = (
            x.data if x.dtype.scalar != interpreter.tl.bfloat16 else self.create_fp_ext(x).data for x in (a, b)
        )
        product = np.einsum("ri,io->ro", left.astype(np.float32), right.astype(np.float32))
        return interpreter.TensorHandle((d.data + product).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_rows)


@pytest.fixture
def invariant(dot_of_rows: None) -> InvariantCudaKernels:
    """With parts that are short, so that a short context has several."""
    kernels = InvariantCudaKernels(device="cpu", num_multiprocessors=2)
    kernels.part_len = 64
    return kernels


@pytest.mark.parametrize("seed", range(by_day(2, by_night=30)))
def test_a_tokens_bits_do_not_depend_on_the_step(invariant: InvariantCudaKernels, seed: int) -> None:
    draw = random.Random(seed)
    num_kv_heads = draw.randint(1, 2)
    kv_of_query = [draw.randrange(num_kv_heads) for _ in range(draw.randint(1, 5))]
    heads = make_heads(invariant, kv_of_query, num_kv_heads, draw.choice([2, 6, 16]))
    lengths, block_size = [draw.randint(1, 25), draw.randint(70, 140), 1], draw.choice([1, 8, 33])
    how: dict[str, Any] = {"block_size": block_size, "dtype": DTYPES[seed % 3], "seed": seed}
    cuda_checks.check_attention_is_invariant(invariant, heads, lengths, **how)
    cuda_checks.check_chunks(invariant, heads, lengths, **how)


@pytest.mark.parametrize("has_wide_tiles", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(
    invariant: InvariantCudaKernels, dtype: torch.dtype, has_wide_tiles: bool
) -> None:
    invariant.has_wide_tiles = has_wide_tiles
    num_rows = 35 if dtype == torch.float32 else 67  # more than a narrow tile
    dense = torch.randn(40, 70).to(dtype)
    cuda_checks.check_rows_are_invariant(invariant, dense, 70, num_rows, dtype)
    cuda_checks.check_rows_are_invariant(invariant, cuda_checks.random_int8(invariant, 9, 70), 70, num_rows, dtype)
    cuda_checks.check_products(invariant, torch.randn(5, 70).to(dtype), dense, dense.double())


@pytest.mark.parametrize("name", GROUP_FORMATS[: by_day(1, by_night=len(GROUP_FORMATS))])
def test_a_rows_bits_with_weights_in_groups(invariant: InvariantCudaKernels, name: str) -> None:
    torch.manual_seed(0)
    weight = invariant.pack_linear(random_matrix(FORMATS[name], 20, 256))
    cuda_checks.check_rows_are_invariant(invariant, weight, 256, 67, torch.float32)


def test_wide_tiles_are_used_where_they_give_the_same_bits(
    invariant: InvariantCudaKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    invariant.settle_tiles(torch.float32)
    assert invariant.has_wide_tiles and not caplog.records
    of_rows = interpreter.InterpreterBuilder.create_dot

    def other_for_wide(self: Any, a: Any, *rest: Any) -> Any:
        out = of_rows(self, a, *rest)
        if a.data.shape[0] > NARROW[4].num_rows:
            out.data = np.nextafter(out.data, np.float32(np.inf))
        return out

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", other_for_wide)
    invariant.settle_tiles(torch.float32)
    assert not invariant.has_wide_tiles and "narrow tiles (slow)" in caplog.text


def test_special_rows_of_a_softmax(invariant: InvariantCudaKernels) -> None:
    cuda_checks.check_softmax_of_special_rows(invariant)


@pytest.mark.parametrize("seed", range(by_day(6, by_night=30)))
def test_sequences_in_chunks_beside_each_other(kernels: CudaKernels, seed: int) -> None:
    """Random maps and shapes."""
    draw = random.Random(seed)
    num_kv_heads = draw.randint(1, 3)
    kv_of_query = [draw.randrange(num_kv_heads) for _ in range(draw.randint(1, 9))]
    heads = make_heads(kernels, kv_of_query, num_kv_heads, draw.choice([2, 6, 16, 24]))
    lengths = [draw.randint(1, 25), draw.randint(30, 80), 1]
    block_size = draw.choice([1, 3, 8, 16, 33])
    cuda_checks.check_chunks(kernels, heads, lengths, block_size=block_size, dtype=DTYPES[seed % 3], seed=seed)


@pytest.mark.parametrize("kv_of_query", [[0, 0, 0, 1, 1], [0] * 20, [1, 1]], ids=["uneven", "mqa", "unread"])
def test_a_long_context_in_many_parts(kv_of_query: list[int]) -> None:
    """Decode with more parts than tiles, and a key/value head that nobody reads."""
    kernels = CudaKernels(device="cpu", num_multiprocessors=32)
    cuda_checks.check_long_decode(kernels, make_heads(kernels, kv_of_query, 2, 8), 140, dtype=torch.float32)


def test_neighbours_that_are_not_finite(kernels: CudaKernels) -> None:
    cuda_checks.check_neighbours(kernels)


def test_no_rows(kernels: CudaKernels) -> None:
    cuda_checks.check_no_rows(kernels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters(kernels: CudaKernels, dtype: torch.dtype) -> None:
    cuda_checks.check_adapters(kernels, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 33, 128, 300])
def test_norms(kernels: CudaKernels, num_columns: int, dtype: torch.dtype) -> None:
    cuda_checks.check_norms(kernels, 3, num_columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 33, 1100])
def test_swiglu(kernels: CudaKernels, num_columns: int, dtype: torch.dtype) -> None:
    cuda_checks.check_swiglu(kernels, 3, num_columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 70), (5, 130, 31), (20, 257, 33)])
def test_int8_products(kernels: CudaKernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cuda_checks.check_int8(kernels, *shape, dtype)


@pytest.fixture
def _e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds to e4m3 otherwise than a GPU does: halves away from zero, and a carry is lost."""
    convert = interpreter.InterpreterBuilder.create_fp_to_fp

    def converted(self: Any, x: Any, to: Any, mode: Any) -> Any:
        tl = interpreter.tl
        if tl.float8e4nv not in (x.dtype.scalar, to.scalar):
            return convert(self, x, to, mode)
        if x.dtype.scalar == tl.float8e4nv:
            values = torch.from_numpy(np.array(x.data)).view(torch.float8_e4m3fn).float().numpy()
            wide = interpreter.TensorHandle(values, tl.float32)
            return wide if to.scalar == tl.float32 else self.create_fp_trunc(wide, to)
        wide = self.create_fp_ext(x, tl.float32) if x.dtype.scalar != tl.float32 else x
        values = fp8.cached(torch.from_numpy(np.array(wide.data, dtype=np.float32)), fp8.FP8)
        return interpreter.TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", converted)


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("seed", range(by_day(3, by_night=15)))
def test_a_cache_in_e4m3(kernels: CudaKernels, seed: int) -> None:
    """Random maps and shapes, prefill in chunks and decode."""
    draw = random.Random(seed)
    heads = make_heads(kernels, [draw.randrange(2) for _ in range(draw.randint(1, 9))], 2, draw.choice([2, 6, 16, 24]))
    cuda_checks.check_chunks(
        kernels,
        heads,
        [draw.randint(1, 25), draw.randint(30, 80), 1],
        block_size=draw.choice([1, 3, 16]),
        dtype=DTYPES[seed % 3],
        seed=seed,
        cache_dtype=fp8.FP8,
    )


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33), (20, 130)])
def test_rows_in_e4m3(kernels: CudaKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cuda_checks.check_fp8_rows(kernels, *shape, dtype)


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 70), (5, 128, 32), (20, 257, 1100)])
def test_fp8_products(kernels: CudaKernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """With torch's own scaled product, which computes on CPUs in float32."""
    cuda_checks.check_fp8(kernels, *shape, dtype)


CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=36,
    intermediate_size=44,
    num_layers=2,
    num_query_heads=9,
    num_kv_heads=3,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    max_position=64,
)


@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_products_with_weights_in_groups(kernels: CudaKernels, name: str) -> None:
    torch.manual_seed(0)
    cuda_checks.check_groups(kernels, name, 3, 300, 70, torch.bfloat16)
    cuda_checks.check_groups(kernels, name, 17, 200, 33, torch.float32, num_before=37)
    cuda_checks.check_groups(kernels, name, 70, 200, 9, torch.float32)


@pytest.mark.parametrize("name", ["symmetric 128", "zeros 32"])
def test_reordered_inputs(kernels: CudaKernels, name: str) -> None:
    torch.manual_seed(0)
    cuda_checks.check_groups(kernels, name, 3, 200, 40, torch.bfloat16, reordered=True)


def test_groups_that_cannot_be_multiplied_are_refused(kernels: CudaKernels) -> None:
    with pytest.raises(ConfigError, match="has groups of 8 inputs; on cuda groups of 32, 64, 128, 256 can be computed"):
        kernels.pack_linear(random_matrix(FORMATS["zeros 8"], 4, 64))


def test_parts_of_one_matrix(kernels: CudaKernels) -> None:
    torch.manual_seed(0)
    parts = (random_matrix(FORMATS["Q4_K"], 20, 256), torch.randn(5, 256), random_matrix(FORMATS["Q6_K"], 9, 256))
    x = torch.randn(3, 256)
    reference = ReferenceKernels(num_threads=1, device="cpu")
    for kind in ("linear", "partial_sum"):
        ours = getattr(kernels, kind)(x, kernels.pack_linear(parts))
        expected = getattr(reference, kind)(x, reference.pack_linear(parts))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def _llama(kernels: CudaKernels | ReferenceKernels, quantization: str = "") -> Llama:
    torch.manual_seed(5)
    weights: dict[str, torch.Tensor] = {}
    for name, shard in shard_table(CONFIG, 1, 0).items():
        part = torch.randn(shard.shape) * 0.3
        fused = fused_name(name)
        weights[fused] = torch.cat([weights[fused], part]) if fused in weights else part
    convert = converter(quantization, {}, SoloCollectives())
    made: dict[str, Any] = weights if convert is None else {name: convert(name, w) for name, w in weights.items()}
    return Llama(CONFIG, made, kernels=kernels, collectives=SoloCollectives())


def _caches(kernels: CudaKernels | ReferenceKernels) -> list[LayerCache]:
    return [
        kernels.allocate_cache(num_blocks=12, block_size=4, num_kv_heads=3, head_dim=4, dtype=torch.float32)
        for _ in range(CONFIG.num_layers)
    ]


def test_a_padded_decode_step_is_that_of_the_reference(kernels: CudaKernels) -> None:
    """What a graph would hold, run as it is: fixed inputs for four sequences, filled in with three, then with one."""
    reference = ReferenceKernels(num_threads=1, device="cpu")
    frequencies = rotary_frequencies(CONFIG, torch.device("cpu"))
    models, caches = [_llama(kernels), _llama(reference)], [_caches(kernels), _caches(reference)]
    tables, lengths = [[0, 1, 2], [3, 4], [5]], [9, 6, 1]
    prompts = [(n, 0, table) for n, table in zip(lengths, tables, strict=True)]
    angles = rotary_angles(torch.tensor([p for n in lengths for p in range(n)]), frequencies)
    prompt = replace(attention_plan(prompts, block_size=4, head_dim=4), cos_TD=angles.cos(), sin_TD=angles.sin())
    ids = torch.randint(0, 50, (sum(lengths),))
    hidden = [model.forward(ids, prompt, cache) for model, cache in zip(models, caches, strict=True)]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)

    inputs = DecodeInputs(4, 40, scratch_slot=12 * 4, frequencies=frequencies)
    for sequences in ([0, 1, 2], [1]):
        chosen = [(1, lengths[i], tables[i]) for i in sequences]
        angles = rotary_angles(torch.tensor([lengths[i] for i in sequences]), frequencies)
        plan = replace(attention_plan(chosen, block_size=4, head_dim=4), cos_TD=angles.cos(), sin_TD=angles.sin())
        token_ids = list(range(7, 7 + len(sequences)))
        expected = models[1].forward(torch.tensor(token_ids), plan, caches[1])
        layout = Layout(
            token_ids,
            [lengths[i] for i in sequences],
            plan.slots_T.tolist(),
            [tuple(run) for run in plan.runs_S4.tolist()],
            plan.blocks.tolist(),
        )
        inputs.load(layout)
        out = models[0].forward(inputs.token_ids_T, inputs.plan(), caches[0])
        assert out.shape[0] == 4
        torch.testing.assert_close(out[: len(sequences)], expected, rtol=1e-4, atol=1e-4)
        for i in sequences:
            lengths[i] += 1


def test_a_step_has_the_bits_of_each_sequence_alone(invariant: InvariantCudaKernels) -> None:
    """Hidden states of a whole model: of a prompt at once, and of its end in padded steps of decode beside another's."""
    model, frequencies = _llama(invariant), rotary_frequencies(CONFIG, torch.device("cpu"))
    ids, tables, num_first = torch.randint(0, 50, (2, 9)), [[0, 1, 2], [3, 4, 5]], 6

    def prompts(lengths: Sequence[int], table_of: Sequence[int], caches: list[LayerCache]) -> torch.Tensor:
        runs = [(n, 0, tables[i]) for n, i in zip(lengths, table_of, strict=True)]
        angles = rotary_angles(torch.tensor([p for n in lengths for p in range(n)]), frequencies)
        plan = replace(attention_plan(runs, block_size=4, head_dim=4), cos_TD=angles.cos(), sin_TD=angles.sin())
        token_ids = torch.cat([ids[i, :n] for n, i in zip(lengths, table_of, strict=True)])
        return model.forward(token_ids, plan, caches)

    alone = prompts([9], [0], _caches(invariant))
    caches = _caches(invariant)
    assert torch.equal(prompts([num_first, 4], [0, 1], caches)[:num_first], alone[:num_first])
    inputs = DecodeInputs(4, 40, scratch_slot=12 * 4, frequencies=frequencies)
    for position in range(num_first, 9):
        places = [(position, 0), (4 + position - num_first, 1)]
        layout = Layout(
            [int(ids[i, at]) for at, i in places],
            [at for at, _ in places],
            [tables[i][at // 4] * 4 + at % 4 for at, i in places],
            [(row, 1, at, 3 * row) for row, (at, _) in enumerate(places)],
            [block for _, i in places for block in tables[i]],
        )
        inputs.load(layout)
        assert torch.equal(model.forward(inputs.token_ids_T, inputs.plan(), caches)[0], alone[position])


@pytest.mark.usefixtures("_e4m3")
def test_a_model_in_fp8_is_that_of_the_reference(kernels: CudaKernels) -> None:
    """No size of the matrices is a multiple of 16."""
    reference = ReferenceKernels(num_threads=1, device="cpu")
    prompt = attention_plan([(9, 0, [0, 1, 2]), (6, 0, [3, 4])], block_size=4, head_dim=4)
    ids = torch.randint(0, 50, (15,))
    exact = _llama(reference).forward(ids, prompt, _caches(reference))
    expected = _llama(reference, "fp8").forward(ids, prompt, _caches(reference))
    hidden = _llama(kernels, "fp8").forward(ids, prompt, _caches(kernels))
    # A sum in another order takes a number over the edge to the next e4m3 number now and then.
    assert (hidden - expected).norm() < 0.3 * (expected - exact).norm()
    torch.testing.assert_close(hidden[0], expected[0], rtol=1e-4, atol=1e-4)


def test_sizes_that_steps_are_padded_to() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(5) == [1, 2, 4, 5]
    assert padded_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
