"""What is wrong with a request is said by field, in OpenAI's form, and never as a server's fault. Rules about values are the
validator's, which gRPC's tests go through; here is what only JSON and HTTP can get wrong."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.contracts.errors import ValidationError
from serving.gateway.http.body import parse
from serving.gateway.http.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import CHAT, COMPLETION, client, post

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"

# (path, changes to a good request, field, what the message says)
TABLE: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (COMPLETIONS, {"prompt": None}, "prompt", ["missing"]),
    (COMPLETIONS, {"prompt": []}, "prompt", ["empty"]),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]", ["empty"]),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt[1]", ["prompt[0]", "list of texts"]),
    (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt[1]", ["prompt[0]"]),
    (COMPLETIONS, {"prompt": [[1, "a"]]}, "prompt[0][1]", ["int", "str"]),
    (COMPLETIONS, {"prompt": [True]}, "prompt[0]", ["bool"]),
    (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt", ["object"]),
    (COMPLETIONS, {"prompt": ["a"] * 17}, "prompt", ["17", "16"]),
    (COMPLETIONS, {"prompt": [1, 270]}, "prompt[1]", ["270", "269"]),
    (COMPLETIONS, {"prompt": [[1], [2, -1]]}, "prompt[1][1]", ["-1", "269"]),
    (COMPLETIONS, {"prompt": ["a", "x" * 99]}, "prompt[1]", ["100 tokens"]),
    (COMPLETIONS, {"max_tokens": 98}, "max_tokens", ["98", "3 tokens", "100", "at most 97"]),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens", ["0", "echo", "1 or more"]),
    (COMPLETIONS, {"max_tokens": 5.5}, "max_tokens", ["int", "float"]),
    (COMPLETIONS, {"max_tokens": -2}, "max_tokens", ["-2", "-1 for the default"]),
    (COMPLETIONS, {"max_tokens": 1e30}, "max_tokens", ["1000000000000000000000000000000; allowed: from 0"]),
    (COMPLETIONS, {"max_tokens": 1e300}, "max_tokens", ["allowed: from 0"]),
    (COMPLETIONS, {"max_tokens": 2**70}, "max_tokens", ["allowed"]),
    (COMPLETIONS, {"max_tokens": True}, "max_tokens", ["int", "bool"]),
    (COMPLETIONS, {"max_tokens": "5"}, "max_tokens", ["int", "str"]),
    (COMPLETIONS, {"temperature": "hot"}, "temperature", ["float", "str"]),
    (COMPLETIONS, {"seed": -(2**63) - 1}, "seed", ["allowed"]),
    (COMPLETIONS, {"stop": [1]}, "stop[0]", ["str", "int"]),
    (COMPLETIONS, {"stop": ["a", "x" * 65]}, "stop[1]", ["65 bytes", "at most 64"]),
    (COMPLETIONS, {"logprobs": True}, "logprobs", ["true", "number"]),
    (COMPLETIONS, {"logprobs": -1}, "logprobs", ["-1", "0 to 5"]),
    (COMPLETIONS, {"n": -1}, "n", ["-1", "1 to 8"]),
    (COMPLETIONS, {"n": 0}, "n", ["0", "1 to 8"]),
    (COMPLETIONS, {"top_k": -2}, "top_k", ["-2", "-1 for the default"]),
    (COMPLETIONS, {"temperature": -1}, "temperature", ["-1", "greedy"]),
    (COMPLETIONS, {"temperature": True}, "temperature", ["bool"]),
    (COMPLETIONS, {"temperature": False}, "temperature", ["bool"]),
    (COMPLETIONS, {"top_p": 0}, "top_p", ["0", "temperature 0"]),
    (COMPLETIONS, {"logprobs": 6}, "logprobs", ["6", "0 to 5"]),
    (COMPLETIONS, {"logit_bias": {"1": "x"}}, "logit_bias", ["float", "str"]),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias", ["'-1'", "token id"]),
    (COMPLETIONS, {"logit_bias": {"01": 1}}, "logit_bias", ["'01'", "token id"]),
    (COMPLETIONS, {"logit_bias": {"٣": 1}}, "logit_bias", ["token id"]),
    (COMPLETIONS, {"logit_bias": {"9" * 5000: 1}}, "logit_bias", ["token id"]),
    (COMPLETIONS, {"logit_bias": {"270": 1}}, "logit_bias", ["270", "269"]),
    (COMPLETIONS, {"best_of": 2}, "best_of", ["2", "n choices"]),
    (COMPLETIONS, {"suffix": "end"}, "suffix", ["not supported"]),
    (COMPLETIONS, {"messages": CHAT["messages"]}, "messages", ["not supported", "send prompt"]),
    (COMPLETIONS, {"x" * 5000: 1, "strict": True}, "x" * 100 + "…", ["not a field"]),
    (COMPLETIONS, {"stream_options": {"x": 1}, "strict": True}, "stream_options.x", ["not a field"]),
    (COMPLETIONS, {"model": ""}, "model", ["missing", "plain, tiny"]),
    (COMPLETIONS, {"model": None}, "model", ["missing", "plain, tiny"]),
    (COMPLETIONS, {"parse_special": True}, "parse_special", ["allow_parse_special"]),
    (COMPLETIONS, {"add_special_tokens": False}, "add_special_tokens", ["not supported", "/tokenize"]),
    (COMPLETIONS, {"min_tokens": 3}, "min_tokens", ["not supported", "null or 0"]),
    (COMPLETIONS, {"n_predict": 3}, "n_predict", ["not supported", "send max_tokens"]),
    (COMPLETIONS, {"repeat_penalty": 1.1}, "repeat_penalty", ["not supported", "send repetition_penalty"]),
    (COMPLETIONS, {"do_sample": False}, "do_sample", ["not supported", "temperature 0"]),
    (COMPLETIONS, {"ebnf": {}}, "ebnf", ["not supported"]),
    (COMPLETIONS, {"use_beam_search": True}, "use_beam_search", ["not supported"]),
    (COMPLETIONS, {"include_stop_str_in_output": True}, "include_stop_str_in_output", ["not supported"]),
    (COMPLETIONS, {"prompt": "a\ud800b"}, "prompt", ["surrogate", "character 1"]),
    (CHATS, {"messages": []}, "messages", ["empty"]),
    (CHATS, {"messages": "hi"}, "messages", ["array", "str"]),
    (CHATS, {"messages": [{"content": "hi"}]}, "messages[0].role", ["missing"]),
    (CHATS, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content", ["int"]),
    (CHATS, {"messages": [{"role": "function", "content": "4", "name": "x"}]}, "messages[0].role", ["'tool'"]),
    (
        CHATS,
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls[0].function",
        ["missing"],
    ),
    (
        CHATS,
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "x"}]},
        "messages[1]",
        ["continue_final"],
    ),
    (CHATS, {"continue_final_message": True}, "continue_final_message", ["assistant"]),
    (CHATS, {"add_generation_prompt": False}, "add_generation_prompt", ["continue_final_message"]),
    (
        CHATS,
        {"messages": [*CHAT["messages"], {"role": "tool", "content": "x"}, {"role": "root", "content": "x"}]},
        "messages[2].role",
        ["root", "system, developer, user, assistant, tool"],
    ),
    ("/tokenize", {"prompt": None, "messages": [{"role": "System"}]}, "messages[0].role", ["system, developer, user"]),
    (CHATS, {"tools": [{"type": "web_search"}]}, "tools[0].type", ["'web_search'", "allowed: function"]),
    (CHATS, {"tool_choice": "any"}, "tool_choice", ["allowed: none, auto, required, an object", "send required"]),
    (CHATS, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", ["allowed: function", "send these tools"]),
    (
        CHATS,
        {"response_format": {"type": "regex"}},
        "response_format.type",
        ["text, json_object, json_schema", "structured_outputs"],
    ),
    (CHATS, {"response_format": {"type": "x" * 5000}}, "response_format.type", ["text, json_object, json_schema"]),
    (CHATS, {"messages": [{"role": "user", "type": "it's\n"}]}, "messages[0].type", ["allowed: text, message"]),
    (RESPONSES, {"input": [{"type": "reasoning"}]}, "input[0].type", ["function_call_output", "leave the item out"]),
    (RESPONSES, {"input": [{"type": "item_reference"}]}, "input[0].type", ["text, message", "send the item itself"]),
    (RESPONSES, {"input": [{"role": "root"}]}, "input[0].role", ["root", "system, developer, user, assistant, tool"]),
    (RESPONSES, {"tools": [{"type": "mcp"}]}, "tools[0].type", ["'mcp'", "allowed: function"]),
    (RESPONSES, {"text": {"format": {"type": "json"}}}, "text.format.type", ["json_schema", "send json_object"]),
    (
        CHATS,
        {"messages": [{"role": "user", "content": "x", "name": "bob"}], "strict": True},
        "messages[0].name",
        ["strict"],
    ),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        "messages[0].content[0].type",
        ["image_url"],
    ),
    (CHATS, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content", ["surrogate"]),
    (CHATS, {"messages": [{"role": "user", "content": "x" * 90}]}, "messages", ["tokens", "100"]),
    (CHATS, {"model": "plain"}, "messages", ["no chat format"]),
    (CHATS, {"logprobs": True, "top_logprobs": 6}, "top_logprobs", ["6", "0 to 5"]),
    (CHATS, {"top_logprobs": 1}, "top_logprobs", ["logprobs is not true"]),
    (CHATS, {"logprobs": 1}, "logprobs", ["bool", "int"]),
    (CHATS, {"max_completion_tokens": 0}, "max_completion_tokens", ["0", "1 or more"]),
    (CHATS, {"max_completion_tokens": 0}, "max_completion_tokens", ["/v1/completions with echo and logprobs"]),
    (RESPONSES, {"input": None}, "input", ["input is missing; give a text, or a list of messages"]),
    (CHATS, {"max_completion_tokens": 90}, "max_completion_tokens", ["90", "21 tokens"]),
    (CHATS, {"max_completion_tokens": 9, "max_tokens": 8}, "max_completion_tokens", ["9", "8"]),
    (CHATS, {"tools": [{"type": "function"}]}, "tools[0].function", ["missing"]),
    (CHATS, {"tool_choice": "required"}, "tool_choice", ["no tools"]),
    (COMPLETIONS, {"tools": [{"type": "function"}]}, "tools", ["not supported", "null"]),
    (CHATS, {"store": True, "strict": True}, "store", ["strict"]),
    (CHATS, {"web_search_options": {}}, "web_search_options", ["not supported", "null"]),
    ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "messages", ["one"]),
    ("/tokenize", {"prompt": None}, "prompt", ["missing"]),
    ("/tokenize", {"prompt": "x" * 5000}, "prompt", ["5000", "100"]),
    ("/tokenize", CHAT | {"prompt": None, "add_special_tokens": True}, "add_special_tokens", ["leave it unset"]),
    ("/detokenize", {"tokens": [270]}, "tokens[0]", ["270", "269"]),
    ("/detokenize", {"tokens": "x"}, "tokens", ["array", "str"]),
    ("/detokenize", {"tokens": ""}, "tokens", ["array", "str"]),
    ("/detokenize", {"tokens": None, "token_ids": None}, "tokens", ["missing"]),
    ("/detokenize", {"token_ids": [1]}, "token_ids", ["not supported", "send tokens"]),
]
GOOD = {
    COMPLETIONS: COMPLETION,
    CHATS: CHAT,
    RESPONSES: {"model": "tiny", "input": "hi"},
    "/tokenize": COMPLETION,
    "/detokenize": {"model": "tiny", "tokens": [1]},
}


def assert_refused(answer: Any, status: int = 400) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    return error


async def test_bad_values_are_named(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for path, changes, field, parts in TABLE:
            error = assert_refused(await post(gateway, path, GOOD[path] | changes))
            assert error["param"] == field, error
            for part in (field, *parts):
                assert part in error["message"], (changes, error)
        assert gateway.backend.requests == []


async def test_what_does_not_fit_the_context_has_openais_code(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for changes in (
            {"prompt": "x" * 200},
            {"prompt": [1] * 100},
            {"prompt": [1] * 101},
            {"prompt": ["x", "y" * 5000]},
            {"prompt": [[1], [1] * 101]},
            {"max_tokens": 98},
        ):
            error = assert_refused(await post(gateway, COMPLETIONS, COMPLETION | changes))
            assert error["code"] == "context_length_exceeded", error
        for path, body in (("/tokenize", {"prompt": "x" * 5000}), ("/detokenize", {"tokens": [1] * 101})):
            assert (
                assert_refused(await post(gateway, path, {"model": "tiny"} | body))["code"] == "context_length_exceeded"
            )


@pytest.mark.parametrize(
    ("path", "asked", "most"),
    [
        (CHATS, "messages", "max_completion_tokens"),
        (CHATS, "messages", "max_tokens"),
        ("/v1/responses", "input", "max_output_tokens"),
        (COMPLETIONS, "prompt", "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_does_not_fit_is_told_in_the_requests_own_names(
    serve: Serve, path: str, asked: str, most: str, stream: bool
) -> None:
    value: Any = CHAT["messages"] if asked == "messages" else "hi"
    async with serve(http_port=0) as gateway:
        body = {"model": "tiny", asked: value, most: 200, "stream": stream}
        error = assert_refused(await post(gateway, path, body))
        assert error["param"] == most
        assert error["message"].startswith(f"{most} is 200 and {asked} has ")
        assert f"send {most} of at most" in error["message"]
        none = assert_refused(await post(gateway, path, body | {most: 0}))
        assert none["message"].startswith(f"{most} is 0, which is for requests about the prompt alone")


NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"best_of": 1, "suffix": None, "user": "u", "store": False}),
    (COMPLETIONS, {"echo": None, "logprobs": None, "n": None, "stop": None, "stream": None, "logit_bias": None}),
    (CHATS, {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "response_format": {"type": "text"}}),
    (CHATS, {"metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": None}),
    (CHATS, {"safety_identifier": "x", "prompt_cache_key": "y", "max_tokens": 5, "max_completion_tokens": 5}),
    (CHATS, {"logprobs": False, "top_logprobs": None, "function_call": None, "functions": None}),
    (COMPLETIONS, {"stop": "", "stop_token_ids": [], "logit_bias": {}, "suffix": "", "logprobs": False, "best_of": 1}),
    (COMPLETIONS, {"stop": ["", "x"], "seed": -1, "top_k": -1, "max_tokens": -1, "temperature": 1e-7, "n": 1.0}),
    (
        COMPLETIONS,
        {"stop": [], "logit_bias": [], "stop_token_ids": "", "stream": None, "echo": False, "stream_options": []},
    ),
    (COMPLETIONS, {"temperature": "", "max_tokens": "", "seed": "", "n": "", "top_p": "", "top_k": 10**6}),
    (COMPLETIONS, {"min_tokens": 0, "use_beam_search": False, "length_penalty": 1.0, "typical_p": 1.0, "mirostat": 0}),
    (COMPLETIONS, {"skip_special_tokens": True, "add_special_tokens": True, "guided_json": None, "repeat_penalty": 1}),
    (COMPLETIONS, {"best_of": 1, "stream_options": {"include_usage": True}, "seed": -7, "n_predict": -1}),
    (CHATS, {"add_generation_prompt": True, "chat_template_kwargs": {}, "top_logprobs": 0, "tool_choice": "auto"}),
    (CHATS, {"max_tokens": -1, "max_completion_tokens": 3}),
    (CHATS, {"max_tokens": 3, "max_completion_tokens": -1}),
    (CHATS, {"max_tokens": None, "max_completion_tokens": -1, "response_format": {}, "tools": False, "audio": ""}),
    (
        CHATS,
        {"guided_json": "", "stream": True, "stream_options": {"include_usage": "", "continuous_usage_stats": None}},
    ),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "", "text": "x"}], "type": ""}]}),
    (CHATS, {"max_tokens": 4e0, "store": False, "service_tier": "default", "reasoning_effort": "none"}),
]


@pytest.mark.parametrize(("path", "changes"), NEUTRAL)
async def test_fields_that_ask_for_nothing_are_taken(serve: Serve, path: str, changes: dict[str, Any]) -> None:
    async with serve(http_port=0) as gateway:
        assert (await post(gateway, path, GOOD[path] | changes)).status_code == 200


DEEP = 250_000
CORPUS: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"null", None),
    (b"[]", None),
    (b'"x"', None),
    (b"{", None),
    (b'{"model":"tiny"', None),
    (b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode(), None),
    (json.dumps(COMPLETION).encode() + b" trailing", None),
    (json.dumps(COMPLETION).encode() * 2, None),
    (b'{"model":"tiny","prompt":"\xff"}', None),
    (b'{"model":"tiny","prompt":"\xed\xa0\x80"}', None),
    (b'{"model":"tiny","prompt":"a\nb"}', None),
    (b'{"model":"tiny","prompt":"hi","model":"plain"}', "model"),
    (b'{"model":"tiny","prompt":"hi","logit_bias":{"1":1,"1":2}}', "1"),
    (b'{"model":"tiny","prompt":"hi","temperature":NaN}', None),
    (b'{"model":"tiny","prompt":"hi","temperature":Infinity}', None),
    (b'{"model":"tiny","prompt":"hi","unknown":[-Infinity]}', None),
    (b'{"model":"tiny","prompt":"hi","temperature":1e400}', "temperature"),
    (b'{"model":"tiny","prompt":"hi","temperature":1' + b"0" * 400 + b"}", "temperature"),
    (b'{"model":"tiny","prompt":"hi","seed":NaN}', None),
    (b'{"model":"tiny","prompt":"hi","seed":1e400}', "seed"),
    (b'{"model":"tiny","prompt":"hi","seed":1' + b"0" * 400 + b"}", "seed"),
    (b'{"model":"tiny","prompt":"hi","seed":1' + b"0" * 5000 + b"}", None),
    (b'{"model":"tiny","prompt":"hi","logit_bias":{"1":NaN}}', None),
    (b'{"model":"tiny","prompt":"hi","logit_bias":{"1":1e400}}', "logit_bias"),
    (b'{"model":"tiny","prompt":"hi","temperature":1e99999999999999999999}', "temperature"),
    (b'{"model":"tiny","prompt":"hi","max_tokens":0e99999999999999999999}', "max_tokens"),
    (b'{"model":"tiny","prompt":[1e-99999999999999999999,270]}', "prompt[1]"),
    (b'{"model":"tiny","prompt":"\\ud800"}', "prompt"),
    (b'{"model":"tiny","prompt":"hi","\\udc00":1}', ""),
    (b'{"model":"tiny","prompt":"hi","user":"\\ud800"}', "user"),
    (b"[" * DEEP + b"]" * DEEP, None),
    (b'{"model":"tiny","prompt":' + b"[" * DEEP + b"1" + b"]" * DEEP + b"}", None),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "model"),
    (b'{"model":"tiny","prompt":"hi","tools":' + b"[" * 400 + b'"\\ud800"' + b"]" * 400 + b"}", "tools" + "[0]" * 400),
]


async def test_broken_json_is_a_bad_request(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for body, field in CORPUS:
            answer = await post(gateway, COMPLETIONS, body)
            assert answer.status_code == 400, (body[:80], answer.text)
            assert answer.json()["error"]["param"] == (field or None), body[:80]
        nul = await post(gateway, COMPLETIONS, b'{"model":"tiny","prompt":"a\\u0000b"}')
        assert nul.status_code == 200, "it is a character like others, as it is for gRPC"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_only_json_is_taken(serve: Serve, content_type: str | None) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        headers = {} if content_type is None else {"content-type": content_type}
        answer = await http.post(COMPLETIONS, content=json.dumps(COMPLETION), headers=headers)
        assert_refused(answer, 415)
        assert (await post(gateway, COMPLETIONS, COMPLETION, **{"content-encoding": "gzip"})).status_code == 415
        for coding in ("identity", "Identity", ""):
            plain = await post(gateway, COMPLETIONS, COMPLETION, **{"content-encoding": coding})
            assert plain.status_code == 200, coding


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "soon", "", "1_0", "0x9", "5s"])
async def test_a_timeout_that_is_none_is_refused(serve: Serve, value: str) -> None:
    async with serve(http_port=0) as gateway:
        answer = await post(gateway, COMPLETIONS, COMPLETION, **{"x-request-timeout-s": value})
    assert assert_refused(answer)["param"] == "x-request-timeout-s"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
SCHEMAS = {schema: sorted(schema.__struct_fields__) for schema in (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest
)}  # fmt: skip


@given(st.sampled_from(list(SCHEMAS)), st.data())
def test_any_json_becomes_a_request_or_a_named_error(schema: Any, data: st.DataObject) -> None:
    names = st.one_of(st.sampled_from(SCHEMAS[schema]), st.text(max_size=6))
    body = json.dumps(data.draw(st.one_of(json_values, st.dictionaries(names, json_values, max_size=6)))).encode()
    try:
        request, _ = parse(schema, body)
        if hasattr(request, "query"):
            request.query()
    except ValidationError as error:
        assert str(error)
        str(error).encode()


@given(st.binary(max_size=60))
def test_any_bytes_become_a_request_or_a_named_error(body: bytes) -> None:
    with suppress(ValidationError):
        parse(CompletionRequest, body)


@pytest.mark.parametrize(
    ("value", "inner"),
    [('["\\ud800"]', "[0]"), ('{"b": "\\ud800"}', ".b"), ('{"\\ud800": 1}', ""), ('"\\u0041"', None)],
)
def test_half_of_a_pair_is_found_beside_many_values_and_below_long_names(value: str, inner: str | None) -> None:
    """The place of each value would be longer than a body may be."""
    body = f'{{"metadata": {{"{"A" * 700_000}": [{"0," * 100_000}{value}]}}, "prompt": "a"}}'.encode()
    if inner is None:
        assert parse(CompletionRequest, body)
        return
    with pytest.raises(ValidationError, match="holds half of a surrogate pair at character 0") as error:
        parse(CompletionRequest, body)
    assert error.value.field == f"metadata.{'A' * 100}…[100000]{inner}"
