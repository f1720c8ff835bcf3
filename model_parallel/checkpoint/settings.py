"""Typed look-ups in a checkpoint's settings, with errors that name file, key and value."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model_parallel.checkpoint.placeholders import is_present, what_it_is
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError

_MAX_JSON_BYTES = 64 << 20
_MAX_WHOLE = 1 << 31


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError naming the file."""
    return read_json_and_bytes(path)[0]


def read_json_and_bytes(path: Path) -> tuple[dict[str, Any], bytes]:
    """The same, and the bytes that it was read from."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the most is {_MAX_JSON_BYTES}")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        if found := what_it_is(path):
            raise CheckpointError(f"{path} {found}") from error
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value, content


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same; {} where there is no such file. One that is meant to be there, a link that leads nowhere, is refused."""
    return read_json(path) if is_present(path) else {}


class Settings:
    """The settings of one file. A field that is null counts as absent, as it does for those who write these files."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number, also one that is written 4096.0."""
        value = self._number(key, default)
        if isinstance(value, float) and not value.is_integer():
            raise CheckpointError(f"{self.path}: {key} is {value!r}; a whole number is needed")
        if abs(value) >= _MAX_WHOLE:
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; a number below {_MAX_WHOLE} is needed")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._number(key, default))

    def optional_real(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.real(key)

    def _number(self, key: str, default: float | None) -> int | float:
        value: Any = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path} does not give {key}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and abs(value) <= sys.float_info.max):  # neither inf nor nan, nor beyond a float's range
            kind = "finite number" if is_number else "number"
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; a {kind} is needed")
        number: int | float = value
        return number

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; true or false is needed")
        return value

    def text(self, key: str) -> str:
        """A string; "" for anything else."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; a token id or a list of them is needed")
        return tuple(i for i in ids if i >= 0)

    def require(self, required: dict[str, tuple[object, ...]]) -> None:
        """Refuse a value that is not allowed. Empty objects, lists and texts say no more than null does."""
        for key, allowed in required.items():
            value = self.values.get(key)
            if (None if value in ({}, [], "") else value) not in allowed:
                raise CheckpointError(
                    f"{self.path}: {key} is {value!r:.80}, which is not supported; "
                    f"allowed: {' or '.join('unset' if a is None else str(a) for a in allowed)}"
                )


def known_ids(
    path: Path, config: ModelConfig, warnings: list[str], *, named_in: Mapping[int, Path] | None = None
) -> tuple[int, ...]:
    """The end tokens that the model's vocabulary has. Raises CheckpointError when BOS, or every end token, is outside of it.
    `named_in`: end tokens that another file than `path` names.
    """
    if config.bos_token_id is not None and config.bos_token_id >= config.vocab_size:
        raise CheckpointError(_outside(path, config.bos_token_id, config.vocab_size))
    kept = tuple(i for i in config.eos_token_ids if i < config.vocab_size)
    for token_id in config.eos_token_ids:
        if token_id >= config.vocab_size:
            problem = _outside((named_in or {}).get(token_id, path), token_id, config.vocab_size)
            if not kept:
                raise CheckpointError(f"{problem}; no answer would ever end")
            warnings.append(f"{problem}; answers end at {join(map(str, kept))}")
    return kept


def _outside(path: Path, token_id: int, vocab_size: int) -> str:
    return f"{path}: the special token {token_id} is not below the vocabulary's {vocab_size}"


def join(names: Iterable[str], *, shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")
