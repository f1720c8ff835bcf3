"""Functions that a model may call: over HTTP with the `openai` package, and how calls are told, read and answered in text."""

import json
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card, obey
from serving.config import LimitsConfig
from serving.contracts.chat import ASSISTANT, USER
from serving.contracts.errors import ValidationError
from serving.gateway.core.tools import (
    TOOL,
    CallReader,
    Tool,
    ToolCall,
    ToolUse,
    Turn,
    call_text,
    check_tools,
    in_order_of_calls,
    tool_grammar,
    tools_text,
    with_results,
    with_tools,
)
from serving.gateway.core.validate import ChatPrompt
from serving.gateway.http.body import parse
from serving.gateway.http.responses_form import ResponsesRequest
from serving.text.chat import ChatMessage
from serving.text.chat_formats import NAMED_FORMATS
from tests.unit.gateway.http_client import CHAT, events, post
from tests.unit.gateway.test_structured_output import api, serve

ASK: list[Any] = [{"role": "user", "content": "hi"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a place.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


def says(*texts: str, seed: int = 0) -> FakeBackend:
    return FakeBackend(obey(*texts, seed=seed), [card("tiny", max_model_len=6000)])


class Weather(pydantic.BaseModel):
    """Asks for the weather."""

    city: str = pydantic.Field(max_length=6)
    days: int


async def test_a_model_that_decides_by_itself() -> None:
    async with serve(says("Sunny.", CALL, f"I look it up.\n{CALL}\n{STOP}")) as gateway, api(gateway) as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, n=3)
        plain, call, both = answer.choices
        assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == ("Sunny.", None, "stop")
        assert (call.message.content, call.finish_reason) == (None, "tool_calls")
        assert call.message.tool_calls and both.message.tool_calls
        assert call.message.tool_calls[0].type == "function"
        assert call.message.tool_calls[0].function.name == "get_weather"
        assert json.loads(call.message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 2}
        assert both.message.content == "I look it up."
        assert [each.function.name for each in both.message.tool_calls if each.type == "function"] == [
            "get_weather",
            "stop",
        ]
        ids = [each.id for choice in (call, both) for each in choice.message.tool_calls or ()]
        assert len(set(ids)) == 3
        (request, *_) = gateway.backend.requests
        told = bytes(token_id for token_id in request.prompt_token_ids if token_id < 256).decode()
        assert "get_weather" in told and "Of a place." in told and "<tools>" in told
        # What came goes back as it came, with results; two results are one message of the user's.
        history: list[Any] = [
            *ASK,
            both.message.model_dump(exclude_none=True),
            *({"role": "tool", "tool_call_id": each.id, "content": "42"} for each in both.message.tool_calls),
            {"role": "user", "content": "and now?"},
        ]
        await client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
        (request,) = gateway.backend.requests
        told = bytes(token_id for token_id in request.prompt_token_ids if token_id < 256).decode()
        assert f"I look it up.\n{CALL}\n{STOP}" in told
        assert "<tool_response>\n42\n</tool_response>\n<tool_response>\n42\n</tool_response>\nand now?" in told


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_call_that_is_asked_for_comes_and_is_valid(choice: Any) -> None:
    async with serve(says("No.", seed=4)) as gateway, api(gateway) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice, n=4, parallel_tool_calls=False
        )
        for each in answer.choices:
            assert each.message.content is None and each.message.tool_calls
            (call,) = each.message.tool_calls
            assert call.type == "function"
            if call.function.name == "get_weather":
                jsonschema.validate(json.loads(call.function.arguments), PLACE)
            else:
                assert (call.function.name, json.loads(call.function.arguments), choice) == ("stop", {}, "required")
            assert each.finish_reason == ("tool_calls" if choice == "required" else "stop")


async def test_a_streamed_call_and_the_parsing_of_the_openai_package() -> None:
    async with serve(says(f"Look:\n{CALL}")) as gateway, api(gateway) as client:
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        async with client.chat.completions.stream(model="tiny", messages=ASK, tools=[tool]) as stream:
            seen = [event async for event in stream]
            final = (await stream.get_final_completion()).choices[0]
        assert final.message.content == "Look:" and final.finish_reason == "tool_calls"
        assert final.message.tool_calls
        assert final.message.tool_calls[0].function.parsed_arguments == Weather(city="Rome", days=2)
        done = [event for event in seen if event.type == "tool_calls.function.arguments.done"]
        assert [event.arguments for event in done] == ['{"city": "Rome", "days": 2}']
        parsed = await client.chat.completions.parse(model="tiny", messages=ASK, tools=[tool], tool_choice="required")
        (call,) = (parsed.choices[0].message.tool_calls or ())[:1]
        assert isinstance(call.function.parsed_arguments, Weather)
        body = CHAT | {"tools": TOOLS, "stream": True, "logprobs": True}
        chunks = events(await post(gateway, "/v1/chat/completions", body))
        deltas = [delta for each in chunks for delta in each["choices"][0]["delta"].get("tool_calls", ())]
        assert (deltas[0]["id"], deltas[0]["type"]) == (deltas[0]["id"], "function")
        assert deltas[0]["function"] == {"name": "get_weather", "arguments": "{"}
        assert all(set(delta) == {"index", "function"} for delta in deltas[1:])
        num_tokens = sum(len((each["choices"][0]["logprobs"] or {}).get("content", ())) for each in chunks)
        assert num_tokens == len(f"Look:\n{CALL}")


async def test_an_event_has_one_entry_for_each_call_however_the_answer_is_cut() -> None:
    """The `openai` package keeps two entries of a choice's first event as two calls, whatever their index."""
    said = [f"{'x' * length}{CALL}\n{STOP}" for length in range(8)]  # a step brings eight bytes
    async with serve(says(*said)) as gateway, api(gateway) as client:
        tools: list[Any] = [openai.pydantic_function_tool(Weather, name="get_weather"), TOOLS[1]]
        async with client.chat.completions.stream(model="tiny", messages=ASK, tools=tools, n=8) as stream:
            async for event in stream:
                if event.type == "chunk":
                    calls = [call.index for each in event.chunk.choices for call in each.delta.tool_calls or ()]
                    assert len(calls) == len(set(calls))
            final = await stream.get_final_completion()
        told = [[call.function for call in each.message.tool_calls or ()] for each in final.choices]
        assert [[(call.name, call.arguments) for call in calls] for calls in told] == 8 * [
            [("get_weather", '{"city": "Rome", "days": 2}'), ("stop", "{}")]
        ]


UNIQUE = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}
FAR = {"type": "object", "properties": {"far": {"type": "number", "minimum": 1e30}}}
"""Schemas that calls cannot be held to: the compiler of grammars knows no such keyword; it would read the bound wrongly."""
ODD_CALL = '<tool_call>\n{"name": "odd", "arguments": {"anything": [1, {}]}}\n</tool_call>'


def odd(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "odd", "parameters": schema, **more}}


@pytest.mark.parametrize("schema", [UNIQUE, FAR])
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_function_that_calls_cannot_be_held_to_is_offered_and_told(
    schema: Any, choice: str, stream: bool
) -> None:
    async with serve(says(f"{ODD_CALL}\n{CALL}")) as gateway:
        tools = [odd(UNIQUE) | {"function": {"name": "other", "parameters": UNIQUE}}, *TOOLS, odd(schema)]
        body = CHAT | {"tools": tools, "tool_choice": choice, "stream": stream}
        answer = await post(gateway, "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        if stream:
            deltas = [call for each in events(answer) for call in each["choices"][0]["delta"].get("tool_calls", ())]
            arguments = [
                "".join(each["function"]["arguments"] for each in deltas if each["index"] == i) for i in (0, 1)
            ]
        else:
            arguments = [each["function"]["arguments"] for each in answer.json()["choices"][0]["message"]["tool_calls"]]
        assert arguments == ['{"anything": [1, {}]}', '{"city": "Rome", "days": 2}']
        told = "tools[0].function.parameters, tools[3].function.parameters"
        assert answer.headers["x-packtrain-ignored"] == told
        # The others are held to theirs.
        (request,) = gateway.backend.requests
        assert '"maxLength": 8' in request.grammar and "uniqueItems" not in request.grammar
        flat = [{"type": "function", **tool["function"]} for tool in tools]
        answer = await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi", "tools": flat})
        assert answer.headers["x-packtrain-ignored"] == "tools[0].parameters, tools[3].parameters"


@pytest.mark.parametrize("schema", [UNIQUE, FAR])
@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ({"strict": True}, {}),
        ({}, {"strict": True}),
        ({}, {"tool_choice": {"type": "function", "function": {"name": "odd"}}}),
        ({"strict": True}, {"tools": [odd(UNIQUE) | {"function": {"name": "other", "parameters": UNIQUE}}, *TOOLS]}),
    ],
)
async def test_a_strict_or_named_function_that_calls_cannot_be_held_to_is_refused(
    schema: Any, more: dict[str, Any], changes: dict[str, Any]
) -> None:
    async with serve(says(ODD_CALL)) as gateway:
        body = CHAT | {"tools": TOOLS} | changes
        tools = [*body["tools"], odd(schema, **more)]
        answer = await post(gateway, "/v1/chat/completions", body | {"tools": tools})
        place = f"tools[{len(tools) - 1}].function.parameters.properties."
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(place), answer.text
        assert not gateway.backend.requests


@pytest.mark.parametrize("arguments", ["", None, "{}"])
@pytest.mark.parametrize("result", ["", None, [], [{"type": "text", "text": ""}]])
async def test_empty_arguments_and_results_go_back_as_what_they_are(arguments: str | None, result: Any) -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": result},
    ]
    async with serve(says("Ok.")) as gateway:
        answer = await post(gateway, "/v1/chat/completions", {"model": "tiny", "messages": messages})
        assert answer.status_code == 200, answer.text
        told = bytes(token_id for token_id in gateway.backend.requests[-1].prompt_token_ids if token_id < 256).decode()
        assert '{"name": "f", "arguments": {}}' in told and "<tool_response>\n\n</tool_response>" in told


async def test_a_form_beside_functions_and_functions_that_may_not_be_called() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    async with serve(says("nothing of this kind", CALL, seed=1)) as gateway:
        body = CHAT | {"tools": TOOLS, "response_format": form, "n": 2, "parallel_tool_calls": False}
        first, second = (await post(gateway, "/v1/chat/completions", body)).json()["choices"]
        assert first["message"].get("tool_calls") or first["message"]["content"] in ('"yes"', '"no"')
        assert second["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        none = await post(gateway, "/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": "none"})
        assert none.json()["choices"][0]["message"] == {
            "content": "nothing of this kind", "role": "assistant", "refusal": None,
        }  # fmt: skip
        assert not gateway.backend.requests[0].grammar


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
WRONG = [
    ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "'a b'"),
    ({"tools": [{"function": FUNCTION}, {"function": FUNCTION}]}, "tools[1].function.name", "another"),
    ({"tools": [{"type": "web_search", "function": FUNCTION}]}, "tools[0].type", "web_search"),
    ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters", "schema"),
    *(
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": kind, "maxLength": 5}}}]},
            "tools[0].function.parameters.type",
            f'{json.dumps(kind)}; allowed: "object"',
        )
        for kind in ("string", "array", "null", ["string", "null"], [], None, "objekt")
    ),
    *(
        ({"tools": [{"function": {"name": "f", "parameters": schema}}]}, "tools[0].function.parameters", "nsatisfiable")
        for schema in (
            False,
            {"const": 5},
            {"enum": ["a", None]},
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            {"oneOf": [{"type": "integer"}]},
            {"allOf": [{"type": "array"}]},
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
        )
    ),
    (
        {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}]},
        "tools[0].function.parameters.properties.a",
        "Invalid type: x",
    ),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "any"),
    ({"tools": TOOLS, "guided_grammar": 'start: "a"'}, "guided_grammar", "beside tools"),
    ({"tools": TOOLS * 70}, "tools", "limits.max_tools"),
    ({"functions": [FUNCTION]}, "functions", "send tools"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": FUNCTION}]}]},
        "messages[0].tool_calls",
        "",
    ),
]


async def test_wrong_functions_are_refused_by_name() -> None:
    async with serve(says("x")) as gateway:
        for body, place, what in WRONG:
            answer = await post(gateway, "/v1/chat/completions", CHAT | body)
            assert answer.status_code == 400, (body, answer.text)
            error = answer.json()["error"]
            assert error["param"] == place and what in error["message"], error


OBJECTS: dict[str, Any] = {
    "any": True,
    "any of one": {"additionalProperties": {"type": "integer"}},
    "or null": {"type": ["null", "object"], "properties": {"a": {"type": "null"}}, "additionalProperties": False},
    "anyOf": {"anyOf": [PLACE, {"type": "null"}, {"type": "string", "maxLength": 5}]},
    "oneOf": {"oneOf": [PLACE, {"type": "integer"}]},
    "allOf": {"allOf": [PLACE, {"type": ["object", "null"]}]},
    "enum": {"enum": [{"a": "}\n</tool_call>"}, 5, None, "}"]},
    "const": {"const": {"a": [{}, "{"]}},
    "ref": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, PLACE]}}},
    "root": {"properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "additionalProperties": False},
}


@pytest.mark.parametrize("name", OBJECTS)
async def test_arguments_are_objects_whatever_the_schema_leaves_open(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": OBJECTS[name]}}]
    async with serve(says("No.", seed=7)) as gateway:
        body = CHAT | {"tools": tools, "tool_choice": "required", "n": 3}
        for choice in (await post(gateway, "/v1/chat/completions", body)).json()["choices"]:
            assert choice["message"]["tool_calls"]
            for number, call in enumerate(choice["message"]["tool_calls"], 1):
                is_cut = choice["finish_reason"] == "length" and number == len(choice["message"]["tool_calls"])
                if not is_cut:
                    arguments = json.loads(call["function"]["arguments"])
                    assert isinstance(arguments, dict)
                    jsonschema.validate(arguments, OBJECTS[name])


@pytest.mark.parametrize(
    ("stop", "said", "reason", "arguments"),
    [
        ("}", CALL, "stop", ['{"city": "Rome", "days": 2']),
        ("Ro", CALL, "stop", ['{"city": "']),
        (' {"city', CALL, "stop", []),
        ('{"city', CALL, "stop", [""]),
        ("</tool_call>", CALL, "tool_calls", ['{"city": "Rome", "days": 2}']),
        ("}\n</tool", CALL, "tool_calls", ['{"city": "Rome", "days": 2}']),
        ('{"name', CALL, "stop", []),
        ('"stop"', f"{CALL}\n{STOP}", "tool_calls", ['{"city": "Rome", "days": 2}']),
        ("{}", f"{CALL}\n{STOP}", "stop", ['{"city": "Rome", "days": 2}', ""]),
        ("zzz", f"{CALL}\n{STOP}", "tool_calls", ['{"city": "Rome", "days": 2}', "{}"]),
        ("look", f"I look it up.\n{CALL}", "stop", []),
    ],
)
async def test_an_answer_ends_with_calls_only_where_the_last_one_is_whole(
    stop: str, said: str, reason: str, arguments: list[str]
) -> None:
    async with serve(says(said)) as gateway:
        body = CHAT | {"tools": TOOLS, "stop": [stop]}
        (whole,) = (await post(gateway, "/v1/chat/completions", body)).json()["choices"]
        calls = whole["message"].get("tool_calls", [])
        assert (whole["finish_reason"], [call["function"]["arguments"] for call in calls]) == (reason, arguments)
        streamed = [
            each["choices"][0] for each in events(await post(gateway, "/v1/chat/completions", body | {"stream": True}))
        ]
        pieces = [""] * len(arguments)
        for choice in streamed:
            for delta in choice["delta"].get("tool_calls", ()):
                pieces[delta["index"]] += delta["function"]["arguments"]
        assert (streamed[-1]["finish_reason"], pieces) == (reason, arguments)


def test_limits_of_the_core() -> None:
    use = ToolUse(tools=(Tool(name="f"),), choice="required")
    check_tools(use, None, LimitsConfig(max_tools=1))
    with pytest.raises(ValidationError, match="max_tools is 0"):
        check_tools(use, None, LimitsConfig(max_tools=0))


# ---- text ----


@given(st.data())
def test_calls_are_read_alike_however_the_answer_is_cut(data: st.DataObject) -> None:
    arguments = [
        json.dumps(data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers(), max_size=3)))
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    said = data.draw(st.sampled_from(["", "Hi.", "a < b <tool", "{}", "x\n\n"]))
    text = said + "\n".join(call_text(ToolCall(name=f"f{i}", arguments=each)) for i, each in enumerate(arguments))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    reader, told, deltas = CallReader(), "", []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, new = reader.push(text[begin:end])
        told += part
        deltas += new
    told += reader.flush()
    assert told == (said.rstrip() if arguments else said)
    assert [delta.name for delta in deltas if delta.name] == [f"f{i}" for i in range(len(arguments))]
    for index, each in enumerate(arguments):
        assert "".join(delta.arguments for delta in deltas if delta.index == index) == each


def test_functions_are_told_where_the_format_has_a_place_for_them() -> None:
    use = ToolUse(tools=(Tool(name="f", description="Does."),))
    told = tools_text(use)
    user, system = ChatMessage("user", "hi"), ChatMessage("system", "Be kind.")
    chatml, mistral = NAMED_FORMATS["chatml"], NAMED_FORMATS["mistral-v0.1"]
    assert with_tools([system, user], use, chatml, "") == [ChatMessage("system", f"Be kind.\n\n{told}"), user]
    assert with_tools([user], use, chatml, "") == [ChatMessage("system", told), user]
    assert with_tools([user], use, chatml, "Default.") == [ChatMessage("system", f"Default.\n\n{told}"), user]
    assert with_tools([user], use, mistral, "") == [ChatMessage("user", f"{told}\n\nhi")]
    assert "now" in tools_text(ToolUse(tools=use.tools, choice="required"))


def test_results_become_messages_of_the_users() -> None:
    call, result = ChatMessage("assistant", "call"), ChatMessage("tool", "1")
    assert [message.role for message in with_results([ChatMessage("user", "a"), call, result, result])] == [
        "user", "assistant", "user",
    ]  # fmt: skip
    assert with_results([call, result, ChatMessage("user", "b")])[1].content == (
        "<tool_response>\n1\n</tool_response>\nb"
    )


def test_the_space_of_sentencepiece_may_stand_before_a_call() -> None:
    use = ToolUse(tools=(Tool(name="f"),), choice="required")
    assert '" "?' in tool_grammar(use, None, strips_space=True).text
    assert '" "?' not in tool_grammar(use, None, strips_space=False).text


# ---- results and their calls ----


def answers(*ids: str | None) -> Turn:
    return Turn(message=ChatMessage(ASSISTANT, "calls"), call_ids=ids)


def result(text: str, call_id: str | None = None) -> Turn:
    return Turn(message=ChatMessage(TOOL, text), result_of=call_id, field="here")


SAYS = Turn(message=ChatMessage(USER, "and"))


@given(st.data())
def test_results_come_in_the_order_of_their_calls(data: st.DataObject) -> None:
    """Whatever the order in which they are sent, in several answers whose calls may have the same ids."""
    turns, wanted = [], []
    for number in range(data.draw(st.integers(1, 3))):
        ids = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
        named = [result(f"{number}{each}", each) for each in ids]
        turns += [answers(*ids), *data.draw(st.permutations(named)), SAYS]
        wanted += [f"{number}{each}" for each in ids]
    assert [each.content for each in in_order_of_calls(turns) if each.role == TOOL] == wanted


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([answers("a", "b"), result("1"), result("2")], "12"),
        ([answers("a", "b", "c"), result("3", "c"), result("1"), result("2")], "123"),
        ([answers("a", "b"), result("2", "b"), SAYS, result("1", "a")], "21"),
        ([answers("a"), result("1", "a"), answers("b"), result("2", "b")], "12"),
        ([answers("a", "a"), result("1", "a"), result("2", "a")], "12"),
        ([answers(None, None), result("1", "x"), result("2", "y")], "12"),
        ([result("1"), result("2")], "12"),
        ([answers("a"), result("1", "a"), result("2")], "12"),
        ([answers("a"), SAYS, answers("b", "a"), result("2", "a"), result("1", "b")], "12"),
        ([answers("a"), SAYS], ""),
    ],
)
def test_results_without_ids_come_as_they_were_sent(turns: list[Turn], wanted: str) -> None:
    assert "".join(each.content for each in in_order_of_calls(turns) if each.role == TOOL) == wanted


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([answers("a", "b"), result("1", "c")], "here is 'c'; allowed: the ids of calls without a result (a, b)"),
        ([answers("a", "b"), result("1", "a"), result("2", "a")], "here is 'a'; allowed: .* (b)"),
        ([answers("a"), result("1", "a"), SAYS, result("2", "a")], "here is 'a'; allowed: .* (none, "),
        ([result("1", "a"), answers("a")], "here is 'a'; allowed: .* (none, "),
    ],
)
def test_results_of_no_call_are_refused(turns: list[Turn], what: str) -> None:
    with pytest.raises(ValidationError, match=what.replace("(", r"\(").replace(")", r"\)")) as error:
        in_order_of_calls(turns)
    assert error.value.field == "here"


async def test_results_in_another_order_over_http() -> None:
    def call(call_id: str, name: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    chat: list[Any] = [
        *ASK,
        {"role": "assistant", "tool_calls": [call("x", "f"), call("y", "g")]},
        {"role": "tool", "tool_call_id": "y", "content": "of g"},
        {"role": "tool", "tool_call_id": "x", "content": "of f"},
    ]
    items: list[Any] = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "y", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "y", "output": "of g"},
        {"type": "function_call_output", "call_id": "x", "output": "of f"},
    ]
    async with serve(says("Ok.")) as gateway:
        for path, body in (("/v1/chat/completions", {"messages": chat}), ("/v1/responses", {"input": items})):
            answer = await post(gateway, path, {"model": "tiny"} | body)
            assert answer.status_code == 200, answer.text
            ids = gateway.backend.requests[-1].prompt_token_ids
            told = bytes(token_id for token_id in ids if token_id < 256).decode()
            assert "<tool_response>\nof f\n</tool_response>\n<tool_response>\nof g\n</tool_response>" in told
        chat[-1]["tool_call_id"] = items[-1]["call_id"] = "z"
        for path, body, field in (
            ("/v1/chat/completions", {"messages": chat}, f"messages[{len(chat) - 1}].tool_call_id"),
            ("/tokenize", {"messages": chat}, f"messages[{len(chat) - 1}].tool_call_id"),
            ("/v1/responses", {"input": items}, "input[4].call_id"),
        ):
            answer = await post(gateway, path, {"model": "tiny"} | body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


def test_an_error_shows_some_of_many_ids() -> None:
    with pytest.raises(ValidationError, match=r"\(0x+, 1x+, .*, 9x+, 4990 more\)") as error:
        in_order_of_calls([answers(*(f"{index}{'x' * 200}" for index in range(5000))), result("1", "y")])
    assert len(str(error.value)) < 2000


def test_an_error_about_an_id_passes_over_calls_without_one() -> None:
    with pytest.raises(ValidationError, match=r"here is 'a'; allowed: .* \(b\)"):
        in_order_of_calls([answers("a", None, "b"), result("1", "a"), result("2", "a")])


def test_as_many_results_as_a_body_can_hold_are_sorted() -> None:
    """In one pass: with a search for each result this would take hours."""
    ids = [str(index) for index in range(300_000)]
    turns = [answers(*ids), *(result(each, each) for each in reversed(ids))]
    assert [each.content for each in in_order_of_calls(turns)[1:]] == ids


def test_items_of_one_answer_are_joined() -> None:
    items: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Let me see"}]
    items += [{"type": "function_call", "call_id": str(index), "name": "f"} for index in range(20_000)]
    items += [{"type": "function_call_output", "call_id": "1", "output": "b"}]
    items += [{"type": "function_call_output", "call_id": "0", "output": "a"}]
    request, _ = parse(ResponsesRequest, json.dumps({"input": items}).encode())
    prompt = request.query().prompt
    assert isinstance(prompt, ChatPrompt)
    roles = [message.role for message in prompt.messages]
    assert roles == [USER, ASSISTANT, TOOL, TOOL]
    assert prompt.messages[1].content == "\n".join(
        ["Let me see", *[call_text(ToolCall(name="f", arguments="{}"))] * 20_000]
    )
    assert [message.content for message in prompt.messages[2:]] == ["a", "b"]


async def test_what_is_said_and_told_together_is_measured_before_it_is_tokenised() -> None:
    tokenizer = ByteTokenizer()
    bound = 6000 * max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    tool = {"type": "function", "function": {"name": "f", "description": "x" * bound}}
    parts = [{"role": role, "content": "x" * (bound // 2)} for role in (USER, ASSISTANT, USER)]
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"messages": ASK, "tools": [tool]}, "tools", "tools with messages has "),
        ({"messages": parts}, "messages", f"messages has {3 * (bound // 2)} characters"),
    ]
    async with serve() as gateway:
        for body, field, what in cases:
            answer = await post(gateway, "/v1/chat/completions", {"model": "tiny", **body})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field) and what in error["message"]
            assert error["code"] == "context_length_exceeded" and "cannot fit into max_model_len" in error["message"]


# ---- text of a form that looks like a call ----

FORM = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "said", ['{"a": "x<tool_call>y"}', '{"a": "x \\n<tool_call>\\n{\\"name\\": \\"get_weather\\""}  ']
)
async def test_an_answer_of_a_form_is_whole_though_it_has_the_beginning_of_a_call(said: str, stream: bool) -> None:
    said = said.rstrip()
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": FORM}}
    async with serve(FakeBackend(obey(said), (card("tiny", max_model_len=6000),))) as gateway:
        body = CHAT | {"model": "tiny", "tools": TOOLS, "response_format": form, "stream": stream}
        answer = await post(gateway, "/v1/chat/completions", body)
        if stream:
            choices = [event["choices"][0] for event in events(answer)]
            assert "".join(choice["delta"].get("content") or "" for choice in choices) == said
            assert choices[-1]["finish_reason"] == "stop"
        else:
            choice = answer.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
        if not stream:
            tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
            asked = {"model": "tiny", "input": "hi", "tools": tools}
            asked["text"] = {"format": {"type": "json_schema", "name": "n", "schema": FORM}}
            answered = (await post(gateway, "/v1/responses", asked)).json()
            assert [item["type"] for item in answered["output"]] == ["message"]
            assert answered["output"][0]["content"][0]["text"] == said


@given(st.data())
def test_what_has_a_form_is_that_form_or_begins_with_a_call(data: st.DataObject) -> None:
    call = call_text(ToolCall(name="f", arguments="{}"))
    said = data.draw(
        st.sampled_from(["", " ", "<tool", "<tool_call>", "<tool_call>x", f" {call}", f"x{call}", "x ", call])
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    reader, told, names = CallReader(has_form=True), "", []
    for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
        part, new = reader.push(said[begin:end])
        told += part
        names += [delta.name for delta in new if delta.name]
    told += reader.flush()
    assert (told, names) == (("", ["f"]) if said == call else (said, []))
