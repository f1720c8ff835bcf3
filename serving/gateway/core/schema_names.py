"""Names that the properties of an object may have, where a JSON schema counts them up: pydantic's `dict[Enum, X]`, Zod's records.

The compiler of grammars knows no `propertyNames`. The same said in `properties` it does.
"""

import json
from typing import Any

from serving.gateway.core.schema_alternatives import Alternatives, kinds_of

_MAX_ADDED_CHARS = 200_000
"""Of one schema: what is said once of all names is written down for each."""
_MAX_DEPTH = 8
"""Of references and unions in each other."""


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
