"""Ranks as threads of the test's process, open to inspection, and checkpoints to load into them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor

from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.threads import Exchange, ThreadCollectives
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig
from model_parallel.engine.messages import NewSequence, Row
from model_parallel.engine.request import SamplingParams
from model_parallel.kernels.interface import Kernels
from model_parallel.model.batch import SequenceState, build_batch
from model_parallel.runtime.rank import Rank

T = TypeVar("T")


def group_config(
    path: Path,
    tp_size: int,
    *,
    dtype: str = "float32",
    quantization: str = "",
    kv_cache_dtype: str = "",
    num_blocks: int = 64,
    device: str = "cpu",
    deterministic: bool = False,
) -> GroupConfig:
    return GroupConfig(
        checkpoint_path=str(path),
        parallel=ParallelConfig(
            tp_size=tp_size,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            deterministic=deterministic,
            step_timeout_s=60,
        ),
        cache=CacheConfig(num_blocks=num_blocks, block_size=16),
        epoch=1,
    )


def on_threads(size: int, call: Callable[[Collectives], T]) -> list[T]:
    """`call` with each rank's collectives, each in a thread of its own; results by rank."""
    exchange = Exchange(size, timeout_s=60)

    def run(rank: int) -> T:
        torch.set_num_threads(1)
        try:
            return call(SoloCollectives() if size == 1 else ThreadCollectives(exchange, rank))
        except BaseException:
            exchange.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def prompt_logits(
    config: GroupConfig, token_ids: list[int], chunk: int, kernels: Callable[[], Kernels] | None = None
) -> Tensor:
    """float32 [tokens, vocabulary]: logits at every position of a prompt that is prefilled `chunk` tokens at a time. `kernels`:
    those of a rank, where not the fastest."""

    def run(collectives: Collectives) -> Tensor:
        rank = Rank(config, collectives.rank, collectives, kernels=None if kernels is None else kernels())
        new = NewSequence(0, tuple(token_ids), len(token_ids), 0, SamplingParams())
        state = SequenceState.begin(new)
        state.block_ids = list(range(-(-len(token_ids) // config.cache.block_size)))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(token_ids), chunk):
                num_tokens = min(chunk, len(token_ids) - start)
                batch = build_batch(
                    (Row(0, start, num_tokens, False),),
                    {0: state},
                    block_size=config.cache.block_size,
                    num_blocks=config.cache.num_blocks,
                    row_multiple=rank.kernels.row_multiple,
                    frequencies=rank.frequencies,
                )
                hidden = rank.model.forward(batch.token_ids_T, batch.attention, rank.caches)
                parts.append(rank.model.logits(hidden)[:num_tokens])
        return torch.cat(parts)

    return torch.cat(on_threads(config.parallel.tp_size, run), dim=1)


def save_random_llama(path: Path, **overrides: object) -> "transformers.LlamaForCausalLM":
    """A small Llama with random weights in Hugging Face format at `path`, and transformers' own model of it."""
    settings: dict[str, object] = {
        "vocab_size": 515,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.15,
        **overrides,
    }
    torch.manual_seed(20261122)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.save_pretrained(path)
    return model


def reference_from_gguf(path: Path, *, has_head: bool = False) -> "transformers.LlamaForCausalLM":
    """transformers' float32 model of a GGUF file, dequantised by transformers."""
    # Importing it takes seconds, so only tests that need it do.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415

    model = transformers.LlamaForCausalLM(
        transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing != ([] if has_head else ["lm_head.weight"]) or unexpected:
        raise AssertionError(f"missing {missing}, unexpected {unexpected}")
    return model
