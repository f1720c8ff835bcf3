"""Bytes of a request to checked plain data: strict JSON, known fields, right types. Whatever is wrong is a ValidationError
that names the field."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from serving.contracts.errors import ValidationError

T = TypeVar("T")

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields of OpenAI's API that this server does not have, each with the values that ask for nothing."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAX_NAME_CHARS = 100


def parse(schema: type[T], body: bytes, neutral: Neutral, ignored: frozenset[str]) -> T:
    """`body` as a `schema`. `ignored` fields may hold anything: they change no answer. Raises ValidationError."""
    data = _read_json(body)
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name not in ignored}
        for name in neutral.keys() & data.keys():
            _check_neutral(name, data.pop(name), neutral[name])
    try:
        return msgspec.convert(data, schema)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def _read_json(body: bytes) -> Any:
    try:
        data = json.loads(body.decode(), object_pairs_hook=_object)
        if b"\\u" in body:  # only an escape can spell half of a surrogate pair
            for path, text in _texts(data, ""):
                if found := _SURROGATE.search(text):
                    raise ValidationError(path, f"{path} holds half of a surrogate pair at character {found.start()}")
    except UnicodeDecodeError as error:
        raise ValidationError("", f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValidationError("", "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValidationError("", f"the body is not valid JSON at character {error.pos}: {error.msg}") from None
    except ValueError as error:
        if isinstance(error, ValidationError):
            raise
        raise ValidationError("", "the body holds a number of thousands of digits") from None
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValidationError(_cut(twice), f"{_cut(twice)} stands twice in one object")
    return data


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every string in `value` and its path; a name of a field has the path of what holds it."""
    match value:
        case str():
            yield path, value
        case dict():
            for name, inner in value.items():
                yield path, name
                yield from _texts(inner, f"{path}.{name}" if path else name)
        case list():
            for index, inner in enumerate(value):
                yield from _texts(inner, f"{path}[{index}]")


def _check_neutral(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value is not None and value not in allowed:
        values = " or ".join(["null", *map(json.dumps, allowed)])
        raise ValidationError(name, f"{name} is not supported by this server; leave it out, or give {values}")


def _explain(problem: str) -> ValidationError:
    """msgspec says: Expected `int`, got `str` - at `$.messages[0].role`."""
    what, _, where = problem.partition(" - at `$")
    path = where.rstrip("`").removeprefix(".").removesuffix("[...]")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        name = _cut(unknown[1])
        field = f"{path}.{name}" if path else name
        return ValidationError(field, f"{field} is not a field that this server knows")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        field = f"{path}.{missing[1]}" if path else missing[1]
        return ValidationError(field, f"{field} is missing")
    what = what.replace("`", "")
    return ValidationError(path, f"{path or 'the body'}: {what[0].lower()}{what[1:]}")


def _cut(name: str) -> str:
    """A field's name from a client, fit for an error."""
    name = name if len(name) <= _MAX_NAME_CHARS else name[:_MAX_NAME_CHARS] + "…"
    return name.encode(errors="replace").decode()
