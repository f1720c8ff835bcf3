"""What the files beside a vocabulary say of it: tokenizer_config.json, special_tokens_map.json, added_tokens.json."""

from pathlib import Path
from typing import Any

from model_parallel.checkpoint.info import AddedToken, TokenizerSettings
from model_parallel.checkpoint.settings import Settings, read_optional_json
from model_parallel.config import MOST_TOKENS
from model_parallel.errors import CheckpointError

_MAX_ADDED_TOKENS = 1 << 17
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_tokenizer_settings(directory: Path, config: dict[str, Any], model: Settings) -> TokenizerSettings:
    """`config` is the content of tokenizer_config.json, `model` that of config.json. Raises CheckpointError naming the file."""
    path = directory / "tokenizer_config.json"
    settings = Settings(path, config)
    special_map = read_optional_json(directory / "special_tokens_map.json")
    added = _added_tokens_json(directory / "added_tokens.json")
    added |= _added_tokens_decoder(path, config.get("added_tokens_decoder") or {})
    special = [token for source in (config, special_map) for token in _named_tokens(source)]
    named = {key: text for source in (special_map, config) for key, text in _roles(source).items()}
    return TokenizerSettings(
        add_bos=settings.flag("add_bos_token"),
        add_eos=settings.flag("add_eos_token") or False,
        class_name=_class_name(settings, model),
        legacy=settings.flag("legacy"),
        add_prefix_space=settings.flag("add_prefix_space"),
        added=tuple(added[token_id] for token_id in sorted(added)),
        named=tuple(sorted(named.items())),
        special_texts=frozenset(special),
        bos_text=next((text for s in (config, special_map) if (text := token_text(s.get("bos_token")))), ""),
        eos_texts=tuple(dict.fromkeys(text for s in (config, special_map) if (text := token_text(s.get("eos_token"))))),
    )


def _class_name(settings: Settings, model: Settings) -> str:
    if str(model.values.get("model_type")).lower() == "mistral":
        return ""  # transformers takes its general class for every Mistral model
    return (settings.text("tokenizer_class") or model.text("tokenizer_class")).removesuffix("Fast")


def token_text(token: object) -> str:
    """Of a token that is written as its text or as an object; "" for anything else."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _named_tokens(source: dict[str, Any]) -> list[str]:
    """Texts of everything called …_token, and of the lists of special tokens."""
    found = [*_roles(source).values()]
    for key in _LISTS:
        values = source.get(key) or []
        if isinstance(values, dict):
            values = [*values.values()]
        found += [token_text(value) for value in values] if isinstance(values, list) else []
    return [text for text in found if text]


def _roles(source: dict[str, Any]) -> dict[str, str]:
    return {key: text for key, value in source.items() if key.endswith("_token") and (text := token_text(value))}


def _added_tokens_json(path: Path) -> dict[int, AddedToken]:
    """Ids by text. An older form of the file is a list, which transformers does not read either."""
    tokens = {}
    for text, given in read_optional_json(path).items():
        token_id = _checked_id(path, text, given)
        tokens[token_id] = AddedToken(id=token_id, text=text, special=None)
    return tokens


def _added_tokens_decoder(path: Path, decoder: object) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is {decoder!r:.80}; tokens by id are needed")
    tokens = {}
    for key, value in decoder.items():
        text = token_text(value)
        if not text:
            raise CheckpointError(f"{path}: added_tokens_decoder has {value!r:.80} for {key!r:.20}; a token is needed")
        token_id = _checked_id(path, text, int(key) if str(key).isdecimal() else key)
        flags = value if isinstance(value, dict) else {}
        tokens[token_id] = AddedToken(
            id=token_id,
            text=text,
            special=bool(flags["special"]) if "special" in flags else None,
            lstrip=bool(flags.get("lstrip")),
            rstrip=bool(flags.get("rstrip")),
            single_word=bool(flags.get("single_word")),
            normalized=bool(flags.get("normalized", flags.get("special") is False)),
        )
    if len(tokens) > _MAX_ADDED_TOKENS:
        raise CheckpointError(f"{path}: added_tokens_decoder has {len(tokens)} tokens; {_MAX_ADDED_TOKENS} is the most")
    return tokens


def _checked_id(path: Path, text: str, token_id: object) -> int:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < MOST_TOKENS:
        raise CheckpointError(
            f"{path}: the token {text!r:.40} has the id {token_id!r:.20}; a whole number below {MOST_TOKENS} is needed"
        )
    return token_id
