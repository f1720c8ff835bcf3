"""Schemas that the compiler of grammars reads in another way than they are meant: what is written instead allows no others."""

import json
import re
from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.matching import Grammar, GrammarCompiler, GrammarError, Matcher, allowed_bits
from serving.config import LimitsConfig
from serving.contracts.errors import ValidationError
from serving.gateway.core.constraints import JsonSchema, Regex, check_constraint, grammar_of
from serving.gateway.core.grammar_worker import Trial, try_out
from serving.gateway.core.json_schemas import schema_of_text, simplified
from serving.gateway.core.schema_numbers import FARTHEST
from serving.gateway.http.body import _read_json
from tests.unit.gateway.test_structured_output import TABLE, ends

COMPILER = GrammarCompiler(TABLE)
FLOAT32, MAX_VALUE = 34028234663852886 * 10**22, 17976931348623157 * 10**292
"""Bounds that Zod writes: z.float32() and z.float64()."""


def compiled(schema: Any) -> Grammar:
    constraint = JsonSchema(field="schema", schema=schema, whitespace_pattern="")
    check_constraint(constraint, LimitsConfig())
    return COMPILER.compile(grammar_of(constraint, strips_space=False).text)


def allows(grammar: Grammar, text: str) -> bool:
    matcher = Matcher(grammar, spares_end=False)
    mask_W = np.zeros(matcher.num_words, dtype=np.int32)
    for byte in text.encode():
        if not (matcher.is_open and matcher.fill(mask_W)):
            return False
        if not allowed_bits(mask_W[None], range(byte, byte + 1))[0, 0]:
            return False
        matcher.consume(byte)
    return ends(matcher)


def holds_raw(grammar: str, text: str) -> bool:
    return allows(COMPILER.compile(grammar), text)


# ---- bounds ----

BOUNDS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 10, -10, 0.5, -0.5, 0.25, 1.5, -1.5, 10.5, 1e-9, 2**53, -(2**53), 2**53 + 1, 2**60 + 1, 10**17]
    ),
    st.sampled_from(
        [2**63 - 1, -(2**63), 2**64 - 1, FARTHEST, -FARTHEST, 1.7976931348623157e308, -MAX_VALUE, FLOAT32, -FLOAT32]
    ),
    st.integers(-30, 30),
    st.integers(-40, 40).map(lambda quarter: quarter / 4),
    st.integers(-(2**62), 2**62),
)
KEYS = ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"]
WHOLE = st.sampled_from([0, 0, 1, -1, 10, -10, 2**53, -(2**53)])
NEAR = st.builds(
    lambda bound, width, lower, upper: {lower: bound, upper: bound + width},
    WHOLE | WHOLE.map(lambda bound: bound - 0.5),
    st.sampled_from([0.25, 0.5, 1, 2]),
    st.sampled_from(KEYS[:2]),
    st.sampled_from(KEYS[2:]),
)
PARTS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, BOUNDS)) | NEAR
STEPS = [Decimal(step) for step in ("0", "1e-30", "0.1", "0.25", "1", "2", "1024")]


def near(bounds: list[int | float]) -> list[Decimal]:
    return [Decimal(bound) + sign * step for bound in (*bounds, 0) for step in STEPS for sign in (1, -1)]


def spelt(number: Decimal, *, whole: bool) -> str:
    with_digits = f"{number:f}"
    return with_digits.partition(".")[0] if whole else with_digits


@pytest.mark.parametrize("bound", [2**53, 2**55, 2**60, 2**60 + 1, 2**61 + 512, 4142516628211395584, 10**17, 10**18])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_of_many_digits_are_not_rounded_outwards(bound: int, key: str, sign: int) -> None:
    """The compiler writes 1152921504606847000 for 2^60 where fractions are allowed."""
    given = sign * bound
    try:
        grammar = compiled({"type": "number", key: given})
    except GrammarError:
        return  # numbers beyond what it can spell
    judge = jsonschema.Draft202012Validator({"type": "number", key: given})
    steps = [Decimal(step) for step in ("0", "0.1", "1.1", "2", "5", "23", "100", "511", "513", "5000")]
    for number in [given + each * step for step in steps for each in (1, -1)]:
        if allows(grammar, f"{number:f}"):
            assert judge.is_valid(Fraction(number)), number


@given(st.sampled_from(["number", "integer"]), PARTS, st.just({}) | PARTS, st.booleans())
def test_no_number_beyond_a_bound_is_allowed(
    kind: str, part: dict[str, Any], other: dict[str, Any], is_apart: bool
) -> None:
    """In one part of a schema, and in two that are added up."""
    schema = {"type": kind} | part | ({"allOf": [other]} if is_apart else other)
    try:
        grammar = compiled(schema)
    except ValidationError as error:
        assert "imum is" in str(error) and "allowed: numbers from -9223372036854774784" in str(error)
        return
    except GrammarError:
        return  # no number is between them, or they are out of reach
    judge = jsonschema.Draft202012Validator(schema)
    for number in near([*part.values(), *other.values()]):
        if abs(number) > 10**20:
            continue
        text = spelt(number, whole=kind == "integer")
        for each in (text, f"-{text}".replace("--", "")):
            value = Fraction(each)
            if allows(grammar, each):
                assert judge.is_valid(int(value) if value == int(value) else value), each


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, ["0.1", "0.0000001", "0.49"], ["0", "-0", "0.0", "0.5"]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ["1.1", "1.01"], ["1", "1.0", "1.5"]),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.001"], ["0", "-0", "-0.0"]),
        ({"minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0"]),
        ({"minimum": 0, "exclusiveMinimum": False, "maximum": 0.5}, ["0", "0.5"], ["-0.1"]),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, ["0.5"], ["0"]),
        ({"exclusiveMinimum": 0, "maximum": 0.9, "multipleOf": 0.1}, ["0.1", "0.9"], ["0", "0.0"]),
        ({"exclusiveMinimum": 0}, ["0.1", "123"], ["0", "-1"]),
        ({"minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}, ["6.02e23", "-5", "0"], []),
        ({"minimum": -MAX_VALUE, "maximum": MAX_VALUE}, ["6.02e23", "-5", "0"], []),  # as whole numbers are read
        ({"minimum": -FLOAT32, "maximum": FLOAT32}, ["-5.25", "0", "9223372036854770000.5"], ["1e40"]),
        ({"exclusiveMinimum": -(10**30), "maximum": 1}, ["-9223372036854770000", "1"], ["2", str(-(10**31))]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["0", str(FARTHEST)], [str(2**63), str(-(2**63) - 1)]),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, ["0", str(FARTHEST)], ["-1", str(2**64)]),
        ({"type": "integer", "exclusiveMinimum": 2**53}, [str(2**53 + 2)], [str(2**53)]),
        ({"type": "integer", "minimum": 2**53 + 1}, [str(2**53 + 2)], [str(2**53)]),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 3}, ["1", "3"], ["0", "4"]),
    ],
)  # fmt: skip
def test_bounds(schema: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    grammar = compiled({"type": "number"} | schema)
    for text in allowed:
        assert allows(grammar, text), text
    for text in refused:
        assert not allows(grammar, text), text


def test_the_compiler_alone_would_allow_what_is_excluded() -> None:
    """When it does not any more, schema_numbers.excluded_bounds can go."""
    assert holds_raw('start: %json {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}', "0")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"type": "number", "minimum": 3.4028234663852886e38}}}, "schema.properties.a.minimum"),
        ({"type": "integer", "minimum": 10**20}, "schema.minimum"),
        ({"type": "number", "exclusiveMinimum": 1e20}, "schema.exclusiveMinimum"),
        ({"anyOf": [{"type": "integer", "maximum": -(10**19)}]}, "schema.anyOf[0].maximum"),
    ],
)
def test_bounds_out_of_reach_are_refused_by_name(schema: Any, place: str) -> None:
    with pytest.raises(ValidationError, match="allowed: numbers from -9223372036854774784 to") as error:
        simplified(schema)
    assert error.value.field == place and str(error.value).startswith(f"{place} is ")


def test_a_bound_that_only_the_compiler_cannot_spell_is_told_in_our_words() -> None:
    verdict = try_out(COMPILER, Trial('start: %json {"type": "integer", "minimum": 2000000000000000000}'))
    assert verdict.error.startswith("minimum is supported up to 10^18 where there is no maximum")


# ---- values ----


@given(
    st.one_of(
        st.integers(-(2**70), 2**70),
        st.integers(2**53 - 4, 2**53 + 4),
        st.integers(2**63 - 2048, 2**63 + 2048),
        st.integers(0, 30).map(lambda zeros: 7 * 10**zeros),
        st.floats(allow_nan=False, allow_infinity=False),
        st.builds(lambda digits, places: digits / 10**places, st.integers(1, 10**16), st.integers(1, 16)),
    ),
    st.sampled_from(["const", "enum", "inner"]),
)
def test_a_number_is_written_as_it_was_sent_or_refused(number: int | float, how: str) -> None:
    schema = {"const": {"const": number}, "enum": {"enum": ["a", number]}, "inner": {"const": {"a": [number]}}}[how]
    digits = spelt(Decimal(repr(number)), whole=number == int(number))
    try:
        grammar = compiled(schema)
    except ValidationError as error:
        assert (
            abs(number) > 2**53 or len(repr(number)) > 15 or 0 < abs(number) < 1e-290
        )  # the compiler divides by 1e309
        assert error.field in ("schema.const", "schema.enum") and str(number) in str(error)
        return
    inside = '{"a":[%s]}' if how == "inner" else "%s"
    assert allows(grammar, inside % digits)
    assert not allows(grammar, inside % f"{digits}1")


def test_numbers_that_are_no_values_may_be_any() -> None:
    schema = {"type": "integer", "default": 2**53 + 1, "examples": [2**70 + 1]}
    assert simplified(schema) == schema


def test_a_number_that_is_no_float64_is_refused() -> None:
    for text in ('{"maximum": 1e400}', '{"enum": [-1e999]}'):
        with pytest.raises(ValidationError, match="field holds a number that is too large for a float64"):
            check_constraint(JsonSchema(field="field", schema=schema_of_text("field", text)), LimitsConfig())


# ---- patterns ----

CLASSES = [
    r'[^"]', r"[^\\]", r'[^"\\]', r'[^\\/:*?"<>|]', r"[\x00-\x1f]", r"[\x00-\x21]", r"[^\x20-\x7f]", r"[^a-z]", r'[^"\n]',
    r'[^\s"]', r'[^\d"]', r'[^\]"]', r'[^-"]', r'["-]', r"[\]]", r"[\\\]a]", r"[\w.-]", r".", r"\D", r"\S", r"[\t\n]", r"\[",
    r"\\", r"[\x01-\x08]", r'["\\]', r"[^\[\]]", "x",
    "[^[]", "[[({]", r"[^[\]]", "[a&&x]", "[^&&]", "[a--x]", "[ --]", "[--/]", "[a~~x]", "[!-~]", "[!-[]", r"[\w-]", "[a^]",
    "[^^]", "[[:digit:]", r"[\b]",
]  # fmt: skip
CHARACTERS = [
    '"',
    "\\",
    "\x01",
    "\b",
    ":",
    "~",
    "^",
    "\t",
    "\n",
    "\x1f",
    " ",
    "!",
    "a",
    "1",
    "x",
    "[",
    "]",
    "-",
    "&",
    "/",
    "é",
    "🙂",
]


@pytest.mark.filterwarnings("ignore:Possible (nested )?set:FutureWarning")  # of what may come to mean more in Python
@given(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3), st.text(st.sampled_from(CHARACTERS), max_size=3))
def test_a_pattern_allows_the_texts_that_it_matches(classes: list[str], text: str) -> None:
    """The standard library's is the judge."""
    pattern = "^" + "".join(classes) + "$"
    meant = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    grammar = compiled({"type": "string", "pattern": pattern})
    escaped = json.dumps(text, ensure_ascii=False)
    assert allows(grammar, escaped) == (meant.match(text) is not None)
    for each in CHARACTERS:
        one = compiled({"type": "string", "pattern": f"^{classes[0]}$"})
        assert allows(one, json.dumps(each, ensure_ascii=False)) == (
            re.fullmatch(classes[0], each, re.ASCII) is not None
        ), each


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        (r"^\P{P}$", ["a", "\n"], ['"', "\\", "!"]),
        (r"^[[:^punct:]]$", ["[]", "u]"], ["a", "\n", '"', "\\", "[", "a]"]),
        (r"^[[^\"]x]$", ["[x]", '"x]'], ["a", "\\", '"', "x]", "ax]"]),
        (r'^[^]"]$', ['a"]', '""]', '\n"]'], ["a", '"', '"]']),
        (r"^(?:[]|a)$", ["a"], ["", "]"]),
        (r"^[\d-x]$", ["1", "-", "x"], ["a", "."]),
        (r"^[\p{L}-\u{7a}]$", ["a", "-"], ["1", "{"]),
        (r"(?i)^[^a\"]$", ["b", "\\"], ["A", "a", '"']),
        (r"^[\x00]$", ["\x00"], ["a", '"']),
        (r'^(?:[^"\\]|\\.)*$', ["a", "\\n", '\\"'], ['"', "\\"]),
    ],
)
def test_patterns_that_python_does_not_know(pattern: str, allowed: list[str], refused: list[str]) -> None:
    grammar = compiled({"type": "string", "pattern": pattern})
    for text in allowed:
        assert allows(grammar, json.dumps(text)), text
    for text in refused:
        assert not allows(grammar, json.dumps(text)), text


def test_names_that_match_a_pattern() -> None:
    schema = {"type": "object", "patternProperties": {'^[^"]$': {"type": "null"}}, "additionalProperties": False}
    grammar = compiled(schema)
    assert allows(grammar, '{"a":null}') and not allows(grammar, '{"\\"":null}')


def test_the_compiler_alone_would_allow_a_quotation_mark() -> None:
    """When it does not any more, schema_patterns can go."""
    assert holds_raw('start: %json {"type": "string", "pattern": "^[^\\"]$"}', '"\\""')


def test_a_pattern_with_comments_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"schema\.items\.pattern is .*, with the flag x, which is not supported"):
        simplified({"items": {"pattern": "(?ix) a # [b"}})


@pytest.mark.parametrize("pattern", [r"\(?x\)?", r"[(?x]", r"(?i)x", r"(?i:x)", r"\[(?:x)", r"(?-x)a"])
def test_what_looks_like_the_flag_x_is_none(pattern: str) -> None:
    simplified({"pattern": pattern})
    check_constraint(Regex(field="r", pattern=pattern), LimitsConfig())


@pytest.mark.parametrize("pattern", ["(?x)\n a # [b", "(?ix: a\n b)", r"\\(?x) a", r"\[(?x) a"])
def test_a_regular_expression_with_comments_is_refused(pattern: str) -> None:
    """Its line breaks would be written otherwise, which changes what a comment is."""
    with pytest.raises(ValidationError, match=r"^r is .*, with the flag x, which is not supported"):
        check_constraint(Regex(field="r", pattern=pattern), LimitsConfig())


# ---- alternatives ----

BRANCHES = st.one_of(
    st.sampled_from(
        [
            {"const": 1}, {"const": 1.0}, {"const": True}, {"const": "a"}, {"enum": [1, 2]}, {"enum": [3, "b"]}, {"enum": []},
            {"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": ["null", "boolean"]}, {}, True, False,
            {"const": None}, {"const": [1]}, {"const": {"a": 1}}, {"type": "array"}, {"type": "object"},
            {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": 2}}},
        ]
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional=dict.fromkeys(KEYS, st.sampled_from([0, 1, 1.5, 2, 3])),
    ),
)  # fmt: skip
VALUES = [None, True, False, 0, 1, 1.0, 1.25, 1.5, 2, 3, 4, -1, "a", "b", [], [1], {}, {"k": 1}, {"k": 2}, {"a": 1}]


@given(st.lists(BRANCHES, min_size=1, max_size=3))
def test_one_of_several_becomes_any_only_where_no_two_fit(branches: list[Any]) -> None:
    written = simplified({"oneOf": branches})
    before, after = jsonschema.Draft202012Validator({"oneOf": branches}), jsonschema.Draft202012Validator(written)
    if "anyOf" not in written:
        return
    for value in VALUES:
        assert before.is_valid(value) == after.is_valid(value)


DEFINITIONS: dict[str, Any] = {
    "a/b": {"type": "object", "properties": {"k": {"$ref": "#/$defs/one"}}, "required": ["k"]},
    "one": {"const": 1},
    "chain": {"$ref": "#/$defs/one"},
    "loop": {"$ref": "#/$defs/loop"},
    "knot": {"type": "object", "properties": {"k": {"$ref": "#/$defs/knot"}}, "required": ["k"]},
    "never": False,
    "list": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "small": {"allOf": [{"type": "number"}, {"maximum": 2}]},
}
REFS = st.sampled_from(
    [
        f"#/$defs/{name}"
        for name in ("a~1b", "a%2Fb", "one", "chain", "knot", "never", "small", "list/anyOf/0", "list/anyOf/1")
    ]
)
REFERRING = st.one_of(
    BRANCHES,
    st.builds(lambda ref: {"$ref": ref}, REFS),
    st.builds(lambda ref, beside: {"$ref": ref} | beside, REFS, BRANCHES.filter(lambda each: isinstance(each, dict))),
    st.builds(lambda ref, beside: {"allOf": [{"$ref": ref}, beside]}, REFS, BRANCHES),
)


@given(
    st.lists(REFERRING, min_size=1, max_size=3),
    st.sampled_from(["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#"]),
)
def test_references_are_followed_to_what_they_mean(branches: list[Any], dialect: str) -> None:
    schema = {"$schema": dialect, "$defs": DEFINITIONS, "oneOf": branches}
    written = simplified(schema)
    if "anyOf" not in written:
        return
    judge: Any = jsonschema.validators.validator_for(schema)
    for value in VALUES:
        assert judge(schema).is_valid(value) == judge(written).is_valid(value)


@pytest.mark.parametrize(
    ("branches", "is_certain"),
    [
        ([{"$ref": "#/$defs/a~1b"}, {"type": "null"}], True),
        ([{"$ref": "#/$defs/chain"}, {"const": 2}, {"type": "string"}], True),
        ([{"$ref": "#/$defs/small"}, {"type": "number", "exclusiveMinimum": 2}], True),
        ([{"$ref": "#/$defs/list/anyOf/0"}, {"$ref": "#/$defs/list/anyOf/1"}], True),
        ([{"$ref": "#/$defs/loop"}, {"type": "null"}], False),
        ([{"$ref": "#/$defs/knot"}, {"$ref": "#/$defs/knot"}], False),
        ([{"$ref": "#/$defs/none"}, {"type": "null"}], False),
        ([{"$ref": f"#/$defs/list/anyOf/{'9' * 5000}"}, {"type": "null"}], False),
        ([{"$ref": "other.json"}, {"type": "null"}], False),
        ([{"$id": "x", "$ref": "#/$defs/one"}, {"type": "null"}], False),
        ([{"const": number} for number in range(3000)], False),
    ],
)
def test_how_far_references_are_followed(branches: list[Any], is_certain: bool) -> None:
    assert ("anyOf" in simplified({"$defs": DEFINITIONS, "oneOf": branches})) == is_certain


def test_alternatives_behind_references() -> None:
    definitions = {
        "cat": {
            "type": "object",
            "properties": {"kind": {"const": 1}},
            "required": ["kind"],
            "additionalProperties": False,
        },
        "dog": {
            "type": "object",
            "properties": {"kind": {"const": 2}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    }
    pets = [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"type": "null"}]
    grammar = compiled({"type": "array", "items": {"oneOf": pets}, "$defs": definitions})
    assert allows(grammar, '[{"kind":2},null,{"kind":1}]') and not allows(grammar, '[{"kind":3}]')


@pytest.mark.parametrize(
    ("branches", "allowed"),
    [
        ([{"const": 1}, {"const": 2}, {"enum": [3, 4]}], "4"),
        ([{"type": "integer", "maximum": 3}, {"type": "integer", "exclusiveMinimum": 3}], "3"),
        ([{"type": "number", "maximum": 0}, {"const": 1, "title": "one"}, {"type": "null"}], "1"),
    ],
)
def test_alternatives_among_numbers(branches: list[Any], allowed: str) -> None:
    assert allows(compiled({"oneOf": branches}), allowed)


def test_alternatives_that_may_overlap_are_refused_with_what_to_send() -> None:
    text = grammar_of(
        JsonSchema(field="s", schema={"oneOf": [{"type": "integer"}, {"minimum": 3}]}), strips_space=False
    )
    assert "two of its alternatives may fit the same value; send anyOf" in try_out(COMPILER, Trial(text.text)).error


# ---- dialects, and what asks for nothing ----

DIALECTS = [
    "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-06/schema", "https://json-schema.org/draft-07/schema#",
    "http://json-schema.org/draft-07/schema", "https://json-schema.org/draft/2019-09/schema#",
    "http://json-schema.org/draft/2020-12/schema",
]  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_however_they_are_spelt(dialect: str) -> None:
    assert allows(compiled({"$schema": dialect, "type": "integer"}), "5")


@pytest.mark.parametrize("dialect", ["https://example.com/my", "http://json-schema.org/schema#", "", 7, None])
def test_other_dialects_are_refused_by_name(dialect: Any) -> None:
    with pytest.raises(ValidationError, match=r"allowed: https://json-schema\.org/draft/2020-12/schema, ") as error:
        simplified({"$schema": dialect, "type": "integer"})
    assert error.value.field == "schema.$schema"


def test_a_property_may_have_the_name_of_the_dialect() -> None:
    schema = {"type": "object", "properties": {"$schema": {"type": "string"}}}
    assert simplified(schema) == schema


@pytest.mark.parametrize("most", [0, 1])
def test_items_of_which_there_is_one_at_most_are_unique(most: int) -> None:
    schema = {"type": "array", "uniqueItems": True, "maxItems": most}
    assert simplified(schema) == {"type": "array", "maxItems": most}
    assert simplified(schema | {"maxItems": 2}) == schema | {"maxItems": 2}


# ---- schemas as texts ----


@pytest.mark.parametrize(
    "text", ['{"minLength": 2.0, "maximum": 1e2}', '{"enum": [5.0, 0e99999999, 0.5, 1e22]}', '{"a": {"a": 1}}', "true"]
)
def test_a_text_is_read_as_a_body_is(text: str) -> None:
    read = schema_of_text("field", text)
    assert json.dumps(read) == json.dumps(_read_json(text.encode()))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"type": "null", "type": "integer"}', "field: type stands twice in one object"),
        ('{"maximum": NaN}', "field is not valid JSON: it holds NaN"),
        ('{"maximum": -Infinity}', "field is not valid JSON: it holds -Infinity"),
        ('{"maximum": ' + "9" * 5000 + "}", "field holds a number of thousands of digits"),
        ('\ufeff{"type": "null"}', "field is not valid JSON at character 0"),
        ("", "field is not valid JSON at character 0"),
    ],
)
def test_a_text_that_a_body_may_not_have_is_refused(text: str, what: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(what)) as error:
        schema_of_text("field", text)
    assert error.value.field == "field"
    with pytest.raises(ValidationError):
        _read_json(text.encode())


# ---- names of properties ----

SPELT = {
    "a": ["a", "\\u0061"],
    "b": ["b", "\\u0062"],
    "/": ["/", "\\/", "\\u002f", "\\u002F"],
    "\n": ["\\n", "\\u000a", "\\u000A"],
    '"': ['\\"', "\\u0022"],
    "\x01": ["\\u0001"],
    "\x7f": ["\x7f", "\\u007f", "\\u007F"],
}
TYPES = st.sampled_from([{"type": "integer"}, {"type": "string"}, True, False])
NAMED = {name: {"type": "integer"} for name in ("a", "b/", *SPELT)}
OBJECTS = st.fixed_dictionaries(
    {
        "type": st.just("object"),
        "properties": st.sets(st.sampled_from([*NAMED])).map(lambda names: {n: NAMED[n] for n in names}),
    },
    optional={
        "patternProperties": st.dictionaries(
            st.sampled_from(["^a", "^/$", "^\\n"]), st.sampled_from([{"type": "integer"}, False]), max_size=1
        ),
        "additionalProperties": st.sampled_from([{"type": "string"}, True, False]),
    },
)


@given(OBJECTS)
def test_no_spelling_of_a_name_evades_its_schema(schema: dict[str, Any]) -> None:
    grammar = compiled(schema)
    names = [spelling for spellings in SPELT.values() for spelling in spellings] + ["b\\/", "\\u0062/", "a\\u0062"]
    for text in (f'{{"{name}":{value}}}' for name in names for value in ("1", '"x"')):
        if allows(grammar, text):
            jsonschema.validate(json.loads(text), schema)


def test_the_compiler_alone_would_allow_another_spelling() -> None:
    """When it does not any more, no escapes need to be forbidden."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for text in ('{"\\u0061":"x"}', '{"a":1,"\\u0061":"x"}'):
        assert holds_raw(f"start: %json {json.dumps(schema)}", text)
        assert not allows(compiled(schema), text)
    assert allows(compiled(schema), '{"a":1,"b\\n":"\\t"}')


@pytest.mark.parametrize("closes", [{"additionalProperties": False}, {}])
def test_control_characters_stay_where_no_name_is_free(closes: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, **closes}
    assert allows(compiled(schema), '{"a":"\\u0001"}') == bool(closes)


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        ({"minProperties": 2}, 1),
        ({"minProperties": 3.0, "additionalProperties": {"type": "integer"}, "required": ["a"]}, 2),
        ({"minProperties": 2, "additionalProperties": False, "patternProperties": {"^a": True}}, 1),
    ],
)
def test_a_number_of_names_that_may_be_the_same_is_refused(schema: dict[str, Any], most: int) -> None:
    with pytest.raises(ValidationError, match=rf"schema\.items\.minProperties is .*; allowed: up to {most},"):
        simplified({"items": {"type": "object", **schema}})


@pytest.mark.parametrize(
    "schema",
    [
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a"]},
        {"minProperties": 1, "additionalProperties": False, "properties": {"a": {"type": "integer"}}},
    ],
)
def test_a_number_of_names_that_is_certain_is_held_to(schema: dict[str, Any]) -> None:
    grammar = compiled({"type": "object", **schema})
    assert not allows(grammar, "{}")
    assert allows(grammar, '{"a":1,"b":1}') == ("additionalProperties" not in schema)


# ---- names that are counted up, and what never is ----

COLORS = {"title": "Color", "type": "string", "enum": ["red", "blue"]}
NUMBERS = {"type": "object", "additionalProperties": {"type": "integer"}}
OBJECTS = ["{}", '{"red":1}', '{"blue":1}', '{"red":1,"blue":2}', '{"red":"x"}', '{"green":1}', '{"red":1,"green":1}']


@pytest.mark.parametrize(
    "schema",
    [
        NUMBERS
        | {"propertyNames": {"$ref": "#/$defs/Color"}, "$defs": {"Color": COLORS}},  # pydantic's dict[Color, int]
        NUMBERS | {"propertyNames": COLORS, "required": ["red", "blue"]},  # Zod's record
        NUMBERS | {"propertyNames": {"anyOf": [{"const": "red"}, {"oneOf": [{"const": "blue"}]}]}},
        {"type": "object", "propertyNames": COLORS},
        {"propertyNames": {"enum": [1, "red", None]}},
        NUMBERS | {"propertyNames": COLORS, "properties": {"green": {"type": "integer"}, "red": {"type": "string"}}},
        {"type": "object", "propertyNames": COLORS, "additionalProperties": False, "properties": {"blue": True}},
        {"allOf": [NUMBERS | {"propertyNames": COLORS}, {"properties": {"blue": {"maximum": 1}}}]},
    ],
)
def test_names_that_are_counted_up(schema: dict[str, Any]) -> None:
    grammar, judge = compiled(schema), jsonschema.Draft202012Validator(schema)
    for text in OBJECTS:
        assert allows(grammar, text) == judge.is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    "part",
    [
        {"propertyNames": {"enum": ["red", "blue"], "maxLength": 3}},
        {"propertyNames": {"type": "integer", "enum": [1]}},
        {"propertyNames": {"anyOf": [{"const": "red"}, {"pattern": "^b"}]}},
        {"propertyNames": {"$ref": "#"}},
        {"propertyNames": COLORS, "patternProperties": {"^r": {"type": "integer"}}},
        {"propertyNames": {"minLength": 1}, "patternProperties": {"^r": {"type": "integer"}}},
        {"propertyNames": {"minLength": 1, "pattern": "^r"}},
        {"propertyNames": {"minLength": -1}},
        {"propertyNames": {"enum": [f"{i}" for i in range(999)]}, "additionalProperties": {"enum": ["x" * 999]}},
    ],
)
def test_names_that_cannot_be_counted_up_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="propertyNames"):
        compiled({"type": "object"} | part)


@pytest.mark.parametrize(
    "names",
    [
        {"pattern": "^[^b]e"},
        {"type": "string", "maxLength": 3},
        {"minLength": 4, "title": "N"},
        {"pattern": "^r", "format": "starts_with"},
    ],
)
@pytest.mark.parametrize(
    "part",
    [
        {},
        {"additionalProperties": {"type": "integer"}},
        {"additionalProperties": False},
        {"properties": {"red": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        {"properties": {"red": {"type": "integer"}, "green": {}}, "additionalProperties": False},
        {"minProperties": 1},
        {"allOf": [{"properties": {"green": {"type": "integer"}}}]},
        {"anyOf": [{"required": ["red"]}, {"required": ["green"]}]},
    ],
)
def test_names_of_a_pattern_or_a_length(names: dict[str, Any], part: dict[str, Any]) -> None:
    schema = {"type": "object", "propertyNames": names} | part
    grammar, judge = compiled(schema), jsonschema.Draft202012Validator(schema)
    texts = [*OBJECTS, '{"":1}', '{"green":"x"}', '{"red":1,"ted":"x"}', '{"ted":2}']
    assert [allows(grammar, text) for text in texts] == [judge.is_valid(json.loads(text)) for text in texts]


def test_what_is_written_down_for_each_name_is_bounded_in_all() -> None:
    """Each level writes the one below it ten times."""
    schema: Any = True
    for _ in range(20):
        schema = {"type": "object", "propertyNames": {"enum": [*"abcdefghij"]}, "additionalProperties": schema}
    assert len(json.dumps(simplified(schema))) < 1_000_000


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"properties": {"a": {"not": {}}, "b": True}}, ['{"b":1}', '{"c":1}'], ['{"a":1}']),
        ({"properties": {"b": True}, "additionalProperties": {"not": {}}}, ['{"b":1}', "{}"], ['{"a":1}']),
        ({"properties": {"b": {"anyOf": [{"not": {}}, {"type": "null"}]}}}, ['{"b":null}'], ['{"b":1}']),
        ({"properties": {"b": {"not": {"not": {}}}}}, ['{"b":1}'], []),
    ],
)  # fmt: skip
def test_what_never_is(schema: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    grammar = compiled({"type": "object"} | schema)
    assert [text for text in allowed if not allows(grammar, text)] == []
    assert [text for text in refused if allows(grammar, text)] == []


# ---- formats ----

YEARS = st.sampled_from([4, 100, 400, 1600, 1700, 1900, 1996, 2000, 2023, 2024, 2100, 9999]) | st.integers(1, 9999)


@given(YEARS, st.integers(1, 12), st.integers(27, 31), st.sampled_from([{}, {"allOf": [{"pattern": "^[0-9]"}]}]))
def test_dates_are_those_of_the_calendar(year: int, month: int, day: int, beside: dict[str, Any]) -> None:
    text = f"{year:04}-{month:02}-{day:02}"
    try:
        is_meant = bool(date.fromisoformat(text))
    except ValueError:
        is_meant = False
    assert allows(compiled({"type": "string", "format": "date", **beside}), f'"{text}"') == is_meant
    assert allows(compiled({"type": "string", "format": "date-time", **beside}), f'"{text}T01:02:03Z"') == is_meant


def test_the_compiler_alone_would_allow_a_leap_day_in_any_year() -> None:
    assert holds_raw('start: %json {"type": "string", "format": "date"}', '"2023-02-29"')


@pytest.mark.parametrize(("num_last", "is_allowed"), [(9, True), (10, False)])
def test_names_of_hosts_have_a_length(num_last: int, is_allowed: bool) -> None:
    name = ".".join(["a" * 60] * 4 + ["b" * num_last])
    assert allows(compiled({"type": "string", "format": "hostname"}), f'"{name}"') == is_allowed
