"""What a GGUF file's metadata say."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from model_parallel.checkpoint.gguf_file import GgufFile
from model_parallel.checkpoint.gguf_formats import FORMATS
from model_parallel.checkpoint.info import CheckpointInfo, TokenizerSettings
from model_parallel.checkpoint.names import from_gguf
from model_parallel.checkpoint.rope_scaling import linear_divisors, plain_if_ones
from model_parallel.checkpoint.settings import Settings, known_ids
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError, ConfigError

ROPE_FREQUENCIES = "rope_freqs.weight"
"""Llama 3.1 and later: divisors of the rotary frequencies, one a pair."""
_REQUIRED: dict[str, tuple[object, ...]] = {
    "general.architecture": ("llama",),
    "llama.expert_count": (0, None),
    "llama.attention.causal": (True, None),
    "llama.rope.scaling.attn_factor": (1.0, None),
}
_END_TOKENS = ("eos", "eot", "eom")
# An array with one number a layer, where every layer may have its own; here all must be equal.
_PER_LAYER = ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length")
_SCALING_KEYS = ("llama.rope.scaling.factor", "llama.rope.scale_linear")


def describe_gguf(path: Path) -> CheckpointInfo:
    """Raises CheckpointError naming the file and the setting."""
    file = GgufFile(path)
    values = {k: file.get(k) for k in file.metadata_keys if not (k.startswith("tokenizer.") and file.array_length(k))}
    for key in _PER_LAYER:
        if isinstance(given := values.get(key), list):
            if len(set(given)) != 1:
                raise CheckpointError(f"{path}: {key} is {given!r:.80}; all layers must have the same")
            values[key] = given[0]
    settings = Settings(path, values)
    if settings.text("general.type") == "adapter" or settings.text("adapter.type"):
        raise CheckpointError(
            f"{path} is an adapter (LoRA), not a model; merge it into its base model with llama-export-lora, or name the PEFT "
            "directory that it was made from in the lora section of the base model"
        )
    if (parts := settings.whole("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path}: split.count is {parts}: it is one of {parts} parts; join them with llama-gguf-split --merge FIRST OUT, "
            "where FIRST is the part 00001, and serve OUT"
        )
    settings.require(_REQUIRED)
    warnings: list[str] = []
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} holds no tensor token_embd.weight")
    num_heads, hidden_size = settings.whole("llama.attention.head_count"), settings.whole("llama.embedding_length")
    head_dim = settings.whole("llama.attention.key_length", hidden_size // max(num_heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if settings.whole(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{path}: {key} is {values[key]} and the head dimension {head_dim}; they must be equal"
            )
    end_ids = (settings.token_ids(f"tokenizer.ggml.{name}_token_id") for name in _END_TOKENS)
    sizes: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": settings.whole("llama.feed_forward_length"),
        "num_layers": settings.whole("llama.block_count"),
        "num_query_heads": num_heads,
        "num_kv_heads": settings.whole("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.real("llama.rope.freq_base", 10000.0),
        "max_position": _window(settings, settings.whole("llama.context_length"), warnings),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": next(iter(settings.token_ids("tokenizer.ggml.bos_token_id")), None),
    }
    eos = tuple(dict.fromkeys(i for ids in end_ids for i in ids))
    try:
        sizes["rope_divisors"], rope_scaling = _rope(file, settings, head_dim)
        config = ModelConfig(**sizes, eos_token_ids=eos)
        formats = {
            from_gguf(name): FORMATS[tensor.type]
            for name, tensor in file.tensors.items()
            if tensor.type in FORMATS and len(tensor.shape) == 2
        }
        config = ModelConfig(**sizes, eos_token_ids=known_ids(path, config, warnings), weight_formats=formats)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    has_tokenizer = bool(file.array_length("tokenizer.ggml.tokens"))
    return CheckpointInfo(
        path=path,
        format="gguf",
        config=config,
        weight_files=(path,),
        tokenizer_kind="gguf" if has_tokenizer else "",
        tokenizer_path=path if has_tokenizer else None,
        tokenizer=TokenizerSettings(
            add_bos=settings.flag("tokenizer.ggml.add_bos_token"),
            add_eos=settings.flag("tokenizer.ggml.add_eos_token") or False,
            legacy=True,  # llama.cpp begins every part after a control token with a space
            add_prefix_space=settings.flag("tokenizer.ggml.add_space_prefix"),
        ),
        chat_template=settings.text("tokenizer.chat_template"),
        rope_scaling=rope_scaling,
        licence=str(values.get("general.license", "")),
        warnings=tuple(warnings),
    )


def _window(settings: Settings, max_position: int, warnings: list[str]) -> int:
    """As with Hugging Face's sliding_window: within the window full attention is the same."""
    window = settings.whole("llama.attention.sliding_window", 0)
    if not 0 < window < max_position:
        return max_position
    warnings.append(
        f"{settings.path}: llama.attention.sliding_window is {window}, which is not implemented; up to {window} tokens "
        f"the model is the same without, and they are the most here (instead of {max_position})"
    )
    return window


def _rope(file: GgufFile, settings: Settings, head_dim: int) -> tuple[tuple[float, ...], str]:
    """Divisors of the rotary frequencies, and the scaling in words."""
    kind = settings.text("llama.rope.scaling.type") or "linear"  # as llama.cpp takes a factor without a type
    factor = next((f for key in _SCALING_KEYS if (f := settings.optional_real(key)) not in (None, 0.0)), 1.0)
    if kind not in ("none", "linear") and factor != 1.0:
        raise CheckpointError(
            f"{settings.path}: llama.rope.scaling.type is {kind!r:.40}, which is not supported; linear scaling and "
            f"{ROPE_FREQUENCIES} are. Serve a checkpoint that was made without it"
        )
    divisors = linear_divisors(head_dim, factor) if kind == "linear" else ()
    words = [f"linear, factor {factor:g}"] if divisors else []
    tensor = file.tensors.get(ROPE_FREQUENCIES)
    if tensor is None:
        return divisors, "".join(words)
    if tensor.type is not GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{settings.path}: {ROPE_FREQUENCIES} is {tensor.type.name} {list(tensor.shape)}; F32 [{head_dim // 2}] is needed"
        )
    given = np.frombuffer(file.data, "<f4", head_dim // 2, tensor.offset).astype(float).tolist()
    if plain_if_ones(given):
        words.append(f"a factor for each frequency ({ROPE_FREQUENCIES})")
    return plain_if_ones([a * b for a, b in zip(given, divisors or (1.0,) * len(given), strict=True)]), "; ".join(words)
