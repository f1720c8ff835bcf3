"""JSON schemas to hold answers to: ours, of the kinds that requests bring, and those that Python packages ship."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from jsonschema_specifications import REGISTRY

_NAME = {"type": "string", "minLength": 1, "maxLength": 20}
_WORDS = ["red", "green", "blue"]


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _array(items: Any, least: int = 1, most: int = 4) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


OURS: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": {"type": "string", "maxLength": 60},
    "const": {"const": {"a": [1, None, "x"]}},
    "enum of kinds": {"enum": ["a", 1, None, True, [1], {"b": 2}]},
    "bounded integer": {"type": "integer", "minimum": -17, "maximum": 1234},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "several types": {"type": ["string", "integer", "null"], "maxLength": 20},
    "short string": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "unanchored pattern": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "duration": {"type": "string", "format": "duration"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "email": {"type": "string", "format": "email"},
    "hostname": {"type": "string", "format": "hostname"},
    "person": _object(name=_NAME, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "optional": _object(["id"], id={"type": "integer"}, note=_NAME, flag={"type": "boolean"}),
    "nested": _object(a=_object(b=_object(c=_object(d={"enum": _WORDS})))),
    "array": _array({"enum": _WORDS}),
    "matrix": _array(_array({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 3),
    "objects": _array(_object(key=_NAME, value={"type": "number"})),
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, _NAME], "items": False, "minItems": 2},
    "tuple and rest": {"type": "array", "prefixItems": [_NAME], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,5}$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [_object(kind={"const": "a"}, x={"type": "integer"}), _object(kind={"const": "b"}, y=_NAME)]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]},
    "allOf": {"allOf": [{"type": "object", "properties": {"a": _NAME}, "required": ["a"]}, {"properties": {"b": {"enum": [1]}}}]},
    "siblings of ref": {"$defs": {"s": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/s", "maxLength": 9}}},
    "ref": {"$defs": {"p": _object(name=_NAME)}, **_object(first={"$ref": "#/$defs/p"}, second={"$ref": "#/$defs/p"})},
    "recursive list": {
        "$ref": "#/$defs/node",
        "$defs": {"node": _object(["value"], value={"enum": _WORDS}, next={"$ref": "#/$defs/node"})},
    },
    "recursive tree": {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": _object(["name"], name=_NAME, children=_array({"$ref": "#/$defs/tree"}, 0, 2))},
    },
    "discriminated": _array(
        {"anyOf": [_object(type={"const": name}, **{name: {"type": "integer"}}) for name in _WORDS]}, 1, 3
    ),
    "unicode keys": _object(**{"größe": {"type": "integer"}, "名前": {"enum": ["東京", "é"]}, "🙂": {"type": "null"}}),
    "odd keys": _object(**{'quo"te': {"type": "null"}, "back\\slash": {"type": "null"}, "a/b~c": {"type": "null"}}),
    "escapes in enum": {"enum": ['"', "\\", "\n\t", "\u0000", "</s>"]},
    "large enum": {"enum": [f"value-{i}" for i in range(500)]},
    "many properties": _object(**{f"p{i}": {"type": "boolean"} for i in range(40)}),
    "many optional": _object([], **{f"p{i}": {"type": "boolean"} for i in range(12)}),
    "order of required": {"type": "object", "required": ["b", "a"], "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
    "additional typed": {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": {"type": "null"}},
    "annotations": {"title": "T", "description": "d", "default": 1, "examples": [1], "type": "integer", "deprecated": True},
    "pydantic": {
        "$defs": {"Item": {"properties": {"name": {"title": "Name", **_NAME}, "price": {"anyOf": [{"type": "number"},
            {"type": "null"}], "default": None}}, "required": ["name"], "title": "Item", "type": "object"}},
        "properties": {"items": _array({"$ref": "#/$defs/Item"}, 1, 2), "total": {"type": "number", "exclusiveMinimum": 0}},
        "required": ["items", "total"], "title": "Order", "type": "object",
    },
    "openai strict": _object(
        steps=_array(_object(explanation=_NAME, output=_NAME), 1, 3), final_answer={"anyOf": [_NAME, {"type": "null"}]}
    ),
    "geojson": _object(
        type={"const": "Point"},
        coordinates={"type": "array", "prefixItems": [{"type": "number"}] * 2, "items": False, "minItems": 2},
    ),
    "bank transfer": _object(
        iban={"type": "string", "pattern": "^[A-Z]{2}[0-9]{20}$"},
        cents={"type": "integer", "minimum": 1},
        on={"format": "date", "type": "string"},
    ),
}  # fmt: skip

UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
    "unevaluated": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "unique": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    "names": ({"type": "object", "propertyNames": {"format": "uuid"}}, "propertyNames"),
    "dependent": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "remote": ({"$ref": "https://example.com/schema.json"}, "example.com"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-ar"),
}
"""With what the refusal names."""


def packaged(most_bytes: int, every: int = 8) -> Iterator[tuple[str, Any]]:
    """Schemas that packages ship: of JSON schema itself, of setuptools, and of Kubernetes (the strict ones up to a size,
    one in so many)."""
    for uri in sorted(REGISTRY):
        yield f"json-schema {uri}", REGISTRY.contents(uri)
    for path in sorted(_package("setuptools").glob("config/*.schema.json")):
        yield f"setuptools {path.name}", json.loads(path.read_text())
    directory = max(_package("kubernetes_validate").glob("kubernetes-json-schema/*-local-strict"))
    definitions = json.loads((directory / "_definitions.json").read_text())["$defs"]
    for path in sorted(directory.glob("*-v1.json"))[::every]:
        schema = _bundled(json.loads(path.read_text()), definitions)
        if len(json.dumps(schema)) <= most_bytes:
            yield f"kubernetes {path.name}", schema


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _bundled(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """With what it refers to, instead of references to a file beside it; descriptions are left out."""
    needed: dict[str, Any] = {}

    def rewritten(value: Any) -> Any:
        match value:
            case {"$ref": str(target)}:
                name = target.rpartition("/")[2]
                if name not in needed:
                    needed[name] = None  # it may refer to itself
                    needed[name] = rewritten(definitions[name])
                return {"$ref": f"#/$defs/{name}"}
            case dict():
                return {
                    key: {name: rewritten(inner) for name, inner in part.items()}
                    if key == "properties"
                    else rewritten(part)
                    for key, part in value.items()
                    if key not in ("description", "$schema") and not key.startswith("x-kubernetes")
                }
            case list():
                return [rewritten(item) for item in value]
            case _:
                return value

    whole = rewritten(schema)
    return whole | ({"$defs": needed} if needed else {})


def all_schemas(most_bytes: int) -> list[tuple[str, Any]]:
    """Of the three sources."""
    return list(chain(OURS.items(), packaged(most_bytes)))
