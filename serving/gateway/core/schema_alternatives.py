"""Whether no value can fit two of several JSON schemas, so that `oneOf` them says the same as `anyOf`.

The compiler of grammars knows this of types, texts and objects. Here it is known of numbers as well.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

_KINDS = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


def are_disjoint(schemas: Sequence[Any]) -> bool:
    """Whether that is certain; it may be so where it is not."""
    return all(_are_two_disjoint(one, other) for one, other in combinations(schemas, 2))


def _are_two_disjoint(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one is False or other is False
    for these, those in ((one, other), (other, one)):
        values = _values(these)
        if values is not None:
            return all(_excludes(those, value) for value in values)
    kinds = _kinds(one) & _kinds(other)
    if kinds <= {"integer", "number"}:
        return not kinds or _are_ranges_apart(_range(one), _range(other))
    return kinds == {"object"} and any(
        _are_two_disjoint(one["properties"][name], other["properties"][name])
        for name in _required(one) & _required(other)
    )


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """All that may be allowed, where these are counted up."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _excludes(schema: dict[str, Any], value: Any) -> bool:
    """Whether it certainly does not allow the value."""
    values = _values(schema)
    if values is not None:
        return not any(_is_same(value, each) for each in values)
    if _kind(value) not in _kinds(schema):
        return True
    return _kind(value) in ("integer", "number") and _are_ranges_apart(_range(schema), (value, False, value, False))


def _is_same(one: Any, other: Any) -> bool:
    """As JSON values: 1 is 1.0, and no boolean. What is within lists and objects is taken to be the same when Python says so."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "integer" if value == math.floor(value) else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _kinds(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    kinds = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else _KINDS
    return frozenset(kinds | {"integer"} if "number" in kinds else kinds)


def _required(schema: dict[str, Any]) -> set[str]:
    """Names of properties that must be there, and have schemas."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return set()
    return {name for name in required if isinstance(name, str) and name in properties}


_Range = tuple[float, bool, float, bool]
"""From where, whether without that, to where, whether without that."""


def _range(schema: dict[str, Any]) -> _Range:
    least, is_least_excluded = _bound(schema, "minimum", "exclusiveMinimum", 1)
    most, is_most_excluded = _bound(schema, "maximum", "exclusiveMaximum", -1)
    return least, is_least_excluded, -most, is_most_excluded


def _bound(schema: dict[str, Any], inclusive: str, exclusive: str, sign: int) -> tuple[float, bool]:
    bounds = [
        (sign * schema[key], is_excluded)
        for key, is_excluded in ((inclusive, False), (exclusive, True))
        if isinstance(schema.get(key), int | float) and not isinstance(schema[key], bool)
    ]
    return max(bounds, default=(-math.inf, False))


def _are_ranges_apart(one: _Range, other: _Range) -> bool:
    for (_, _, most, is_most_excluded), (least, is_least_excluded, _, _) in ((one, other), (other, one)):
        if most < least or (most == least and (is_most_excluded or is_least_excluded)):
            return True
    return False
