"""Bad input gets INVALID_ARGUMENT or NOT_FOUND that names field, value and limit; a neighbour's stream goes on."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card, say
from model_parallel.engine.request import EngineOutput, EngineRequest
from protos import inference_pb2 as pb
from serving.config import LimitsConfig
from serving.contracts.accounts import OPEN
from serving.contracts.errors import UnknownModelError, ValidationError
from serving.gateway.core.call import Call
from serving.gateway.core.error_responses import error_response
from serving.gateway.core.generation import Generator
from serving.gateway.core.validate import (
    GenerateQuery,
    TextPrompt,
    TokenPrompt,
    check_generate,
    find_model,
    output_budget,
)
from serving.gateway.grpc.convert import explain_undecodable, generate_query
from tests.unit.gateway.conftest import Serve

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
BIG = 2**31 - 1


def generate(prompt: pb.Prompt | None = None, *, model: str = "tiny", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt=prompt or pb.Prompt(text="hi"), sampling=pb.Sampling(**sampling))


def tokens(*ids: int) -> pb.Prompt:
    return pb.Prompt(token_ids=pb.TokenIds(ids=ids))


def chat(*messages: tuple[str, str]) -> pb.Prompt:
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in messages]))


def score(context: pb.Prompt, *continuations: pb.Continuation) -> pb.ScoreRequest:
    return pb.ScoreRequest(model="tiny", context=context, continuations=continuations)


TEXT, IDS = pb.Continuation(text="x"), pb.Continuation(token_ids=pb.TokenIds(ids=[1]))

# (method, request, field, what the message says of value and limit)
TABLE: list[tuple[str, Any, str, list[str]]] = [
    ("Generate", pb.GenerateRequest(model="tiny"), "prompt", ["missing"]),
    ("Generate", generate(pb.Prompt()), "prompt", ["missing"]),
    ("Generate", generate(pb.Prompt(text="")), "prompt", ["empty", "at least one"]),
    ("Generate", generate(tokens()), "prompt", ["empty", "at least one"]),
    ("Generate", generate(tokens(1, 270)), "prompt[1]", ["270", "0 to 269"]),
    ("Generate", generate(tokens(2**32 - 1)), "prompt[0]", ["4294967295", "0 to 269"]),
    ("Generate", generate(pb.Prompt(text="x" * 150)), "prompt", ["151 tokens", "100"]),
    ("Generate", generate(pb.Prompt(text="x" * 99)), "prompt", ["100 tokens", "at least one"]),
    ("Generate", generate(pb.Prompt(text="x" * 1_000_000)), "prompt", ["1000000 characters", "100"]),
    ("Generate", generate(tokens(*[1] * 101)), "prompt", ["101 tokens", "100"]),
    ("Generate", generate(chat()), "messages", ["empty"]),
    ("Generate", generate(chat(("user", "x"), ("assistant", "y"))), "messages[1]", ["assistant"]),
    (
        "Generate",
        generate(chat(("root", "x"))),
        "messages[0].role",
        ["root", "system, developer, user, assistant, tool"],
    ),
    ("Generate", generate(chat(*[("user", "x")] * 1025)), "messages", ["1025", "1024"]),
    ("Generate", generate(chat(("user", "x" * 5000))), "messages[0]", ["5000", "100"]),
    ("Generate", generate(chat(("user", "x")), model="plain"), "messages", ["plain", "no chat format"]),
    ("Generate", generate(temperature=math.nan), "temperature", ["nan", "0 (greedy) to 2"]),
    ("Generate", generate(temperature=-1), "temperature", ["-1", "0 (greedy) to 2"]),
    ("Generate", generate(temperature=1e30), "temperature", ["1e+30"]),
    ("Generate", generate(top_p=0), "top_p", ["0", "above 0, at most 1"]),
    ("Generate", generate(top_p=1.1), "top_p", ["1.1"]),
    ("Generate", generate(top_p=math.nan), "top_p", ["nan"]),
    ("Generate", generate(top_k=-5), "top_k", ["-5", "-1 for the default"]),
    ("Generate", generate(min_p=-0.1), "min_p", ["-0.1", "0 to 1"]),
    ("Generate", generate(min_p=math.inf), "min_p", ["inf"]),
    ("Generate", generate(repetition_penalty=0), "repetition_penalty", ["0.01 to 2"]),
    ("Generate", generate(repetition_penalty=math.inf), "repetition_penalty", ["inf"]),
    ("Generate", generate(presence_penalty=2.5), "presence_penalty", ["2.5", "-2 to 2"]),
    ("Generate", generate(frequency_penalty=-math.inf), "frequency_penalty", ["-inf"]),
    ("Generate", generate(n=0), "n", ["0", "1 to 8"]),
    ("Generate", generate(n=-1), "n", ["-1"]),
    ("Generate", generate(n=BIG), "n", [str(BIG)]),
    ("Generate", generate(max_tokens=0), "max_tokens", ["0", "1 or more"]),
    ("Generate", generate(max_tokens=-2), "max_tokens", ["-2", "-1 for the default"]),
    ("Generate", generate(max_tokens=2**63 - 1), "max_tokens", [str(2**63 - 1)]),
    ("Generate", generate(max_tokens=98), "max_tokens", ["98", "3 tokens", "100"]),
    ("Generate", generate(logprobs=-1), "logprobs", ["-1", "0 to 5"]),
    ("Generate", generate(logprobs=10**6), "logprobs", ["1000000"]),
    ("Generate", generate(prompt_logprobs=6), "prompt_logprobs", ["6", "0 to 5"]),
    ("Generate", generate(stop=["x", "é" * 33]), "stop[1]", ["66 bytes", "at most 64"]),
    ("Generate", generate(stop=["x"] * 10_000), "stop", ["10000", "32"]),
    ("Generate", generate(stop=["x" * 1_000_000]), "stop[0]", ["1000000 bytes"]),
    ("Generate", generate(stop_token_ids=[1, 270]), "stop_token_ids[1]", ["270", "0 to 269"]),
    ("Generate", generate(stop_token_ids=[1] * 17), "stop_token_ids", ["17", "16"]),
    ("Generate", generate(logit_bias={270: 1.0}), "logit_bias", ["270", "0 to 269"]),
    ("Generate", generate(logit_bias={1: math.nan}), "logit_bias", ["logit_bias[1]", "nan", "-100 to 100"]),
    ("Generate", generate(logit_bias={1: -101.0}), "logit_bias", ["-101", "-100 to 100"]),
    ("Generate", generate(logit_bias=dict.fromkeys(range(301), 0.0)), "logit_bias", ["301", "300"]),
    ("Generate", generate(model=""), "model", ["missing", "plain, tiny"]),
    ("Score", score(pb.Prompt(), TEXT), "context", ["missing"]),
    ("Score", score(pb.Prompt(text="x")), "continuations", ["empty"]),
    ("Score", score(pb.Prompt(text="x"), *[TEXT] * 17), "continuations", ["17", "16"]),
    ("Score", score(pb.Prompt(text="x"), TEXT, pb.Continuation()), "continuations[1]", ["empty"]),
    ("Score", score(pb.Prompt(text="x"), pb.Continuation(text="")), "continuations[0]", ["empty"]),
    ("Score", score(pb.Prompt(text="x"), IDS), "continuations[0]", ["mix"]),
    ("Score", score(tokens(1), TEXT), "continuations[0]", ["mix"]),
    ("Score", score(pb.Prompt(text="x"), pb.Continuation(text="x" * 99)), "continuations[0]", ["101", "100"]),
    ("Tokenize", pb.TokenizeRequest(model="tiny"), "input", ["missing"]),
    ("Tokenize", pb.TokenizeRequest(model="tiny", chat=chat(("user", "x")).chat, add_bos=True), "add_bos", ["chat"]),
    ("Detokenize", pb.DetokenizeRequest(model="tiny", token_ids=[270]), "token_ids[0]", ["270", "0 to 269"]),
    ("GetModel", pb.GetModelRequest(), "model", ["missing"]),
]


@pytest.mark.parametrize(("method", "request_", "field", "parts"), TABLE, ids=lambda value: str(value)[:30])
async def test_bad_values_are_named(serve: Serve, method: str, request_: Any, field: str, parts: list[str]) -> None:
    async with serve() as gateway:
        call = getattr(gateway.stub, method)(request_)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is INVALID
        status = await rpc_status.aio.from_call(call)
        bad = error_details_pb2.BadRequest()
        assert any(detail.Unpack(bad) for detail in status.details)
        assert [violation.field for violation in bad.field_violations] == [field]
        for part in (field, *parts):
            assert part in caught.value.details()
        assert len(caught.value.details()) < 300
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
        assert gateway.backend.requests == []


def score(context: pb.Prompt, end: pb.Prompt) -> pb.ScoreRequest:
    continuation = (
        pb.Continuation(token_ids=end.token_ids) if end.HasField("token_ids") else pb.Continuation(text=end.text)
    )
    return pb.ScoreRequest(model="tiny", context=context, continuations=[continuation])


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", generate(pb.Prompt(text="x" * 100))),
        ("Generate", generate(tokens(*[1] * 100))),
        ("Generate", generate(tokens(*[1] * 101))),
        ("Generate", generate(max_tokens=99)),
        ("Tokenize", pb.TokenizeRequest(model="tiny", text="x" * 5000)),
        ("Detokenize", pb.DetokenizeRequest(model="tiny", token_ids=[1] * 101)),
        ("Score", score(pb.Prompt(text="x" * 5000), pb.Prompt(text="y"))),
        ("Score", score(pb.Prompt(text="x" * 60), pb.Prompt(text="y" * 60))),
        ("Score", score(tokens(*[1] * 101), tokens(1))),
        ("Score", score(tokens(1), tokens(*[1] * 101))),
        ("Score", score(tokens(*[1] * 60), tokens(*[1] * 60))),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_does_not_fit_the_model_has_one_reason(serve: Serve, method: str, request_: Any) -> None:
    async with serve() as gateway:
        call = getattr(gateway.stub, method)(request_)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        status = await rpc_status.aio.from_call(call)
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        assert info.reason == "CONTEXT_LENGTH_EXCEEDED"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", generate(model="x" * 500)),
        ("Score", pb.ScoreRequest(model="x" * 500)),
        ("Tokenize", pb.TokenizeRequest(model="x" * 500)),
        ("Detokenize", pb.DetokenizeRequest(model="x" * 500)),
        ("GetModel", pb.GetModelRequest(model="x" * 500)),
    ],
)
async def test_an_unknown_model_is_not_found(serve: Serve, method: str, request_: Any) -> None:
    async with serve() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(gateway.stub, method)(request_)
    assert caught.value.code() is NOT_FOUND
    assert "plain, tiny" in caught.value.details()
    assert len(caught.value.details()) < 300


@pytest.mark.parametrize(
    "request_",
    [
        generate(temperature=0.0, n=8),
        generate(temperature=0.01, top_p=1.0, top_k=270, min_p=1.0, repetition_penalty=2.0),
        generate(presence_penalty=-2.0, frequency_penalty=2.0, seed=2**64 - 1, max_tokens=97),
        generate(stop=["x" * 64] * 4, stop_token_ids=[269] * 16, logprobs=5, prompt_logprobs=0),
        generate(logit_bias=dict.fromkeys(range(270), 100.0)),
        generate(tokens(*[269] * 99)),
    ],
    ids=str,
)
def test_values_at_their_limits_are_taken(request_: pb.GenerateRequest) -> None:
    query = generate_query(request_)
    check_generate(query, card(), LimitsConfig())


def test_what_only_json_can_spell_is_refused() -> None:
    for changes, field in [
        ({"prompt": TextPrompt("a\ud800b")}, "prompt"),
        ({"stop": ("\udfff",)}, "stop[0]"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"prompt": TokenPrompt([-1])}, "prompt[0]"),
        ({"max_tokens": 10**400}, "max_tokens"),
    ]:
        query = GenerateQuery(**({"model": "tiny", "prompt": TextPrompt("x")} | changes))  # type: ignore[arg-type]
        with pytest.raises(ValidationError) as caught:
            check_generate(query, card(), LimitsConfig())
        assert caught.value.field == field


def test_find_model_and_output_budget() -> None:
    with pytest.raises(UnknownModelError):
        find_model({"tiny": card()}, "huge", OPEN)
    assert output_budget(10, None, card(), LimitsConfig()) == 90
    assert output_budget(10, 90, card(), LimitsConfig()) == 90


def field_bytes(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, encoded = len(data), b""
    while size > 127:
        encoded += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + data


BAD = b"a\xff\xfe"
MODEL = field_bytes(1, b"tiny")


@pytest.mark.parametrize(
    ("method", "data", "field"),
    [
        ("Generate", field_bytes(1, BAD), "model"),
        ("GenerateStream", MODEL + field_bytes(2, field_bytes(1, BAD)), "prompt.text"),
        (
            "Generate",
            MODEL
            + field_bytes(
                2, field_bytes(3, field_bytes(1, field_bytes(2, b"ok")) + field_bytes(1, field_bytes(2, BAD)))
            ),
            "prompt.chat.messages[1].content",
        ),
        ("Generate", MODEL + field_bytes(3, field_bytes(10, b"ok") + field_bytes(10, BAD)), "sampling.stop[1]"),
        ("Score", MODEL + field_bytes(3, field_bytes(1, BAD)), "continuations[0].text"),
        ("Generate", b"\xff\xff\xff", ""),
        ("Generate", MODEL + field_bytes(2, b"\x0a\xff"), ""),
        ("Generate", MODEL + b"\x50\x01" + b"\xaa\x06\x01x", "#101 is not a field"),
        ("Generate", MODEL + b"\x50\x01" + field_bytes(3, b"\xaa\x06\x01x"), "sampling.#101 is not a field"),
        ("Generate", MODEL + field_bytes(3, field_bytes(1, b"wrong type")), "sampling.temperature is of another type"),
    ],
)
async def test_unreadable_requests_are_invalid_not_internal(serve: Serve, method: str, data: bytes, field: str) -> None:
    async with serve() as gateway:
        path = f"/packtrain.v1.Inference/{method}"
        call: Any = gateway.channel.unary_stream(path)(data)  # bytes as they are
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is INVALID
        assert field in caught.value.details()


async def test_health_answers_unreadable_requests_too(serve: Serve) -> None:
    async with serve() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_unary("/grpc.health.v1.Health/Check")(field_bytes(1, BAD))
    assert caught.value.code() is INVALID


async def test_a_message_over_the_limit_is_refused(serve: Serve) -> None:
    async with serve() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Generate(generate(pb.Prompt(text="x" * (5 << 20))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_neighbours_stream_goes_on(serve: Serve) -> None:
    middle = asyncio.Event()

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        number = 0
        async for outputs in say("undisturbed")(requests):
            yield outputs
            if (number := number + 1) == 5:
                await middle.wait()

    async with serve(FakeBackend(script)) as gateway:
        stream = gateway.stub.GenerateStream(generate())
        text = (await stream.read()).text
        for method, bad, *_ in TABLE:
            with pytest.raises(grpc.aio.AioRpcError):
                await getattr(gateway.stub, method)(bad)
        middle.set()
        while chunk := await stream.read():
            text += chunk.text
    assert text == "undisturbed"


doubles = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 2.0]))
int32s = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 8))
uint32s = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 270))
prompts = st.one_of(
    st.just(pb.Prompt()),
    st.builds(lambda text: pb.Prompt(text=text), st.text()),
    st.builds(lambda ids: tokens(*ids), st.lists(uint32s, max_size=8)),
    st.builds(
        lambda messages: chat(*messages),
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "x"]), st.text(max_size=9)), max_size=3),
    ),
)
samplings = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), doubles),
        **dict.fromkeys(("top_k", "n", "logprobs", "prompt_logprobs"), int32s),
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 99)),
        "stop": st.lists(st.text(max_size=70), max_size=35),
        "stop_token_ids": st.lists(uint32s, max_size=17),
        "ignore_eos": st.booleans(),
        "logit_bias": st.dictionaries(uint32s, doubles, max_size=3),
    },
)


@given(data=st.data())
async def test_no_values_bring_an_unexpected_status(data: st.DataObject) -> None:
    """Everything is served or refused; what the validator passes, SamplingParams can hold."""
    sampling = data.draw(samplings)
    request = generate(data.draw(prompts), model=data.draw(st.sampled_from(["tiny", "plain", "x"])), **sampling)
    backend = FakeBackend(say(*["ok"] * max(1, min(8, sampling.get("n", 1)))))
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    generator = Generator(backend, tokenizers, LimitsConfig())
    call = Call(request_id="id", arrived_s=generator.clock(), timeout_s=None)
    try:
        query = generate_query(request)
        async for _ in generator.generate(query, call, generator.begin(query, call)):
            pass
    except Exception as error:
        assert error_response(error, 1.0).status.code in (INVALID.name, NOT_FOUND.name), error


@given(data=st.binary(max_size=64), position=st.integers(0, 40), byte=st.integers(0, 255))
def test_no_bytes_break_the_explanation(data: bytes, position: int, byte: int) -> None:
    """Noise, and a good request with one byte changed."""
    changed = bytearray(generate(chat(("user", "hello"))).SerializeToString())
    changed[position % len(changed)] = byte
    for candidate in (data, bytes(changed)):
        assert isinstance(explain_undecodable(pb.GenerateRequest.DESCRIPTOR, candidate), ValidationError)
