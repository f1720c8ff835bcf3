"""Bytes of a request to checked plain data: strict JSON, right types, and no field that would change the answer unseen.
Whatever is wrong is a ValidationError that names the field."""

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from serving.contracts.errors import ValidationError
from serving.gateway.core.fields import Unsupported, asks_for_nothing
from serving.gateway.core.places import Place
from serving.gateway.core.strict_json import MAX_NAME_CHARS, read_json, shown_name

T = TypeVar("T", bound="Body")

_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Object(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object that a client sends."""

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        """Fields that are refused unless they ask for nothing."""
        return {}

    @classmethod
    def no_effect(cls) -> frozenset[str]:
        """Fields that may hold anything."""
        return frozenset()

    @classmethod
    def as_given(cls) -> frozenset[str]:
        """Fields of what is asked or said, and not how: an empty value there is a value, which may be a mistake."""
        return frozenset()


class Body(Object, frozen=True, kw_only=True):
    """The object that is a whole request."""

    strict: bool | None = None
    """Refuse fields that this server does not know, where they would be ignored."""


def parse(schema: type[T], body: bytes) -> tuple[T, tuple[str, ...]]:
    """`body` as a `schema`, and the paths of fields that were ignored. Raises ValidationError."""
    data = _read_json(body)
    names: list[str] = []
    if isinstance(data, dict):
        data = _tidied(data, schema, "", names)
    try:
        request = msgspec.convert(data, schema)
    except msgspec.ValidationError as error:
        raise _explain(str(error), schema) from None
    if names and request.strict:
        raise ValidationError(names[0], f"{names[0]} is not a field that this server knows, and the request is strict")
    return request, tuple(names)


# ---- what may be left out, and what may not ----


@dataclass(frozen=True, kw_only=True, slots=True)
class _Field:
    """What a field's type says about the values that ask for nothing, and where objects with fields of their own lie."""

    nothing: tuple[Any, ...]
    inner: type[Object] | None
    """Of the value, or of each item of a list."""


@cache
def _fields(schema: type[Object]) -> dict[str, _Field]:
    return {
        field.name: _field(field.type, may_be_left_out=not field.required and field.name not in schema.as_given())
        for field in msgspec.structs.fields(schema)
    }


def _field(hint: Any, *, may_be_left_out: bool) -> _Field:
    options = _options(hint)
    nothing: list[Any] = []
    if may_be_left_out:
        nothing.append("")
        if type(None) in options and not {int, float} & set(options):
            nothing += [[], {}]
            if bool not in options:
                nothing.append(False)
    inner = [option for option in options if isinstance(option, type) and issubclass(option, Object)]
    inner += [
        item
        for option in options
        if get_origin(option) is list
        for item in get_args(get_args(option)[0]) or get_args(option)
        if isinstance(item, type) and issubclass(item, Object)
    ]
    return _Field(nothing=tuple(nothing), inner=inner[0] if inner else None)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _tidied(data: dict[str, Any], schema: type[Object], path: str, names: list[str]) -> dict[str, Any]:
    """The fields that `schema` knows. What is ignored is added to `names`. Raises ValidationError for what must not be."""
    fields, unsupported, no_effect = _fields(schema), schema.unsupported(), schema.no_effect()
    kept = {}
    for name, value in data.items():
        where = f"{path}.{shown_name(name)}" if path else shown_name(name)
        if field := fields.get(name):
            if not (value is None or _is_any(value, field.nothing)):
                kept[name] = value if field.inner is None else _tidied_inner(value, field.inner, where, names)
        elif rule := unsupported.get(name):
            if not rule.is_neutral(value):
                raise ValidationError(where, rule.refusal(where))
        elif name not in no_effect and not asks_for_nothing(name, value):
            names.append(where)
    return kept


def _tidied_inner(value: Any, schema: type[Object], where: str, names: list[str]) -> Any:
    match value:
        case dict():
            return _tidied(value, schema, where, names)
        case list():
            return [
                _tidied(item, schema, f"{where}[{index}]", names) if isinstance(item, dict) else item
                for index, item in enumerate(value)
            ]
        case _:
            return value


def _is_any(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(each) and value == each for each in values)


# ---- JSON ----


def _read_json(body: bytes) -> Any:
    try:
        data = read_json(body.decode(), field="", title="the body")
        if b"\\u" in body:  # only an escape can spell half of a surrogate pair
            _check_texts(data)
    except UnicodeDecodeError as error:
        raise ValidationError("", f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValidationError("", "the body is nested too deeply") from None
    return data


def _check_texts(data: Any) -> None:
    """Raises ValidationError for half of a surrogate pair in a text; of a field's name it tells the place of what holds it."""
    steps: list[str | int] = [""]
    left: list[Iterator[tuple[str | int, Any]]] = [iter([("", data)])]
    """Of each level that is being walked through."""
    while left:
        for steps[-1], value in left[-1]:
            if isinstance(value, str):
                _check_text(value, steps)
            elif isinstance(value, dict | list):
                for name in value if isinstance(value, dict) else ():
                    _check_text(name, steps)
                left.append(iter(value.items() if isinstance(value, dict) else enumerate(value)))
                steps.append("")
                break
        else:
            left.pop()
            steps.pop()


def _check_text(text: str, steps: Sequence[str | int]) -> None:
    if found := _SURROGATE.search(text):
        place = str(Place("").at(*steps[1:]))
        raise ValidationError(
            place, f"{place or 'the body'} holds half of a surrogate pair at character {found.start()}"
        )


def _explain(problem: str, schema: type[Body]) -> ValidationError:
    """msgspec says: Expected `int`, got `str` - at `$.messages[0].role`."""
    what, _, where = problem.partition(" - at `$")
    path = where.rstrip("`").removeprefix(".").removesuffix("[...]")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        field = f"{path}.{missing[1]}" if path else missing[1]
        return ValidationError(field, f"{field} is missing")
    if wrong := re.fullmatch(r"Invalid enum value '?(.*?)'?", what, re.DOTALL):
        value = wrong[1][:MAX_NAME_CHARS]
        allowed = ", ".join(_allowed(schema, path))
        instead = _INSTEAD.get((path.rpartition(".")[2], value))
        more = f"; instead, {instead}" if instead else ""
        return ValidationError(path, f"{path} is {value!r}; allowed: {allowed}{more}")
    what = what.replace("`", "")
    return ValidationError(path, f"{path or 'the body'}: {what[0].lower()}{what[1:]}")


_INSTEAD = {
    ("type", "item_reference"): "send the item itself, as nothing is kept",
    ("type", "json"): "send json_object, or json_schema with a schema",
    ("type", "reasoning"): "leave the item out",
    ("type", "regex"): "send structured_outputs with regex",
    ("type", "grammar"): "send structured_outputs with grammar",
    ("type", "allowed_tools"): "send these tools alone",
    ("tool_choice", "any"): "send required",
}
"""For values that other servers know, by a field's name."""


def _allowed(schema: type[Body], path: str) -> list[str]:
    """The names that the field at `path` may hold; "an object" where it may be one too."""
    hints: list[Any] = [schema]
    for name in re.findall(r"[A-Za-z_]\w*|\[\d+\]", path):
        inner: list[Any] = []
        for hint in hints:
            if name.startswith("["):
                inner += _options(get_args(hint)[0]) if get_origin(hint) is list else ()
            elif isinstance(hint, type) and issubclass(hint, Object):
                inner += [
                    each
                    for field in msgspec.structs.fields(hint)
                    if field.name == name
                    for each in _options(field.type)
                ]
        hints = inner
    names = [str(name) for hint in hints if get_origin(hint) is Literal for name in get_args(hint) if name is not None]
    is_object = any(isinstance(hint, type) and issubclass(hint, Object) for hint in hints)
    return list(dict.fromkeys(names)) + ["an object"] * is_object
