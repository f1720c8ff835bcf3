"""The configurations of Llama 2 as published, by the names of its repositories."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from model_parallel.checkpoint.detect import describe
from model_parallel.config import ModelConfig
from model_parallel.errors import ConfigError
from serving.models.fetch import existing_source


def _llama_2(
    *, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position=4096,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


LLAMA_2: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "7b": _llama_2(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32),
        "13b": _llama_2(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40),
        "70b": _llama_2(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8),
    }
)
KNOWN_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        f"llama-2-{size}{chat}{form}": config
        for size, config in LLAMA_2.items()
        for chat in ("", "-chat")
        for form in ("", "-hf")
    }
)


def config_of(model: str) -> ModelConfig:
    """Of a checkpoint's path, a fetched model's name, or a name of Llama 2. Raises ConfigError, CheckpointError."""
    path = existing_source(model)
    return describe(path).config if path.exists() else known_config(model)


def known_config(name: str) -> ModelConfig:
    """By name, with or without its owner, in any case: "meta-llama/Llama-2-70b-chat-hf". Raises ConfigError."""
    short = name.rpartition("/")[2].lower()
    if short in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[short]
    near = difflib.get_close_matches(short, KNOWN_CONFIGS, n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"known: {', '.join(n for n in KNOWN_CONFIGS if not n.endswith('-hf'))}"
    )
    raise ConfigError(f"{name!r} is neither a known model nor a checkpoint's path; {hint}")


def llama_2_size(config: ModelConfig) -> str | None:
    """ "7b", "13b" or "70b" when the sizes are Llama 2's; whatever the norm's epsilon and the special tokens are."""

    def sizes(c: ModelConfig) -> tuple[int, ...]:
        heads = (c.num_query_heads, c.num_kv_heads, c.head_dim)
        return (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers, c.max_position, *heads)

    return next((name for name, known in LLAMA_2.items() if sizes(known) == sizes(config)), None)
