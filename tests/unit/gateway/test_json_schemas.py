"""What of a JSON schema is held to, and what may stand in it and asks for nothing."""

import json
import tracemalloc
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.matching import GrammarCompiler, GrammarError
from serving.config import LimitsConfig
from serving.contracts.errors import ValidationError
from serving.gateway.core.constraints import (
    Constraint,
    JsonSchema,
    LarkGrammar,
    OneOf,
    Regex,
    check_constraint,
    grammar_of,
)
from serving.gateway.core.json_schemas import FORMATS, MAX_DEPTH, schema_of_text, simplified
from tests.unit.gateway.test_structured_output import ASK, TABLE, api, serve

STRING: dict[str, Any] = {"type": "string"}
# What JSON Schema names, OpenAPI's registry, and what pydantic and Zod write.
OTHER_FORMATS = [
    "idn-email", "idn-hostname", "uri-reference", "uri-template", "iri", "iri-reference", "regex", "json-pointer",
    "relative-json-pointer", "int32", "int64", "float", "double", "byte", "binary", "password", "uuid4", "path", "file-path",
    "ipvanyaddress", "base64url", "json-string", "date-time-local", "time-delta", "cuid", "emoji", "unknown", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TABLE)


def text_of(schema: Any) -> str:
    return grammar_of(JsonSchema(field="schema", schema=schema), strips_space=False).text


def test_the_formats_that_we_name_are_those_that_the_compiler_knows(compiler: GrammarCompiler) -> None:
    for name in FORMATS:
        compiler.compile("start: %json " + json.dumps(STRING | {"format": name}))
        assert name in text_of(STRING | {"format": name})
    for name in OTHER_FORMATS:
        if name != "unknown":  # which the compiler takes for any text
            with pytest.raises(GrammarError, match="Unknown format"):
                compiler.compile("start: %json " + json.dumps(STRING | {"format": name}))
        compiler.compile(text_of(STRING | {"format": name}))


IDLE: list[Any] = [
    *({"format": name} for name in OTHER_FORMATS),
    {"propertyNames": {"type": "string"}},
    {"propertyNames": {"type": ["string", "null"], "title": "Name"}},
    {"propertyNames": {"type": "string", "format": "uuid4"}},
    {"propertyNames": {}},
    {"propertyNames": True},
    {"uniqueItems": False},
    {"unevaluatedProperties": True},
    {"unevaluatedProperties": {"description": "any"}},
    {"unevaluatedItems": True},
    {"unevaluatedItems": {}},
    {"dependentRequired": {}},
    {"dependentRequired": {"a": []}},
    {"dependentSchemas": {}},
    {"dependentSchemas": {"a": True, "b": {}}},
    {"dependencies": {}},
    {"dependencies": {"a": [], "b": True}},
    {"minContains": 0},
    {"minContains": 3, "maxContains": 1},
    {"contains": {"const": 1}, "minContains": 0},
    {"not": False},
    {"if": {"const": 1}},
    {"then": {"const": 1}, "else": False},
    {"if": {"const": 1}, "then": True, "else": {}},
    {"additionalItems": True},
    {"$dynamicAnchor": "node"},
]
BUSY: list[Any] = [
    {"propertyNames": {"pattern": "^a", "maxLength": 3}},
    {"propertyNames": {"type": "integer"}},
    {"propertyNames": {"type": "integer", "minLength": 3}},
    {"propertyNames": {"format": "uuid"}},
    {"propertyNames": False},
    {"uniqueItems": True},
    {"unevaluatedProperties": False},
    {"unevaluatedProperties": {"type": "null"}},
    {"unevaluatedItems": False},
    {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"required": ["b"]}}},
    {"dependencies": {"a": ["b"]}},
    {"contains": {"const": 1}},
    {"contains": {"const": 1}, "minContains": 1},
    {"contains": {"const": 1}, "minContains": False},
    {"contains": {"const": 1}, "minContains": 0, "maxContains": 2},
    STRING | {"not": True},
    STRING | {"not": {}},
    {"not": {"const": 1}},
    {"if": {"const": 1}, "then": {"const": 1}},
    {"if": {"const": 1}, "else": False},
    {"$dynamicRef": "#node"},
    {"format": 5},
]
INSIDE = {
    "root": lambda part: part,
    "property": lambda part: {"type": "object", "properties": {"a": part}},
    "definition": lambda part: {"$ref": "#/$defs/a", "$defs": {"a": part}},
    "definition of OpenAPI": lambda part: {"$ref": "#/components/schemas/a", "components": {"schemas": {"a": part}}},
    "items": lambda part: {"type": "array", "items": part},
    "prefix": lambda part: {"type": "array", "prefixItems": [{"type": "null"}, part]},
    "list of items": lambda part: {"type": "array", "items": [part]},
    "values": lambda part: {"type": "object", "additionalProperties": part},
    "pattern": lambda part: {"type": "object", "patternProperties": {"^x$": part}},
    "anyOf": lambda part: {"anyOf": [{"type": "null"}, {"allOf": [part]}]},
}


@pytest.mark.parametrize("place", INSIDE)
def test_what_asks_for_nothing_is_left_out_and_everything_else_stays(compiler: GrammarCompiler, place: str) -> None:
    inside = INSIDE[place]
    for part in IDLE:
        given = inside(STRING | part)
        before = json.dumps(given)
        left = simplified(given)
        assert json.dumps(given) == before, "the client's own is told to the model"
        if "additionalItems" not in part:  # which the compiler knows
            assert left == inside(STRING), part
        compiler.compile(text_of(given))
    for part in BUSY:
        assert simplified(inside(part)) == inside(part)
        with pytest.raises(GrammarError):
            compiler.compile(text_of(inside(part)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"format": {"const": "path"}, "not": {"type": "null"}, "if": True}},
        {"const": {"format": "path", "uniqueItems": False}},
        {"enum": [{"format": "path"}, [{"not": False}]]},
        {"$defs": {"format": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/format"}}},
        {"type": "string", "format": "time", "default": {"format": "path"}, "examples": [{"format": "path"}]},
        True,
        {},
    ],
)
def test_what_has_the_name_of_a_keyword_and_is_none_stays(schema: Any) -> None:
    assert simplified(schema) == schema


@given(
    st.recursive(
        st.booleans()
        | st.fixed_dictionaries({}, optional={"format": st.sampled_from(["date", "x"]), "uniqueItems": st.booleans()}),
        lambda inner: st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["string", "array", "object"]),
                "propertyNames": inner,
                "not": inner,
                "contains": inner,
                "minContains": st.integers(0, 2),
                "items": inner,
                "dependentRequired": st.dictionaries(
                    st.sampled_from("ab"), st.lists(st.sampled_from("ab"), max_size=1)
                ),
                "dependentSchemas": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
                "if": inner,
                "then": inner,
                "else": inner,
            },
        ),
        max_leaves=12,
    ),
    st.lists(
        st.recursive(
            st.sampled_from(["a", "1999-12-31", 1, None]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=6,
    ),
)
def test_a_simplified_schema_says_the_same(schema: Any, values: list[Any]) -> None:
    """Another implementation is the judge."""
    before = jsonschema.Draft202012Validator(schema)
    after = jsonschema.Draft202012Validator(simplified(schema))
    for value in values:
        assert before.is_valid(value) == after.is_valid(value)


class Formats(pydantic.BaseModel):
    """Types of pydantic's whose formats nobody enforces, beside some that are."""

    path: Path
    address: pydantic.IPvAnyAddress | None
    secret: pydantic.SecretStr
    raw: bytes
    names: dict[Path, int]
    host: IPv4Address


async def test_the_openai_package_parses_types_with_other_formats() -> None:
    async with serve() as gateway, api(gateway) as client:
        kinds: list[Any] = [pydantic.UUID4, pydantic.Base64Str]
        for kind in kinds:
            schema = pydantic.TypeAdapter(kind).json_schema()
            form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            answer = await client.chat.completions.create(
                model="tiny", messages=ASK, response_format=form, max_tokens=9
            )
            assert answer.choices[0].message.content
        tool = openai.pydantic_function_tool(Formats)
        choices: list[Literal["auto", "required"]] = ["auto", "required"]
        for choice in choices:
            called = await client.chat.completions.create(
                model="tiny", messages=ASK, tools=[tool], tool_choice=choice, max_tokens=5
            )
            assert called.choices
        (asked,) = gateway.backend.requests
        told = bytes(token_id for token_id in asked.prompt_token_ids if token_id < 256).decode()
        assert '"format": "path"' in told, "to the model an annotation may say something"
        assert '"format": "ipv4"' in asked.grammar and '"format": "path"' not in asked.grammar


# ---- as texts ----

HALF = ["\\ud800", "\\udfff", "a\\ud83d", "\\ud83dx"]


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(
    "schema",
    ['{"const":"%s"}', '{"properties":{"%s":{}}}', '{"enum":["a",["%s"]]}', '{"description":"%s"}', '{"x":{"%s":1}}'],
)
def test_half_of_a_surrogate_pair_is_refused(schema: str, half: str) -> None:
    read = schema_of_text("field", schema % half)
    with pytest.raises(ValidationError, match="field holds half of a surrogate pair") as error:
        check_constraint(JsonSchema(field="field", schema=read), LimitsConfig())
    assert error.value.field == "field"


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (Regex(field="f", pattern="\ud800"), "f"),
        (OneOf(field="f", texts=["a", "\udfff"]), "f[1]"),
        (LarkGrammar(field="f", text='start: "\ud800"'), "f"),
        (JsonSchema(field="f", schema=True, whitespace_pattern="\ud800"), "f"),
    ],
)
def test_so_it_is_in_every_other_form(constraint: Constraint, field: str) -> None:
    with pytest.raises(ValidationError, match="half of a surrogate pair") as error:
        check_constraint(constraint, LimitsConfig())
    assert error.value.field == field


def nested(depth: int, kind: str) -> str:
    return {
        "items": '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1),
        "enum": '{"enum":' + "[" * (depth - 1) + "]" * (depth - 1) + "}",
    }[kind]


@pytest.mark.parametrize("kind", ["items", "enum"])
def test_depth_has_a_bound_that_the_compiler_does_not_meet(compiler: GrammarCompiler, kind: str) -> None:
    deepest = schema_of_text("field", nested(MAX_DEPTH, kind))
    check_constraint(JsonSchema(field="field", schema=deepest), LimitsConfig())
    if kind == "items":
        compiler.compile(text_of({"properties": {"a": {}}} | deepest))
    for depth in (MAX_DEPTH + 1, 300, 600, 900, *range(930, 1010), 30_000):
        with pytest.raises(ValidationError, match="field is nested too deeply; allowed: 120 levels"):
            read = schema_of_text("field", nested(depth, kind))
            check_constraint(JsonSchema(field="field", schema=read), LimitsConfig())


def test_a_text_that_is_no_json_is_told_so() -> None:
    with pytest.raises(ValidationError, match="field is not valid JSON at character 1"):
        schema_of_text("field", "{")


def test_places_of_parts_take_no_memory() -> None:
    """A long name above many parts would stand in the place of each."""
    schema = {"k" * 30_000: [{} for _ in range(8000)], "pattern": "(?x)a"}
    tracemalloc.start()
    try:
        with pytest.raises(ValidationError, match=r"^schema\.pattern is"):
            simplified(schema)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    with pytest.raises(ValidationError, match=r"^schema\.k{100}…\[1\]\.pattern is"):
        simplified({"k" * 30_000: [{}, {"pattern": "(?x)a"}]})
