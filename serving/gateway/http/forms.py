"""What clients say of an answer's form: OpenAI's response_format and text.format, vLLM's structured_outputs and guided_*."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from serving.contracts.errors import ValidationError
from serving.gateway.core.constraints import Constraint, JsonSchema, LarkGrammar, OneOf, Regex
from serving.gateway.core.fields import Unsupported
from serving.gateway.core.json_schemas import schema_of_text
from serving.gateway.http.body import Body, Object


class NamedSchema(Object, frozen=True, kw_only=True):
    """A JSON schema. Its name and description are for the client; `strict` changes nothing, as every answer keeps to it."""

    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(Object, frozen=True, kw_only=True):
    """OpenAI's. A schema may stand beside json_object too, as llama.cpp and others have it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema: Any = None

    def constraint(self, where: str) -> Constraint | None:
        """Raises ValidationError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            schema = {"type": "object"} if self.schema is None else self.schema
            return JsonSchema(field=where if self.schema is None else f"{where}.schema", schema=schema)
        if self.json_schema is None or self.json_schema.schema is None:
            raise ValidationError(f"{where}.json_schema", f"{where}.json_schema.schema is missing")
        return JsonSchema(field=f"{where}.json_schema.schema", schema=self.json_schema.schema)


class TextFormat(Object, frozen=True, kw_only=True):
    """Of /v1/responses: the same, laid flat."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None

    def constraint(self, where: str) -> Constraint | None:
        """Raises ValidationError."""
        if self.type == "json_schema" and self.schema is None:
            raise ValidationError(f"{where}.schema", f"{where}.schema is missing")
        named = NamedSchema(schema=self.schema)
        form = ResponseFormat(type=self.type, json_schema=named).constraint(where)
        return JsonSchema(field=f"{where}.schema", schema=self.schema) if self.type == "json_schema" else form


class TextOptions(Object, frozen=True, kw_only=True):
    """Of /v1/responses."""

    format: TextFormat | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return {"verbosity": Unsupported(neutral=("medium",), instead="ask for it in the input")}


class StructuredOutputs(Object, frozen=True, kw_only=True):
    """vLLM's: exactly one of json, regex, choice, grammar and json_object."""

    json: Any = None
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    """With json and json_object: nothing between the parts."""
    whitespace_pattern: str | None = None
    """With json and json_object: a regular expression of what may stand between the parts."""

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return {
            "structural_tag": Unsupported(instead="send tools, or a grammar"),
            "disable_additional_properties": Unsupported(instead="say additionalProperties: false in the schema"),
        }

    @classmethod
    def no_effect(cls) -> frozenset[str]:
        return frozenset({"disable_fallback", "_backend", "_backend_was_auto"})

    def constraint(self, where: str) -> Constraint:
        """Raises ValidationError."""
        names = {name: f"{where}.{name}" for name in ("json", "regex", "choice", "grammar", "json_object")}
        whitespace = self._whitespace(where)
        name = "disable_any_whitespace" if whitespace == "" else "whitespace_pattern"
        found = _given(self, names, whitespace, f"{where}.{name}")
        if found is None:
            raise ValidationError(where, f"{where} is empty; give json, regex, choice, grammar or json_object")
        return found

    def _whitespace(self, where: str) -> str | None:
        if self.disable_any_whitespace and self.whitespace_pattern:
            raise ValidationError(
                f"{where}.whitespace_pattern",
                f"{where}.whitespace_pattern is set beside disable_any_whitespace; give one",
            )
        return "" if self.disable_any_whitespace else self.whitespace_pattern


class Forms(Body, frozen=True, kw_only=True):
    """The fields of a chat or a completion that say what form the answer must have."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def constraint(self) -> Constraint | None:
        """Raises ValidationError, also for two forms at once."""
        names = {name: f"guided_{name}" for name in ("json", "regex", "choice", "grammar")}
        given = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        found = [
            self.response_format and self.response_format.constraint("response_format"),
            self.structured_outputs and self.structured_outputs.constraint("structured_outputs"),
            _given(given, names, self.guided_whitespace_pattern, "guided_whitespace_pattern"),
        ]
        return only_one([each for each in found if each])


def only_one(found: Sequence[Constraint]) -> Constraint | None:
    """Raises ValidationError for several."""
    if len(found) > 1:
        raise ValidationError(found[1].field, f"{found[1].field} is set beside {found[0].field}; give one")
    return found[0] if found else None


def _given(
    forms: StructuredOutputs, names: Mapping[str, str], whitespace: str | None, whitespace_name: str
) -> Constraint | None:
    """The one that is set, by what the client calls each, with its rule for whitespace."""
    found: list[Constraint] = []
    if forms.json is not None:
        # vLLM takes a schema's text too.
        schema = schema_of_text(names["json"], forms.json) if isinstance(forms.json, str) else forms.json
        found.append(JsonSchema(field=names["json"], schema=schema, whitespace_pattern=whitespace))
    if forms.regex is not None:
        found.append(Regex(field=names["regex"], pattern=forms.regex))
    if forms.choice is not None:
        found.append(OneOf(field=names["choice"], texts=tuple(forms.choice)))
    if forms.grammar is not None:
        found.append(LarkGrammar(field=names["grammar"], text=forms.grammar))
    if forms.json_object:
        found.append(JsonSchema(field=names["json_object"], schema={"type": "object"}, whitespace_pattern=whitespace))
    only = only_one(found)
    if whitespace is not None and not isinstance(only, JsonSchema):
        raise ValidationError(whitespace_name, f"{whitespace_name} is set, which is for JSON alone")
    return only
