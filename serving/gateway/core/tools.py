"""Functions that a model may call (tools), for models of any chat format: how they are told, called and answered, in text.

A call is what Hermes models, Qwen and others were trained to write:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

The grammar holds every call to this form and its arguments to the function's schema, so a model that has never seen the form
still calls correctly. A result goes back in a message of the user's, within <tool_response></tool_response>.
"""

import json
import math
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal

from serving.config import LimitsConfig
from serving.contracts.chat import START, SYSTEM, USER, ChatFormat
from serving.contracts.errors import ValidationError
from serving.gateway.core.constraints import (
    Constraint,
    GrammarText,
    JsonSchema,
    LarkGrammar,
    answer_rules,
    check_constraint,
    literal,
    schema_rule,
    with_compilable_schema,
)
from serving.text.chat import ChatMessage

CALL_OPENS, CALL_CLOSES = "<tool_call>", "</tool_call>"
MAX_CALLS = 32
"""In one answer."""
_MAX_SHOWN_IDS = 10
"""In an error."""
TOOL = "tool"
"""Role of a result."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BEGINNING = CALL_OPENS + '\n{"name": "'
_HEAD = re.compile(r'\n\{"name": "([^"]+)", "arguments": ')
_TAIL = "}\n" + CALL_CLOSES


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function."""

    name: str
    description: str = ""
    parameters: Any = None
    """A JSON schema of an object; None for no parameters."""
    is_strict: bool = False
    """It is offered only if calls can be held to the schema."""
    field: str = ""
    """Where it stands in the request, if not in `function` of an entry of `tools`."""

    def field_at(self, index: int) -> str:
        """What errors call it."""
        return self.field or f"tools[{index}].function"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The functions of a request, and whether they may or must be called."""

    tools: Sequence[Tool]
    choice: Literal["none", "auto", "required"] = "auto"
    named: str | None = None
    """The one that must be called, with "required"."""
    is_parallel: bool = True
    """There may be several calls in an answer."""

    @property
    def is_used(self) -> bool:
        """The model is told of them, and its answer may hold calls."""
        return bool(self.tools) and self.choice != "none"

    @property
    def callable_tools(self) -> Sequence[tuple[int, Tool]]:
        """Those that may be called, with their places."""
        return [(index, tool) for index, tool in enumerate(self.tools) if self.named in (None, tool.name)]

    @property
    def loosenable(self) -> frozenset[int]:
        """Places of those that may be offered though calls cannot be held to their schemas: all but the named and strict ones."""
        return frozenset(
            index for index, tool in self.callable_tools if not (tool.is_strict or tool.name == self.named)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of an answer, in the conversation."""

    name: str
    arguments: str
    """A JSON text."""


def check_tools(use: ToolUse, constraint: Constraint | None, limits: LimitsConfig) -> None:
    """All but whether schemas can be compiled. Raises ValidationError."""
    if len(use.tools) > limits.max_tools:
        raise ValidationError("tools", f"tools has {len(use.tools)} entries; limits.max_tools is {limits.max_tools}")
    names: set[str] = set()
    for index, tool in enumerate(use.tools):
        where = tool.field_at(index)
        if not _NAME.fullmatch(tool.name):
            raise ValidationError(
                f"{where}.name",
                f"{where}.name is {tool.name!r:.80}; allowed: 1 to 64 letters, digits, '_', '-' and '.'",
            )
        if tool.name in names:
            raise ValidationError(f"{where}.name", f"{where}.name is {tool.name!r}, as another function's")
        names.add(tool.name)
        _check_kind(f"{where}.parameters", tool.parameters)
        check_constraint(_schema_of(index, tool), limits)
    if use.choice == "required" and not use.tools:
        raise ValidationError("tool_choice", "tool_choice asks for a call, and there are no tools")
    if use.named is not None and use.named not in names:
        raise ValidationError("tool_choice", f"tool_choice names {use.named!r:.80}, which is not among tools")
    if use.is_used and isinstance(constraint, LarkGrammar):
        raise ValidationError(
            constraint.field, f"{constraint.field} is set beside tools, which this server does not support"
        )


def tool_grammar(
    use: ToolUse, constraint: Constraint | None, *, strips_space: bool, loose: frozenset[int] = frozenset()
) -> GrammarText:
    """Of an answer that calls functions; with "auto", or is text instead, which follows `constraint` where there is one.

    Its first schemas are those of the functions that may be called, in their order. `loose` has functions whose schemas the
    compiler refused; those are added whose schemas it would read wrongly. Raises ValidationError.
    """
    bodies, schemas = [], []
    for index, tool in use.callable_tools:
        schema = JsonSchema(field=f"{tool.field_at(index)}.parameters", schema={"type": "object"})
        if index not in loose:
            try:
                schema = with_compilable_schema(_schema_of(index, tool))
            except ValidationError:
                if index not in use.loosenable:
                    raise
                loose |= {index}
        head, tail = literal(f'\n{{"name": "{tool.name}", "arguments": '), literal(_TAIL)
        bodies.append(f"call_{index}: {head} {schema_rule(schema)} {tail}\n")
        schemas.append((schema.field, json.dumps(schema.schema)))
    names = " | ".join(f"call_{index}" for index, _ in use.callable_tools)
    more = f"({literal(chr(10) + CALL_OPENS)} call){{0,{MAX_CALLS - 1}}}" if use.is_parallel else ""
    calls = f"calls: call {more}\ncall: {names}\n" + "".join(bodies)
    space = '" "? ' if strips_space else ""
    if isinstance(constraint, JsonSchema):
        constraint = with_compilable_schema(constraint)
    if use.choice == "required":
        start = f"start: {space}{literal(CALL_OPENS)} calls\n"
    elif constraint is None:
        # Text until the first call: the shortest that ends with its beginning.
        start = f"start: text | head calls\ntext: TEXT\nTEXT: /(?s:.*)/\nhead[lazy]: TEXT {literal(CALL_OPENS)}\n"
    else:
        start = f"start: answer | {space}{literal(CALL_OPENS)} calls\n"
        start += answer_rules(constraint, strips_space=strips_space, start="answer")
        if isinstance(constraint, JsonSchema):
            schemas.append((constraint.field, json.dumps(constraint.schema)))
    return GrammarText(field="tools", text=start + calls, schemas=tuple(schemas), loose_tools=loose)


def _check_kind(field: str, schema: Any) -> None:
    """Raises ValidationError where the schema says that arguments are no object."""
    if isinstance(schema, dict) and "type" in schema and not _is_among("object", schema["type"]):
        kind = json.dumps(schema["type"])
        raise ValidationError(
            f"{field}.type", f'{field}.type is {kind:.80}; allowed: "object", as arguments are always one'
        )


def _is_among(kind: str, kinds: Any) -> bool:
    return kind in kinds if isinstance(kinds, list) else kind == kinds


def _schema_of(index: int, tool: Tool) -> JsonSchema:
    """Of the arguments, which are an object whatever the schema leaves open."""
    schema = tool.parameters
    if schema is None or schema == {}:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    elif schema is True:
        schema = {"type": "object"}
    elif isinstance(schema, dict) and schema.get("type") != "object":
        # Also beside $ref, anyOf and the like: null, which they may allow too, is no arguments.
        schema = {"type": "object"} | {key: value for key, value in schema.items() if key != "type"}
    return JsonSchema(field=f"{tool.field_at(index)}.parameters", schema=schema)


# ---- in the conversation ----


def call_text(call: ToolCall) -> str:
    """A call as the model writes it."""
    return f'{CALL_OPENS}\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n{CALL_CLOSES}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A message, and what says which result belongs to which call."""

    message: ChatMessage
    call_ids: tuple[str | None, ...] = ()
    """Of the calls that it holds, as far as they have ids."""
    result_of: str | None = None
    """The call whose result it is, where that is said."""
    field: str = ""
    """Where that is said."""


def in_order_of_calls(turns: Iterable[Turn]) -> list[ChatMessage]:
    """The messages, with results that stand together in the order of their calls: the model is not told their ids. Results
    without an id are those of the first calls that no other belongs to. Raises ValidationError for an id of no call."""
    ordered: list[ChatMessage] = []
    calls = _OpenCalls()
    for are_results, together in groupby(turns, key=lambda turn: turn.message.role == TOOL):
        if are_results:
            ordered += _sorted_results([*together], calls)
            continue
        for turn in together:
            calls.add(turn.call_ids)
            ordered.append(turn.message)
    return ordered


def _sorted_results(results: list[Turn], calls: "_OpenCalls") -> list[ChatMessage]:
    """Takes their calls out of `calls`."""
    numbers: dict[int, float] = {}
    """Of calls, by the results' indices."""
    for index, result in enumerate(results):
        if result.result_of is None:
            continue
        number = calls.take(result.result_of)
        if number is not None:
            numbers[index] = number
        elif calls.was_taken(result.result_of) or not calls.has_one_without_id:
            raise ValidationError(
                result.field,
                f"{result.field} is {result.result_of!r:.80}; allowed: the ids of calls without a result ({calls})",
            )
    for index in range(len(results)):
        if index not in numbers:
            numbers[index] = calls.take_first()
    return [results[index].message for index in sorted(numbers, key=lambda index: (numbers[index], index))]


class _OpenCalls:
    """The calls that have no result, numbered as they come."""

    def __init__(self) -> None:
        self._ids: OrderedDict[int, str | None] = OrderedDict()
        self._num = self._num_without_id = 0
        self._newest: defaultdict[str, deque[int]] = defaultdict(deque)
        """Of the last answer, by id. May hold some that have a result by now."""
        self._older: defaultdict[str, deque[int]] = defaultdict(deque)
        self._taken: set[str] = set()

    def __str__(self) -> str:
        ids = [f"{call_id:.80}" for call_id in islice(self._ids.values(), _MAX_SHOWN_IDS) if call_id is not None]
        more = len(self._ids) - self._num_without_id - len(ids)
        return ", ".join([*ids, *[f"{more} more"] * (more > 0)]) or "none, as no call before it is without a result"

    @property
    def has_one_without_id(self) -> bool:
        return self._num_without_id > 0

    def add(self, ids: Sequence[str | None]) -> None:
        """Those of one answer."""
        if ids:
            for known, numbers in self._newest.items():
                self._older[known] += numbers
            self._newest.clear()
        for call_id in ids:
            self._ids[self._num] = call_id
            if call_id is None:
                self._num_without_id += 1
            else:
                self._newest[call_id].append(self._num)
            self._num += 1

    def take(self, call_id: str) -> int | None:
        """The call with an id; of several the first of the last answer."""
        for numbers in (self._newest[call_id], self._older[call_id]):
            while numbers:
                number = numbers.popleft()
                if number in self._ids:
                    del self._ids[number]
                    self._taken.add(call_id)
                    return number
        return None

    def was_taken(self, call_id: str) -> bool:
        return call_id in self._taken

    def take_first(self) -> float:
        """Of all that are left; behind all others when there is none."""
        if not self._ids:
            return math.inf
        number, call_id = self._ids.popitem(last=False)
        self._num_without_id -= call_id is None
        return number


def with_results(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Results become a message of the user's; several together one, and the user's next message is part of it."""
    folded: list[tuple[ChatMessage, list[str]]] = []
    """Of each message the texts that it is made of."""
    is_open = False
    for message in messages:
        is_result = message.role == TOOL
        text = f"<tool_response>\n{message.content}\n</tool_response>" if is_result else message.content
        if is_open and (is_result or message.role == USER):
            folded[-1][1].append(text)
        else:
            folded.append((ChatMessage(USER, "") if is_result else message, [text]))
        is_open = is_result
    return [replace(message, content="\n".join(texts)) for message, texts in folded]


def with_tools(
    messages: Sequence[ChatMessage], use: ToolUse, chat_format: ChatFormat, default_system: str
) -> list[ChatMessage]:
    """The functions are told in the system message; in the first one where the format has no system messages."""
    text = tools_text(use)
    if messages[0].role == SYSTEM:
        return [replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:]]
    if chat_format.literal(START, SYSTEM) is None:
        return [replace(messages[0], content=f"{text}\n\n{messages[0].content}"), *messages[1:]]
    system = default_system or chat_format.default_system or chat_format.shown_system
    return [ChatMessage(SYSTEM, f"{system}\n\n{text}" if system else text), *messages]


def tools_text(use: ToolUse) -> str:
    """What the model is told."""
    functions = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": schema.schema},
        }
        for tool, schema in ((tool, _schema_of(index, tool)) for index, tool in enumerate(use.tools))
    ]
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = (
        "You may call functions to assist with the user's request. Their signatures are JSON schemas within <tools></tools>:\n"
        f"<tools>\n{lines}\n</tools>\n"
        f"To call a function, answer with a JSON object of its name and arguments within {CALL_OPENS}{CALL_CLOSES}:\n"
        f'{CALL_OPENS}\n{{"name": <function-name>, "arguments": <arguments-object>}}\n{CALL_CLOSES}'
    )
    if use.named is not None:
        return f"{text}\nCall the function {use.named} now."
    return f"{text}\nCall at least one function now." if use.choice == "required" else text


# ---- out of the answer ----


@dataclass(frozen=True, kw_only=True, slots=True)
class CallDelta:
    """What a piece of an answer adds to one of its calls."""

    index: int
    name: str | None = None
    """Of a call that begins."""
    arguments: str = ""


class CallReader:
    """Parts an answer into its text and its calls, however it is cut into pieces. The grammar has seen to its form."""

    def __init__(self, *, has_form: bool = False) -> None:
        """An answer that `has_form` is of that form, or begins with a call; what looks like one within it is its text."""
        self.num_calls = 0
        """That have begun."""
        self._buffer = ""
        self._state: Literal["beginning", "answer", "text", "head", "arguments", "tail"]
        self._state = "beginning" if has_form else "text"
        self._depth = 0
        self._in_string = self._is_escaped = False

    @property
    def is_within_arguments(self) -> bool:
        """Of a call: what has come of them is not whole."""
        return self._state == "arguments"

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """(text that is certain, what is new of calls)."""
        self._buffer += text
        said: list[str] = []
        deltas: list[CallDelta] = []
        while self._advance(said, deltas):
            pass
        return "".join(said), deltas

    def flush(self) -> str:
        """Text that was held back, at the end."""
        rest = self._buffer if self._state in ("beginning", "text") else ""
        self._buffer = ""
        return rest if not self.num_calls else ""

    def _advance(self, said: list[str], deltas: list[CallDelta]) -> bool:
        """Read on in the buffer; whether more can be read."""
        match self._state:
            case "beginning":
                if self._buffer.startswith(_BEGINNING):
                    self._state = "text"
                elif not _BEGINNING.startswith(self._buffer):
                    self._state = "answer"
                else:
                    return False
            case "answer":
                said.append(self._buffer)
                self._buffer = ""
                return False
            case "text":
                before, opens, after = self._buffer.partition(CALL_OPENS)
                if not opens:
                    self._say_what_is_certain(said)
                    return False
                said.append("" if self.num_calls else before.rstrip())
                self._buffer, self._state = after, "head"
            case "head":
                head = _HEAD.match(self._buffer)
                if head is None:
                    return False
                self._buffer, self._state = self._buffer[head.end() :], "arguments"
                self.num_calls += 1
                deltas.append(CallDelta(index=self.num_calls - 1, name=head[1]))
            case "arguments":
                end = self._end_of_arguments()
                if part := self._buffer[:end]:
                    deltas.append(CallDelta(index=self.num_calls - 1, arguments=part))
                self._buffer = self._buffer[end:]
                if self._state == "arguments":
                    return False
            case "tail":
                if len(self._buffer) < len(_TAIL):
                    return False
                self._buffer, self._state = self._buffer[len(_TAIL) :], "text"
        return True

    def _say_what_is_certain(self, said: list[str]) -> None:
        """Spaces before a call are not part of the text, nor is what may be its beginning."""
        held = next((n for n in range(len(CALL_OPENS) - 1, 0, -1) if self._buffer.endswith(CALL_OPENS[:n])), 0)
        text = self._buffer[: len(self._buffer) - held].rstrip()
        self._buffer = self._buffer[len(text) :]
        said.append("" if self.num_calls else text)

    def _end_of_arguments(self) -> int:
        """Characters of the buffer that belong to the arguments; the state tells whether they end there."""
        for position, character in enumerate(self._buffer):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._state = "tail"
                    return position + 1
        return len(self._buffer)
