"""What a client asks of an answer's form, and the grammar that says it.

A grammar is in llguidance's variant of Lark (model_parallel/engine/matching.py). Nothing here decides whether it can be compiled.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving.config import LimitsConfig
from serving.contracts.errors import ValidationError
from serving.gateway.core.json_schemas import check_depth, has_free_names, simplified
from serving.gateway.core.schema_patterns import ignores_space

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the parts of a JSON text: enough for any layout, and not without end, in which weak models get lost."""
_UNSUPPORTED_IN_LARK = re.compile(
    r"""^[^\S\n]*[?!]*[a-z_][\w-]*(?:::_)?[^\S\n]*\[(?:"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])*/|[^\]\n"/])*?"""
    r"\b(temperature|stop|max_tokens)\s*=",
    re.MULTILINE,
)
"""Among what stands in brackets behind the name of a rule, in whose texts and expressions brackets may stand too."""
_BACKUS_NAUR = re.compile(r"^\s*<?[A-Za-z_][\w-]*>?\s*::=", re.MULTILINE)
_UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff]")
"""What JSON may write as it is, and the grammar's lexer does not take."""
_OPTIONS_OF_SCHEMAS = "x-guidance"
_ESCAPES_WITHOUT_NUMBERS = 'nrbtf\\"'
"""All but \\u0061 and the like. The compiler keeps the names that a schema has from being free names by their spelling, and with
these each has but one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonSchema:
    """A JSON text that is valid under a schema."""

    field: str
    """What the client calls it."""
    schema: Any
    """A schema: an object, or true for any JSON text."""
    whitespace_pattern: str | None = None
    """What may stand between the parts; "" for nothing at all, None for what is usual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regex:
    """A text that a regular expression matches from its beginning to its end."""

    field: str
    pattern: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OneOf:
    """One of several texts."""

    field: str
    texts: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LarkGrammar:
    """A text that a grammar derives from its rule `start`."""

    field: str
    text: str


Constraint = JsonSchema | Regex | OneOf | LarkGrammar


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarText:
    """A grammar, and what a client calls it."""

    field: str
    text: str
    schemas: tuple[tuple[str, str], ...] = ()
    """JSON schemas that it is made of, by what the client calls them."""
    is_as_sent: bool = False
    """The client wrote it, so that places in it say something."""
    loose_tools: frozenset[int] = frozenset()
    """Functions whose arguments may be any object, since calls could not be held to their schemas."""


def check_constraint(constraint: Constraint, limits: LimitsConfig) -> None:
    """What can be said without compiling it. Raises ValidationError."""
    field = constraint.field
    match constraint:
        case JsonSchema(schema=schema):
            if not isinstance(schema, dict | bool):
                raise ValidationError(field, f"{field} is not a JSON schema, which is an object, true or false")
            if isinstance(schema, dict) and _OPTIONS_OF_SCHEMAS in schema:
                where = f"{field}.{_OPTIONS_OF_SCHEMAS}"
                raise ValidationError(where, f"{where} is not supported by this server; leave it out")
            check_depth(field, schema)
            try:
                num_bytes = _num_bytes(field, json.dumps(schema, ensure_ascii=False, allow_nan=False))
            except ValueError as error:
                if isinstance(error, ValidationError):
                    raise
                raise ValidationError(field, f"{field} holds a number that is too large for a float64") from None
            _num_bytes(field, constraint.whitespace_pattern or "")
        case Regex(pattern=pattern):
            if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
                raise ValidationError(field, f"{field} ends with a backslash that escapes nothing")
            if ignores_space(pattern):
                raise ValidationError(field, f"{field} is {pattern!r:.80}, with the flag x, which is not supported")
            num_bytes = _num_bytes(field, pattern)
        case OneOf(texts=texts):
            if not texts:
                raise ValidationError(field, f"{field} is empty; it needs at least one text")
            num_bytes = sum(_num_bytes(f"{field}[{index}]", text) for index, text in enumerate(texts))
        case LarkGrammar(text=text):
            if _BACKUS_NAUR.search(text):
                raise ValidationError(
                    field,
                    f"{field} has rules with ::=, as GBNF and EBNF have; allowed: llguidance's variant of Lark, whose rules have "
                    'a colon, from the rule start, as in start: "yes" | "no"',
                )
            if found := _UNSUPPORTED_IN_LARK.search(text):
                raise ValidationError(field, f"{field} sets {found[1]} of a rule, which this server does not support")
            num_bytes = _num_bytes(field, text)
    if num_bytes > limits.max_grammar_bytes:
        raise ValidationError(
            field, f"{field} has {num_bytes} bytes; limits.max_grammar_bytes is {limits.max_grammar_bytes}"
        )


def _num_bytes(field: str, text: str) -> int:
    """Raises ValidationError for a text that is not Unicode: a JSON text within the request can spell such ones."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValidationError(field, f"{field} holds half of a surrogate pair") from None


def with_compilable_schema(constraint: JsonSchema) -> JsonSchema:
    """The same, with the schema as the compiler understands it. Raises ValidationError."""
    return replace(constraint, schema=simplified(constraint.schema, constraint.field))


def grammar_of(constraint: Constraint, *, strips_space: bool) -> GrammarText:
    """The grammar. With `strips_space` a space that the first token brings is not part of the answer's text, as in the answers of
    sentencepiece's models to conversations: it may then stand before any of the texts. Raises ValidationError."""
    schemas: tuple[tuple[str, str], ...] = ()
    if isinstance(constraint, JsonSchema):
        constraint = with_compilable_schema(constraint)
        schemas = ((constraint.field, json.dumps(constraint.schema)),)
    rules = answer_rules(constraint, strips_space=strips_space)
    return GrammarText(
        field=constraint.field, text=rules, schemas=schemas, is_as_sent=isinstance(constraint, LarkGrammar)
    )


def answer_rules(constraint: Constraint, *, strips_space: bool, start: str = "start") -> str:
    """Rules of which `start` derives the texts that a constraint allows. The names of others begin with `answer` or `ANSWER`."""
    match constraint:
        case JsonSchema():
            space = '" "? ' if strips_space else ""
            return f"{start}: {space}{schema_rule(constraint)}\n"
        case Regex(pattern=pattern):
            body = f"ANSWER_BODY: /{_escaped(pattern)}/\n"
            if not strips_space:
                return f"{start}: ANSWER_BODY\n{body}"
            # One space is taken away, so a text that begins with one needs another before it.
            return (
                f'{start}: ANSWER_TEXT\nANSWER_TEXT: " " ANSWER_BODY | ANSWER_BODY & ANSWER_NO_SPACE\n{body}'
                "ANSWER_NO_SPACE: /([^ ](?s:.*))?/\n"
            )
        case OneOf(texts=texts):
            given = [*texts]
            if strips_space:
                given = [*(f" {text}" for text in texts), *(text for text in texts if not text.startswith(" "))]
            # One terminal: as parts of a rule, the compiler could not hold more than 2,000 that begin alike.
            return f"{start}: ANSWER_TEXTS\nANSWER_TEXTS: " + " | ".join(map(literal, dict.fromkeys(given))) + "\n"
        case LarkGrammar(text=text):
            return text


def schema_rule(constraint: JsonSchema) -> str:
    """A schema as the right side of a rule."""
    schema = {} if constraint.schema is True else constraint.schema
    pattern = WHITESPACE if constraint.whitespace_pattern is None else constraint.whitespace_pattern
    options: dict[str, Any] = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    if has_free_names(schema):
        options["json_allowed_escapes"] = _ESCAPES_WITHOUT_NUMBERS
    if isinstance(schema, dict):
        schema = {_OPTIONS_OF_SCHEMAS: options} | schema
    return "%json " + json.dumps(schema, ensure_ascii=False)


def literal(text: str) -> str:
    """A text as the grammar writes it."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _escaped(pattern: str) -> str:
    """A regular expression between slashes: only a slash of its own, and a line break, need to be written otherwise."""
    written = re.sub(
        r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.DOTALL
    )
    return written.replace("\\\n", r"\n")
