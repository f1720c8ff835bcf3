"""What of a JSON schema has to be held to, as the compiler of grammars understands it.

The compiler refuses keywords and formats that it does not know, also where they ask for nothing: those are left out before it
sees the schema. Some that it knows it reads in another way than they are meant: those are written otherwise.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from serving.contracts.errors import ValidationError
from serving.gateway.core.places import Place
from serving.gateway.core.schema_alternatives import Alternatives
from serving.gateway.core.schema_names import CountedNames, as_pattern
from serving.gateway.core.schema_numbers import check_exact, excluded_bounds, separate_exclusions, tighten
from serving.gateway.core.schema_patterns import for_compiler, ignores_space
from serving.gateway.core.strict_json import read_json

MAX_DEPTH = 120
"""Of objects and lists in each other. The compiler's bound is a little higher."""
FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
"""Of texts, that the compiler knows. Any other is an annotation (JSON Schema 2020-12, Validation, 7.2.1)."""
_IN_LEAP_YEARS = {
    "pattern": "^(?:[0-9]{4}-(?:0[13-9]|1[0-2])|[0-9]{4}-02-(?:[01]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
}
_NARROWER = {"date": _IN_LEAP_YEARS, "date-time": _IN_LEAP_YEARS, "hostname": {"maxLength": 253}}
"""What the compiler does not hold to of a format."""
_DIALECTS = {
    "json-schema.org/draft/2020-12/schema": "https://json-schema.org/draft/2020-12/schema",
    "json-schema.org/draft/2019-09/schema": "https://json-schema.org/draft/2019-09/schema",
    "json-schema.org/draft-07/schema": "http://json-schema.org/draft-07/schema#",
    "json-schema.org/draft-06/schema": "http://json-schema.org/draft-06/schema#",
    "json-schema.org/draft-04/schema": "http://json-schema.org/draft-04/schema#",
}
"""Versions of JSON Schema, without the parts of their names that people write in several ways."""
_BY_NAME = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose value has schemas by names."""
_VALUES = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose value is no schema, and has none in it."""
_ANNOTATIONS = frozenset(
    {"$comment", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly"}
)


def schema_of_text(field: str, text: str) -> Any:
    """A schema that is sent as a JSON text. Raises ValidationError."""
    try:
        return read_json(text, field=field, title=field)
    except RecursionError:
        raise ValidationError(field, f"{field} is nested too deeply; allowed: {MAX_DEPTH} levels") from None


def check_depth(field: str, schema: Any) -> None:
    """Raises ValidationError. What passes may be read and written by functions that call themselves."""
    level, depth = [schema], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValidationError(field, f"{field} is nested too deeply; allowed: {MAX_DEPTH} levels")
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]


def simplified(schema: Any, field: str = "schema") -> Any:
    """A schema that the compiler understands as it is meant: without what asks for nothing, and with what the compiler would read
    in another way written otherwise, or a little more strictly. Raises ValidationError, with the place, for what cannot be."""
    whole = json.loads(json.dumps(schema))
    # A `$ref` may point below a keyword that nobody knows, so those are followed too.
    found: list[tuple[Place, dict[str, Any]]] = []
    left = [(Place(field), whole)]
    while left:
        place, part = left.pop()
        inner: list[tuple[Place, Any, str | int]] = []
        """With what holds each, and where in it."""
        if isinstance(part, list):
            inner = [(place.at(index), part, index) for index in range(len(part))]
        elif isinstance(part, dict):
            found.append((place, part))
            separate_exclusions(part)
            for key, value in part.items():
                if key in _BY_NAME and isinstance(value, dict):
                    inner += [(place.at(key, name), value, name) for name in value]
                elif key not in _VALUES:
                    inner.append((place.at(key), part, key))
        for where, holder, step in inner:
            if _allows_nothing(holder[step]):
                holder[step] = False
            left.append((where, holder[step]))
    excluded = excluded_bounds([part for _, part in found])
    own_ids = (part.get(key) for _, part in found[1:] for key in ("$id", "id"))
    alternatives = Alternatives(whole, has_own_ids=any(isinstance(own_id, str) for own_id in own_ids))
    names = CountedNames(alternatives, _ANNOTATIONS)
    for place, part in reversed(found):  # the inner ones first: an outer one may ask for nothing because they do
        idle = [key for key, asks_for_nothing in _IDLE.items() if key in part and asks_for_nothing(part)]
        for key in idle:
            del part[key]
        names.write_down(part)
        as_pattern(part, _ANNOTATIONS)
        _rewrite(place, part, alternatives)
        tighten(place, part, excluded)
    return whole


def has_free_names(schema: Any) -> bool:
    """Whether an object may have names that the schema does not have, beside names or patterns that it does."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if _is_open(part) and any(part.get(key) for key in ("properties", "patternProperties", "required")):
                return True
            left += part.values()
        elif isinstance(part, list):
            left += part
    return False


def _is_open(part: Mapping[str, Any]) -> bool:
    return part.get("additionalProperties") is not False or bool(part.get("patternProperties"))


def _rewrite(place: Place, part: dict[str, Any], alternatives: Alternatives) -> None:
    """Raises ValidationError."""
    for key in ("const", "enum"):
        check_exact(place.at(key), part.get(key))
    if "$schema" in part:
        _name_dialect(place.at("$schema"), part)
    if isinstance(part.get("format"), str) and (narrower := _NARROWER.get(part["format"])):
        others = part.get("allOf", [])
        part["allOf"] = [*others, narrower] if isinstance(others, list) else others
    _check_num_names(place.at("minProperties"), part)
    if isinstance(part.get("pattern"), str):
        part["pattern"] = _pattern(place.at("pattern"), part["pattern"])
    if isinstance(by_pattern := part.get("patternProperties"), dict):
        part["patternProperties"] = {
            _pattern(place.at("patternProperties"), pattern): inner for pattern, inner in by_pattern.items()
        }
    if "anyOf" not in part and isinstance(branches := part.get("oneOf"), list) and alternatives.are_disjoint(branches):
        part["anyOf"] = part.pop("oneOf")


def _pattern(place: Place, pattern: str) -> str:
    if ignores_space(pattern):
        raise ValidationError(str(place), f"{place} is {pattern!r:.80}, with the flag x, which is not supported")
    return for_compiler(pattern)


def _check_num_names(place: Place, part: Mapping[str, Any]) -> None:
    """A name that is free may stand in an object twice, which counts as one."""
    least, required = part.get("minProperties"), part.get("required")
    num_certain = 1 + (len(required) if isinstance(required, list) else 0)
    if isinstance(least, int | float) and least > num_certain and _is_open(part):
        raise ValidationError(
            str(place),
            f"{place} is {least!s:.60}, which could not be held to where names are free; allowed: up to {num_certain}, "
            "one more than required has, or additionalProperties: false beside it and no patternProperties",
        )


def _name_dialect(place: Place, part: dict[str, Any]) -> None:
    """As the compiler spells it."""
    given = part["$schema"]
    dialect = re.sub("^https?://", "", given.rstrip("#")) if isinstance(given, str) else None
    if dialect not in _DIALECTS:
        raise ValidationError(
            str(place), f"{place} is {given!r:.80}; allowed: {', '.join(_DIALECTS.values())}, or none"
        )
    part["$schema"] = _DIALECTS[dialect]


def _allows_all(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and schema.keys() <= _ANNOTATIONS)


def _allows_nothing(schema: Any) -> bool:
    """As Zod and pydantic write it of what never is, or is undefined."""
    return isinstance(schema, dict) and schema.keys() - _ANNOTATIONS == {"not"} and _allows_all(schema["not"])


def _allows_all_names(schema: Any) -> bool:
    """Of properties, which are strings."""
    if not isinstance(schema, dict):
        return schema is True
    kinds = schema.get("type", "string")
    names_are_of_it = "string" in kinds if isinstance(kinds, list) else kinds == "string"
    return names_are_of_it and schema.keys() <= _ANNOTATIONS | {"type"}


def _holds_idle(is_idle: Callable[[Any], bool], value: Any) -> bool:
    """Whether all that stands by name in an object asks for nothing."""
    return isinstance(value, dict) and all(map(is_idle, value.values()))


def _may_lack_contained(part: Mapping[str, Any]) -> bool:
    """Whether `contains` and its bounds are met by every array."""
    return "contains" not in part or (_is_zero(part.get("minContains")) and "maxContains" not in part)


def _is_zero(value: Any) -> bool:
    return value == 0 and value is not False


def _is_no_condition(part: Mapping[str, Any]) -> bool:
    """Whether `if`, `then` and `else` together decide nothing."""
    return "if" not in part or all(_allows_all(part.get(key, True)) for key in ("then", "else"))


_IDLE: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "$dynamicAnchor": lambda part: True,  # what refers to it is refused
    "$recursiveAnchor": lambda part: True,
    "contains": _may_lack_contained,
    "dependencies": lambda part: _holds_idle(lambda value: value == [] or _allows_all(value), part["dependencies"]),
    "dependentRequired": lambda part: _holds_idle(lambda value: value == [], part["dependentRequired"]),
    "dependentSchemas": lambda part: _holds_idle(_allows_all, part["dependentSchemas"]),
    "else": _is_no_condition,
    "format": lambda part: isinstance(part["format"], str) and part["format"] not in FORMATS,
    "if": _is_no_condition,
    "maxContains": _may_lack_contained,
    "minContains": _may_lack_contained,
    "not": lambda part: part["not"] is False,
    "propertyNames": lambda part: _allows_all_names(part["propertyNames"]),
    "then": _is_no_condition,
    "unevaluatedItems": lambda part: _allows_all(part["unevaluatedItems"]),
    "unevaluatedProperties": lambda part: _allows_all(part["unevaluatedProperties"]),
    "uniqueItems": lambda part: part["uniqueItems"] is False or part.get("maxItems") in (0, 1),
}
"""Keywords that the compiler does not know, or not with every value: whether one asks for nothing, beside those around it."""
