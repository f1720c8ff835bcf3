"""What a checkpoint is, read from its configuration alone: no torch, no weights, and no code that comes with it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_parallel.checkpoint.gguf_file import MAGIC, GgufFile
from model_parallel.checkpoint.sentencepiece_file import read_pieces
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError, ConfigError

TokenizerKind = Literal["tokenizer.json", "tokenizer.model", "gguf", ""]

_MAX_JSON_BYTES = 64 << 20
_MAX_NUMBER = 1 << 31
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_CARD_LICENCE = re.compile(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.-]{1,80})")
_MAX_CARD_HEAD = 1 << 16
_META_FILE = re.compile(r"consolidated\.(\d\d)\.pth")

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
# Everything that Llama 2's code reads from params.json, and what later code of Meta's adds to it without changing it.
_META_KEYS = frozenset(
    {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
    }
    | {"max_seq_len", "max_batch_size"}
)
_LLAMA_2_MAX_POSITION = 4096
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
    format: Literal["huggingface", "meta", "gguf"]
    config: ModelConfig
    weight_files: tuple[Path, ...]
    index_file: Path | None = None
    """Says which of several weight files holds which tensor, in Hugging Face's format."""
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
    """Read the configuration of a directory in Hugging Face's or Meta's format, or of a GGUF file.

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
        raise CheckpointError(
            f"{source} does not exist; a directory in Hugging Face's or Meta's format or a GGUF file is needed"
        )
    if (source / "config.json").is_file():
        return _describe_huggingface(source)
    if (source / "params.json").is_file():
        return _describe_meta(source)
    raise CheckpointError(f"{source} holds neither config.json (Hugging Face's format) nor params.json (Meta's)")


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
    weight_files, index_file = _weight_files(directory)
    return CheckpointInfo(
        path=directory,
        format="huggingface",
        config=config,
        weight_files=weight_files,
        index_file=index_file,
        tokenizer_kind=kind,
        tokenizer_path=directory / kind if kind else None,
        add_bos=tokenizer.flag("add_bos_token"),
        chat_format=_chat_format(_huggingface_template(directory, tokenizer.values)),
        licence=str(values.get("license") or _card_licence(directory)),
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


def _weight_files(directory: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The files, and their index where there is one. safetensors files are taken before torch's."""
    for single, several in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (directory / single).is_file():
            return (directory / single,), None
        if (directory / several).is_file():
            return _indexed_files(directory / several), directory / several
    raise CheckpointError(f"{directory} holds none of {', '.join((*_SINGLE_FILES, *_INDEX_FILES))}")


def _indexed_files(index: Path) -> tuple[Path, ...]:
    directory, kind = index.parent, index.name.split(".")[1]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must give a file name for each tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != f".{kind}":
            raise CheckpointError(f"{index}: {name!r:.80} is not the name of a .{kind} file in the same directory")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing")
    return tuple(directory / name for name in names)


def directory_name(directory: Path) -> str:
    """What a directory is called, in lower case; in Hugging Face's cache that stands above `snapshots/REVISION`."""
    path = directory.absolute()
    return (path.parents[1] if path.parent.name == "snapshots" else path).name.lower()


def _describe_meta(directory: Path) -> CheckpointInfo:
    values = read_json(directory / "params.json")
    settings = _Settings(directory / "params.json", values)
    if unknown := sorted(values.keys() - _META_KEYS):
        raise CheckpointError(
            f"{settings.path}: {', '.join(unknown):.200} is not supported; known: {', '.join(sorted(_META_KEYS))}"
        )
    # Meta's download puts the tokenizer beside the models' directories, the repositories into them.
    tokenizer = next(
        (d / "tokenizer.model" for d in (directory, directory.parent) if (d / "tokenizer.model").is_file()), None
    )
    pieces = read_pieces(tokenizer) if tokenizer is not None else []
    vocab_size = settings.whole("vocab_size", -1)
    if vocab_size == -1 and tokenizer is None:
        raise CheckpointError(f"{settings.path}: vocab_size is -1, and there is no tokenizer.model to count")
    hidden_size, num_heads = settings.whole("dim"), settings.whole("n_heads")
    try:
        config = ModelConfig(
            vocab_size=len(pieces) if vocab_size == -1 else vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_meta_feed_forward(settings, hidden_size),
            num_layers=settings.whole("n_layers"),
            num_query_heads=num_heads,
            num_kv_heads=settings.whole("n_kv_heads", num_heads),
            head_dim=hidden_size // max(num_heads, 1),
            rms_norm_eps=settings.real("norm_eps", 1e-5),
            rope_theta=settings.real("rope_theta", 10000.0),
            max_position=settings.whole("max_seq_len", _LLAMA_2_MAX_POSITION),
            bos_token_id=pieces.index("<s>") if "<s>" in pieces else None,
            eos_token_ids=(pieces.index("</s>"),) if "</s>" in pieces else (),
        )
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {error}") from error
    _check_ids(settings.path, config)
    return CheckpointInfo(
        path=directory,
        format="meta",
        config=config,
        weight_files=_meta_files(directory),
        tokenizer_kind="tokenizer.model" if tokenizer is not None else "",
        tokenizer_path=tokenizer,
        add_bos=True,
        # The format has no template: Meta's chat models are told by their directories' names alone.
        chat_format="llama-2" if "chat" in directory_name(directory) else "",
        licence="",
    )


def _meta_feed_forward(settings: _Settings, hidden_size: int) -> int:
    """Width of the feed-forward layer as Meta's FeedForward derives it from `dim`."""
    multiple_of = settings.whole("multiple_of", 256)
    width = int(settings.real("ffn_dim_multiplier", 1.0) * (8 * hidden_size // 3))
    if multiple_of <= 0:
        raise CheckpointError(f"{settings.path}: multiple_of is {multiple_of}; it must be greater than 0")
    return -(-width // multiple_of) * multiple_of


def _meta_files(directory: Path) -> tuple[Path, ...]:
    files = {int(m[1]): p for p in sorted(directory.iterdir()) if (m := _META_FILE.fullmatch(p.name)) and p.is_file()}
    for number in range(max(files, default=0) + 1):
        if number not in files:
            raise CheckpointError(f"{directory} lacks consolidated.{number:02}.pth")
    return tuple(files[number] for number in sorted(files))


def _huggingface_template(directory: Path, tokenizer: dict[str, Any]) -> str:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _card_licence(directory: Path) -> str:
    """`license: …` in the head of the model card, "" where there is none."""
    card = directory / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        match = _CARD_LICENCE.match(file.read(_MAX_CARD_HEAD))
    return match[1] if match else ""


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
