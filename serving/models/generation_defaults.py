"""What requests get that leave sampling fields unset: one rule, named in the configuration (`generation_config`)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.errors import ConfigError

RULES = ("auto", "vllm-like", "none")
_SAMPLED = ("temperature", "top_p", "top_k", "min_p")
_FIELDS = (*_SAMPLED, "repetition_penalty")
# Wider than what requests may send is of no use; values are those that the gateway takes.
_ALLOWED: Mapping[str, tuple[Callable[[float], bool], str]] = MappingProxyType(
    {
        "temperature": (lambda value: 0 <= value <= 2, "from 0 to 2"),
        "top_p": (lambda value: 0 < value <= 1, "above 0, at most 1"),
        "top_k": (lambda value: value >= -1, "at least 0, or -1"),
        "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
        "repetition_penalty": (lambda value: 0.01 <= value <= 2, "from 0.01 to 2"),
        "max_tokens": (lambda value: value >= 1, "at least 1"),
    }
)
_SMALLEST_TEMPERATURE = 0.01
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0.0, "min_p": 0.0, "repetition_penalty": 1.0}


def default_sampling(info: CheckpointInfo, rule: str) -> dict[str, float]:
    """Fields by the names of requests, without those whose value is neutral.

    "auto" reads generation_config.json as transformers does: what shapes the draw counts where it says do_sample: true, and
    repetition_penalty always. "vllm-like" takes all of it whatever do_sample says, and max_new_tokens as max_tokens. "none" takes
    nothing. Raises ConfigError naming a value that no request could have.
    """
    found = info.generation
    if rule == "none":
        return {}
    names = _FIELDS if rule == "vllm-like" or found.do_sample else ("repetition_penalty",)
    values = {name: getattr(found, name) for name in names}
    if rule == "vllm-like":
        values["max_tokens"] = found.max_new_tokens
    defaults = {}
    for name, value in values.items():
        if value is None:
            continue
        is_allowed, allowed = _ALLOWED[name]
        if not is_allowed(value):
            raise ConfigError(
                f"{info.path / 'generation_config.json'}: {name} is {value}; allowed: {allowed}. Correct the file, or set "
                "generation_config to none"
            )
        defaults[name] = _as_request(name, float(value), info.config.vocab_size)
    return {name: value for name, value in defaults.items() if value != _NEUTRAL.get(name)}


def _as_request(name: str, value: float, vocab_size: int) -> float:
    """Temperatures near 0 are greedy; a top_k of -1, or of the whole vocabulary, keeps all tokens."""
    if name == "temperature" and value < _SMALLEST_TEMPERATURE:
        return 0.0
    if name == "top_k" and not 0 < value < vocab_size:
        return 0.0
    return value
