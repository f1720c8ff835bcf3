"""Whether no value can fit two of several JSON schemas, so that `oneOf` them says the same as `anyOf`.

The compiler of grammars knows this of types, texts and objects. Here it is known of numbers as well.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any
from urllib.parse import unquote

_KINDS = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


_MAX_STEPS = 100_000
"""Comparisons for one schema; what is not certain by then is not certain."""
_MAX_PARTS = 16
"""Of one alternative, over which its references lead."""
_MAX_DEPTH = 8


class Alternatives:
    """Tells of alternatives in one schema whether they exclude each other."""

    def __init__(self, whole: Any, *, has_own_ids: bool = False) -> None:
        """`has_own_ids`: parts of the whole have ids, so that a pointer may start at one of them. None is followed then."""
        self._whole = None if has_own_ids else whole
        dialect = whole.get("$schema") if isinstance(whole, dict) else None
        self._refs_stand_alone = isinstance(dialect, str) and "draft-0" in dialect
        """Until draft 7 a reference is all that counts in its object."""
        self._targets: dict[str, Any] = {}
        self._num_left = _MAX_STEPS

    def are_disjoint(self, schemas: Sequence[Any]) -> bool:
        """Whether that is certain; it may be so where it is not."""
        return all(self._are_two_disjoint(one, other) for one, other in combinations(schemas, 2))

    def _are_two_disjoint(self, one: Any, other: Any, depth: int = 0) -> bool:
        return depth < _MAX_DEPTH and any(
            self._are_parts_disjoint(these, those, depth) for these in self._parts(one) for those in self._parts(other)
        )

    def _parts(self, schema: Any) -> list[Any]:
        """Schemas that a value has to fit all of, which may be true or false."""
        found: list[Any] = []
        left = [schema]
        while left and len(found) < _MAX_PARTS:
            part = left.pop()
            if isinstance(part, dict) and isinstance(ref := part.get("$ref"), str):
                left.append(self.target(ref))
                if self._refs_stand_alone:
                    part = True
            if isinstance(part, dict) and isinstance(all_of := part.get("allOf"), list):
                left += all_of
            found.append(part)
        return found

    def target(self, ref: str) -> Any:
        """Of a pointer into the schema; true, which allows everything, for any other reference."""
        if ref not in self._targets:
            pointer = unquote(ref)
            target = self._whole if pointer.partition("/")[0] == "#" and self._whole is not None else True
            for step in pointer.split("/")[1:]:
                name = step.replace("~1", "/").replace("~0", "~")
                if isinstance(target, dict):
                    target = target.get(name, True)
                elif isinstance(target, list):
                    is_index = name.isdecimal() and len(name) < 10 and int(name) < len(target)
                    target = target[int(name)] if is_index else True
            self._targets[ref] = target
        return self._targets[ref]

    def _are_parts_disjoint(self, one: Any, other: Any, depth: int) -> bool:
        if not isinstance(one, dict) or not isinstance(other, dict):
            return one is False or other is False
        lists = [_values(one), _values(other)]
        self._num_left -= math.prod(len(values) for values in lists if values is not None)
        if self._num_left < 0:
            return False
        for values, those in zip(lists, (other, one), strict=True):
            if values is not None:
                return all(_excludes(those, value) for value in values)
        kinds = kinds_of(one) & kinds_of(other)
        if kinds <= {"integer", "number"}:
            return not kinds or _are_ranges_apart(_range(one), _range(other))
        return kinds == {"object"} and any(
            self._are_two_disjoint(one["properties"][name], other["properties"][name], depth + 1)
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
    if _kind(value) not in kinds_of(schema):
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


def kinds_of(schema: dict[str, Any]) -> frozenset[str]:
    """Types of the values that it may allow, as far as `type` tells."""
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
