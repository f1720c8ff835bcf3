"""Byte-level BPE vocabularies that come without the rules of cutting text: in GGUF files, which name them, and in Meta's files
of Llama 3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.checkpoint.tiktoken_file import llama3_special_tokens, read_tiktoken
from model_parallel.errors import CheckpointError
from serving.text.gguf_tokens import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, gguf_tokens
from serving.text.token_bytes import byte_level_bytes, byte_level_text
from serving.text.vocabulary import ControlToken, Vocabulary, is_markup, special_ids

if TYPE_CHECKING:  # what reads GGUF needs NumPy
    from model_parallel.checkpoint.gguf_file import GgufFile

_GPT_2 = "gpt-2"
_DIGITS = "digits"
_DEEPSEEK_CODER = "deepseek-coder"
# How text is cut before merges, by llama.cpp's names (`tokenizer.ggml.pre`, src/llama-vocab.cpp): GPT-2's rule, the same after
# every digit was cut off, or one regular expression.
_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT_2)
    | dict.fromkeys(("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS)
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), _LLAMA_3)
    | {"qwen2": _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), "tekken": _TEKKEN, "deepseek-coder": _DEEPSEEK_CODER}
)
# A piece that is a token as it stands is not cut and merged again; texts begin with BOS unless the file says otherwise.
_WHOLE_PIECES_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
_SUPPORTED_SHOWN = ("gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "deepseek-coder", "and their like")


def from_gguf_byte_level(info: CheckpointInfo, file: "GgufFile", markup: str) -> Vocabulary:
    """Raises CheckpointError naming a rule that is not known here."""
    pre = file.get("tokenizer.ggml.pre")
    if pre not in _RULES:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(_SUPPORTED_SHOWN)}. Serve the model's "
            "directory in Hugging Face's format, whose tokenizer.json has the rule"
        )
    tokens, types = gguf_tokens(file)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    try:
        library = tokenizers.Tokenizer(
            models.BPE(
                {text: i for i, text in enumerate(tokens)},
                merges,
                ignore_merges=pre in _WHOLE_PIECES_FIRST,
            )
        )
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{file.path}: its tokenizer is not valid: {error}") from error
    library.pre_tokenizer = _pre_tokenizer(_RULES[pre])
    control_kinds = {
        i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL)
        or i in special_ids(info)
        or (kind == USER_DEFINED and is_markup(info, text, markup))
    }
    in_text = [text for i, text in enumerate(tokens) if types[i] == USER_DEFINED and i not in control_kinds]
    library.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in in_text])

    def to_bytes(token_id: int, text: str) -> bytes:
        if token_id in control_kinds or types[token_id] == UNUSED:
            return b""
        return text.encode() if types[token_id] == USER_DEFINED else byte_level_bytes(text)

    return _vocabulary(
        library,
        [to_bytes(i, text) for i, text in enumerate(tokens)],
        {tokens[i]: ControlToken(id=i) for i in sorted(control_kinds)},
        add_bos=pre in _WHOLE_PIECES_FIRST if info.add_bos is None else info.add_bos,
    )


def from_tiktoken(path: Path) -> Vocabulary:
    """Llama 3's, in Meta's format. Raises CheckpointError."""
    tokens, special = read_tiktoken(path), llama3_special_tokens()
    texts = [byte_level_text(token) for token in tokens]
    try:
        library = tokenizers.Tokenizer(
            models.BPE({text: i for i, text in enumerate(texts)}, _merges(tokens), ignore_merges=True)
        )
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path}: its tokenizer is not valid: {error}") from error
    library.pre_tokenizer = _pre_tokenizer(_LLAMA_3)
    control = {text: ControlToken(id=len(tokens) + i) for i, text in enumerate(special)}
    return _vocabulary(library, [*tokens, *[b""] * len(special)], control, add_bos=True)


def _merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """The pairs that were merged into each token, in the order of the ranks: those whose two parts are both older tokens; of
    several pairs the one with the older parts comes first (as transformers' TikTokenConverter has it).
    """
    rank = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for token in tokens:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = sorted(((rank[a], rank[b]), a, b) for a, b in cuts if a in rank and b in rank)
        merges += [(byte_level_text(a), byte_level_text(b)) for _, a, b in pairs]
    return merges


def _vocabulary(
    library: tokenizers.Tokenizer,
    token_bytes: Sequence[bytes],
    control: Mapping[str, ControlToken],
    *,
    add_bos: bool,
) -> Vocabulary:
    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def token_id(text: str) -> int | None:
        return control[text].id if text in control else library.token_to_id(text)

    return Vocabulary(
        encode=encode,
        encode_later=encode,
        token_bytes=token_bytes,
        control=control,
        token_id=token_id,
        add_bos=add_bos,
        strips_leading_space=False,
    )


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule == _GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = [rule]
    if rule == _DEEPSEEK_CODER:
        patterns = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
