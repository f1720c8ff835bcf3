"""Directories in Hugging Face's format: config.json and what lies beside it."""

import re
from pathlib import Path
from typing import Any

from model_parallel.checkpoint.group_settings import (
    Fp8Settings,
    GroupSettings,
    formats_of,
    fp8_weights_of,
    read_group_settings,
)
from model_parallel.checkpoint.huggingface_tokenizer import read_tokenizer_settings
from model_parallel.checkpoint.info import CheckpointInfo, GenerationSettings, TokenizerKind
from model_parallel.checkpoint.placeholders import is_present, refuse_pointers
from model_parallel.checkpoint.rope_scaling import linear_divisors, llama3_divisors
from model_parallel.checkpoint.settings import Settings, join, known_ids, read_json, read_optional_json
from model_parallel.checkpoint.weight_files import find_weight_files
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError, ConfigError

_CARD_LICENCE = re.compile(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.-]{1,80})")
_MAX_CARD_HEAD = 1 << 16
_MAX_TEMPLATE_BYTES = 1 << 20

_MODEL_TYPES = ("llama", "mistral")
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_ACTIVATIONS = ("silu", "swish")
# Settings that change the arithmetic, and the values under which this implementation is right; absent counts as None.
_REQUIRED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False, None),
}
_MISTRAL_KV_HEADS = 8
_MISTRAL_WINDOW = 4096
"""Of a file that does not give sliding_window, as transformers takes it; null is no window."""
_DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072}
_UNUSED_GENERATION: dict[str, float | None] = {
    **dict.fromkeys((
        "bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "exponential_decay_length_penalty",
        "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "max_time", "sequence_bias", "stop_strings",
        "suppress_tokens", "top_h", "watermarking_config",
    )),
    **dict.fromkeys((
        "diversity_penalty", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "frequency_penalty", "min_length",
        "min_new_tokens", "no_repeat_ngram_size", "penalty_alpha", "presence_penalty", "token_healing",
    ), 0),
    **dict.fromkeys((
        "encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams", "num_return_sequences", "typical_p",
    ), 1),
}  # fmt: skip
"""Fields of generation_config.json that change transformers' answers and not ours, with the values that change nothing."""
_DEFAULT_MAX_LENGTH = 20
"""Of prompt and answer together, in files that give every field: of a caller who says nothing."""
_ROPE_KINDS = "default, linear, llama3 and dynamic"


def describe_huggingface(directory: Path) -> CheckpointInfo:
    """Raises CheckpointError naming the file and the setting."""
    values = read_json(directory / "config.json")
    settings = Settings(directory / "config.json", values)
    warnings: list[str] = []
    model_type = _architecture(settings)
    settings.require(_REQUIRED)
    quantized = read_group_settings(directory, settings)
    hidden_size, num_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    head_dim = settings.whole("head_dim", hidden_size // max(num_heads, 1))
    max_position = settings.whole("max_position_embeddings", _DEFAULT_MAX_POSITION[model_type])
    max_position = _window(settings, model_type, max_position, warnings)
    theta, divisors, rope_scaling = _rope(settings, head_dim, max_position)
    if rope_scaling.startswith("dynamic"):
        warnings.append(
            f"{settings.path}: dynamic RoPE scaling begins after {max_position} tokens, which are the most here"
        )
    generation = Settings(
        directory / "generation_config.json", read_optional_json(directory / "generation_config.json")
    )
    own_eos, generation_eos = settings.token_ids("eos_token_id"), generation.token_ids("eos_token_id")
    named_in = {i: generation.path for i in generation_eos if i not in own_eos}
    kv_default = num_heads if model_type == "llama" or "num_key_value_heads" in values else _MISTRAL_KV_HEADS
    sizes: dict[str, Any] = {
        "vocab_size": settings.whole("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": settings.whole("intermediate_size"),
        "num_layers": settings.whole("num_hidden_layers"),
        "num_query_heads": num_heads,
        "num_kv_heads": settings.whole("num_key_value_heads", kv_default),
        "head_dim": head_dim,
        "rms_norm_eps": settings.real("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_divisors": divisors,
        "max_position": max_position,
        "tie_word_embeddings": settings.flag("tie_word_embeddings") or False,
        "bos_token_id": next(iter(settings.token_ids("bos_token_id")), None),
    }
    try:
        config = ModelConfig(**sizes, eos_token_ids=tuple(dict.fromkeys((*own_eos, *generation_eos))))
        formats = formats_of(quantized, config, settings.path)
        fp8_weights = fp8_weights_of(quantized, config, settings.path)
        eos = known_ids(settings.path, config, warnings, named_in=named_in)
        config = ModelConfig(**sizes, eos_token_ids=eos, weight_formats=formats, fp8_weights=fp8_weights)
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {error}") from error
    tokenizer_values = read_optional_json(directory / "tokenizer_config.json")
    kinds: tuple[TokenizerKind, ...] = ("tokenizer.json", "tokenizer.model")
    kind: TokenizerKind = next((k for k in kinds if is_present(directory / k)), "")
    weights = find_weight_files(directory)
    refuse_pointers((*weights.files, *([directory / kind] if kind else [])))
    return CheckpointInfo(
        path=directory,
        format="huggingface",
        config=config,
        weight_files=weights.files,
        index_file=weights.index,
        tokenizer_kind=kind,
        tokenizer_path=directory / kind if kind else None,
        tokenizer=read_tokenizer_settings(directory, tokenizer_values, settings),
        chat_template=_chat_template(directory, tokenizer_values, warnings),
        generation=_generation(generation, max_position, warnings),
        rope_scaling=rope_scaling,
        dtype=(settings.text("dtype") or settings.text("torch_dtype")).removeprefix("torch.").replace("auto", ""),
        groups=quantized if isinstance(quantized, GroupSettings) else None,
        fp8=quantized if isinstance(quantized, Fp8Settings) else None,
        licence=str(values.get("license") or _card_licence(directory)),
        warnings=(*warnings, *weights.warnings),
    )


def _architecture(settings: Settings) -> str:
    """ "llama" or "mistral", which compute the same. Raises CheckpointError for any other."""
    given = settings.values.get("architectures") or []
    names = given if isinstance(given, list) else [given]
    known = {name.lower(): name for name in _ARCHITECTURES}
    if not all(isinstance(name, str) and name.lower() in known for name in names):
        raise CheckpointError(
            f"{settings.path}: architectures is {given!r:.80}; {' or '.join(_ARCHITECTURES)} is needed"
        )
    model_type = settings.values.get("model_type")
    if not model_type and names:
        model_type = names[0].lower().removesuffix("forcausallm")
    if not isinstance(model_type, str) or model_type.lower() not in _MODEL_TYPES:
        raise CheckpointError(
            f"{settings.path}: model_type is {model_type!r:.80}, which is not supported; allowed: "
            f"{' or '.join(_MODEL_TYPES)}"
        )
    activation = settings.values.get("hidden_act") or None
    if activation is not None and str(activation).lower() not in _ACTIVATIONS:
        raise CheckpointError(
            f"{settings.path}: hidden_act is {activation!r:.80}, which is not supported; allowed: silu, swish or unset"
        )
    return model_type.lower()


def _window(settings: Settings, model_type: str, max_position: int, warnings: list[str]) -> int:
    """Attention over a sliding window is the same as full attention as long as nothing is longer than the window."""
    is_given = "sliding_window" in settings.values
    is_none = not settings.values["sliding_window"] if is_given else model_type != "mistral"
    is_off = settings.flag("use_sliding_window") is False and model_type != "mistral"  # no field of Mistral's
    if is_off or is_none:
        return max_position
    window = settings.whole("sliding_window", _MISTRAL_WINDOW)
    if window < 0:
        raise CheckpointError(f"{settings.path}: sliding_window is {window}; a number of tokens or null is needed")
    if window >= max_position:
        return max_position
    warnings.append(
        f"{settings.path}: sliding_window is {window}{'' if is_given else ' where a Mistral model does not give it'}, which is "
        f"not implemented; up to {window} tokens the model is the "
        f"same without, and they are the most here (instead of {max_position})"
    )
    return window


def _rope(settings: Settings, head_dim: int, max_position: int) -> tuple[float, tuple[float, ...], str]:
    """theta, divisors of the frequencies, and the scaling in words. Older files give rope_theta and rope_scaling, newer ones
    both in rope_parameters; a file that has both must not say two things.
    """
    given = {
        key: _rope_object(settings, key) for key in ("rope_parameters", "rope_scaling") if settings.values.get(key)
    }
    thetas = {"rope_theta": settings.optional_real("rope_theta")}
    thetas |= {f"{key}.rope_theta": rope.optional_real("rope_theta") for key, rope in given.items()}
    different = {key: theta for key, theta in thetas.items() if theta is not None}
    if len(set(different.values())) > 1:
        raise CheckpointError(f"{settings.path} says {different}; one rope_theta is needed")
    theta = next(iter(different.values()), 10000.0)
    scalings = [
        scaling
        for key, rope in given.items()
        if any(scaling := _scaling(settings, key, rope, theta, head_dim, max_position))
    ]
    if len({divisors for divisors, _ in scalings}) > 1:
        raise CheckpointError(
            f"{settings.path}: rope_scaling and rope_parameters say different things; keep one of them"
        )
    return (theta, *(scalings[0] if scalings else ((), "")))


def _rope_object(settings: Settings, key: str) -> Settings:
    given = settings.values[key]
    if not isinstance(given, dict):
        raise CheckpointError(f"{settings.path}: {key} is {given!r:.80}, which is not supported; an object is needed")
    if nested := sorted(name for name, value in given.items() if isinstance(value, dict)):
        raise CheckpointError(
            f"{settings.path}: {key} has {nested}, one scaling a kind of layer, which is not supported"
        )
    return Settings(Path(f"{settings.path}: {key}"), given)  # so that errors name the field around theirs


def _scaling(
    settings: Settings, key: str, rope: Settings, theta: float, head_dim: int, max_position: int
) -> tuple[tuple[float, ...], str]:
    """Divisors of the frequencies, and the scaling in words; nothing for a scaling that changes nothing."""
    given = rope.values
    kind = given.get("rope_type") or given.get("type") or "default"
    refusal = f"{settings.path}: {key} is {given!r:.200}, which is not supported"
    if rope.real("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{refusal}; partial_rotary_factor must be 1")
    try:
        if kind == "default":
            return (), ""
        if kind == "linear":
            factor = rope.real("factor")
            divisors = linear_divisors(head_dim, factor)
            return divisors, f"linear, factor {factor:g}" if divisors else ""
        if kind == "llama3":
            factor = rope.real("factor")
            outer = settings.whole("original_max_position_embeddings", max_position)
            original = rope.whole("original_max_position_embeddings", outer)
            if original != outer and settings.values.get("original_max_position_embeddings") is not None:
                raise CheckpointError(
                    f"{settings.path} says original_max_position_embeddings {outer}, and within {key} {original}; one is needed"
                )
            divisors = llama3_divisors(
                head_dim,
                theta,
                factor=factor,
                low_freq_factor=rope.real("low_freq_factor"),
                high_freq_factor=rope.real("high_freq_factor"),
                original_max=original,
            )
            return divisors, f"llama3, factor {factor:g} over {original} tokens" if divisors else ""
        if kind == "dynamic" and "alpha" not in given:
            factor = rope.real("factor")
            return (), f"dynamic, factor {factor:g}" if factor != 1 else ""
        if kind == "yarn" and given.get("factor") == 1 and given.get("attention_factor") in (None, 1):
            return (), ""
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {key}: {error}") from error
    raise CheckpointError(
        f"{refusal}; {_ROPE_KINDS} scaling are. Serve a checkpoint that was made without {kind!s:.40} scaling"
    )


def _chat_template(directory: Path, tokenizer: dict[str, Any], warnings: list[str]) -> str:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = directory / name
        if not is_present(path):
            continue
        refuse_pointers([path])
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the most is {_MAX_TEMPLATE_BYTES}")
        if name.endswith(".json"):
            return _default_template(path, read_json(path).get("chat_template"), warnings)
        return path.read_text(encoding="utf-8", errors="replace")
    return _default_template(directory / "tokenizer_config.json", tokenizer.get("chat_template"), warnings)


def _default_template(path: Path, given: object, warnings: list[str]) -> str:
    template = given
    if isinstance(given, list):  # several, by name
        named = (t for t in given if isinstance(t, dict) and t.get("name") == "default")
        template = next((t.get("template") for t in named), None)
    elif isinstance(given, dict):
        template = given.get("default")
    if isinstance(template, str):
        return template
    if given not in (None, [], {}):
        warnings.append(
            f"{path}: chat_template is {given!r:.60}; a text, or several by name with one called default, can be used. The model "
            "is served without chat unless chat.format is set"
        )
    return ""


def _generation(settings: Settings, max_position: int, warnings: list[str]) -> GenerationSettings:
    names = [
        name
        for name, neutral in _UNUSED_GENERATION.items()
        if settings.values.get(name) not in (None, [], {}, "", neutral)
    ]
    max_length = settings.values.get("max_length")
    if isinstance(max_length, int) and max_length < max_position and max_length != _DEFAULT_MAX_LENGTH:
        names.append("max_length")
    unused = [f"{name} ({settings.values[name]!r:.40})" for name in names]
    if unused:
        warnings.append(f"{settings.path}: not used here, though answers of transformers depend on it: {join(unused)}")
    top_k, longest = settings.values.get("top_k"), settings.values.get("max_new_tokens")
    return GenerationSettings(
        do_sample=settings.flag("do_sample"),
        temperature=settings.optional_real("temperature"),
        top_p=settings.optional_real("top_p"),
        top_k=None if top_k is None else settings.whole("top_k"),
        min_p=settings.optional_real("min_p"),
        repetition_penalty=settings.optional_real("repetition_penalty"),
        max_new_tokens=None if longest is None else settings.whole("max_new_tokens"),
    )


def _card_licence(directory: Path) -> str:
    """`license: …` in the head of the model card, "" where there is none."""
    card = directory / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        match = _CARD_LICENCE.match(file.read(_MAX_CARD_HEAD))
    return match[1] if match else ""
