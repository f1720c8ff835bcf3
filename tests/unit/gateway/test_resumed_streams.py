"""Streams are cut anywhere and resumed at another gateway: in all there comes what an uncut stream brings, over gRPC and HTTP."""

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card, say
from protos import inference_pb2 as pb
from serving.client.resuming import Received
from serving.config import LimitsConfig
from serving.contracts.chat import ANSWER, DATE_CLOSES, DATE_OPENS, START, USER, ChatFormat, between
from serving.gateway.core import choices as choices_module
from serving.gateway.core import resume_tokens
from serving.gateway.core.call import Call
from serving.gateway.core.generation import Generator
from serving.gateway.grpc.convert import generate_query
from serving.gateway.http.resuming import EventIds
from tests.support.drawn_groups import DrawnGroups, drawn_bytes, own_end
from tests.support.effort import by_day
from tests.unit.gateway.conftest import Running, Serve
from tests.unit.gateway.http_client import JSON, client

ENDS_ITSELF = next(seed for seed in range(99) if own_end(seed, 0, 60) < 50)
"""A seed."""
NUM_CUTS = by_day(3, by_night=100)
"""Rounds of each case."""
RESUMABLE = JSON | {"x-packtrain-resumable": "1"}


@asynccontextmanager
async def two_gateways(serve: Serve, path: Path, draw: random.Random | None = None) -> AsyncIterator[list[Running]]:
    """With one key. With `draw`, tokens come together by chance."""
    key = path / "key"
    key.write_text("k" * 32)
    together = None if draw is None else lambda: draw.randrange(1, 6)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                serve(DrawnGroups(together, cards=[card()]), http_port=0, resume_key_file=key)
            )
            for _ in range(2)
        ]


# ---- gRPC ----


@dataclass
class Whole:
    """What the messages of a stream come to."""

    text: defaultdict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    prompt_logprobs: list[float] = field(default_factory=list)
    reasons: dict[int, int] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    identity: set[tuple[str, int]] = field(default_factory=set)

    def take(self, chunk: Any) -> None:
        self.text[chunk.index] += chunk.text
        self.token_ids[chunk.index] += chunk.token_ids
        self.logprobs[chunk.index] += [each.logprob for each in chunk.logprobs]
        self.prompt_logprobs += [each.logprob for each in chunk.prompt_logprobs]
        if chunk.finish_reason:
            self.reasons[chunk.index] = chunk.finish_reason
        if chunk.HasField("usage"):
            self.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        if chunk.HasField("request"):
            self.identity.add((chunk.request.request_id, chunk.request.seed))


def asked(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="tell me"), sampling=pb.Sampling(**sampling))


GRPC_CASES = {
    "plain": asked(max_tokens=20, seed=3),
    "drawn seed": asked(max_tokens=20),
    "three choices": asked(max_tokens=15, n=3, seed=4),
    "stop string": asked(max_tokens=40, seed=5, n=2, stop=[drawn_bytes(5, 1, 9)[3:].decode(errors="ignore")]),
    "log-probabilities": asked(max_tokens=12, seed=6, n=2, logprobs=1, prompt_logprobs=1),
    "of the prompt alone": asked(max_tokens=0, seed=6, prompt_logprobs=1),
    "penalties": asked(max_tokens=12, seed=7, presence_penalty=1.0, repetition_penalty=1.5, ignore_eos=True),
    "chat": pb.GenerateRequest(
        model="tiny",
        prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])),
        sampling=pb.Sampling(max_tokens=25, seed=8),
    ),
}


async def read_grpc(gateways: Sequence[Running], request: pb.GenerateRequest, cuts: Callable[[], int]) -> Whole:
    """The stream is left after `cuts()` messages and resumed at the other gateway, until it ends."""
    whole, received, gateway = Whole(), Received(request), 0
    while True:
        num_left = cuts()
        call = gateways[gateway].stub.GenerateStream(received.rest(), timeout=60)
        async for chunk in call:
            received.take(chunk)
            whole.take(chunk)
            num_left -= 1
            if num_left == 0:
                break
        if num_left:
            return whole
        call.cancel()
        gateway = 1 - gateway


@pytest.mark.parametrize("case", GRPC_CASES)
async def test_over_grpc_a_cut_stream_is_whole(serve: Serve, tmp_path: Path, case: str) -> None:
    draw, request = random.Random(case), pb.GenerateRequest()
    request.CopyFrom(GRPC_CASES[case])
    async with two_gateways(serve, tmp_path, draw) as gateways:
        for _ in range(NUM_CUTS):
            if case == "drawn seed":  # the reference is asked with the seed that was drawn
                cut = await read_grpc(gateways, GRPC_CASES[case], lambda: draw.randrange(1, 6))
                ((_, request.sampling.seed),) = cut.identity
            else:
                cut = await read_grpc(gateways, request, lambda: draw.randrange(1, 6))
            uncut = await read_grpc(gateways, request, lambda: -1)
            assert len(cut.identity) == 1, "one id and one seed, whichever gateway answers"
            assert {name for name, _ in cut.identity} != {name for name, _ in uncut.identity}
            cut.identity = uncut.identity
            assert cut == uncut


# ---- HTTP ----

SAMPLED: dict[str, Any] = {"model": "tiny", "stream": True}
CHAT = SAMPLED | {"messages": [{"role": "user", "content": "hi"}]}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
STOP = drawn_bytes(5, 0, 12)[5:].decode(errors="ignore")
HTTP_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"max_tokens": 20, "seed": 1}),
    "chat with everything": (
        "/v1/chat/completions",
        CHAT | {"n": 3, "max_tokens": 9, "seed": 2, "logprobs": True, "top_logprobs": 1, "stream_options": USAGE},
    ),
    "chat with a stop text": ("/v1/chat/completions", CHAT | {"n": 2, "max_tokens": 40, "seed": 5, "stop": [STOP]}),
    "completion": ("/v1/completions", SAMPLED | {"prompt": "ab c", "max_tokens": 20, "seed": 3}),
    "echo with log-probabilities": (
        "/v1/completions",
        SAMPLED | {"prompt": ["ab c", "xy"], "max_tokens": 7, "seed": 3, "n": 2, "echo": True, "logprobs": 1},
    ),
    "echo alone": (
        "/v1/completions",
        SAMPLED | {"prompt": "ab c", "max_tokens": 0, "echo": True, "logprobs": 1, "stream_options": USAGE},
    ),
    "responses": ("/v1/responses", SAMPLED | {"input": "hi", "max_output_tokens": 20, "seed": 4, "metadata": {"a": 1}}),
}


@dataclass(frozen=True)
class Sent:
    """One event."""

    id: str
    data: Any


async def read_http(
    gateways: Sequence[Running], path: str, body: dict[str, Any], cuts: Callable[[], int]
) -> list[Sent]:
    """All events, of as many connections as it takes. A client has an event when the empty line behind it has come."""
    found: list[Sent] = []
    gateway = 0
    while True:
        num_left = cuts()
        headers = RESUMABLE | ({"last-event-id": found[-1].id} if found else {})
        async with (
            client(gateways[gateway]) as http,
            http.stream("POST", path, content=json.dumps(body), headers=headers) as response,
        ):
            assert response.status_code == 200, await response.aread()
            event_id, data, has_ended = "", "", False
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    event_id = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    data = line.removeprefix("data: ")
                elif not line and data == "[DONE]":
                    has_ended = True
                elif not line and data:
                    found.append(Sent(event_id, json.loads(data)))
                    data, num_left = "", num_left - 1
                    if num_left == 0:
                        break
            if (
                has_ended
                or (path == "/v1/responses" and found[-1].data["type"] == "response.completed")
                or (path == "/v1/responses" and found[-1].data["type"] == "response.incomplete")
            ):
                return found
        gateway = 1 - gateway


def merged(events: Sequence[Sent]) -> Any:
    """What a stream comes to, whichever tokens came together."""
    whole: dict[Any, Any] = defaultdict(list)
    for sent in events:
        data = sent.data
        if "sequence_number" in data:
            whole["numbers"].append(data["sequence_number"])
            whole["text"].append(data.get("delta", ""))
            whole["last"] = data if "response" in data else whole["last"]
            continue
        whole["identity"] = {key: data[key] for key in ("object", "model", "system_fingerprint")}
        if not data["choices"]:
            whole["usage"].append(data["usage"])
        for choice in data["choices"]:
            index = choice["index"]
            whole[index, "text"].append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            whole[index, "role"] += [choice["delta"]["role"]] if "role" in choice.get("delta", {}) else []
            if reported := choice.get("logprobs"):
                for name, values in reported.items():
                    whole[index, name] += values or []
            whole[index, "reason"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    numbers = whole.pop("numbers", [])
    assert numbers == list(range(len(numbers)))
    if "last" in whole:
        last = whole["last"]["response"]
        whole["last"] = {key: last[key] for key in ("status", "usage", "metadata")}, last["output"][0]["content"]
    return {key: "".join(value) if "text" in (key, key[-1]) else value for key, value in whole.items()}


@pytest.mark.parametrize("case", HTTP_CASES)
async def test_over_http_a_cut_stream_is_whole(serve: Serve, tmp_path: Path, case: str) -> None:
    path, body = HTTP_CASES[case]
    draw = random.Random(case)
    async with two_gateways(serve, tmp_path, draw) as gateways:
        for _ in range(NUM_CUTS):
            uncut = await read_http(gateways, path, body, lambda: -1)
            cut = await read_http(gateways, path, body, lambda: draw.randrange(1, 6))
            assert merged(cut) == merged(uncut)
            assert len({str(sent.data.get("id")) for sent in cut}) == 1


@pytest.mark.parametrize("case", HTTP_CASES)
async def test_over_http_the_very_same_events_come_after_every_cut(serve: Serve, tmp_path: Path, case: str) -> None:
    """Where each step brings one token, of which each event tells."""
    path, body = HTTP_CASES[case]
    async with two_gateways(serve, tmp_path) as gateways:
        uncut = await read_http(gateways, path, body, lambda: -1)
        for place in range(1, len(uncut), by_day(4, by_night=1)):
            headers = RESUMABLE | {"last-event-id": uncut[place - 1].id}
            async with client(gateways[place % 2]) as http:
                response = await http.post(path, content=json.dumps(body), headers=headers)
            parts = [part.rpartition("data: ")[2] for part in response.text.split("\n\n")]
            rest = [json.loads(part) for part in parts if part and part != "[DONE]"]
            assert rest == [sent.data for sent in uncut[place:]]


async def test_ids_come_only_where_they_are_asked_for(serve: Serve, tmp_path: Path) -> None:
    """Load generators of others read every line of a stream, or every part, as data."""
    path, body = HTTP_CASES["chat"]
    async with two_gateways(serve, tmp_path) as gateways, client(gateways[0]) as http:
        for value, has_ids in ((None, False), ("0", False), ("1", True)):
            headers = JSON if value is None else JSON | {"x-packtrain-resumable": value}
            response = await http.post(path, content=json.dumps(body), headers=headers)
            assert ("id: " in response.text) == has_ids
        response = await http.post(path, content=json.dumps(body), headers=JSON | {"x-packtrain-resumable": "yes"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "x-packtrain-resumable")


async def test_a_model_that_is_not_deterministic_cannot_be_resumed(serve: Serve) -> None:
    path, body = HTTP_CASES["chat"]
    backend = DrawnGroups(cards=[card(deterministic=False)])
    async with serve(backend, http_port=0) as gateway:
        assert not [c async for c in gateway.stub.GenerateStream(asked(max_tokens=3), timeout=60) if c.resume_token]
        async with client(gateway) as http:
            response = await http.post(path, content=json.dumps(body), headers=RESUMABLE)
        assert response.status_code == 200
        assert "id: " not in response.text


# ---- what is refused ----


async def first_message(gateway: Running, request: pb.GenerateRequest) -> Any:
    return await anext(aiter(gateway.stub.GenerateStream(request, timeout=60)))


async def refusal(gateway: Running, request: pb.GenerateRequest) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [chunk async for chunk in gateway.stub.GenerateStream(request, timeout=60)]
    return refused.value.code().name, str(refused.value.details())


async def test_what_cannot_be_resumed_is_refused_alike_by_both_front_ends(serve: Serve, tmp_path: Path) -> None:
    path, body = HTTP_CASES["chat"]
    async with two_gateways(serve, tmp_path) as gateways:
        gateway, request = gateways[0], asked(max_tokens=20, seed=3, n=2, ignore_eos=True)
        request.resume_token = (await first_message(gateway, request)).resume_token
        good_id = (await read_http(gateways, path, body, lambda: -1))[2].id
        token, _, rest = good_id.partition(".")

        async def by_http(event_id: str, changed: dict[str, Any]) -> tuple[int, str, str, str]:
            async with client(gateway) as http:
                headers = RESUMABLE | {"last-event-id": event_id}
                response = await http.post(path, content=json.dumps(body | changed), headers=headers)
            error = response.json()["error"]
            return response.status_code, error["code"], error["param"], error["message"]

        other = pb.GenerateRequest()
        other.CopyFrom(request)
        other.sampling.temperature = 0.5
        code, message = await refusal(gateway, other)
        assert code == "INVALID_ARGUMENT" and "is of another request" in message
        status, _, param, message = await by_http(good_id, {"temperature": 0.5})
        assert (status, param) == (400, "last-event-id") and "is of another request" in message

        other.CopyFrom(request)
        other.resume_token = b"garbage"
        code, message = await refusal(gateway, other)
        assert code == "INVALID_ARGUMENT" and "'Z2FyYmFnZQ' of 7 bytes is not one" in message
        for event_id in (f"Z2FyYmFnZQ.{rest}", f"!.{rest}", f".{rest}"):
            status, _, param, message = await by_http(event_id, {})
            assert (status, param) == (400, "last-event-id") and "is not one that this deployment has made" in message
        for event_id in ("garbage", f"{token}.x.1-1", f"{token}.1.1", f"{token}.1.-1-1", f"{token}.1", f"{good_id}.1"):
            status, _, param, message = await by_http(event_id, {})
            assert (status, param) == (400, "last-event-id") and "allowed: the id of the last event" in message

        other.CopyFrom(request)
        other.resume_from.num_tokens.extend([1, 21])
        code, message = await refusal(gateway, other)
        assert code == "INVALID_ARGUMENT" and "resume_from.num_tokens[1] is 21; allowed: from 0 to 20" in message
        other.resume_from.num_tokens[:] = [1, 2, 3]
        code, message = await refusal(gateway, other)
        assert code == "INVALID_ARGUMENT" and "3 entries; the request has 2 choices" in message
        status, _, param, message = await by_http(f"{token}.9.21-1", {})
        assert (status, param) == (400, "last-event-id[0]") and "allowed: from 0 to 20" in message

        other.ClearField("resume_token")
        assert (await refusal(gateway, other))[0] == "INVALID_ARGUMENT"
        with pytest.raises(grpc.aio.AioRpcError, match="call GenerateStream"):
            await gateway.stub.Generate(request, timeout=60)
        status, _, param, message = await by_http(good_id, {"stream": False})
        assert (status, param) == (400, "last-event-id") and "not one for a stream" in message


async def test_more_tokens_than_there_are_is_refused(serve: Serve, tmp_path: Path) -> None:
    async with two_gateways(serve, tmp_path) as gateways:
        request = asked(max_tokens=60, seed=ENDS_ITSELF)
        whole = await read_grpc(gateways, request, lambda: -1)
        assert len(whole.token_ids[0]) < 60, "it ends by itself"
        request.resume_token = (await first_message(gateways[0], request)).resume_token
        request.resume_from.num_tokens.append(60)
        code, message = await refusal(gateways[1], request)
        assert code == "INVALID_ARGUMENT"
        assert f"is 60, and the choice has {len(whole.token_ids[0])} tokens" in message


async def test_an_expired_token_is_a_failed_precondition(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body = HTTP_CASES["chat"]
    monkeypatch.setattr(resume_tokens, "LIFETIME_S", -10)
    async with two_gateways(serve, tmp_path) as gateways:
        request = asked(max_tokens=20, seed=3)
        request.resume_token = (await first_message(gateways[0], request)).resume_token
        code, message = await refusal(gateways[1], request)
        assert code == "FAILED_PRECONDITION" and "has expired" in message
        last = (await read_http(gateways, path, body, lambda: -1))[1].id
        async with client(gateways[1]) as http:
            response = await http.post(path, content=json.dumps(body), headers=RESUMABLE | {"last-event-id": last})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (412, "cannot_resume", "last-event-id")


# ---- the test itself ----


def _forgets_the_split(self: Any, output: Any, num_known: int) -> Any:
    yield self.take(output)


BUGS: list[tuple[Any, str, Any]] = [
    (resume_tokens.Stream, "num_delivered", lambda self, choice: 0),
    (choices_module.Choice, "take_around", _forgets_the_split),
]


@pytest.mark.parametrize(("owner", "name", "bug"), BUGS, ids=["no-suppression", "no-split"])
async def test_a_bug_that_is_put_in_is_found(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any
) -> None:
    monkeypatch.setattr(owner, name, bug)
    request, draw = asked(max_tokens=20, seed=3, ignore_eos=True), random.Random(0)
    async with two_gateways(serve, tmp_path, draw) as gateways:
        with pytest.raises((AssertionError, grpc.aio.AioRpcError)):  # a gateway also sees that a client has too many
            for _ in range(5):
                uncut = await read_grpc(gateways, request, lambda: -1)
                cut = await read_grpc(gateways, request, lambda: draw.randrange(1, 6))
                assert cut.token_ids == uncut.token_ids


async def test_a_bug_in_the_ids_is_found(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sends_all(self: EventIds, events: Any) -> Any:
        for event in events:
            yield event.data, 0, self._line()

    path, body = HTTP_CASES["chat"]
    async with two_gateways(serve, tmp_path) as gateways:
        uncut = await read_http(gateways, path, body, lambda: -1)
        monkeypatch.setattr(EventIds, "new", sends_all)
        async with client(gateways[1]) as http:
            headers = RESUMABLE | {"last-event-id": uncut[4].id}
            response = await http.post(path, content=json.dumps(body), headers=headers)
        assert response.text.count("data: ") > len(uncut) - 5 + 1


# ---- what changes with time ----


async def test_a_resumed_chat_has_the_time_that_it_began_with() -> None:
    """A template may write the date, or the time of the day: the prompt of a minute later is another one."""
    literals = {between(START, USER): f"{DATE_OPENS}%H:%M:%S{DATE_CLOSES} ", between(USER, ANSWER): "\n"}
    backend = FakeBackend(say("ok"), cards=[card(chat=ChatFormat(name="template", literals=literals))])
    tokenizer: Any = ByteTokenizer()
    generator = Generator(backend, {"tiny": tokenizer}, LimitsConfig())
    call = Call(request_id="id", arrived_s=generator.clock(), timeout_s=None)
    query = generate_query(GRPC_CASES["chat"])
    stream = generator.begin(query, call)
    stream.created_unix_s -= 12_345
    async for _ in generator.generate(query, call, stream):
        pass
    begun = datetime.fromtimestamp(stream.created_unix_s)
    assert tokenizer.decode(backend.requests[0].prompt_token_ids) == f"{begun:%H:%M:%S} hi\n"
