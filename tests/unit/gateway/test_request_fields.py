"""What clients send besides what is needed: neutral values, unknown fields, other spellings. Both front ends take them alike."""

import json
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.support.fake_backend import BOS, EOS, FakeBackend, card, say
from model_parallel.engine.request import SamplingParams
from protos import inference_pb2 as pb
from serving.config import LimitsConfig
from serving.contracts.observer import RequestObserver
from serving.gateway.core.fields import NO_EFFECT, UNSUPPORTED
from serving.gateway.http.body import Body
from serving.gateway.http.responses_form import ResponsesRequest
from serving.gateway.http.schemas import ChatRequest, CompletionRequest
from tests.unit.gateway.conftest import Running, Serve, running
from tests.unit.gateway.http_client import CHAT, COMPLETION, post

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
ASK = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))


def limited(backend: FakeBackend | None = None, **limits: Any) -> AbstractAsyncContextManager[Running]:
    """A gateway with other limits."""
    return running(backend, http_port=0, limits=LimitsConfig(**limits))


async def sampling_over_http(gateway: Running, changes: dict[str, Any]) -> SamplingParams:
    answer = await post(gateway, COMPLETIONS, COMPLETION | {"seed": 1} | changes)
    assert answer.status_code == 200, (changes, answer.text)
    return gateway.backend.requests[0].sampling


async def sampling_over_grpc(gateway: Running, changes: dict[str, Any]) -> SamplingParams:
    request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
    request.sampling.MergeFrom(pb.Sampling(**({"seed": 1, "max_tokens": 16} | changes)))
    await gateway.stub.Generate(request)
    return gateway.backend.requests[0].sampling


# What is sent, and what it means.
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 1e-9}, {"temperature": 0.0}),
    ({"temperature": 0.00999}, {"temperature": 0.0}),
    ({"temperature": 5e-324}, {"temperature": 0.0}),
    ({"temperature": 0.01}, {"temperature": 0.01}),
    ({"top_k": -1}, {}),
    ({"top_k": 0}, {}),
    ({"top_k": 270}, {}),
    ({"top_k": 2**31 - 1}, {}),
    ({"top_k": 269}, {"top_k": 269}),
    ({"max_tokens": -1}, {"max_tokens": 97}),
    ({"stop": [""]}, {}),
    ({"stop_token_ids": []}, {}),
    ({"logit_bias": {}}, {}),
    ({"ignore_eos": False}, {}),
    ({"skip_special_tokens": True}, {}),
]


async def test_neutral_values_mean_the_same_on_both_front_ends(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for sent, meant in SAME:
            expected = await sampling_over_http(gateway, meant)
            assert await sampling_over_http(gateway, sent) == expected, sent
            assert await sampling_over_grpc(gateway, sent) == expected, sent


JSON_SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ('"max_tokens": 5.0', {"max_tokens": 5}),
    ('"max_tokens": 1e1', {"max_tokens": 10}),
    ('"max_tokens": 50E-1', {"max_tokens": 5}),
    ('"max_tokens": 0.5e+1', {"max_tokens": 5}),
    ('"seed": 9007199254740993.0', {"seed": 2**53 + 1}),
    ('"seed": 1.8446744073709551615e19', {"seed": 2**64 - 1}),
    ('"seed": -2', {"seed": 2**64 - 2}),
    ('"top_k": -1.0', {}),
    ('"temperature": 1', {"temperature": 1.0}),
    ('"temperature": 0e0', {"temperature": 0.0}),
    ('"temperature": 0e99999999999999999999', {"temperature": 0.0}),
    ('"temperature": -0.0e-99999999999999999999', {"temperature": 0.0}),
    ('"temperature": 1e-99999999999999999999', {"temperature": 0.0}),
    ('"seed": 1, "unknown": [0.0E99999999999999999999]', {}),
    ('"stop_token_ids": [9.0, 1e1]', {"stop_token_ids": [9, 10]}),
    ('"n": 1.0', {}),
    ('"logit_bias": {"5": 1e0}', {"logit_bias": {"5": 1}}),
    ('"max_tokens": ""', {}),
    ('"seed": 1, "max_tokens": null', {}),
]


async def test_whole_numbers_may_be_spelt_in_any_way(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for spelling, meant in JSON_SPELLINGS:
            expected = await sampling_over_http(gateway, meant)
            seed = "" if '"seed"' in spelling else ', "seed": 1'
            body = f'{{"model": "tiny", "prompt": "hi", {spelling}{seed}}}'.encode()
            answer = await post(gateway, COMPLETIONS, body)
            assert answer.status_code == 200, (spelling, answer.text)
            assert gateway.backend.requests[0].sampling == expected, spelling


async def test_token_ids_may_be_spelt_as_floats(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        assert (await post(gateway, COMPLETIONS, COMPLETION | {"prompt": [1.0, 2.0]})).status_code == 200
        assert gateway.backend.requests[0].prompt_token_ids == (1, 2)
        assert (await post(gateway, "/detokenize", {"model": "tiny", "tokens": [104.0]})).json() == {"prompt": "h"}


async def test_what_would_change_the_answer_is_refused_by_name(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for name in sorted(UNSUPPORTED.keys() - set(ChatRequest.__struct_fields__)):
            refused = await post(gateway, CHATS, CHAT | {name: {"some": ["thing"]}})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, name)
            assert error["message"].startswith(f"{name} is not supported by this server; leave it out or give null")
            for value in (None, *UNSUPPORTED[name].neutral):
                answer = await post(gateway, CHATS, CHAT | {name: value, "strict": True})
                assert answer.status_code == 200, (name, value, answer.text)


ANSWERED: tuple[type[Body], ...] = (ChatRequest, CompletionRequest, ResponsesRequest)


@pytest.mark.parametrize("schema", ANSWERED)
def test_no_endpoint_ignores_what_another_honours(schema: type[Body]) -> None:
    honoured = {name for each in ANSWERED for name in each.__struct_fields__}
    known = {*schema.__struct_fields__, *schema.unsupported(), *NO_EFFECT}
    assert honoured - known <= {"include"}  # which may ask for nothing anywhere
    assert not schema.unsupported().keys() & NO_EFFECT


RESPONSES = "/v1/responses"
RESPONSE = {"model": "tiny", "input": "hi"}
ELSEWHERE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (RESPONSES, {"stop": "a"}, {"stop": ""}, "/v1/chat/completions"),
    (RESPONSES, {"stop_token_ids": [1]}, {"stop_token_ids": []}, "/v1/chat/completions"),
    (RESPONSES, {"ignore_eos": True}, {"ignore_eos": False}, "/v1/chat/completions"),
    (RESPONSES, {"logit_bias": {"1": 5}}, {"logit_bias": {}}, "/v1/chat/completions"),
    (RESPONSES, {"skip_special_tokens": False}, {"skip_special_tokens": True}, "/v1/chat/completions"),
    (RESPONSES, {"guided_json": {}}, {"guided_json": None}, "text.format"),
    (RESPONSES, {"guided_choice": ["a"]}, {"guided_choice": []}, "structured_outputs to /v1/chat/completions"),
    (RESPONSES, {"best_of": 2}, {"best_of": 1}, "n choices"),
    (RESPONSES, {"echo": True}, {"echo": False}, "/v1/completions"),
    (RESPONSES, {"continue_final_message": True}, {"continue_final_message": False}, "/v1/chat/completions"),
    (RESPONSES, {"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}}, "text.format"),
    (COMPLETIONS, {"continue_final_message": True}, {"continue_final_message": False}, "send a prompt"),
    (COMPLETIONS, {"max_output_tokens": 3}, {"max_output_tokens": -1}, "send max_tokens"),
    (COMPLETIONS, {"instructions": "x"}, {"instructions": ""}, "prompt"),
    (CHATS, {"max_output_tokens": 3}, {"max_output_tokens": None}, "send max_tokens"),
    (CHATS, {"text": {"format": {"type": "json_object"}}}, {"text": {"format": {"type": "text"}}}, "response_format"),
    (CHATS, {"stop_regex": "a"}, {"stop_regex": ""}, "send stop"),
    (CHATS, {"no_stop_trim": True}, {"no_stop_trim": False}, "finish_reason"),
    (CHATS, {"lora_path": "a"}, {"lora_path": None}, "as model"),
    (CHATS, {"top_n_sigma": 1.5}, {"top_n_sigma": -1}, "null or -1 or 0"),
    (CHATS, {"guidance_scale": 1.5}, {"guidance_scale": 1.0}, "null or 1"),
    (CHATS, {"eos_token_id": 0}, {"eos_token_id": None}, "send stop_token_ids"),
    (CHATS, {"add_generation_prompt": False}, {"add_generation_prompt": True}, "continue_final_message: true"),
]


@pytest.mark.parametrize(("path", "asking", "neutral", "instead"), ELSEWHERE)
async def test_what_only_another_endpoint_or_server_has_is_refused_by_name(
    serve: Serve, path: str, asking: dict[str, Any], neutral: dict[str, Any], instead: str
) -> None:
    good = {RESPONSES: RESPONSE, COMPLETIONS: COMPLETION, CHATS: CHAT}[path]
    async with serve(http_port=0) as gateway:
        error = (await post(gateway, path, good | asking)).json()["error"]
        assert error["param"] in asking and instead in error["message"]
        answer = await post(gateway, path, good | neutral | {"strict": True})
        assert answer.status_code == 200, answer.text


NEVER: dict[str, Any] = {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]}


@pytest.mark.parametrize(
    "changes",
    [
        NEVER,
        {"include": []},
        *({"reasoning": each} for each in ({"effort": None, "summary": None}, {"effort": "none"})),
    ],
)
async def test_responses_take_what_asks_for_nothing(serve: Serve, changes: dict[str, Any]) -> None:
    async with serve(http_port=0) as gateway:
        answer = await post(gateway, RESPONSES, RESPONSE | changes | {"strict": True})
        assert answer.status_code == 200, answer.text
        assert "x-packtrain-ignored" not in answer.headers


@pytest.mark.parametrize("name", ["message.output_text.logprobs", "x" * 500])
async def test_responses_refuse_what_their_items_would_hold(serve: Serve, name: str) -> None:
    async with serve(http_port=0) as gateway:
        error = (await post(gateway, RESPONSES, RESPONSE | {"include": [*NEVER["include"], name]})).json()["error"]
        assert error["param"] == "include[2]" and len(error["message"]) < 250
        assert ("/v1/chat/completions" in error["message"]) is name.endswith("logprobs")
        told = await post(gateway, RESPONSES, RESPONSE | {"reasoning": {"effort": "high"}})
        assert told.headers["x-packtrain-ignored"] == "reasoning"


async def test_what_changes_nothing_is_taken_in_silence(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for name in sorted(NO_EFFECT):
            for value in ("x", True, {"a": "b"}, [1]):
                answer = await post(gateway, CHATS, CHAT | {name: value, "strict": True})
                assert answer.status_code == 200, (name, value)
                assert "x-packtrain-ignored" not in answer.headers, (name, value)


MESSAGE = {
    "role": "user",
    "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
    "name": "me",
}
UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, COMPLETION | {"mystery": 1}, "mystery"),
    (COMPLETIONS, COMPLETION | {"mystery": None, "other": [], "third": False}, ""),
    (COMPLETIONS, COMPLETION | {"store": True, "service_tier": "flex"}, "store, service_tier"),
    (COMPLETIONS, COMPLETION | {"bad\r\nset-cookie: x": 1}, "bad??set-cookie??x"),
    (COMPLETIONS, COMPLETION | {f"f{number}": 1 for number in range(20)}, "f15, and 4 more"),
    (COMPLETIONS, COMPLETION | {f"f{number}": 1 for number in range(2000)}, "f15, and 1984 more"),
    (CHATS, CHAT | {"messages": [MESSAGE]}, "messages[0].content[0].cache_control, messages[0].name"),
    (CHATS, CHAT | {"reasoning_effort": "high", "prediction": {"type": "content"}}, "reasoning_effort, prediction"),
    (CHATS, CHAT | {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ("/tokenize", {"model": "tiny", "prompt": "x", "mystery": 1}, "mystery"),
    ("/detokenize", {"model": "tiny", "tokens": [1], "mystery": 1}, "mystery"),
]


@pytest.mark.parametrize(("path", "body", "told"), UNKNOWN)
async def test_unknown_fields_are_told_or_refused(serve: Serve, path: str, body: dict[str, Any], told: str) -> None:
    async with serve(http_port=0) as gateway:
        answer = await post(gateway, path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-packtrain-ignored", "").endswith(told)
        assert ("x-packtrain-ignored" in answer.headers) is bool(told)
        assert "set-cookie" not in answer.headers
        strict = await post(gateway, path, body | {"strict": True})
        assert strict.status_code == (400 if told else 200)
        if path in (COMPLETIONS, CHATS):
            stream = await post(gateway, path, body | {"stream": True})
            assert stream.headers.get("x-packtrain-ignored") == answer.headers.get("x-packtrain-ignored")


def unknown(number: int, value: int = 1) -> bytes:
    """A varint field."""
    key = number << 3
    data = b""
    while key > 127:
        data, key = data + bytes([key & 127 | 128]), key >> 7
    return data + bytes([key, value])


async def generate(gateway: Running, data: bytes) -> tuple[pb.GenerateResponse, dict[str, Any]]:
    """The request as bytes, and the initial metadata of its answer."""
    call = gateway.channel.unary_unary(
        "/packtrain.v1.Inference/Generate",
        request_serializer=lambda data: data,
        response_deserializer=pb.GenerateResponse.FromString,
    )(data)
    answer = await call
    return answer, dict(await call.initial_metadata())


async def test_unknown_fields_are_told_over_grpc_too(serve: Serve) -> None:
    async with serve() as gateway:
        sampling = pb.GenerateRequest(sampling=pb.Sampling.FromString(unknown(99)))
        data = ASK.SerializeToString() + unknown(77) + unknown(77) + sampling.SerializeToString()
        _, metadata = await generate(gateway, data)
        assert metadata["x-packtrain-ignored"] == "#77, sampling.#99"
        _, metadata = await generate(gateway, ASK.SerializeToString())
        assert "x-packtrain-ignored" not in metadata
        strict = pb.GenerateRequest(strict=True).SerializeToString()
        # A reserved number is a newer server's, and a wrong type is a mistake: both would change the answer.
        float_temperature = pb.GenerateRequest(sampling=pb.Sampling.FromString(unknown(1))).SerializeToString()
        for more, message in (
            (strict + unknown(77), "#77 is not a field"),
            (unknown(6), "newer server"),
            (pb.GenerateRequest(sampling=pb.Sampling.FromString(unknown(18))).SerializeToString(), "newer server"),
            (float_temperature, "sampling.temperature is of another type"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
                await generate(gateway, ASK.SerializeToString() + more)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_ignored_fields_are_counted() -> None:
    counted: list[int] = []

    class Counting(RequestObserver):
        def ignored(self, num_fields: int) -> None:
            counted.append(num_fields)

    async with running(http_port=0, observe=lambda *about: Counting()) as gateway:
        await post(gateway, CHATS, CHAT | {"a": 1, "b": 2})
        await generate(gateway, ASK.SerializeToString() + unknown(77))
    assert counted == [2, 1]


# ---- messages ----

CONVERSATIONS: list[tuple[list[Any], bytes]] = [
    ([{"role": "developer", "content": "be kind"}, {"role": "user", "content": "x"}], b"system\nbe kind\nuser\nx\n"),
    ([{"role": "user"}], b"user\n\n"),
    ([{"role": "system", "content": "be kind"}], b"system\nbe kind\n"),
    ([{"role": "user", "content": None}], b"user\n\n"),
    ([{"role": "user", "content": []}], b"user\n\n"),
    ([{"role": "user", "content": [{"type": "text", "text": ""}]}], b"user\n\n"),
    (
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "input_text", "text": "x"}]}],
        b"user\n\nx\n",
    ),
    (
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": ""}, {"type": "output_text", "text": ""}]},
            {"role": "user", "content": "y"},
        ],
        b"user\nx\nassistant\n\n\nuser\ny\n",
    ),
    ([{"role": "user", "content": ["a", {"text": "b"}, {"type": "input_text", "text": "c"}]}], b"user\na\nb\nc\n"),
    (
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "refusal": "no", "tool_calls": [], "reasoning_content": "hm"},
            {"role": "user", "content": "y"},
        ],
        b"user\nx\nassistant\nno\nuser\ny\n",
    ),
    (
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "audio": None, "annotations": [1]},
            {"role": "user", "content": "y"},
        ],
        b"user\nx\nassistant\nno\nuser\ny\n",
    ),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], b"user\nx\nuser\ny\n"),
]


def text_of(gateway: Running) -> bytes:
    return bytes(token for token in gateway.backend.requests[0].prompt_token_ids if token < 256)


async def test_messages_as_clients_replay_them(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for messages, said in CONVERSATIONS:
            answer = await post(gateway, CHATS, {"model": "tiny", "messages": messages})
            assert answer.status_code == 200, (messages, answer.text)
            assert text_of(gateway) == said + b"assistant\n"
        chat = pb.Chat(
            messages=[pb.ChatMessage(role="developer", content="be kind"), pb.ChatMessage(role="user", content="x")]
        )
        await gateway.stub.Generate(pb.GenerateRequest(model="tiny", prompt=pb.Prompt(chat=chat)))
        assert text_of(gateway) == CONVERSATIONS[0][1] + b"assistant\n"


async def test_an_answer_that_was_begun_is_continued(serve: Serve) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once"}]
    async with serve(http_port=0) as gateway:
        body = {"model": "tiny", "messages": messages, "continue_final_message": True}
        for asks in (None, False, True):  # vLLM's clients say false beside it
            answer = await post(gateway, CHATS, body | {"add_generation_prompt": asks})
            assert answer.status_code == 200, answer.text
            tokens = await post(gateway, "/tokenize", body | {"add_generation_prompt": asks})
            assert tuple(tokens.json()["tokens"]) == gateway.backend.requests[0].prompt_token_ids
        over_http = gateway.backend.requests[0].prompt_token_ids
        assert text_of(gateway) == b"user\nx\nassistant\nOnce"
        chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in messages], continue_final_message=True)
        await gateway.stub.Generate(pb.GenerateRequest(model="tiny", prompt=pb.Prompt(chat=chat)))
        assert gateway.backend.requests[0].prompt_token_ids == over_http


# ---- room ----


async def test_more_than_there_is_room_for_has_one_code_and_tells_what_fits(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for max_tokens in (98, 101, 2**31 - 1, 2**63 - 1):
            error = (await post(gateway, COMPLETIONS, COMPLETION | {"max_tokens": max_tokens})).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
            assert "at most 97" in error["message"]
            call = gateway.stub.Generate(
                pb.GenerateRequest(
                    model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(max_tokens=max_tokens)
                )
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            status = await rpc_status.aio.from_call(call)
            assert status is not None
            info = error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in status.details)
            assert (info.reason, dict(info.metadata)) == ("CONTEXT_LENGTH_EXCEEDED", {"max_tokens": "97"})
        too_long = (await post(gateway, COMPLETIONS, COMPLETION | {"prompt": "x" * 5000})).json()["error"]
        assert too_long["code"] == "context_length_exceeded"


async def test_max_tokens_is_clamped_where_that_is_configured() -> None:
    async with limited(clamp_max_tokens=True) as gateway:
        assert (await post(gateway, COMPLETIONS, COMPLETION | {"max_tokens": 2**31 - 1})).status_code == 200
        assert gateway.backend.requests[0].sampling.max_tokens == 97
        await gateway.stub.Generate(
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(max_tokens=500))
        )
        assert gateway.backend.requests[0].sampling.max_tokens == 97
        assert (await post(gateway, COMPLETIONS, COMPLETION | {"prompt": "x" * 100})).status_code == 400


async def test_no_tokens_may_be_asked_for_with_the_prompts_own(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        body = COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 1}
        await post(gateway, COMPLETIONS, body)
        sampling = gateway.backend.requests[0].sampling
        assert (sampling.max_tokens, sampling.prompt_logprobs) == (0, 1)


# ---- seeds, models, control tokens ----


async def test_a_drawn_seed_survives_json(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for _ in range(20):
            answer = await post(gateway, COMPLETIONS, COMPLETION | {"seed": -1})
            seed = int(answer.headers["x-seed"])
            assert seed == gateway.backend.requests[0].sampling.seed < 2**53
            assert json.loads(json.dumps(float(seed))) == seed
            assert (await gateway.stub.Generate(ASK)).request.seed < 2**53


async def test_the_model_may_be_left_out_where_there_is_one() -> None:
    async with limited(FakeBackend(cards=[card("only")])) as gateway:
        for more in ({}, {"model": None}, {"model": ""}):
            answer = await post(gateway, COMPLETIONS, {"prompt": "hi"} | more)
            assert answer.json()["model"] == "only"
            chat = {name: value for name, value in CHAT.items() if name != "model"} | more
            assert (await post(gateway, CHATS, chat)).json()["model"] == "only"
            assert (await post(gateway, "/tokenize", {"prompt": "hi"} | more)).json()["tokens"] == [BOS, *b"hi"]
            assert (await post(gateway, "/detokenize", {"tokens": [104]} | more)).json() == {"prompt": "h"}
        assert (await gateway.stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="hi")))).choices[0].text == "Paris"
        assert (await gateway.stub.Tokenize(pb.TokenizeRequest(text="h"))).token_ids == [BOS, 104]
        assert (await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=[104]))).text == "h"
        assert (await gateway.stub.GetModel(pb.GetModelRequest())).model.name == "only"


async def test_text_becomes_a_control_token_only_where_model_and_request_allow_it() -> None:
    cards = [card("trusting", allow_parse_special=True), card("tiny")]
    async with limited(FakeBackend(cards=cards)) as gateway:
        body = {"model": "trusting", "prompt": "a</s>"}
        await post(gateway, COMPLETIONS, body)
        assert gateway.backend.requests[0].prompt_token_ids == (BOS, *b"a</s>")
        await post(gateway, COMPLETIONS, body | {"parse_special": True})
        assert gateway.backend.requests[0].prompt_token_ids == (BOS, 97, EOS)
        tokens = (await post(gateway, "/tokenize", body | {"parse_special": True})).json()["tokens"]
        assert tokens == [BOS, 97, EOS]
        request = pb.GenerateRequest(model="trusting", prompt=pb.Prompt(text="a</s>"), parse_special=True)
        await gateway.stub.Generate(request)
        assert gateway.backend.requests[0].prompt_token_ids == (BOS, 97, EOS)
        assert (await gateway.stub.GetModel(pb.GetModelRequest(model="trusting"))).model.allow_parse_special
        request.model = "tiny"
        with pytest.raises(grpc.aio.AioRpcError, match="allow_parse_special"):
            await gateway.stub.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError, match="allow_parse_special"):
            await gateway.stub.Tokenize(pb.TokenizeRequest(model="tiny", text="a", parse_special=True))


async def test_control_tokens_are_shown_on_request(serve: Serve) -> None:
    from bench.support.fake_backend import IM_END, steps  # noqa: PLC0415

    async with serve(FakeBackend(steps([[97], [IM_END], [98]])), http_port=0) as gateway:
        for skip, text in ((None, "ab"), (True, "ab"), (False, "a<|im_end|>b")):
            answer = await post(gateway, COMPLETIONS, COMPLETION | {"skip_special_tokens": skip})
            assert answer.json()["choices"][0]["text"] == text
            sampling = pb.Sampling() if skip is None else pb.Sampling(skip_special_tokens=skip)
            request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=sampling)
            assert (await gateway.stub.Generate(request)).choices[0].text == text


async def test_an_empty_stop_text_stops_nothing(serve: Serve) -> None:
    async with serve(FakeBackend(say("Paris")), http_port=0) as gateway:
        for stop, text in (("", "Paris"), ([""], "Paris"), (["", "r"], "Pa")):
            answer = await post(gateway, COMPLETIONS, COMPLETION | {"stop": stop})
            assert answer.json()["choices"][0]["text"] == text
