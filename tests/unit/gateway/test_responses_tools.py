"""Functions over /v1/responses, with the `openai` package."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jsonschema
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import card
from model_parallel.engine.request import FinishReason
from serving.gateway.core.choices import Chunk, Summary
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.tools import Tool, ToolUse
from serving.gateway.http.responses_form import ResponsesForm, ResponsesRequest, ResponseTool
from serving.gateway.http.resuming import Event
from tests.unit.gateway.http_client import post
from tests.unit.gateway.test_structured_output import api, serve
from tests.unit.gateway.test_tools import CALL, PLACE, STOP, Weather, says

TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "Of a place.", "parameters": PLACE, "strict": True},
    {"type": "function", "name": "stop", "parameters": None, "strict": False},
]
BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}


async def test_calls_come_and_go_back_with_their_results() -> None:
    async with serve(says(f"I look it up.\n{CALL}\n{STOP}")) as gateway, api(gateway) as client:
        answer = await client.responses.create(model="tiny", input="hi", tools=TOOLS)
        message, weather, stop = answer.output
        assert message.type == "message" and answer.output_text == "I look it up."
        assert weather.type == "function_call" and stop.type == "function_call"
        assert (weather.name, json.loads(weather.arguments)) == ("get_weather", {"city": "Rome", "days": 2})
        assert (stop.name, stop.arguments, stop.status) == ("stop", "{}", "completed")
        assert len({message.id, weather.id, stop.id, weather.call_id, stop.call_id}) == 5
        assert (answer.status, answer.tool_choice, answer.parallel_tool_calls) == ("completed", "auto", True)
        assert [tool.name for tool in answer.tools if tool.type == "function"] == ["get_weather", "stop"]
        # All that came goes back as it came, with results.
        history: list[Any] = [
            {"role": "user", "content": "hi"},
            *(item.model_dump(exclude_none=True) for item in answer.output),
            {"type": "function_call_output", "call_id": weather.call_id, "output": "42"},
            {"type": "function_call_output", "call_id": stop.call_id, "output": [{"type": "input_text", "text": "ok"}]},
            {"role": "user", "content": "and now?"},
        ]
        await client.responses.create(model="tiny", input=history, tools=TOOLS)
        request = gateway.backend.requests[-1]
        told = bytes(token_id for token_id in request.prompt_token_ids if token_id < 256).decode()
        assert f"I look it up.\n{CALL}\n{STOP}" in told
        assert "<tool_response>\n42\n</tool_response>\n<tool_response>\nok\n</tool_response>\nand now?" in told


EMPTY_TEXT: list[Any] = [{"type": "input_text", "text": ""}]


@pytest.mark.parametrize(
    ("arguments", "output"), [("", ""), ("{}", []), (None, EMPTY_TEXT), ("", [{"type": "output_text", "text": ""}])]
)
async def test_an_empty_result_is_a_result(arguments: str | None, output: Any) -> None:
    async with serve(says("Ok.")) as gateway:
        history = [
            {"role": "user", "content": EMPTY_TEXT},
            {"type": "function_call", "call_id": "a", "name": "stop", "arguments": arguments},
            {"type": "function_call_output", "call_id": "a", "output": output},
        ]
        answer = await post(gateway, "/v1/responses", {"model": "tiny", "input": history})
        assert answer.status_code == 200, answer.text
        told = bytes(token_id for token_id in gateway.backend.requests[-1].prompt_token_ids if token_id < 256).decode()
        assert '{"name": "stop", "arguments": {}}' in told and "<tool_response>\n\n</tool_response>" in told
        missing = await post(gateway, "/v1/responses", {"model": "tiny", "input": [history[2] | {"output": None}]})
        assert missing.json()["error"]["message"] == "input[0].output is missing"


async def test_the_package_parses_arguments() -> None:
    async with serve(says(CALL)) as gateway, api(gateway) as client:
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        answer = await client.responses.parse(model="tiny", input="hi", tools=[tool])
        (call,) = answer.output
        assert call.type == "function_call" and call.parsed_arguments == Weather(city="Rome", days=2)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
async def test_a_call_that_is_asked_for_comes_and_is_valid(choice: Any) -> None:
    async with serve(says("No.", seed=4)) as gateway, api(gateway) as client:
        answer = await client.responses.create(
            model="tiny", input="hi", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answer.output
        assert call.type == "function_call"
        if call.name == "get_weather":
            jsonschema.validate(json.loads(call.arguments), PLACE)
        else:
            assert (call.name, json.loads(call.arguments), choice) == ("stop", {}, "required")
        told = answer.tool_choice if isinstance(answer.tool_choice, str) else answer.tool_choice.model_dump()
        assert told == choice


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        (f"Look:\n{CALL}\n{STOP}", ["message", "function_call", "function_call"]),
        (CALL, ["function_call"]),
        ("Sunny.", ["message"]),
        ("", ["message"]),
    ],
)
async def test_streamed_events_make_the_answer(said: str, kinds: list[str]) -> None:
    """The package's own accumulator is the judge: it raises when events do not fit together."""
    async with serve(says(said)) as gateway, api(gateway) as client:
        tool = openai.pydantic_function_tool(Weather, name="get_weather")["function"]
        tools: list[Any] = [{"type": "function", **tool}, TOOLS[1]]
        async with client.responses.stream(model="tiny", input="hi", tools=tools) as stream:
            seen = [event async for event in stream]
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == kinds
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        added = [event.item.id for event in seen if event.type == "response.output_item.added"]
        done = [event.item for event in seen if event.type == "response.output_item.done"]
        assert added == [item.id for item in done] == [item.id for item in final.output]
        arguments = [event for event in seen if event.type == "response.function_call_arguments.done"]
        assert [(event.output_index, event.arguments) for event in arguments] == [
            (index, item.arguments) for index, item in enumerate(final.output) if item.type == "function_call"
        ]
        if CALL in said:
            parsed = next(item for item in final.output if item.type == "function_call")
            assert parsed.parsed_arguments == {"city": "Rome", "days": 2}
        whole = await client.responses.create(model="tiny", input="hi", tools=tools)
        plain = [item.model_dump(exclude={"id", "call_id", "parsed_arguments", "content"}) for item in final.output]
        assert [item.model_dump(exclude={"id", "call_id", "content"}) for item in whole.output] == plain
        assert whole.output_text == final.output_text


FUNCTION = {"type": "function", "name": "f"}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "'a b'"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name", "another"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [FUNCTION | {"parameters": []}]}, "tools[0].parameters", "schema"),
    (
        {"tools": [FUNCTION | {"parameters": {"type": "array"}}]},
        "tools[0].parameters.type",
        '"array"; allowed: "object"',
    ),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", "missing"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "missing"),
    ({"input": [{"content": "hi"}]}, "input[0].role", "missing"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "reasoning"),
]


async def test_wrong_functions_are_refused_by_name() -> None:
    async with serve(says("x")) as gateway:
        for body, place, what in WRONG:
            answer = await post(gateway, "/v1/responses", BODY | body)
            assert answer.status_code == 400, (body, answer.text)
            error = answer.json()["error"]
            assert error["param"] == place and what in error["message"], error


def _told(events: list[Event]) -> dict[str, Any]:
    """What a client makes of events: pieces together, and everything else as it came."""
    pieces: dict[tuple[str, int], str] = {}
    others = []
    for event in events:
        data = json.loads(msgspec.json.encode(event.data))
        if "delta" in data:
            key = (data["type"], data["output_index"])
            pieces[key] = pieces.get(key, "") + data["delta"]
        else:
            others.append(data)
    return {"pieces": pieces, "others": others}


@given(st.data())
def test_a_stream_that_is_cut_goes_on_with_the_events_that_are_missing(data: st.DataObject) -> None:
    """However tokens come together before and after, as long as the second part begins where the first one ended."""
    said = f"I look {CALL} it up.\n{STOP}\n{CALL}"
    request = ResponsesRequest(tools=[ResponseTool(name="get_weather"), ResponseTool(name="stop")])
    use = ToolUse(tools=(Tool(name="get_weather"), Tool(name="stop")))
    stream = Stream(billed_id="b", seed=1, created_unix_s=5)
    summary = Summary(
        num_prompt_tokens=3,
        num_completion_tokens=len(said),
        num_cached_tokens=0,
        num_accepted_tokens=0,
        num_rejected_tokens=0,
        group=None,
        gateway_s=0.0,
        total_s=0.0,
    )

    def events(ends: list[int]) -> list[Event]:
        form = ResponsesForm(stream, card("tiny"), request, tools=use)
        found: list[Event] = []
        for begin, end in pairwise([0, *ends, len(said)]):
            reason = FinishReason.STOP if end == len(said) else None
            chunk = Chunk(index=0, text=said[begin:end], num_tokens=end, offsets=tuple(range(begin, end)))
            found += form.events(replace(chunk, finish_reason=reason))
        return [*found, *form.last_events(summary)]

    cuts = st.lists(st.integers(1, len(said) - 1), unique=True, max_size=30).map(sorted)
    whole = events([])
    first = events(data.draw(cuts))
    places = [event.place for event in first]
    assert places == sorted(set(places)), "each is later than the one before"
    kept = first[: data.draw(st.integers(1, len(first)))]
    last = kept[-1].place
    delivered = {last.num_tokens} - {0, len(said)}
    second = events(sorted(delivered | set(data.draw(cuts))))
    assert _told([*kept, *(event for event in second if event.place > last)]) == _told(whole)
