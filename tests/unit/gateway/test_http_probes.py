"""What tools ask an OpenAI server for besides answers, in which form streams come, and who may ask from a browser."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai
import pytest

from bench.support.fake_backend import AB, BOS, FakeBackend, for_ever, say, steps
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from serving.config import GatewayConfig, parse_config
from serving.gateway.core.ticks import with_ticks
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import CHAT, COMPLETION, answer_to, client, events, post, raw_request

STREAM = b'{"model":"tiny","prompt":"hi","stream":true}'


async def test_models_have_the_fields_that_tools_read(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        single = (await http.get("/v1/models/tiny")).json()
    assert single == listed[1]
    assert (single["id"], single["root"], single["parent"], single["max_model_len"]) == ("tiny", "tiny", None, 100)
    assert single["permission"][0]["object"] == "model_permission"


async def test_probes(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        assert (await http.get("/version")).json()["version"]
        assert (await http.get("/ping")).status_code == (await http.post("/ping")).status_code == 200
        info = (await http.get("/tokenizer_info?model=tiny")).json()
        assert (info["bos_token"], info["eos_token"], info["model_max_length"]) == ("<s>", "</s>", 100)
        assert (await http.get("/tokenizer_info")).status_code == 400, "there are two models"


async def test_paths_may_end_in_a_slash(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        for path in ("/v1/models/", "/version/", "/healthz/", "/readyz/", "/docs/", "/openapi.json/"):
            assert (await http.get(path)).status_code == 200, path
        assert (await post(gateway, "/v1/completions/", COMPLETION)).status_code == 200
        assert (await post(gateway, "/v1/chat/completions/", CHAT)).status_code == 200
        assert (await http.get("/v1/models//")).status_code == 404


# ---- /v1/responses ----


async def test_responses(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        url = f"http://127.0.0.1:{gateway.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=30) as api:
            answer = await api.responses.create(
                model="tiny",
                input="hi",
                instructions="be kind",
                max_output_tokens=20,
                temperature=0,
                metadata={"a": "b"},
            )
            assert (answer.output_text, answer.status, answer.object) == ("Paris", "completed", "response")
            assert (answer.metadata, answer.max_output_tokens) == ({"a": "b"}, 20)
            assert answer.usage and answer.usage.output_tokens == 6
            assert answer.usage.total_tokens == answer.usage.input_tokens + 6
            first = gateway.backend.requests[0].prompt_token_ids
            history: Any = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in answer.output)]
            again = await api.responses.create(
                model="tiny", input=[*history, {"role": "user", "content": [{"type": "input_text", "text": "more"}]}]
            )
            assert again.output_text == "Paris"
            said = bytes(token for token in gateway.backend.requests[0].prompt_token_ids if token < 256)
            assert said == b"user\nhi\nassistant\nParis\nuser\nmore\nassistant\n"
            assert bytes(token for token in first if token < 256) == b"system\nbe kind\nuser\nhi\nassistant\n"
            with pytest.raises(openai.BadRequestError) as caught:
                await api.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
            assert caught.value.param == "previous_response_id"
            with pytest.raises(openai.BadRequestError) as caught:
                await api.responses.create(model="tiny", input="hi", max_output_tokens=500)
            assert (caught.value.param, caught.value.code) == ("max_output_tokens", "context_length_exceeded")


async def test_a_response_that_is_cut_is_incomplete(serve: Serve) -> None:
    async with serve(FakeBackend(say("Par", finish=FinishReason.LENGTH)), http_port=0) as gateway:
        answer = (await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi"})).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["content"][0]["text"] == "Par"


async def test_an_error_in_a_streamed_response_is_its_next_event(serve: Serve) -> None:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("a"),)),)
        await asyncio.Event().wait()

    async with serve(FakeBackend(script), http_port=0) as gateway:
        asked = {"model": "tiny", "input": "hi", "stream": True}
        answer = await post(gateway, "/v1/responses", asked, **{"x-request-timeout-s": "1"})
    parts = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert (parts[-1]["type"], parts[-1]["code"]) == ("error", "deadline_exceeded")
    assert [part["sequence_number"] for part in parts] == list(range(len(parts))) and len(parts) > 3


async def test_a_streamed_response(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        url = f"http://127.0.0.1:{gateway.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=30) as api:
            stream = await api.responses.create(model="tiny", input="hi", stream=True)
            parts = [part async for part in stream]
            async with api.responses.stream(model="tiny", input="hi") as helper:
                final = await helper.get_final_response()
    assert final.output_text == "Paris"
    assert [part.sequence_number for part in parts] == list(range(len(parts)))
    kinds = [kind for kind, _ in itertools.groupby(part.type for part in parts)]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == "Paris"


async def test_an_error_within_a_streamed_response_is_an_event_of_it(serve: Serve) -> None:
    async def fails(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(97,)),)
        raise ZeroDivisionError

    async with serve(FakeBackend(fails), http_port=0) as gateway:
        answer = await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi", "stream": True})
    assert answer.text.split("\n\n")[-2].startswith('event: error\ndata: {"type":"error","code":"internal_error"')


# ---- offsets ----


def speaks(text: str) -> Any:
    """Says `text` a byte a token, each with its log-probability; prompts are scored too."""

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        for request in requests:
            scored = request.prompt_token_ids[1:] if request.sampling.prompt_logprobs is not None else ()
            tokens = tuple(text.encode())
            yield (
                EngineOutput(
                    request_id=request.request_id,
                    choice=request.choice,
                    token_ids=tokens,
                    logprobs=tuple(TokenLogprobs(token, -1.0, ()) for token in tokens),
                    prompt_logprobs=tuple(TokenLogprobs(token, -2.0, ()) for token in scored),
                    finish_reason=FinishReason.LENGTH,
                ),
            )

    return script


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["hi", "a🙂é", [[BOS, *"é".encode(), AB]], ["🙂", "xy"]])
async def test_offsets_are_those_of_the_returned_text(serve: Serve, prompt: Any, echo: bool) -> None:
    body = {"model": "tiny", "prompt": prompt, "n": 2, "echo": echo, "logprobs": 0, "max_tokens": 20}
    async with serve(FakeBackend(speaks("é🙂z")), http_port=0) as gateway:
        choices = (await post(gateway, "/v1/completions", body)).json()["choices"]
        parts = events(await post(gateway, "/v1/completions", body | {"stream": True}))
    for choice in choices:
        offsets, text = choice["logprobs"]["text_offset"], choice["text"]
        assert len(offsets) == len(choice["logprobs"]["tokens"])
        spelt = text.encode()
        position = 0
        for name, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
            # The character that the token's first byte is part of.
            assert offset == len(spelt[:position].decode(errors="ignore"))
            position += 0 if name.startswith("token_id") else 2 if name == "ab" else 1
        assert position == len(spelt)
        pieces = [each for part in parts for each in part["choices"] if each["index"] == choice["index"]]
        assert [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]] == offsets


async def test_offsets_of_a_stop_text_lie_at_the_end(serve: Serve) -> None:
    async with serve(FakeBackend(steps(*[[[byte] for byte in b"abcde"]], eos=False)), http_port=0) as gateway:
        body = COMPLETION | {"stop": "cd", "logprobs": 0}
        choice = (await post(gateway, "/v1/completions", body)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("ab", [0, 1, 2, 2])


# ---- signs of life, and framing ----


def slow(after: asyncio.Event) -> Any:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        await after.wait()
        async for outputs in say("ok")(requests):
            yield outputs

    return script


@pytest.mark.parametrize("asked", [False, True])
async def test_a_stream_that_waits_gives_signs_of_life(serve: Serve, asked: bool) -> None:
    go_on = asyncio.Event()
    config = {} if asked else {"stream_keep_alive_s": 1}
    headers = {"x-packtrain-keep-alive-s": "1"} if asked else {}
    body = COMPLETION | {"stream": True}
    async with (
        serve(FakeBackend(slow(go_on)), http_port=0, **config) as gateway,
        client(gateway, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
    ):
        parts = answer.aiter_text()
        assert await anext(parts) == ": keep-alive\n\n"
        go_on.set()
        rest = "".join([part async for part in parts])
    assert rest.endswith("data: [DONE]\n\n") and '"text":"o"' in rest


async def test_grpc_headers_come_early_on_request(serve: Serve) -> None:
    go_on = asyncio.Event()
    async with serve(FakeBackend(slow(go_on))) as gateway, asyncio.timeout(60):
        request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
        metadata = (("x-packtrain-keep-alive-s", "1"), ("x-request-id", "mine"))
        call = gateway.stub.GenerateStream(request, metadata=metadata)
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        go_on.set()
        parts = [part async for part in call]
    assert "".join(part.text for part in parts) == "ok"
    assert parts[0].request.request_id == parts[-1].request.request_id != ""


@pytest.mark.parametrize("value", ["0", "0.5", "301", "nan", "soon", ""])
async def test_a_silence_out_of_range_is_refused(serve: Serve, value: str) -> None:
    async with serve(http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", COMPLETION, **{"x-packtrain-keep-alive-s": value})
    assert answer.json()["error"]["param"] == "x-packtrain-keep-alive-s"


async def test_a_client_that_leaves_a_slow_stream_ends_it(serve: Serve) -> None:
    body = COMPLETION | {"stream": True}
    async with serve(FakeBackend(for_ever), http_port=0, stream_keep_alive_s=1) as gateway:
        async with client(gateway) as http, http.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_text())
        await gateway.backend.closed()


async def test_ticks_fill_silences_and_pass_errors_on() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.05)
        yield 2
        raise ZeroDivisionError

    seen: list[int | None] = []
    with pytest.raises(ZeroDivisionError):
        async for item in with_ticks(items(), 0.01):  # type: ignore[arg-type]
            seen.append(item)
    assert seen[0] == 1 and seen[-1] == 2
    assert None in seen[1:-1]


async def test_old_clients_get_no_chunks(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        request = raw_request(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0")
        head, _, body = (await answer_to(gateway, request)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head and b"connection: close" in head
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
        whole = await answer_to(gateway, raw_request(b'{"model":"tiny","prompt":"hi"}').replace(b"1.1", b"1.0"))
        assert b"content-length" in whole and b"Paris" in whole


# ---- browsers ----

PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_browsers_are_let_in_by_a_list(serve: Serve) -> None:
    async with serve(http_port=0, cors_allow_origins=("https://chat.example",)) as gateway, client(gateway) as http:
        allowed = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        other = await http.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        answer = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        refused = await http.post("/v1/nope", json=CHAT, headers={"origin": "https://chat.example"})
        assert refused.headers["access-control-allow-origin"] == "https://chat.example", "pages may read errors"


async def test_browsers_are_kept_out_by_default(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        answer = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://chat.example/page", ""])
def test_an_origin_is_what_browsers_send(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.cors_allow_origins"):
        parse_config(
            {"models": [{"name": "m", "source": "s"}], "gateway": {"cors_allow_origins": [origin]}}, origin="test"
        )
    assert GatewayConfig(cors_allow_origins=("*", "http://localhost:3000")).cors_allow_origins
