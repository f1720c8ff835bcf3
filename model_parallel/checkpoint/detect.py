"""What a checkpoint is, read from its configuration alone: no torch, no weights, and no code that comes with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_parallel.checkpoint.gguf_file import MAGIC, GgufFile
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError, ConfigError

TokenizerKind = Literal["tokenizer.json", "tokenizer.model", "gguf", ""]

_MAX_JSON_BYTES = 64 << 20
_MAX_NUMBER = 1 << 31
_SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Settings that change the arithmetic, and the values under which this implementation is right; absent counts as None.
_HUGGINGFACE_REQUIRED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False, None),
}
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_GGUF_REQUIRED: dict[str, tuple[object, ...]] = {
    "general.architecture": ("llama",),
    "split.count": (0, 1, None),
    "llama.expert_count": (0, None),
    "llama.attention.sliding_window": (0, None),
    "llama.rope.scaling.type": ("none", None),
    "llama.rope.scaling.factor": (1.0, None),
    "llama.rope.scale_linear": (1.0, None),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """A checkpoint that this implementation can compute, and what serving it needs to know."""

    path: Path
    """The directory, or the GGUF file."""
    format: Literal["huggingface", "gguf"]
    config: ModelConfig
    weight_files: tuple[Path, ...]
    tokenizer_kind: TokenizerKind
    """What the tokenizer is made from; "" when the checkpoint has none."""
    tokenizer_path: Path | None
    add_bos: bool | None
    """Whether the tokenizer begins a text with BOS; None where the checkpoint does not say."""
    chat_format: Literal["llama-2", "chatml", ""]
    """Recognised from the checkpoint's own chat template; "" when it has none, or an unknown one."""
    licence: str
    """As the checkpoint states it; "" when it does not."""


def describe(source: Path) -> CheckpointInfo:
    """Read the configuration of a directory in Hugging Face format, or of a GGUF file.

    Raises CheckpointError naming the file and the setting when something is missing, broken, or would need arithmetic
    that is not implemented.
    """
    if source.is_file():
        with source.open("rb") as file:
            magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise CheckpointError(f"{source} is not a GGUF file: it begins with {magic!r}")
        return _describe_gguf(source)
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; a directory in Hugging Face format or a GGUF file is needed")
    if not (source / "config.json").is_file():
        hint = "; it looks like Meta's format, which is not supported" if (source / "params.json").exists() else ""
        raise CheckpointError(f"{source} holds no config.json{hint}")
    return _describe_huggingface(source)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the most is {_MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


class _Settings:
    """Typed look-ups in a checkpoint's settings, with errors that name file, key and value."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def whole(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, default, int))

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, default, (int, float)))

    def _typed(self, key: str, default: Any, types: type | tuple[type, ...]) -> Any:
        value: Any = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path} does not give {key}")
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not (is_number and abs(value) < _MAX_NUMBER):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; a number below {_MAX_NUMBER} is needed")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; true or false is needed")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; a token id or a list of them is needed")
        return tuple(i for i in ids if i >= 0)

    def require(self, required: dict[str, tuple[object, ...]]) -> None:
        for key, allowed in required.items():
            if self.values.get(key) not in allowed:
                raise CheckpointError(
                    f"{self.path}: {key} is {self.values.get(key)!r:.80}, which is not supported; "
                    f"allowed: {' or '.join('unset' if a is None else str(a) for a in allowed)}"
                )


def _check_ids(path: Path, config: ModelConfig) -> None:
    for token_id in (*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))):
        if token_id >= config.vocab_size:
            raise CheckpointError(
                f"{path}: the special token {token_id} is not below the vocabulary's {config.vocab_size}"
            )


def _describe_huggingface(directory: Path) -> CheckpointInfo:
    values = read_json(directory / "config.json")
    settings = _Settings(directory / "config.json", values)
    settings.require(_HUGGINGFACE_REQUIRED)
    if values.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise CheckpointError(
            f"{settings.path}: architectures is {values['architectures']!r:.80}; LlamaForCausalLM is needed"
        )
    rope_theta = _rope_theta(settings)
    hidden_size, num_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    eos = settings.token_ids("eos_token_id")
    if (directory / "generation_config.json").is_file():
        generation = _Settings(directory / "generation_config.json", read_json(directory / "generation_config.json"))
        eos += generation.token_ids("eos_token_id")
    try:
        config = ModelConfig(
            vocab_size=settings.whole("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=settings.whole("intermediate_size"),
            num_layers=settings.whole("num_hidden_layers"),
            num_query_heads=num_heads,
            num_kv_heads=settings.whole("num_key_value_heads", num_heads),
            head_dim=settings.whole("head_dim", hidden_size // max(num_heads, 1)),
            rms_norm_eps=settings.real("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            max_position=settings.whole("max_position_embeddings", 2048),
            tie_word_embeddings=settings.flag("tie_word_embeddings") or False,
            bos_token_id=next(iter(settings.token_ids("bos_token_id")), None),
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {error}") from error
    _check_ids(settings.path, config)
    tokenizer_config = directory / "tokenizer_config.json"
    tokenizer = _Settings(tokenizer_config, read_json(tokenizer_config) if tokenizer_config.is_file() else {})
    kinds: tuple[TokenizerKind, ...] = ("tokenizer.json", "tokenizer.model")
    kind: TokenizerKind = next((k for k in kinds if (directory / k).is_file()), "")
    return CheckpointInfo(
        path=directory,
        format="huggingface",
        config=config,
        weight_files=_weight_files(directory),
        tokenizer_kind=kind,
        tokenizer_path=directory / kind if kind else None,
        add_bos=tokenizer.flag("add_bos_token"),
        chat_format=_chat_format(_huggingface_template(directory, tokenizer.values)),
        licence=str(values.get("license") or ""),
    )


def _rope_theta(settings: _Settings) -> float:
    """Older files give rope_theta and rope_scaling, newer ones both in rope_parameters. Scaling is refused."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.values.get(key) or {}
        if not isinstance(rope, dict) or any(value != _PLAIN_ROPE.get(name, value) for name, value in rope.items()):
            raise CheckpointError(
                f"{settings.path}: {key} is {rope!r:.80}, which is not supported; only the default is"
            )
        if unknown := rope.keys() - _PLAIN_ROPE.keys() - {"rope_theta"}:
            raise CheckpointError(f"{settings.path}: {key} has {sorted(unknown)}, which is not supported")
        if "rope_theta" in rope:
            return _Settings(settings.path, rope).real("rope_theta")
    return settings.real("rope_theta", 10000.0)


def _weight_files(directory: Path) -> tuple[Path, ...]:
    if (directory / _SINGLE_FILE).is_file():
        return (directory / _SINGLE_FILE,)
    index = directory / INDEX_FILE
    if not index.is_file():
        other = ", ".join(sorted(p.name for p in directory.glob("*.bin"))[:3])
        hint = f"; {other} can hold code when loaded and is not supported: convert it to safetensors" if other else ""
        raise CheckpointError(f"{directory} holds neither {_SINGLE_FILE} nor {INDEX_FILE}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must give a file name for each tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r:.80} is not the name of a file in the same directory")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing")
    return tuple(directory / name for name in names)


def _huggingface_template(directory: Path, tokenizer: dict[str, Any]) -> str:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _chat_format(template: str) -> Literal["llama-2", "chatml", ""]:
    """The format that a template's markers show. The template itself is never run."""
    if "<|im_start|>" in template and "<|im_end|>" in template:
        return "chatml"
    return "llama-2" if "[INST]" in template and "<<SYS>>" in template else ""


def _describe_gguf(path: Path) -> CheckpointInfo:
    file = GgufFile(path)
    values = {k: file.get(k) for k in file.metadata_keys if not (k.startswith("tokenizer.") and file.array_length(k))}
    settings = _Settings(path, values)
    settings.require(_GGUF_REQUIRED)
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
    tokens = (settings.token_ids(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    try:
        config = ModelConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=settings.whole("llama.feed_forward_length"),
            num_layers=settings.whole("llama.block_count"),
            num_query_heads=num_heads,
            num_kv_heads=settings.whole("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=settings.real("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=settings.real("llama.rope.freq_base", 10000.0),
            max_position=settings.whole("llama.context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=next(iter(settings.token_ids("tokenizer.ggml.bos_token_id")), None),
            eos_token_ids=tuple(dict.fromkeys(i for ids in tokens for i in ids)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_ids(path, config)
    has_tokenizer = bool(file.array_length("tokenizer.ggml.tokens"))
    return CheckpointInfo(
        path=path,
        format="gguf",
        config=config,
        weight_files=(path,),
        tokenizer_kind="gguf" if has_tokenizer else "",
        tokenizer_path=path if has_tokenizer else None,
        add_bos=settings.flag("tokenizer.ggml.add_bos_token"),
        chat_format=_chat_format(str(values.get("tokenizer.chat_template", ""))),
        licence=str(values.get("general.license", "")),
    )
