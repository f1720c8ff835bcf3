"""Answers in a form that the client asks for, over HTTP and gRPC, from a backend that draws what the grammar allows."""

import asyncio
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

import grpc
import jsonschema
import numpy as np
import openai
import pydantic
import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card, obey
from model_parallel.engine.matching import GrammarCompiler, Matcher, allowed_bits
from protos import inference_pb2 as pb
from serving.config import LimitsConfig
from serving.contracts.errors import OverloadedError, ValidationError
from serving.gateway.core import grammars
from serving.gateway.core.admission import SharedRoom
from serving.gateway.core.constraints import GrammarText, JsonSchema, LarkGrammar, OneOf, check_constraint, grammar_of
from serving.gateway.core.grammar_worker import Trial, Verdict, try_out
from serving.gateway.core.grammars import GrammarChecker
from serving.text.token_table import token_table
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Running, running
from tests.unit.gateway.http_client import CHAT, COMPLETION, events, post

ASK: list[Any] = [{"role": "user", "content": "hi"}]


class Person(pydantic.BaseModel):
    """What `.parse()` of the openai package is given."""

    name: str = pydantic.Field(max_length=6)
    age: int
    mood: Literal["good", "bad"]
    tags: list[Literal["a", "b"]]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def serve(backend: FakeBackend | None = None, **limits: Any) -> AbstractAsyncContextManager[Running]:
    cards = (card("tiny", max_model_len=6000), card("free", structured_output=False))
    return running(backend or FakeBackend(obey(), cards), http_port=0, limits=LimitsConfig(**limits))


@asynccontextmanager
async def api(gateway: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{gateway.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


async def test_the_openai_package_parses_answers_into_pydantic_models() -> None:
    async with serve() as gateway, api(gateway) as client:
        answer = await client.chat.completions.parse(model="tiny", messages=ASK, response_format=Person, n=3)
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Person) and choice.finish_reason == "stop"
        assert len({choice.message.content for choice in answer.choices}) == 3
        async with client.chat.completions.stream(model="tiny", messages=ASK, response_format=Person) as stream:
            kinds = {event.type async for event in stream}
            streamed = await stream.get_final_completion()
        assert isinstance(streamed.choices[0].message.parsed, Person)
        assert {"chunk", "content.delta", "content.done"} <= kinds
        response = await client.responses.parse(model="tiny", input="hi", text_format=Person)
        assert isinstance(response.output_parsed, Person)
        assert response.text and response.text.format and response.text.format.type == "json_schema"


@pytest.fixture(scope="module")
def chat_bodies() -> dict[str, dict[str, Any]]:
    """What is asked for, by the name of what the answer must be."""
    choice, pattern = ["yes", "no", "it depends"], r"[a-f]{3}-\d"
    return {
        "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        "schema beside": {"response_format": {"type": "json_object", "schema": SCHEMA}},
        "schema vllm": {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        "schema text": {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": "[ ]{1,2}"},
        "schema old": {"guided_json": SCHEMA},
        "object": {"response_format": {"type": "json_object"}},
        "object vllm": {"structured_outputs": {"json_object": True}},
        "any": {"guided_json": {}},
        "choice": {"guided_choice": choice},
        "choice vllm": {"structured_outputs": {"choice": choice}},
        "regex": {"guided_regex": pattern},
        "regex vllm": {"structured_outputs": {"regex": pattern}},
        "lark": {"guided_grammar": 'start: "a" b\nb: "[" b "]" | "x"'},
        "lark vllm": {"structured_outputs": {"grammar": 'start: "a" b\nb: "[" b "]" | "x"'}},
        "free": {"response_format": {"type": "text"}, "guided_choice": [], "structured_outputs": None},
    }


def check_form(name: str, text: str) -> None:
    match name.split(maxsplit=1)[0]:
        case "schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "object":
            assert isinstance(json.loads(text), dict)
        case "any":
            json.loads(text)
        case "choice":
            assert text in ("yes", "no", "it depends")
        case "regex":
            assert re.fullmatch(r"[a-f]{3}-\d", text)
        case "lark":
            assert re.fullmatch(r"a\[*x\]*", text) and text.count("[") == text.count("]")
        case _:
            assert text == "Paris"


async def test_every_way_of_asking_over_http(chat_bodies: dict[str, dict[str, Any]]) -> None:
    async with serve() as gateway:
        for name, body in chat_bodies.items():
            answer = await post(gateway, "/v1/chat/completions", CHAT | body)
            assert answer.status_code == 200, answer.text
            assert "x-packtrain-ignored" not in answer.headers
            check_form(name, answer.json()["choices"][0]["message"]["content"])
            if "vllm" in name or "old" in name:  # another name of the same
                continue
            streamed = events(await post(gateway, "/v1/chat/completions", CHAT | body | {"stream": True}))
            assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
            check_form(name, "".join(each["choices"][0]["delta"].get("content", "") for each in streamed))
            whole = await post(gateway, "/v1/completions", COMPLETION | body | {"prompt": ["a", "b"], "max_tokens": -1})
            for choice in whole.json()["choices"]:
                check_form(name, choice["text"])
        compact = await post(gateway, "/v1/chat/completions", CHAT | chat_bodies["schema vllm"])
        text = compact.json()["choices"][0]["message"]["content"]
        assert re.match(r'\{"name":"', text)
        for form in ({"type": "json_object"}, {"type": "text"}, {"type": "json_schema", "name": "x", "schema": SCHEMA}):
            answer = await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi", "text": {"format": form}})
            text = answer.json()["output"][0]["content"][0]["text"]
            check_form({"json_object": "object", "text": "free"}.get(form["type"], "schema"), text)  # type: ignore[call-overload]


async def test_every_kind_over_grpc() -> None:
    kinds = {
        "schema": pb.Constraint(json_schema=json.dumps(SCHEMA)),
        "any": pb.Constraint(json_schema="true"),
        "choice": pb.Constraint(choice=pb.Constraint.Texts(texts=["yes", "no", "it depends"])),
        "regex": pb.Constraint(regex=r"[a-f]{3}-\d"),
        "lark": pb.Constraint(lark='start: "a" b\nb: "[" b "]" | "x"'),
    }
    async with serve() as gateway:
        for name, constraint in kinds.items():
            request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
            request.sampling.constraint.CopyFrom(constraint)
            request.sampling.n = 2
            for choice in (await gateway.stub.Generate(request)).choices:
                check_form(name, choice.text)
                assert choice.finish_reason == pb.FINISH_REASON_STOP
            request.sampling.n = 1
            check_form(name, "".join([chunk.text async for chunk in gateway.stub.GenerateStream(request)]))
        model = (await gateway.stub.GetModel(pb.GetModelRequest(model="tiny"))).model
        assert model.structured_output
        for wrong, field in (
            (pb.Constraint(), "sampling.constraint"),
            (pb.Constraint(json_schema="{"), "sampling.constraint.json_schema"),
            (pb.Constraint(json_schema='{"properties": {"a": {"type": "objekt"}}}'), "json_schema.properties.a"),
            (pb.Constraint(json_schema='{"const": "\\ud800"}'), "sampling.constraint.json_schema holds half"),
            (pb.Constraint(json_schema='{"items":' * 980 + "{}" + "}" * 980), "json_schema is nested too deeply"),
            (pb.Constraint(regex="(?=a)b"), "sampling.constraint.regex"),
            (pb.Constraint(choice=pb.Constraint.Texts()), "sampling.constraint.choice.texts"),
            (pb.Constraint(lark="start: other"), "sampling.constraint.lark"),
        ):
            request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
            request.sampling.constraint.CopyFrom(wrong)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.stub.Generate(request)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert field in (error.value.details() or "")


def schema_body(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


S = "response_format.json_schema.schema"
WRONG = [
    ({"response_format": {"type": "json"}}, "response_format.type", "json"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    (schema_body(3), S, "not a JSON schema"),
    (schema_body([]), S, "not a JSON schema"),
    (schema_body({"type": "objekt"}), S, "Invalid type: objekt"),
    (
        schema_body({"properties": {"a": {"type": "array", "items": {"type": "strin"}}}}),
        f"{S}.properties.a.items",
        "Invalid type: strin",
    ),
    (
        schema_body({"anyOf": [{"type": "null"}, {"type": "object", "unevaluatedProperties": False}]}),
        f"{S}.anyOf[1]",
        "unevaluatedProperties",
    ),
    (schema_body({"$defs": {"n": {"not": {"const": 1}}}, "$ref": "#/$defs/n"}), f"{S}.$defs.n", "not"),
    (schema_body({"$defs": {"n": {"not": {}}}, "$ref": "#/$defs/n"}), f"{S}.$defs.n", "schema is false"),
    (schema_body({"properties": {"a": {"pattern": "(?=x)", "type": "string"}}}), f"{S}.properties.a", "look-around"),
    (schema_body({"type": "string", "format": 5}), S, "format"),
    (schema_body({"$ref": "http://example.com/x"}), S, "example.com"),
    (schema_body({"type": "integer", "minimum": 5, "maximum": 4}), S, "minimum (5)"),
    (schema_body(False), S, "nsatisfiable"),
    (schema_body({"$ref": "#"}), S, "no text at all"),
    (schema_body({"x-guidance": {"lenient": True}}), f"{S}.x-guidance", "not supported"),
    (schema_body({"description": "x" * 70_000}), S, "limits.max_grammar_bytes"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
    ({"guided_regex": "a\\"}, "guided_regex", ""),
    ({"guided_grammar": "start: a\nb: )"}, "guided_grammar", "2("),
    ({"guided_grammar": 'start: a\na[temperature=0.5]: "x"'}, "guided_grammar", "temperature"),
    ({"guided_grammar": ""}, None, ""),
    ({"guided_grammar": "start: <|im_end|>"}, "guided_grammar", "<|im_end|> is a special token"),
    ({"guided_grammar": "start: " + " | ".join(f'"x{i}"' for i in range(2500))}, "guided_grammar", "after 1 tokens"),
    ({"guided_regex": r"\bfoo"}, "guided_regex", 'guided_regex: invalid regex "\\\\bfoo"'),
    ({"guided_regex": "foo\\"}, "guided_regex", "ends with a backslash that escapes nothing"),
    ({"guided_grammar": 'root ::= "yes" | "no"'}, "guided_grammar", "has rules with ::="),
    ({"guided_grammar": 'start: "x" b'}, "guided_grammar", "at 1(8): unknown name"),
    (
        schema_body({"properties": {"a": {"minimum": 1e39}}}),
        "response_format.json_schema.schema.properties.a.minimum",
        "allowed",
    ),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", "half of a surrogate pair"),
    ({"structured_outputs": {"json": '{"const": "\\ud800"}'}}, "structured_outputs.json", "half of a surrogate pair"),
    ({"guided_json": '{"items":' * 980 + "{}" + "}" * 980}, "guided_json", "nested too deeply"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "beside guided_regex"),
    ({"guided_choice": ["a"]} | schema_body(SCHEMA), "guided_choice", "beside"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex", "beside"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace", ""),
    ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "JSON alone"),
    ({"ebnf": "root ::= x"}, "ebnf", "structured_outputs"),
]


async def test_what_is_wrong_is_refused_by_its_place_and_reaches_no_group() -> None:
    async with serve() as gateway:
        for body, place, what in WRONG:
            answer = await post(gateway, "/v1/chat/completions", CHAT | body)
            if place is None:
                assert answer.status_code == 200, answer.text
                continue
            assert answer.status_code == 400, (body, answer.text)
            error = answer.json()["error"]
            assert error["param"] == place and what in error["message"], (body, error)
            assert place in error["message"]
            assert "backtrace" not in error["message"] and "no_forcing" not in error["message"]
        assert [request.grammar for request in gateway.backend.requests] == [""]
        answer = await post(gateway, "/v1/chat/completions", CHAT | schema_body(SCHEMA) | {"model": "free"})
        assert answer.status_code == 400 and "structured_output: false" in answer.json()["error"]["message"]
        form = {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}
        answer = await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi", "text": {"format": form}})
        assert answer.json()["error"]["param"] == "text.format.schema"


CHOICES = {
    "many": [f"x{i}" for i in range(2500)],
    "many of one beginning": [f"the city of {i}" for i in range(3000)],
    "as many as there may be": [str(i) for i in range(13_000)],
    "special": [
        "<|im_end|>",
        "a|b",
        ".*",
        '"',
        "\\",
        "/",
        "'",
        "%json {}",
        "é🙂",
        "\n",
        "\x00\x7f\u2028\ufeff",
        " a",
        "[0-9]",
    ],
    "begins alike": ["a", "ab", "abc", "abcd"],
    "empty": ["", "a"],
    "one": ["only"],
    "twice": ["a", "a"],
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("strips_space", [False, True])
def test_a_list_of_texts_is_those_texts(name: str, strips_space: bool) -> None:
    """Each of them is allowed to its end, and nothing beside it."""
    texts = CHOICES[name]
    text = grammar_of(OneOf(field="choice", texts=texts), strips_space=strips_space).text
    compiler = GrammarCompiler(TABLE)
    assert not try_out(compiler, Trial(text)).error
    grammar = compiler.compile(text)
    for each in [*texts[:5], *texts[-5:]]:
        for spelt in (each, f" {each}") if strips_space else (each,):
            matcher = Matcher(grammar, spares_end=False)
            for byte in spelt.encode():
                matcher.consume(byte)
            if strips_space and each.startswith(" ") and spelt == each:
                assert not ends(matcher), "the space would be taken away"
                continue
            assert ends(matcher), spelt
            matcher.consume(ord("~"))
            assert matcher.has_failed or matcher.is_complete


def ends(matcher: Matcher) -> bool:
    """Whether the text may end here."""
    mask_W = np.zeros(matcher.num_words, dtype=np.int32)
    return matcher.is_complete or (matcher.fill(mask_W) and bool(allowed_bits(mask_W[None], range(257, 258))[0, 0]))


@pytest.mark.parametrize("num_texts", [2500, 5000])
async def test_a_long_list_of_texts_is_chosen_from(num_texts: int) -> None:
    texts = [f"x{i}" for i in range(num_texts)]
    async with serve() as gateway:
        answer = await post(gateway, "/v1/chat/completions", CHAT | {"guided_choice": texts})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] in texts


@pytest.mark.parametrize("attribute", ["temperature=0.5", "max_tokens=3", 'stop="b"', "stop = /b/"])
@pytest.mark.parametrize(
    "rule",
    [
        "x[{}]",
        "  x [lazy, {}]",
        "!x[{}]",
        "?x[{}]",
        "!?x[{}]",
        'x[capture="]", {}]',
        'x[capture="\\"]", {}]',
        "_x-1[{}]",
    ],
)
def test_what_a_rule_may_not_set_is_found_however_the_rule_is_written(rule: str, attribute: str) -> None:
    grammar = LarkGrammar(field="g", text=f'start: "a"\n{rule.format(attribute)}: /a*/')
    with pytest.raises(ValidationError, match=f"^g sets {attribute.partition('=')[0].strip()} of a rule"):
        check_constraint(grammar, LimitsConfig())


@pytest.mark.parametrize(
    "text", ['start[capture="stop=1"]: "a"', 'start: /[stop=1]/ "x[max_tokens=3]"', "start[lazy]: /a*/"]
)
def test_what_only_looks_as_if_it_were_set_is_taken(text: str) -> None:
    check_constraint(LarkGrammar(field="g", text=text), LimitsConfig())


# ---- trials ----

TABLE = token_table(ByteTokenizer(), 270, (257,))  # type: ignore[arg-type]


def grammar(schema: Any) -> GrammarText:
    return grammar_of(JsonSchema(field="schema", schema=schema), strips_space=False)


async def test_a_grammar_is_tried_once() -> None:
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    try:
        good, bad = grammar(SCHEMA), grammar({"type": "objekt"})
        await asyncio.gather(*(checker.check(good, "t") for _ in range(5)))
        for _ in range(2):
            with pytest.raises(ValidationError, match="objekt"):
                await checker.check(bad, "t")
        await checker.check(good, "t")
        assert (checker.num_tried, checker.num_hits) == (2, 2)
    finally:
        checker.close()


async def test_a_grammar_that_takes_too_long_ends_its_trial_and_no_other() -> None:
    """The library's own limits do not bound it: some six seconds on an idle machine."""
    checker = GrammarChecker(lambda: TABLE, 1.0, SharedRoom(100))
    try:
        slow = grammar({"type": "integer", "multipleOf": 1000003})
        with pytest.raises(ValidationError, match="schema: takes more than 1 s"):
            await checker.check(slow, "t")
        await checker.check(grammar(SCHEMA), "t")
        with pytest.raises(ValidationError, match="takes more than"):
            await checker.check(slow, "t")
        assert checker.num_tried == 2, "it is remembered"
        assert checker._worker is not None
        pid = checker._worker._process.pid
    finally:
        checker.close()
    await asyncio.to_thread(checker._thread.shutdown)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


LARGE = grammar({"enum": [f"{index:060}" for index in range(3000)]})
"""More than a pipe holds."""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("asked", [grammar(SCHEMA), LARGE], ids=["small", "large"])
async def test_a_process_that_was_lost_between_trials_is_replaced(sent: signal.Signals, asked: GrammarText) -> None:
    """It says nothing of the grammar that came next."""
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    try:
        await checker.check(grammar({"type": "integer"}), "t")
        lost = checker._worker
        assert lost is not None
        os.kill(lost._process.pid, sent)
        if sent == signal.SIGSTOP:
            lost._timeout_s = 0.2  # of this process alone
        await checker.check(asked, "t")
        assert checker._worker is not None and checker._worker is not lost
        with pytest.raises(ValidationError, match="objekt"):
            await checker.check(grammar({"type": "objekt"}), "t")
        with pytest.raises(ProcessLookupError):
            os.kill(lost._process.pid, 0)
    finally:
        checker.close()


async def test_a_process_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "module_command", lambda module: [sys.executable, "-c", ""])
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    try:
        with pytest.raises(OverloadedError, match="does not start"):
            await checker.check(grammar(SCHEMA), "t")
        monkeypatch.undo()
        await checker.check(grammar(SCHEMA), "t")
    finally:
        checker.close()


async def test_a_request_that_goes_away_leaves_the_trial_to_others() -> None:
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    try:
        first = asyncio.create_task(checker.check(grammar(SCHEMA), "t"))
        await asyncio.sleep(0)
        second = asyncio.create_task(checker.check(grammar(SCHEMA), "t"))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert first.cancelled() and checker.num_tried == 1
    finally:
        checker.close()


async def test_tenants_take_turns_with_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has one new grammar does not wait behind all of another's."""
    order = list[str]()
    may_go_on = threading.Event()

    def try_out(self: GrammarChecker, grammar: GrammarText) -> tuple[Verdict, float]:
        may_go_on.wait(PATIENCE_S)
        order.append(grammar.text)
        return Verdict(), math.inf

    monkeypatch.setattr(GrammarChecker, "_try_out", try_out)
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    grammars_of = {
        name: [grammar({"const": f"{name}{index}"}) for index in range(count)]
        for name, count in {"greedy": 6, "small": 1, "middle": 2}.items()
    }
    try:
        tasks = list[asyncio.Task[None]]()
        for tenant, mine in grammars_of.items():
            tasks += [asyncio.create_task(checker.check(each, tenant)) for each in mine]
            await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(*tasks)
    finally:
        checker.close()
    names = {each.text: f"{name}{index}" for name, mine in grammars_of.items() for index, each in enumerate(mine)}
    assert [names[text] for text in order] == [
        "greedy0", "greedy1", "small0", "middle0", "greedy2", "middle1", "greedy3", "greedy4", "greedy5",
    ]  # fmt: skip


async def test_what_waits_for_a_trial_is_refused_when_the_model_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def try_out(self: GrammarChecker, grammar: GrammarText) -> tuple[Verdict, float]:
        may_end.wait(PATIENCE_S)
        return Verdict(), math.inf

    monkeypatch.setattr(GrammarChecker, "_try_out", try_out)
    checker = GrammarChecker(lambda: TABLE, 2.0, SharedRoom(100))
    tasks = [asyncio.create_task(checker.check(grammar({"const": value}), "t")) for value in range(3)]
    await asyncio.sleep(0)
    checker.close()
    may_end.set()
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert first is None
    assert [str(each) for each in others] == ["the model is being changed"] * 2
    with pytest.raises(OverloadedError):
        await checker.check(grammar({"const": "new"}), "t")


async def test_a_tenant_fills_neither_the_trials_nor_the_places_of_those_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that have gone leave their trials, and those for one grammar count as well as those for many."""
    may_end = threading.Event()

    def try_out(self: GrammarChecker, grammar: GrammarText) -> tuple[Verdict, float]:
        may_end.wait(PATIENCE_S)
        return Verdict(), math.inf

    monkeypatch.setattr(GrammarChecker, "_try_out", try_out)
    monkeypatch.setattr(grammars, "MAX_WAITING", 10)
    requests = SharedRoom(20)
    checkers = [GrammarChecker(lambda: TABLE, 2.0, requests) for _ in range(2)]
    tasks: list[asyncio.Task[None]] = []

    async def num_let_in(checker: GrammarChecker, tenant: str, schemas: list[Any]) -> int:
        """Of so many requests."""
        asked = [asyncio.create_task(checker.check(grammar(schema), tenant)) for schema in schemas]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = [task for task in asked if task.done()]
        assert all(isinstance(task.exception(), OverloadedError) for task in refused)
        tasks.extend(set(asked).difference(refused))
        return len(asked) - len(refused)

    try:
        many = [{"const": value} for value in range(10)]
        assert await num_let_in(checkers[0], "greedy", many) == 8
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert await num_let_in(checkers[0], "greedy", many[8:]) == 0, "the trials are still there"
        assert await num_let_in(checkers[0], "other", many[9:]) == 1
        assert await num_let_in(checkers[0], "greedy", [many[0]] * 20) == 16, "four times as many as there is room"
        assert await num_let_in(checkers[1], "greedy", many) == 0, "the room is that of the whole gateway"
        assert await num_let_in(checkers[1], "other", many[:1]) == 1
        may_end.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await num_let_in(checkers[1], "greedy", [{"const": -value} for value in range(1, 11)]) == 8, (
            "all places are back"
        )
    finally:
        may_end.set()
        for checker in checkers:
            checker.close()
        await asyncio.gather(*tasks, return_exceptions=True)
