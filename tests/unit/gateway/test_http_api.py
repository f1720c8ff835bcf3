"""Whole answers and streams of every endpoint, read with the `openai` package where it has them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from bench.support.fake_backend import AB, BOS, EOS, FakeBackend, say, steps
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Running, Serve
from tests.unit.gateway.http_client import CHAT, COMPLETION, client, events, post

ASK: list[Any] = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def openai_client(gateway: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{gateway.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=PATIENCE_S) as api:
        yield api


async def test_a_chat_completion(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, openai_client(gateway) as api:
        answer = await api.chat.completions.create(
            model="tiny", messages=ASK, max_completion_tokens=20, seed=7, logprobs=True, top_logprobs=2, stop="!"
        )
    assert answer.object == "chat.completion"
    assert answer.id == f"chatcmpl-{answer._request_id}"
    assert answer.model == "tiny"
    assert answer.choices[0].message.content == "Paris"
    assert answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content
    assert [token.token for token in logprobs.content] == [*"Paris", f"token_id:{EOS}"]
    assert [token.bytes for token in logprobs.content] == [*([byte] for byte in b"Paris"), []]
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.5]
    usage = answer.usage
    assert usage and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (21, 6, 27)
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == 3
    (request,) = gateway.backend.requests
    assert (request.sampling.seed, request.sampling.max_tokens, request.sampling.logprobs) == (7, 20, 2)


async def test_a_streamed_chat(serve: Serve) -> None:
    async with serve(FakeBackend(say("ab", "cd")), http_port=0) as gateway, openai_client(gateway) as api:
        stream = await api.chat.completions.create(
            model="tiny", messages=ASK, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for index, text in enumerate(("ab", "cd")):
        deltas = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert (deltas[0].delta.role, deltas[0].delta.content) == ("assistant", "")
        assert "".join(each.delta.content or "" for each in deltas) == text
        assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_stream_without_usage_does_not_speak_of_it(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        answer = await post(gateway, "/v1/chat/completions", CHAT | {"stream": True})
    assert all("usage" not in event for event in events(answer))
    assert answer.headers["cache-control"] == "no-store"


async def test_usage_in_every_event_is_that_of_its_choice(serve: Serve) -> None:
    options = {"stream": True, "n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with serve(FakeBackend(say("ab", "c")), http_port=0) as gateway:
        parts = events(await post(gateway, "/v1/completions", COMPLETION | options))
    for index, counts in ((0, [1, 3]), (1, [2])):
        own = [part["usage"] for part in parts if part["choices"] and part["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == counts
        assert all(usage["prompt_tokens"] == 3 for usage in own)
    assert parts[-1]["usage"]["completion_tokens"] == 5


async def test_a_list_of_prompts_with_choices(serve: Serve) -> None:
    backend = FakeBackend(say("one", "two", "three", "four"))
    async with serve(backend, http_port=0) as gateway, openai_client(gateway) as api:
        answer = await api.completions.create(model="tiny", prompt=["hi", "you"], n=2, max_tokens=9)
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (0, "one"), (1, "two"), (2, "three"), (3, "four"),
        ]  # fmt: skip
        assert answer.usage and answer.usage.prompt_tokens == 3 + 4
        assert [request.prompt_token_ids for request in backend.requests] == [(BOS, *b"hi")] * 2 + [(BOS, *b"you")] * 2
        assert len({request.request_id for request in backend.requests}) == 4

        backend.script = say("a", "b")
        answer = await api.completions.create(model="tiny", prompt=[[1, 2], [3]], max_tokens=9)
        assert [request.prompt_token_ids for request in backend.requests] == [(1, 2), (3,)]

        backend.script = say("a")
        answer = await api.completions.create(model="tiny", prompt=[1, 2], max_tokens=9)
        assert [request.prompt_token_ids for request in backend.requests] == [(1, 2)]


async def test_max_tokens_of_a_completion_is_16(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        await post(gateway, "/v1/completions", COMPLETION)
        assert gateway.backend.requests[0].sampling.max_tokens == 16
        await post(gateway, "/v1/chat/completions", CHAT)
        assert gateway.backend.requests[0].sampling.max_tokens == 100 - 21


async def test_every_sampling_field_arrives(serve: Serve) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.3, "seed": 2**64 - 1, "max_tokens": 7, "ignore_eos": True, "logprobs": 3,
    }  # fmt: skip
    async with serve(http_port=0) as gateway:
        body = COMPLETION | fields | {"stop_token_ids": [9], "logit_bias": {"5": -1, "12": 100}}
        answer = await post(gateway, "/v1/completions", body)
        assert answer.status_code == 200
        assert answer.headers["x-seed"] == str(2**64 - 1)
        sampling = gateway.backend.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((9,), ((5, -1.0), (12, 100.0)))


def scored(*answers: str, split: int = 0) -> Any:
    """Says `answers`; prompt log-probabilities come in a first step, `split` of them in one of their own."""

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        reported = []
        for request in requests:
            ids = request.prompt_token_ids[1:] if request.sampling.prompt_logprobs is not None else ()
            reported.append(tuple(TokenLogprobs(token, -token / 100, ((7, -0.01),)) for token in ids))
        identity = [{"request_id": request.request_id, "choice": request.choice} for request in requests]
        if split:
            yield tuple(
                EngineOutput(**who, prompt_logprobs=tokens[:split])
                for who, tokens in zip(identity, reported, strict=True)
            )
        # Choices other than the first run ahead of it.
        for who, answer, tokens in reversed([*zip(identity, answers, reported, strict=True)]):
            ids = tuple(answer.encode())
            logprobs = tuple(TokenLogprobs(token, -1.0, ((token, -1.0),)) for token in ids)
            yield (
                EngineOutput(
                    **who, token_ids=ids, logprobs=logprobs, prompt_logprobs=tokens[split:],
                    finish_reason=FinishReason.LENGTH,
                ),
            )  # fmt: skip

    return script


async def test_echo_with_logprobs_as_lm_eval_reads_it(serve: Serve) -> None:
    async with serve(FakeBackend(scored("!?")), http_port=0) as gateway, openai_client(gateway) as api:
        answer = await api.completions.create(model="tiny", prompt=[1, 97, 98], max_tokens=2, echo=True, logprobs=1)
        (choice,) = answer.choices
        assert choice.text == "\x01ab!?"
        assert choice.logprobs and choice.logprobs.token_logprobs == [None, -0.97, -0.98, -1.0, -1.0]
        assert choice.logprobs.tokens == ["\x01", "a", "b", "!", "?"]
        assert choice.logprobs.top_logprobs == [
            None, {"a": -0.97, "\x07": -0.01}, {"b": -0.98, "\x07": -0.01}, {"!": -1.0}, {"?": -1.0},
        ]  # fmt: skip
        assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("split", [0, 1])
async def test_a_streamed_echo_is_the_whole_one_in_pieces(serve: Serve, split: int) -> None:
    body = {"model": "tiny", "prompt": ["abc", "d"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 4}
    script = scored("one", "two", "three", "four", split=split)
    async with serve(FakeBackend(script), http_port=0) as gateway:
        whole = (await post(gateway, "/v1/completions", body)).json()
        parts = events(await post(gateway, "/v1/completions", body | {"stream": True}))
    assert [choice["text"] for choice in whole["choices"]] == ["abcone", "abctwo", "dthree", "dfour"]
    for choice in whole["choices"]:
        pieces = [piece for part in parts for piece in part["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == "length"
        for name, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values, name


async def test_echo_without_logprobs_gives_texts_as_they_came(serve: Serve) -> None:
    async with serve(FakeBackend(say("!", "?")), http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", {"model": "tiny", "prompt": ["ab", "c"], "echo": True})
        assert [choice["text"] for choice in answer.json()["choices"]] == ["ab!", "c?"]
        assert all(request.sampling.prompt_logprobs is None for request in gateway.backend.requests)


async def test_characters_over_several_tokens_are_not_split_and_are_named_by_bytes(serve: Serve) -> None:
    backend = FakeBackend(steps([[byte] for byte in "é".encode()] + [[AB]], eos=False))
    async with serve(backend, http_port=0) as gateway:
        parts = events(await post(gateway, "/v1/completions", COMPLETION | {"stream": True, "logprobs": 0}))
    assert [part["choices"][0]["text"] for part in parts] == ["", "é", "ab"]
    tokens = [part["choices"][0]["logprobs"]["tokens"] for part in parts]
    assert tokens == [["bytes:\\xc3"], ["bytes:\\xa9"], ["ab"]]


async def test_messages_come_in_parts_or_as_an_answer_gave_them(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, openai_client(gateway) as api:
        answer = await api.chat.completions.create(model="tiny", messages=ASK)
        said: Any = answer.choices[0].message.model_dump()
        parts: Any = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        await api.chat.completions.create(model="tiny", messages=[*ASK, said, parts])
        assert bytes(token for token in gateway.backend.requests[0].prompt_token_ids if token < 256) == (
            b"user\nhi\nassistant\nParis\nuser\na\nb\nassistant\n"
        )


async def test_models(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, openai_client(gateway) as api:
        assert [model.id async for model in api.models.list()] == ["plain", "tiny"]
        assert (await api.models.retrieve("tiny")).owned_by == "packtrain"
        with pytest.raises(openai.NotFoundError) as caught:
            await api.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


async def test_tokenize_and_detokenize(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        for body, tokens in [
            ({"prompt": "hi"}, [BOS, *b"hi"]),
            ({"prompt": "hi", "add_special_tokens": False}, [*b"hi"]),
            ({"prompt": "ab"}, [BOS, AB]),
        ]:
            answer = (await post(gateway, "/tokenize", {"model": "tiny"} | body)).json()
            assert answer == {"count": len(tokens), "max_model_len": 100, "tokens": tokens}
        chat = (await post(gateway, "/tokenize", CHAT)).json()
        assert chat["count"] == 21
        text = (await post(gateway, "/detokenize", {"model": "tiny", "tokens": [*b"hi", AB]})).json()
        assert text == {"prompt": "hiab"}


async def test_the_openapi_document_names_what_is_served(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        document = (await http.get("/openapi.json")).json()
        page = await http.get("/docs")
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/{model}", "/tokenize",
        "/detokenize", "/tokenizer_info", "/version", "/healthz", "/readyz", "/health", "/ping",
    }  # fmt: skip
    request = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "temperature", "max_completion_tokens"} <= set(request["properties"])
    assert page.headers["content-type"].startswith("text/html")
    assert "http:" not in page.text and "https:" not in page.text, "it fetches nothing"
