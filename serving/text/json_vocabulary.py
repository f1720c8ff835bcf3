"""Vocabularies in Hugging Face's tokenizer.json, which brings its own rules."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from model_parallel.checkpoint.detect import CheckpointInfo, read_json
from model_parallel.checkpoint.info import AddedToken
from model_parallel.config import MOST_TOKENS
from model_parallel.errors import CheckpointError
from serving.text.token_bytes import SPACE, byte_level_bytes, piece_bytes
from serving.text.vocabulary import ControlToken, Vocabulary, is_markup, special_ids

_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer")
"""Their pre-tokenizer is one ByteLevel step, which transformers builds anew from add_prefix_space."""


def from_tokenizer_json(info: CheckpointInfo, path: Path, markup: str) -> Vocabulary:
    """Raises CheckpointError for a file that is broken, or whose decoder is not known here."""
    data = read_json(path)
    prepends = _prepends(data)
    cuts_otherwise = _set_prefix(info, data)
    try:
        added = _added_tokens(info, data, markup)
        library = _library(data)
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from error
    for token_id, token in added.items():
        if library.token_to_id(token["content"]) != token_id:
            raise CheckpointError(
                f"{path}: the token {token['content']!r:.40} is to have the id {token_id}, and the vocabulary gives it "
                f"{library.token_to_id(token['content'])}"
            )
        if token.get("normalized") and library.normalizer and not library.normalizer.normalize_str(token["content"]):
            raise CheckpointError(  # the library would find it between the bytes of a character, and panic
                f"{path}: the added token {token['content']!r:.40} is to be found in normalized text, where nothing is left of "
                "it; set its normalized to false"
            )
    to_bytes, strips_leading_space = _decoder(data, path)
    ids: dict[str, int] = library.get_vocab(with_added_tokens=True)
    last = max(ids.values(), default=-1)
    if last >= MOST_TOKENS:
        raise CheckpointError(f"{path}: a token has the id {last}; the most is {MOST_TOKENS - 1}")
    token_bytes = [b""] * (last + 1)
    for text, token_id in ids.items():
        if token_id not in added:
            token_bytes[token_id] = to_bytes(text)
        elif not added[token_id]["special"]:
            found = library.id_to_token(token_id) or text  # of one that is looked for in normalized text, that: "▁word"
            token_bytes[token_id] = text.encode() if found == text else to_bytes(found)
    bos_id = ids.get(info.tokenizer.bos_text)
    bos = info.config.bos_token_id if bos_id is None else bos_id
    first = _first_id(info, library, added)
    later = _library_for_later_parts(data)
    encode = _encoder(library, second_space=prepends and not _prepends(data) and strips_leading_space)
    return Vocabulary(
        encode=encode,
        encode_later=encode if later is None else _encoder(later, second_space=False),
        token_bytes=token_bytes,
        control={
            token["content"]: ControlToken(id=token_id, lstrip=token["lstrip"], rstrip=token["rstrip"])
            for token_id, token in added.items()
            if token["special"]
        },
        token_id=ids.get,
        add_bos=first is not None,
        first_id=first,
        strips_leading_space=strips_leading_space,
        bos_token_id=bos_id,
        unknown_id=data["model"].get("unk_id", ids.get(data["model"].get("unk_token") or "")),
        warnings=(
            *_differences(info, path, library, first, bos, cuts_otherwise=cuts_otherwise),
            *_dropout(path, data["model"].get("dropout")),
        ),
    )


def _encoder(library: tokenizers.Tokenizer, *, second_space: bool) -> Callable[[str], list[int]]:
    """`second_space`: a text that begins with a space gets another, as from Prepend and not from a Metaspace step."""

    def encode(text: str) -> list[int]:
        if second_space and text.startswith((" ", SPACE)):
            text = f" {text}"
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _first_id(info: CheckpointInfo, library: tokenizers.Tokenizer, added: dict[int, dict[str, Any]]) -> int | None:
    """The control token that the file's post_processor puts before a text. It decides whatever add_bos_token says, as in
    transformers 5."""
    first = next(iter(library.encode("a").ids), None)
    is_control = first in library.encode("").ids and first in added and added[first]["special"]
    return first if first is not None and is_control and first < info.config.vocab_size else None


def _differences(
    info: CheckpointInfo,
    path: Path,
    library: tokenizers.Tokenizer,
    first: int | None,
    bos: int | None,
    *,
    cuts_otherwise: bool,
) -> Iterator[str]:
    """What is told of the tokens around a text, and of how it is cut."""
    if cuts_otherwise:
        yield (
            f"{path}: text is cut by its normalizer and pre_tokenizer; transformers 5 cuts by the rule of the class "
            f"{info.tokenizer.class_name}, which tokenizer_config.json names, and ignores the file's"
        )
    ours = [] if first is None else [library.id_to_token(first)]
    if info.add_bos not in (None, first is not None) or (first is not None and first != bos):
        yield (
            f"{path}: texts begin with {ours[0] if ours else 'no token'!s:.40}, as its post_processor says; add_bos_token "
            f"({info.add_bos}) and bos_token ({info.tokenizer.bos_text!r:.40}) of tokenizer_config.json say otherwise, and "
            "transformers 5 ignores them there too"
        )
    if (theirs := library.encode("").tokens) != ours:
        yield f"{path}: its post_processor puts {theirs!r:.80} around a text; here a text has {ours!r:.80}"


def _dropout(path: Path, given: object) -> Iterator[str]:
    if given:
        yield f"{path}: model.dropout is {given!r:.20}, which is for training; it is not used here"


def _library(data: dict[str, Any]) -> tokenizers.Tokenizer:
    model = data["model"] | ({"dropout": None} if "dropout" in data["model"] else {})
    library = tokenizers.Tokenizer.from_str(json.dumps(data | {"model": model}))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library


def _added_tokens(info: CheckpointInfo, data: dict[str, Any], markup: str) -> dict[int, dict[str, Any]]:
    """The file's added tokens by id, and those of the files beside it, which are written into `data`. What is special is never
    found in text; so are end tokens, those that a chat format writes, and those that the model has no embedding for.
    """
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    by_id = special_ids(info)
    by_text = {token["content"]: token for token in added.values()}
    is_new = False
    for token in info.tokenizer.added:
        if token.id in added or token.text in by_text:
            known = added.get(token.id) or by_text[token.text]
            known["special"] = known["special"] or (bool(token.special) and known["content"] == token.text)
            continue
        added[token.id] = _added(token)
        is_new = True
    for token_id, token in added.items():
        token["special"] = bool(
            token["special"]
            or token_id in by_id
            or token_id >= info.config.vocab_size
            or is_markup(info, token["content"], markup)
        )
    data["added_tokens"] = [added[token_id] for token_id in sorted(added)]
    vocab = data["model"].get("vocab")
    if is_new and isinstance(vocab, dict):
        # What the vocabulary lacks gets the ids that follow it. So that all have their own, none is left out of it.
        for token_id, token in added.items():
            vocab.setdefault(token["content"], token_id)
    return added


def _added(token: AddedToken) -> dict[str, Any]:
    return {
        "id": token.id, "content": token.text, "single_word": token.single_word, "lstrip": token.lstrip,
        "rstrip": token.rstrip, "normalized": token.normalized, "special": bool(token.special),
    }  # fmt: skip


def _set_prefix(info: CheckpointInfo, data: dict[str, Any]) -> bool:
    """Give or take the space that a text begins with, as tokenizer_config.json says, where the class is one for which
    transformers 5 does so. Whether it cuts text by another rule than the file's, which stays."""
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    byte_levels = [step for step in steps if step.get("type") == "ByteLevel"]
    wanted = info.tokenizer.add_prefix_space
    if info.tokenizer.class_name in _BYTE_LEVEL_CLASSES:
        if byte_levels:
            _set_prefix_of_bytes(data, byte_levels, wanted is True)
        return steps != byte_levels or len(steps) != 1
    if not info.tokenizer.is_llamas:
        return False
    if byte_levels:  # transformers knows LlamaTokenizer to be named where it is not meant, and reads the file
        return info.tokenizer.class_name != "LlamaTokenizer"
    cuts_otherwise = not _is_llamas_cut(data, steps)
    _set_prefix_of_pieces(info, data, steps)
    return cuts_otherwise


def _prepends(data: dict[str, Any]) -> bool:
    return any(step.get("type") == "Prepend" for step in _steps(data.get("normalizer"), "normalizers"))


def _set_prefix_of_bytes(data: dict[str, Any], byte_levels: list[dict[str, Any]], wanted: bool) -> None:
    for step in byte_levels:
        step["add_prefix_space"] = False  # after other steps it would give every word a space
    if wanted:
        before = _steps(data.get("normalizer"), "normalizers")
        space = {"type": "Prepend", "prepend": " "}
        one = {
            "type": "Replace",
            "pattern": {"Regex": r"\A  "},
            "content": " ",
        }  # a text that has a space gets no other
        data["normalizer"] = {"type": "Sequence", "normalizers": [*before, space, one]}


def _set_prefix_of_pieces(info: CheckpointInfo, data: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """By a Metaspace step, as transformers 5, which makes Llama's tokenizers of their vocabulary alone. One that Prepend gives
    every part would stand after every added word too."""
    wanted = info.tokenizer.add_prefix_space is not False
    scheme = "never" if not wanted else "first" if info.tokenizer.only_first_has_space else "always"
    flags = {"prepend_scheme": scheme, "add_prefix_space": wanted}
    before = [step for step in _steps(data.get("normalizer"), "normalizers") if step.get("type") != "Prepend"]
    metaspaces = [step for step in steps if step.get("type") == "Metaspace"]
    after = [step for step in _steps(data.get("decoder"), "decoders") if step.get("type") != "Strip"]
    for step in [*metaspaces, *(step for step in after if step.get("type") == "Metaspace")]:
        step.update(flags)
    own = [] if metaspaces else [{"type": "Metaspace", "replacement": SPACE, "split": False} | flags]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if wanted else []
    data["normalizer"] = {"type": "Sequence", "normalizers": before}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*own, *steps]}
    data["decoder"] = {"type": "Sequence", "decoders": [*after, *strip]}
    if data["model"].get("type", "BPE") == "BPE":
        data["model"] |= {"byte_fallback": True, "fuse_unk": True, "ignore_merges": False}


def _is_llamas_cut(data: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether the file's steps do no more than write spaces as pieces do, and put one before the text."""
    normalizers = {step.get("type") for step in _steps(data.get("normalizer"), "normalizers")}
    whole = all(step.get("type") == "Metaspace" and step.get("split") is False for step in steps)
    return whole and normalizers <= {"Prepend", "Replace"}


def _decoder(data: dict[str, Any], path: Path) -> tuple[Callable[[str], bytes], bool]:
    """What a token's text stands for, and whether the first one carries a space that the text does not have."""
    decoders = _steps(data.get("decoder"), "decoders")
    kinds = [step["type"] for step in decoders]
    before = _steps(data.get("pre_tokenizer"), "pretokenizers")
    if "ByteLevel" in kinds or (not kinds and any(step["type"] == "ByteLevel" for step in before)):
        return byte_level_bytes, False
    if "ByteFallback" in kinds or "Metaspace" in kinds or (data.get("model") or {}).get("byte_fallback"):
        metaspace = next((step for step in decoders if step["type"] == "Metaspace"), None)
        return piece_bytes, "Strip" in kinds or (metaspace is not None and _scheme(metaspace) != "never")
    raise CheckpointError(f"{path}: its decoder is {kinds or None}; ByteLevel or ByteFallback is needed")


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a decoder, normalizer or pre-tokenizer: one, or a sequence."""
    if not isinstance(part, dict):
        return []
    steps = part.get(key, [part])
    return [step for step in steps if isinstance(step, dict)]


def _scheme(metaspace: dict[str, Any]) -> str:
    """Whether text begins with a space of its own: "always", "first" or "never"; older files have a flag."""
    scheme = metaspace.get("prepend_scheme")
    if scheme is None:
        scheme = "always" if metaspace.get("add_prefix_space", True) else "never"
    return str(scheme)


def _library_for_later_parts(data: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """For parts after a control token, where a Metaspace step gives a space to the first part alone; of Llama's classes
    `_set_prefix` has written it so unless tokenizer_config.json says legacy: true.
    """
    data = copy.deepcopy(data)
    first = [
        step
        for step in _steps(data.get("pre_tokenizer"), "pretokenizers")
        if step.get("type") == "Metaspace" and _scheme(step) == "first"
    ]
    for step in first:
        step.update(prepend_scheme="never", add_prefix_space=False)
    return _library(data) if first else None
