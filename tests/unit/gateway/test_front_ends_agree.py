"""The same request over gRPC and over HTTP gets the same decision: status by the contract, field by its name, and the answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import httpx2
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import event, given, settings
from hypothesis import strategies as st

from bench.support.fake_backend import ByteTokenizer, FakeBackend, say
from model_parallel.engine.request import EngineOutput, EngineRequest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.http.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serving.gateway.server import GatewayServer
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.http_client import JSON

# By faults.md's contract. What has no entry must not come from either side.
STATUS = {200: grpc.StatusCode.OK, 400: grpc.StatusCode.INVALID_ARGUMENT, 404: grpc.StatusCode.NOT_FOUND}
ALL_NIGHT = 67
"""Times as many examples as elsewhere."""


@dataclass(frozen=True)
class Decision:
    """What a front end said: the status in gRPC's words, the field at fault, the texts of an answer."""

    code: grpc.StatusCode
    field: str
    answer: tuple[Any, ...]


async def paris(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """Every choice says the same."""
    async for outputs in say(*["Paris"] * len(requests))(requests):
        yield outputs


class FrontEnds:
    """One gateway, asked over both."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self._start())

    async def _start(self) -> None:
        backend = FakeBackend(paris)
        tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
        self._server = GatewayServer(GatewayConfig(port=0, http_port=0), LimitsConfig(), backend, tokenizers)
        ports = await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}")
        self._stub: Any = InferenceStub(self._channel)
        self._http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{ports.http}", verify=False, timeout=PATIENCE_S)

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        await self._http.aclose()
        await self._channel.close()
        await self._server.stop(0)

    def over_grpc(self, method: str, request: Any) -> Decision:
        return self._runner.run(self._over_grpc(method, request))

    async def _over_grpc(self, method: str, request: Any) -> Decision:
        call = getattr(self._stub, method)(request, timeout=PATIENCE_S)
        try:
            answers = [each async for each in call] if method == "GenerateStream" else [await call]
        except grpc.aio.AioRpcError as error:
            status = await rpc_status.aio.from_call(call)
            bad = error_details_pb2.BadRequest()
            named = [detail for detail in status.details if detail.Unpack(bad)] if status else []
            return Decision(error.code(), bad.field_violations[0].field if named else "", ())
        return Decision(grpc.StatusCode.OK, "", _grpc_answer(method, answers))

    def over_http(self, path: str, body: Any) -> tuple[int, Decision]:
        return self._runner.run(self._over_http(path, body))

    async def _over_http(self, path: str, body: Any) -> tuple[int, Decision]:
        # Unlike JSON's own rules, Python's spell NaN and Infinity, which the gateway must refuse by field.
        answer = await self._http.post(path, content=json.dumps(body).encode(), headers=JSON)
        code = STATUS.get(answer.status_code, grpc.StatusCode.INTERNAL)
        if answer.status_code != 200:
            return answer.status_code, Decision(code, answer.json()["error"]["param"] or "", ())
        return 200, Decision(code, "", _http_answer(answer))


def _grpc_answer(method: str, answers: list[Any]) -> tuple[Any, ...]:
    if method == "Tokenize":
        return tuple(answers[0].token_ids)
    if method == "Detokenize":
        return (answers[0].text,)
    texts: dict[int, str] = {}
    for part in answers[0].choices if method == "Generate" else answers:
        texts[part.index] = texts.get(part.index, "") + part.text
    usage = answers[-1].usage
    return (*(texts[index] for index in sorted(texts)), usage.prompt_tokens, usage.completion_tokens)


def _http_answer(answer: Any) -> tuple[Any, ...]:
    if answer.headers["content-type"] == "text/event-stream":
        parts = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    else:
        parts = [answer.json()]
    if "tokens" in parts[0]:
        return tuple(parts[0]["tokens"])
    if "prompt" in parts[0]:
        return (parts[0]["prompt"],)
    texts: dict[int, str] = {}
    for part in parts:
        for choice in part["choices"]:
            said = choice.get("message") or choice.get("delta") or {}
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice.get("text") or said.get("content") or "")
    usage = parts[-1]["usage"]
    return (*(texts[index] for index in sorted(texts)), usage["prompt_tokens"], usage["completion_tokens"])


@pytest.fixture(scope="module")
def front_ends() -> Iterator[FrontEnds]:
    both = FrontEnds()
    yield both
    both.close()


doubles = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 2.0, 1e-9, -0.0]), st.floats())
int32s = st.one_of(st.integers(-2, 9), st.integers(-(2**31), 2**31 - 1))
uint32s = st.one_of(st.integers(0, 275), st.integers(0, 2**32 - 1))
models = st.sampled_from(["tiny"] * 20 + ["plain", "huge", "", "x" * 200])
texts = st.one_of(st.text(max_size=12), st.sampled_from(["", "x" * 98, "x" * 99, "x" * 5000, "</s>", "ab"]))
messages = st.one_of(
    st.text(max_size=9).map(lambda said: [("user", said)]),
    st.lists(
        st.tuples(st.sampled_from(["user", "user", "assistant", "system", "tool", ""]), st.text(max_size=9)), max_size=3
    ),
)
sampling = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), doubles
        ),
        **dict.fromkeys(("top_k", "n", "logprobs"), int32s),
        "seed": st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
        "max_tokens": st.one_of(st.integers(-1, 99), st.integers(-(2**63), 2**63 - 1)),
        "stop": st.lists(st.text(max_size=70), max_size=35),
        "stop_token_ids": st.lists(uint32s, max_size=17),
        "ignore_eos": st.booleans(),
        "logit_bias": st.dictionaries(uint32s, doubles, max_size=3),
    },
)
good_sampling = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("temperature", "repetition_penalty"), st.floats(0.01, 2)),
        **dict.fromkeys(("top_p", "min_p"), st.floats(0.01, 1)),
        "n": st.integers(1, 8),
        "logprobs": st.integers(0, 5),
        "max_tokens": st.integers(1, 75),
        "stop": st.lists(st.sampled_from(["r", "is", "Z"]), max_size=4),
        "logit_bias": st.dictionaries(st.integers(0, 269), st.floats(-100, 100), max_size=3),
    },
)


def one_from(good: dict[str, Any], wild: dict[str, Any]) -> dict[str, Any]:
    return good | dict(list(wild.items())[-1:])


generations = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["text", "token_ids", "messages"]),
        "model": models,
        "text": texts,
        "token_ids": st.lists(uint32s, max_size=8),
        "messages": messages,
        # At its limits, with one field from anywhere, and wild: what is wrong first hides what comes after it.
        "sampling": st.one_of(good_sampling, st.builds(one_from, good_sampling, sampling), sampling),
        "stream": st.booleans(),
    }
)


def chat_of(pairs: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in pairs])


def json_messages(pairs: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def as_grpc(drawn: dict[str, Any]) -> pb.GenerateRequest:
    prompts = {
        "text": lambda: pb.Prompt(text=drawn["text"]),
        "token_ids": lambda: pb.Prompt(token_ids=pb.TokenIds(ids=drawn["token_ids"])),
        "messages": lambda: pb.Prompt(chat=chat_of(drawn["messages"])),
    }
    fields = dict(drawn["sampling"])
    if drawn["kind"] != "messages":
        fields.setdefault("max_tokens", 16)  # the one default that differs, as OpenAI's API has it
    return pb.GenerateRequest(model=drawn["model"], prompt=prompts[drawn["kind"]](), sampling=pb.Sampling(**fields))


def as_http(drawn: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Path, body, and what HTTP calls gRPC's fields."""
    body = {"model": drawn["model"]} | drawn["sampling"]
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if drawn["stream"]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if drawn["kind"] != "messages":
        return "/v1/completions", body | {"prompt": drawn[drawn["kind"]]}, {}
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    return "/v1/chat/completions", body | {"messages": json_messages(drawn["messages"])}, names


def is_json(body: dict[str, Any]) -> bool:
    """JSON has neither infinity nor NaN."""
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        return False
    return True


def compare_generation(front_ends: FrontEnds, drawn: dict[str, Any]) -> None:
    over_grpc = front_ends.over_grpc("GenerateStream" if drawn["stream"] else "Generate", as_grpc(drawn))
    path, body, names = as_http(drawn)
    status, over_http = front_ends.over_http(path, body)
    assert status in STATUS, (status, drawn)
    if not is_json(body):
        assert over_http == Decision(grpc.StatusCode.INVALID_ARGUMENT, "", ())
        return
    if over_grpc.code is grpc.StatusCode.NOT_FOUND:
        over_grpc = Decision(over_grpc.code, "model", ())  # which gRPC has no place for
    event(over_grpc.code.name)
    assert over_http == Decision(over_grpc.code, names.get(over_grpc.field, over_grpc.field), over_grpc.answer)


def compare_tokens(front_ends: FrontEnds, drawn: dict[str, Any]) -> None:
    model = drawn["model"]
    if drawn["kind"] == "token_ids":
        request: Any = pb.DetokenizeRequest(model=model, token_ids=drawn["token_ids"])
        over_grpc = front_ends.over_grpc("Detokenize", request)
        status, over_http = front_ends.over_http("/detokenize", {"model": model, "tokens": drawn["token_ids"]})
    else:
        body: dict[str, Any] = {"model": model}
        request = pb.TokenizeRequest(model=model)
        if drawn["kind"] == "text":
            request.text = body["prompt"] = drawn["text"]
        else:
            request.chat.CopyFrom(chat_of(drawn["messages"]))
            body["messages"] = json_messages(drawn["messages"])
        if drawn["stream"]:
            request.add_bos = body["add_special_tokens"] = False
        over_grpc = front_ends.over_grpc("Tokenize", request)
        status, over_http = front_ends.over_http("/tokenize", body)
    assert status in STATUS, (status, drawn)
    base, bracket, index = over_grpc.field.partition("[")
    names = {"input": "prompt", "text": "prompt", "token_ids": "tokens", "add_bos": "add_special_tokens"}
    field = "model" if over_grpc.code is grpc.StatusCode.NOT_FOUND else names.get(base, base) + bracket + index
    assert over_http == Decision(over_grpc.code, field, over_grpc.answer)


def agree(front_ends: FrontEnds, drawn: dict[str, Any], *, generates: bool) -> None:
    (compare_generation if generates else compare_tokens)(front_ends, drawn)


@given(generations, st.sampled_from([True, True, True, False]))
def test_both_front_ends_give_the_same_verdict(front_ends: FrontEnds, drawn: dict[str, Any], generates: bool) -> None:
    agree(front_ends, drawn, generates=generates)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("tiny")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = sorted({
    name for schema in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    for name in schema.__struct_fields__
} - {"model"})  # fmt: skip
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), anything, max_size=5))
def test_no_json_is_the_servers_fault(front_ends: FrontEnds, path: str, body: dict[str, Any]) -> None:
    status, _ = front_ends.over_http(path, {"model": "tiny"} | body)
    assert status in STATUS


@pytest.mark.nightly
@settings(max_examples=ALL_NIGHT * settings.default.max_examples)
@given(generations, st.sampled_from([True, True, True, False]))
def test_they_do_all_night(front_ends: FrontEnds, drawn: dict[str, Any], generates: bool) -> None:
    agree(front_ends, drawn, generates=generates)
