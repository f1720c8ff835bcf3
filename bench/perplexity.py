"""What smaller numbers cost in quality: perplexity, and how far the model's probabilities move from float32's, on a fixed text.

The text is chapter I of Lewis Carroll's Alice's Adventures in Wonderland (1865, public domain; bench/texts) and the project's own
LICENSE, cut into windows that are each read from an empty cache.

    python -m bench.perplexity [--model PATH] [--window 512]

Shape suffixes: T tokens of a window · V vocabulary
"""

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.peers.convert_huggingface import convert
from bench.support.group_quantizer import quantize_checkpoint
from model_parallel.collectives.interface import SoloCollectives
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig
from model_parallel.engine.messages import NewSequence, Row
from model_parallel.engine.request import SamplingParams
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.model.batch import SequenceState, build_batch
from model_parallel.runtime.rank import Rank
from serving.models.fetch import resolve_source
from serving.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = (ROOT / "bench/texts/alice-1.txt", ROOT / "LICENSE")
VARIANTS = (
    ("float32", ""), ("float32", "int8"), ("float32", "fp8"), ("bfloat16", ""), ("bfloat16", "int8"), ("bfloat16", "fp8"),
    ("float32", "fp8 cache"), ("bfloat16", "fp8 cache"), ("bfloat16", "packed"),
    ("bfloat16", "4 bits, groups of 128"), ("bfloat16", "4 bits, groups of 32"),
)  # fmt: skip
"""(dtype, quantization); the first is what the others are held against. fp8, and a KV cache in fp8: by the reference kernels, as
no others on a CPU compute them. packed: as the model's file has its weights. 4 bits: the layers' weights rounded to the nearest
number of a group, and packed."""
BLOCK_SIZE = 16


@dataclass(slots=True)
class Quality:
    """Sums over the text's positions, each of which has a token before it."""

    num_tokens: int = 0
    loss: float = 0.0
    """Of the text's own tokens, in nats."""
    divergence: float = 0.0
    """Kullback-Leibler, from the first variant, in nats."""
    num_agreed: int = 0
    """Where the most likely token is the first variant's."""

    def add(self, logprobs_TV: Tensor, expected_TV: Tensor, targets_T: Tensor) -> None:
        self.num_tokens += len(targets_T)
        self.loss -= float(logprobs_TV.gather(1, targets_T.unsqueeze(1)).sum())
        self.divergence += float((expected_TV.exp() * (expected_TV - logprobs_TV)).sum())
        self.num_agreed += int((logprobs_TV.argmax(1) == expected_TV.argmax(1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.num_tokens)


def load(path: Path, dtype: str, quantization: str, window: int) -> Rank:
    """The whole model as one rank."""
    in_fp8_cache = quantization == "fp8 cache"
    config = GroupConfig(
        checkpoint_path=str(path),
        parallel=ParallelConfig(
            dtype=dtype,
            quantization="" if in_fp8_cache else quantization,
            kv_cache_dtype="fp8" if in_fp8_cache else "",
            num_threads=2,
        ),
        cache=CacheConfig(num_blocks=-(-window // BLOCK_SIZE), block_size=BLOCK_SIZE),
        epoch=1,
    )
    kernels = ReferenceKernels(num_threads=2, device="cpu") if quantization.startswith("fp8") else None
    return Rank(config, 0, SoloCollectives(), kernels=kernels)


@torch.inference_mode()
def logprobs(rank: Rank, token_ids: list[int]) -> Tensor:
    """float64 [T, V]: what the model expects after each token."""
    state = SequenceState.begin(NewSequence(0, tuple(token_ids), len(token_ids), 0, SamplingParams()))
    state.block_ids = list(range(rank.config.cache.num_blocks))
    batch = build_batch(
        (Row(0, 0, len(token_ids), False),),
        {0: state},
        block_size=BLOCK_SIZE,
        num_blocks=rank.config.cache.num_blocks,
        row_multiple=rank.kernels.row_multiple,
        frequencies=rank.frequencies,
    )
    hidden_TE = rank.model.forward(batch.token_ids_T, batch.attention, rank.caches)
    return rank.model.logits(hidden_TE)[: len(token_ids)].double().log_softmax(1)


def load_variant(path: Path, converted: Path, variant: tuple[str, str], window: int) -> Rank:
    """`converted`: a directory for checkpoints that are made of the one at `path`."""
    dtype, quantization = variant
    if not quantization.startswith("4 bits"):
        return load(path, dtype, quantization, window)
    dense, group_size = converted / "dense", int(quantization.rpartition(" ")[2])
    if not dense.exists():
        convert(path, dense)
    quantize_checkpoint(dense, converted / str(group_size), group_size)
    return load(converted / str(group_size), dtype, "packed", window)


def measure(path: Path, window: int) -> dict[tuple[str, str], Quality]:
    """Every variant on every window of the text."""
    tokenizer = load_tokenizer(path)
    windows = [
        token_ids[start : start + window]
        for token_ids in (tokenizer.encode(text.read_text()) for text in TEXTS)
        for start in range(0, len(token_ids) - 1, window)
    ]
    with tempfile.TemporaryDirectory(prefix="packtrain-perplexity-") as directory:
        ranks = {variant: load_variant(path, Path(directory), variant, window) for variant in VARIANTS}
    qualities = {variant: Quality() for variant in VARIANTS}
    for token_ids in windows:
        targets_T = torch.tensor(token_ids[1:])
        expected_TV = logprobs(ranks[VARIANTS[0]], token_ids)[:-1]
        for variant in VARIANTS:
            qualities[variant].add(logprobs(ranks[variant], token_ids)[:-1], expected_TV, targets_T)
    return qualities


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known name, or a checkpoint's path")
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    qualities = measure(resolve_source(arguments.model), arguments.window)
    first = qualities[VARIANTS[0]]
    table = Table("weights", "perplexity", "difference", "KL, nats a token", "same likeliest token")
    for (dtype, quantization), quality in qualities.items():
        table.add_row(
            f"{dtype} {quantization}",
            f"{quality.perplexity:.4f}",
            f"{quality.perplexity / first.perplexity - 1:+.3%}",
            f"{quality.divergence / quality.num_tokens:.2e}",
            f"{quality.num_agreed / quality.num_tokens:.2%}",
        )
    console = Console()
    console.print(table)
    console.print(f"{first.num_tokens} tokens in windows of {arguments.window}")


if __name__ == "__main__":
    main()
