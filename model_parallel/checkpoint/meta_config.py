"""Directories in Meta's own format: params.json, consolidated.00.pth and on, tokenizer.model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_parallel.checkpoint.info import CheckpointInfo, TokenizerKind, TokenizerSettings
from model_parallel.checkpoint.placeholders import is_present, refuse_pointers
from model_parallel.checkpoint.rope_scaling import llama3_divisors
from model_parallel.checkpoint.sentencepiece_file import read_pieces
from model_parallel.checkpoint.settings import Settings, known_ids, read_json
from model_parallel.checkpoint.tiktoken_file import is_tiktoken_file, llama3_special_tokens, read_tiktoken
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError, ConfigError

_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
# Everything that Llama 2's and 3's code reads from params.json, and what later code of Meta's adds to it without changing it.
_KEYS = frozenset(
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
        "max_seq_len",
        "max_batch_size",
        "use_scaled_rope",
        "rope_scaling_factor",
        "rope_high_freq_factor",
    }
)
_MOST_TIMES_WIDER = 1000
_LLAMA_2_MAX_POSITION = 4096
_LLAMA_3_MAX_POSITION = 8192
_LLAMA_3_1_MAX_POSITION = 131072
_SMALLEST_LLAMA_3_VOCABULARY = 100_000
_END_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vocabulary:
    kind: TokenizerKind = ""
    path: Path | None = None
    ids: dict[str, int]
    """Of the tokens whose texts are looked for."""
    size: int = 0


def describe_meta(directory: Path) -> CheckpointInfo:
    """Raises CheckpointError naming the file and the setting."""
    values = read_json(directory / "params.json")
    settings = Settings(directory / "params.json", values)
    if unknown := sorted(key for key in values.keys() - _KEYS if values[key] not in (None, False, {}, [])):
        raise CheckpointError(
            f"{settings.path}: {', '.join(unknown):.200} is not supported; known: {', '.join(sorted(_KEYS))}"
        )
    # Meta's download puts the tokenizer beside the models' directories, the repositories into them.
    tokenizer = next(
        (d / "tokenizer.model" for d in (directory, directory.parent) if is_present(d / "tokenizer.model")), None
    )
    files = _files(directory)
    refuse_pointers((*files, *([tokenizer] if tokenizer is not None else [])))
    vocabulary = _read_vocabulary(tokenizer)
    vocab_size = settings.whole("vocab_size", -1)
    if vocab_size == -1 and tokenizer is None:
        raise CheckpointError(f"{settings.path}: vocab_size is -1, and there is no tokenizer.model to count")
    vocab_size = vocabulary.size if vocab_size == -1 else vocab_size
    hidden_size, num_heads = settings.whole("dim"), settings.whole("n_heads")
    head_dim = hidden_size // max(num_heads, 1)
    theta = settings.real("rope_theta", 10000.0)
    warnings: list[str] = []
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _feed_forward(settings, hidden_size),
        "num_layers": settings.whole("n_layers"),
        "num_query_heads": num_heads,
        "num_kv_heads": settings.whole("n_kv_heads", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.real("norm_eps", 1e-5),
        "rope_theta": theta,
        "max_position": settings.whole("max_seq_len", _max_position(settings, vocab_size)),
        "bos_token_id": next((vocabulary.ids[t] for t in _BEGIN_TOKENS if t in vocabulary.ids), None),
    }
    eos = tuple(vocabulary.ids[text] for text in _END_TOKENS if text in vocabulary.ids)
    try:
        sizes["rope_divisors"] = divisors = _divisors(settings, head_dim, theta)
        config = ModelConfig(**sizes, eos_token_ids=eos)
        config = ModelConfig(**sizes, eos_token_ids=known_ids(settings.path, config, warnings))
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {error}") from error
    return CheckpointInfo(
        path=directory,
        format="meta",
        config=config,
        weight_files=files,
        tokenizer_kind=vocabulary.kind,
        tokenizer_path=vocabulary.path,
        tokenizer=TokenizerSettings(add_bos=True, legacy=True),
        chat_format=_chat_format(directory, vocabulary.kind),
        rope_scaling=f"llama3, factor {settings.real('rope_scaling_factor', 8.0):g}" if divisors else "",
        licence="",
        warnings=tuple(warnings),
    )


def directory_name(directory: Path) -> str:
    """What a directory is called, in lower case; in Hugging Face's cache that stands above `snapshots/REVISION`. Meta's
    repositories keep the files of its own format in a directory `original`."""
    path = directory.absolute()
    if path.name == "original":
        path = path.parent
    return (path.parents[1] if path.parent.name == "snapshots" else path).name.lower()


def _chat_format(directory: Path, kind: TokenizerKind) -> Literal["llama-2", "llama-3", ""]:
    """The format has no template: Meta's chat models are told by their directories' names alone."""
    name = directory_name(directory)
    if kind == "tiktoken":
        return "llama-3" if "instruct" in name or "chat" in name else ""
    return "llama-2" if "chat" in name else ""


def _read_vocabulary(path: Path | None) -> _Vocabulary:
    if path is None:
        return _Vocabulary(ids={})
    if is_tiktoken_file(path):
        special = llama3_special_tokens()
        first = len(read_tiktoken(path))
        ids = {text: first + i for i, text in enumerate(special)}
        return _Vocabulary(kind="tiktoken", path=path, ids=ids, size=first + len(special))
    pieces = read_pieces(path)
    ids = {text: pieces.index(text) for text in (*_BEGIN_TOKENS, *_END_TOKENS) if text in pieces}
    return _Vocabulary(kind="tokenizer.model", path=path, ids=ids, size=len(pieces))


def _max_position(settings: Settings, vocab_size: int) -> int:
    """The format does not say it. Llama 3.1 and later scale their rotary embedding to 128k tokens."""
    if settings.flag("use_scaled_rope"):
        return _LLAMA_3_1_MAX_POSITION
    return _LLAMA_3_MAX_POSITION if vocab_size >= _SMALLEST_LLAMA_3_VOCABULARY else _LLAMA_2_MAX_POSITION


def _divisors(settings: Settings, head_dim: int, theta: float) -> tuple[float, ...]:
    if not settings.flag("use_scaled_rope"):
        return ()
    return llama3_divisors(
        head_dim,
        theta,
        factor=settings.real("rope_scaling_factor", 8.0),
        low_freq_factor=1.0,
        high_freq_factor=settings.real("rope_high_freq_factor", 4.0),
        original_max=_LLAMA_3_MAX_POSITION,
    )


def _feed_forward(settings: Settings, hidden_size: int) -> int:
    """Width of the feed-forward layer as Meta's FeedForward derives it from `dim`."""
    multiple_of = settings.whole("multiple_of", 256)
    multiplier = settings.real("ffn_dim_multiplier", 1.0)
    if not 0 < multiplier < _MOST_TIMES_WIDER:
        raise CheckpointError(
            f"{settings.path}: ffn_dim_multiplier is {multiplier}; a number above 0 and below {_MOST_TIMES_WIDER} is needed"
        )
    width = int(multiplier * (8 * hidden_size // 3))
    if multiple_of <= 0:
        raise CheckpointError(f"{settings.path}: multiple_of is {multiple_of}; it must be greater than 0")
    return -(-width // multiple_of) * multiple_of


def _files(directory: Path) -> tuple[Path, ...]:
    files = {int(m[1]): p for p in sorted(directory.iterdir()) if (m := _FILE.fullmatch(p.name))}
    for number in range(max(files, default=0) + 1):
        if number not in files:
            raise CheckpointError(f"{directory} lacks consolidated.{number:02}.pth")
    return tuple(files[number] for number in sorted(files))
