"""Results as JSON files that every reader takes; and whether a file can be written, before what goes into it is measured."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_parallel.errors import ConfigError


def plain(value: Any) -> Any:
    """The same with null for numbers that JSON does not have: infinities, and what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def write_json(result: Any, path: Path) -> None:
    """Numbers that JSON does not have become null. Raises ConfigError."""
    write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def check_can_be_written(path: Path | None, option: str) -> None:
    """Raises ConfigError. Nothing is written."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} is {path}, a directory; it must be a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} is {path}; there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} is {path}, which this user may not write; it must be a file that can be written")


def check_all_can_be_written(paths: Mapping[str, Path | None]) -> None:
    """Of several options, each of which needs a file of its own. Raises ConfigError. Nothing is written."""
    taken: dict[Path, str] = {}
    for option, path in paths.items():
        check_can_be_written(path, option)
        if path is not None and (other := taken.setdefault(path.resolve(), option)) != option:
            raise ConfigError(f"{option} is {path}, and so is {other}; each needs a file of its own")
