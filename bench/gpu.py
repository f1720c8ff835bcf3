"""One GPU on the shapes of Llama 2: decode steps beside what its memory allows, prefill beside what its matrix units do.

Weights are random and made on the device; a 70B model is cut to an eighth of its layers. A decode step is a whole one, from the
scheduler's numbers to the tokens on the host. Its floor is the bytes that it must read, weights and cached keys and values, over
the bandwidth measured in the same run; prefill's is its arithmetic over the measured rate of a large product, in fp8
of one in fp8.

    python -m bench.gpu [--shapes 7b 13b 70b] [--kv-cache-dtype fp8] [--deterministic] [--repeats 50] [--json FILE]

Shape suffixes: T tokens · E hidden
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.config import DTYPE_BYTES, ModelConfig
from model_parallel.engine.messages import NewSequence, Row
from model_parallel.engine.request import SamplingParams
from model_parallel.gpus import OLDEST_WITH_FP8
from model_parallel.kernels.fp8 import FP8
from model_parallel.kernels.interface import LayerCache, Matrix
from model_parallel.kernels.select import select_kernels
from model_parallel.memory import DEVICE_RESERVE_BYTES, kv_bytes_per_token, weight_bytes
from model_parallel.model.batch import SequenceState, build_batch, lay_out, rotary_frequencies
from model_parallel.model.llama import Llama
from model_parallel.model.partition import EMBEDDING, fused_name, shard_table
from model_parallel.model.quantization import converter
from model_parallel.model.sampler import Sampler
from model_parallel.runtime.cuda_graphs import DecodeGraphs
from serving.models.known_llama import LLAMA_2

RESULTS = Path(__file__).parent / "results"
DTYPE = "bfloat16"
NUM_LAYERS = {"7b": 32, "13b": 40, "70b": 10}
BATCHES = (1, 8, 64)
CONTEXTS = (128, 1024, 4000)
PREFILLS = (512, 2048)
QUANTIZATIONS = ("", "int8", "fp8")
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the device does at most, in this run."""

    device: str
    torch: str
    bandwidth_bytes_per_s: float
    product_flop_per_s: float
    """In bfloat16."""
    fp8_product_flop_per_s: float | None
    """Of e4m3 numbers with bfloat16 output; None on a device that has no such products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One kind of step, beside its floor."""

    shape: str
    num_layers: int
    quantization: str
    kv_cache_dtype: str
    deterministic: bool
    work: str
    """ "decode" or "prefill"."""
    batch: int
    context: int
    """Cached tokens of each sequence before a decode step; tokens of a prefill."""
    step_s: float
    """Median."""
    floor_s: float

    @property
    def part_of_limit(self) -> float:
        return self.floor_s / self.step_s


def seconds_each(repeats: int, run: Callable[[], object]) -> float:
    """Median wall-clock time of `run` with all that it enqueues, after three that do not count."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[3:])


def measure_bandwidth() -> float:
    """Bytes a second of a large copy, counting what it reads and writes, or of a large sum, whichever is higher."""
    source = torch.ones(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds_each(20, lambda: target.copy_(source))
    return max(2 * source.nbytes / copy_s, source.nbytes / seconds_each(20, source.sum))


def measure_rates() -> Rates:
    # Random values: on zeros the product is faster than on any real ones.
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds_each(20, lambda: a @ b)
    fp8_s = None
    if torch.cuda.get_device_capability() >= OLDEST_WITH_FP8:
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(FP8), b.to(FP8)
        fp8_s = seconds_each(20, lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16))
    return Rates(
        device=torch.cuda.get_device_name(),
        torch=str(torch.__version__),
        bandwidth_bytes_per_s=measure_bandwidth(),
        product_flop_per_s=2 * 8192**3 / product_s,
        fp8_product_flop_per_s=None if fp8_s is None else 2 * 8192**3 / fp8_s,
    )


def random_weights(config: ModelConfig, *, quantization: str) -> dict[str, Matrix]:
    """As checkpoint/loader.py would give them, of the size that keeps activations near 1."""
    rows_of: dict[str, int] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    for name, shard in shard_table(config, 1, 0).items():
        fused = fused_name(name)
        rows_of[fused] = rows_of.get(fused, 0) + shard.shape[0]
        shape_of[fused] = shard.shape[1:]
    convert = converter(quantization, {}, SoloCollectives())
    weights: dict[str, Matrix] = {}
    for name, num_rows in rows_of.items():
        shape = (num_rows, *shape_of[name])
        weight = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        weight = weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(std=shape[1] ** -0.5)
        weights[name] = weight if convert is None else convert(name, weight)
    return weights


class Subject:
    """A model of one shape, and the steps to time."""

    def __init__(self, shape: str, quantization: str, kv_cache_dtype: str, *, deterministic: bool) -> None:
        self.shape = shape
        self.quantization = quantization
        self.kv_cache_dtype = kv_cache_dtype
        self.config = replace(LLAMA_2[shape], num_layers=NUM_LAYERS[shape])
        self.kernels = select_kernels("cuda", torch.bfloat16, 1, deterministic=deterministic)
        weights: dict[str, Any] = random_weights(self.config, quantization=quantization)
        self.model = Llama(self.config, weights, kernels=self.kernels, collectives=SoloCollectives())
        self.frequencies = rotary_frequencies(self.config, torch.device("cuda"))
        self.sampler = Sampler(self.kernels, SoloCollectives(), range(self.config.vocab_size), self.config.vocab_size)
        self.num_blocks = self._num_blocks()
        self.caches: list[LayerCache] = [
            self.kernels.allocate_cache(
                num_blocks=self.num_blocks,
                block_size=BLOCK_SIZE,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                dtype=FP8 if kv_cache_dtype == "fp8" else torch.bfloat16,
            )
            for _ in range(self.config.num_layers)
        ]
        self.graphs = DecodeGraphs(
            self.model,
            self.caches,
            self.frequencies,
            max_num_seqs=max(BATCHES),
            max_model_len=MAX_MODEL_LEN,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.config, self.config.num_kv_heads, self.kv_cache_dtype)

    def _num_blocks(self) -> int:
        """Room for the largest batch at the longest context, or whatever fits."""
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info()[0] - 4 * DEVICE_RESERVE_BYTES
        wanted = max(BATCHES) * -(-(max(CONTEXTS) + 1) // BLOCK_SIZE)
        return min(wanted, room // (self.kv_bytes_per_token * BLOCK_SIZE) - 1)

    def decode(self, batch: int, context: int, repeats: int) -> float | None:
        """Seconds of a whole step in which `batch` sequences get a token each; None when their cache does not fit."""
        blocks_each = -(-(context + 1) // BLOCK_SIZE)
        if batch * blocks_each > self.num_blocks:
            return None
        states = {i: self._sequence(i, context + 1, blocks_each) for i in range(batch)}
        rows = tuple(Row(i, context, 1, True) for i in range(batch))

        def step() -> None:
            hidden_TE = self.graphs.forward(lay_out(rows, states, block_size=BLOCK_SIZE))
            self.sampler.sample(self.model.logits(hidden_TE[:batch]), list(states.values()))

        return seconds_each(repeats, step)

    def prefill(self, num_tokens: int, repeats: int) -> float:
        """Seconds of a step in which one prompt is computed whole, and its first token drawn."""
        states = {0: self._sequence(0, num_tokens, -(-num_tokens // BLOCK_SIZE))}

        def step() -> None:
            batch = build_batch(
                (Row(0, 0, num_tokens, True),),
                states,
                block_size=BLOCK_SIZE,
                num_blocks=self.num_blocks,
                row_multiple=self.kernels.row_multiple,
                frequencies=self.frequencies,
            )
            hidden_TE = self.model.forward(batch.token_ids_T, batch.attention, self.caches)
            self.sampler.sample(self.model.logits(hidden_TE[-1:]), list(states.values()))

        return seconds_each(repeats, step)

    def _sequence(self, index: int, num_tokens: int, num_blocks: int) -> SequenceState:
        token_ids = tuple((7 * p + index) % self.config.vocab_size for p in range(num_tokens))
        state = SequenceState.begin(NewSequence(index, token_ids, num_tokens, 0, SamplingParams(temperature=0.0)))
        state.block_ids = list(range(index * num_blocks, (index + 1) * num_blocks))
        return state

    def decode_floor_s(self, batch: int, context: int, rates: Rates) -> float:
        sizes = weight_bytes(shard_table(self.config, 1, 0), dtype=DTYPE, quantization=self.quantization)
        cached = batch * (context + 1) * self.kv_bytes_per_token
        return (sum(sizes.values()) - sizes[EMBEDDING] + cached) / rates.bandwidth_bytes_per_s

    def prefill_floor_s(self, num_tokens: int, rates: Rates) -> float:
        """Each token meets every weight of the layers once; scores and weighted sums are counted where they are not masked. In
        fp8 the layers' products have the rate of such products, and head and attention that of bfloat16."""
        config = self.config
        sizes = weight_bytes(shard_table(config, 1, 0), dtype=DTYPE, quantization="")
        head = config.vocab_size * config.hidden_size
        layers = 2 * num_tokens * (sum(sizes.values()) // DTYPE_BYTES[DTYPE] - 2 * head)
        attention = 2 * num_tokens**2 * config.num_query_heads * config.head_dim * config.num_layers
        fp8_rate = rates.fp8_product_flop_per_s if self.quantization == "fp8" else None
        return layers / (fp8_rate or rates.product_flop_per_s) + (2 * head + attention) / rates.product_flop_per_s


def measure(
    shape: str, quantization: str, rates: Rates, repeats: int, *, kv_cache_dtype: str, deterministic: bool
) -> list[Measurement]:
    subject = Subject(shape, quantization, kv_cache_dtype, deterministic=deterministic)
    found = []
    for batch in BATCHES:
        for context in CONTEXTS:
            step_s = subject.decode(batch, context, repeats)
            if step_s is not None:
                floor_s = subject.decode_floor_s(batch, context, rates)
                found.append(("decode", batch, context, step_s, floor_s))
    for num_tokens in PREFILLS:
        step_s = subject.prefill(num_tokens, repeats)
        found.append(("prefill", 1, num_tokens, step_s, subject.prefill_floor_s(num_tokens, rates)))
    return [
        Measurement(
            shape=shape,
            num_layers=subject.config.num_layers,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            deterministic=deterministic,
            work=work,
            batch=batch,
            context=context,
            step_s=step_s,
            floor_s=floor_s,
        )
        for work, batch, context, step_s, floor_s in found
    ]


def as_table(measurements: list[Measurement], rates: Rates) -> Table:
    title = (
        f"{rates.device}, torch {rates.torch}: {rates.bandwidth_bytes_per_s / 1e12:.2f} TB/s, "
        f"{rates.product_flop_per_s / 1e12:.0f} TFLOP/s (bfloat16)"
    )
    if rates.fp8_product_flop_per_s is not None:
        title += f", {rates.fp8_product_flop_per_s / 1e12:.0f} TFLOP/s (fp8)"
    names = ("shape", "weights", "KV cache", "bits", "work", "batch", "context", "step ms", "floor ms", "% of limit")
    table = Table(*names, title=title)
    for m in measurements:
        name = f"{m.shape} ({m.num_layers} layers)" if m.num_layers != LLAMA_2[m.shape].num_layers else m.shape
        numbers = (f"{m.step_s * 1e3:.3f}", f"{m.floor_s * 1e3:.3f}", f"{100 * m.part_of_limit:.0f}")
        how = (m.quantization or DTYPE, m.kv_cache_dtype, "deterministic" if m.deterministic else "fast")
        table.add_row(name, *how, m.work, str(m.batch), str(m.context), *numbers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA_2), default=list(LLAMA_2))
    parser.add_argument(
        "--quantizations",
        nargs="+",
        choices=QUANTIZATIONS,
        help="all that the device can compute unless given",
    )
    parser.add_argument("--kv-cache-dtype", choices=(DTYPE, "fp8"), default=DTYPE)
    parser.add_argument("--deterministic", action="store_true", help="also time the kernels of `deterministic: true`")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the result here; bench/results/gpu-DEVICE.json unless given")
    arguments = parser.parse_args()
    with torch.inference_mode():
        rates = measure_rates()
        can = [kind for kind in QUANTIZATIONS if kind != "fp8" or rates.fp8_product_flop_per_s is not None]
        measurements = []
        for shape in arguments.shapes:
            for quantization in arguments.quantizations or can:
                # fp8 products are cuBLAS's alone.
                both = arguments.deterministic and quantization != "fp8"
                for deterministic in (False, True) if both else (False,):
                    measurements += measure(
                        shape,
                        quantization,
                        rates,
                        arguments.repeats,
                        kv_cache_dtype=arguments.kv_cache_dtype,
                        deterministic=deterministic,
                    )
                    torch.cuda.empty_cache()
    Console(width=120).print(as_table(measurements, rates))
    device = re.sub(r"[^a-z0-9]+", "-", rates.device.lower()).strip("-")
    path = arguments.json or RESULTS / f"gpu-{device}.json"
    rows = [asdict(m) | {"part_of_limit": m.part_of_limit} for m in measurements]
    path.write_text(json.dumps({"rates": asdict(rates), "measurements": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
