"""What is known of a checkpoint before a weight is read. Plain data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model_parallel.checkpoint.group_settings import Fp8Settings, GroupSettings
from model_parallel.config import ModelConfig

TokenizerKind = Literal["tokenizer.json", "tokenizer.model", "tiktoken", "gguf", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token that a file beside the vocabulary adds to it."""

    id: int
    text: str
    special: bool | None
    """None where the file does not say (added_tokens.json)."""
    lstrip: bool = False
    """Takes the spaces before it with it; `rstrip` those after it."""
    rstrip: bool = False
    single_word: bool = False
    """Found only where no letter or digit stands beside it."""
    normalized: bool = False
    """Looked for in the text as the tokenizer has normalized it, rather than as it was sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say, and their like in other formats."""

    add_bos: bool | None = None
    """Whether the tokenizer begins a text with BOS; None where the checkpoint does not say."""
    add_eos: bool = False
    """Whether the tokenizer ends a text with EOS. No prompt does here."""
    class_name: str = ""
    """Of the tokenizer, without "Fast"; "" where there is none, or where transformers heeds none (a Mistral model's)."""
    legacy: bool | None = None
    """Of Llama's sentencepiece tokenizer: whether every part between control tokens begins with a space of its own, or only the
    first; None where the checkpoint does not say, which transformers 5 takes for the latter."""
    add_prefix_space: bool | None = None
    added: tuple[AddedToken, ...] = ()
    named: tuple[tuple[str, str], ...] = ()
    """Roles and texts of special tokens ("bos_token", "<s>"), as chat templates know them."""
    special_texts: frozenset[str] = frozenset()
    """Texts of tokens that are named in a special role."""
    bos_text: str = ""
    eos_texts: tuple[str, ...] = ()
    """Texts of the end tokens."""

    @property
    def is_llamas(self) -> bool:
        """Of a class that makes the space before a text by its own settings in transformers; with others tokenizer.json decides
        alone."""
        return self.class_name in ("LlamaTokenizer", "CodeLlamaTokenizer")

    @property
    def only_first_has_space(self) -> bool:
        """Of Llama's tokenizers: whether only the first part between control tokens begins with a space of its own."""
        return self.legacy is not True or self.class_name == "CodeLlamaTokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How the checkpoint's makers draw from it (generation_config.json). None is not said."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


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
    tokenizer: TokenizerSettings
    chat_template: str = ""
    """The checkpoint's own, in the language Jinja; "" when it has none. Never run here."""
    chat_format: Literal["llama-2", "llama-3", ""] = ""
    """Of a checkpoint whose format has no templates: told by its name (Meta's)."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    rope_scaling: str = ""
    """How the rotary embedding is scaled, in words; "" when it is not."""
    dtype: str = ""
    """As the configuration states it: "float16", "bfloat16", …; "" when it does not."""
    licence: str
    """As the checkpoint states it; "" when it does not."""
    groups: GroupSettings | None = None
    """How the weights are quantised, in Hugging Face's format."""
    fp8: Fp8Settings | None = None
    """How they are, where they are in e4m3."""
    warnings: tuple[str, ...] = ()
    """What was found and did not matter, as sentences."""

    @property
    def add_bos(self) -> bool | None:
        """Whether the tokenizer begins a text with BOS; None where the checkpoint does not say."""
        return self.tokenizer.add_bos
