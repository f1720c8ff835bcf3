"""Names that the properties of an object may have: pydantic's `dict[Enum, X]` and `dict[constr(…), X]`, Zod's records.

The compiler of grammars knows no `propertyNames`. The same said in `properties`, where names are counted up, or in
`patternProperties` it does.
"""

import json
from collections.abc import Mapping
from typing import Any

from serving.gateway.core.schema_alternatives import Alternatives, kinds_of

_MAX_ADDED_CHARS = 200_000
"""Of one schema: what is said once of all names is written down for each."""
_MAX_DEPTH = 8
"""Of references and unions in each other."""


def as_pattern(part: dict[str, Any], annotations: frozenset[str]) -> None:
    """Change a part whose `propertyNames` ask for a pattern, as the compiler reads it, or for a length, so that its `allOf` says
    the same with `patternProperties`, beside which no other name is allowed. Nothing is changed where the part has patterns of
    its own: the compiler takes no two that one name may fit."""
    pattern = _pattern_of(part.get("propertyNames"), annotations)
    others = part.get("allOf", [])
    if pattern is not None and isinstance(others, list) and not part.get("patternProperties"):
        del part["propertyNames"]
        part["allOf"] = [*others, {"patternProperties": {pattern: True}, "additionalProperties": False}]


def _pattern_of(schema: Any, annotations: frozenset[str]) -> str | None:
    """A regular expression that finds something in just the texts that a schema allows; None where there may be none."""
    if not isinstance(schema, dict) or "string" not in kinds_of(schema):
        return None
    match {key: value for key, value in schema.items() if key not in annotations and key != "type"}:
        case {"pattern": str(pattern), **others} if not others:
            return pattern
        case {"minLength": _} | {"maxLength": _} as lengths if lengths.keys() <= {"minLength", "maxLength"}:
            return _of_length(lengths)
        case _:
            return None


def _of_length(lengths: Mapping[str, Any]) -> str | None:
    least, most = lengths.get("minLength", 0), lengths.get("maxLength", "")
    if not all(each == "" or (type(each) is int and each >= 0) for each in (least, most)):
        return None
    return f"^(?s:.){{{least},{most}}}$"


class CountedNames:
    """Of one schema."""

    def __init__(self, alternatives: Alternatives, annotations: frozenset[str]) -> None:
        self._alternatives = alternatives
        self._annotations = annotations
        self._num_chars_left = _MAX_ADDED_CHARS

    def write_down(self, part: dict[str, Any]) -> None:
        """Change a part whose `propertyNames` counts names up, so that it has these as `properties`, and no others. Nothing is
        changed where that would be too long, or where `patternProperties` say something of the names as well."""
        names = self._allowed(part.get("propertyNames"))
        properties = part.get("properties", {})
        if names is None or part.get("patternProperties") or not isinstance(properties, dict):
            return
        rest = part.get("additionalProperties", True)
        added = {name: rest for name in names if name not in properties}
        self._num_chars_left -= sum(map(len, added)) + len(added) * len(json.dumps(rest))
        if self._num_chars_left < 0:
            return
        del part["propertyNames"]
        part["properties"] = {name: inner for name, inner in properties.items() if name in names} | added
        part["additionalProperties"] = False

    def _allowed(self, schema: Any, depth: int = 0) -> dict[str, None] | None:
        """The texts that a schema allows, in its order; None where it does not count them up, or asks for more."""
        if depth == _MAX_DEPTH or not isinstance(schema, dict) or "string" not in kinds_of(schema):
            return None
        match [*(schema.keys() - self._annotations - {"type"})]:
            case ["const"]:
                values = [schema["const"]]
            case ["enum"] if isinstance(schema["enum"], list):
                values = schema["enum"]
            case ["$ref"] if isinstance(schema["$ref"], str):
                return self._allowed(self._alternatives.target(schema["$ref"]), depth + 1)
            case ["anyOf"] if isinstance(schema["anyOf"], list):
                values = []
                for branch in schema["anyOf"]:
                    names = self._allowed(branch, depth + 1)
                    if names is None:
                        return None
                    values += names
            case _:
                return None
        return dict.fromkeys(value for value in values if isinstance(value, str))
