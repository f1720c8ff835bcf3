import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.support.fake_backend import BOS, EOS, IM_END, IM_START, FakeBackend, card, for_ever, say, steps
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from protos import inference_pb2 as pb
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve


def ask(text: str = "hi", model: str = "tiny", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt=pb.Prompt(text=text), sampling=pb.Sampling(**sampling))


async def collect(call: Any) -> list[pb.GenerateStreamResponse]:
    return [chunk async for chunk in call]


async def test_a_stream_carries_text_tokens_and_at_its_end_usage_and_timings(serve: Serve) -> None:
    async with serve(FakeBackend(say("é!"))) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask()))
    assert [chunk.text for chunk in chunks] == ["", "é", "!"]  # the first byte of é waits for the second
    assert [list(chunk.token_ids) for chunk in chunks] == [[0xC3], [0xA9], [ord("!"), EOS]]
    assert [chunk.finish_reason for chunk in chunks] == [0, 0, pb.FINISH_REASON_STOP]
    assert [chunk.HasField("request") for chunk in chunks] == [True, False, True]
    assert chunks[0].request == chunks[-1].request
    usage, timings = chunks[-1].usage, chunks[-1].timings
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 3, 4)
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == (0.25, 0.5, 0.75)
    assert 0 <= timings.gateway_s <= timings.total_s


async def test_the_engine_gets_what_was_asked_and_unset_is_not_zero(serve: Serve) -> None:
    async with serve() as gateway:
        response = await gateway.stub.Generate(
            ask("hi", temperature=0.0, seed=0, top_k=5, stop_token_ids=[7], logit_bias={9: -1.5}, ignore_eos=True),
            timeout=30,
        )
        [request] = gateway.backend.requests
        assert request.prompt_token_ids == (BOS, ord("h"), ord("i"))
        assert request.eos_token_ids == (EOS,)
        assert request.deadline_s is not None and 29 < request.deadline_s < 31  # the wire rounds
        assert request.request_id == f"{response.request.request_id}-0"
        assert request.sampling.temperature == 0
        assert request.sampling.top_p == 1.0
        assert request.sampling.top_k == 5
        assert request.sampling.seed == response.request.seed == 0
        assert request.sampling.stop_token_ids == (7,)
        assert request.sampling.logit_bias == ((9, -1.5),)
        assert request.sampling.ignore_eos
        assert request.sampling.max_tokens == 100 - 3  # all that is left of max_model_len
        assert request.sampling.logprobs is None

        response = await gateway.stub.Generate(ask())
        [request] = gateway.backend.requests
        assert request.sampling.temperature == 1.0
        assert request.sampling.seed == response.request.seed != 0  # drawn
        assert request.deadline_s is None


async def test_generate_puts_the_choices_together(serve: Serve) -> None:
    async with serve(FakeBackend(say("one", "three", finish=FinishReason.LENGTH))) as gateway:
        response = await gateway.stub.Generate(ask(n=2, logprobs=1))
    assert [choice.text for choice in response.choices] == ["one", "three"]
    assert [choice.index for choice in response.choices] == [0, 1]
    assert bytes(response.choices[1].token_ids) == b"three"
    assert [len(choice.logprobs) for choice in response.choices] == [3, 5]
    first = response.choices[0].logprobs[0]
    assert (first.token_id, first.token, first.logprob) == (ord("o"), b"o", -0.5)
    assert [(other.token_id, other.token, other.logprob) for other in first.top] == [(0, b"\0", -0.5)]
    assert {choice.finish_reason for choice in response.choices} == {pb.FINISH_REASON_LENGTH}
    assert response.usage.completion_tokens == 8
    assert response.usage.prompt_tokens == 3


async def test_choices_are_merged_into_one_stream(serve: Serve) -> None:
    async with serve(FakeBackend(say("ab", "cdef"))) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask(n=2)))
        assert [request.choice for request in gateway.backend.requests] == [0, 1]
        assert len({request.request_id for request in gateway.backend.requests}) == 2
    for index, text in enumerate(("ab", "cdef")):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == text
        assert [chunk.finish_reason for chunk in mine] == [0] * (len(text) - 1) + [pb.FINISH_REASON_STOP]
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * 5 + [True]


async def test_tokens_of_one_step_come_as_one_chunk(serve: Serve) -> None:
    async with serve(FakeBackend(steps([list(b"Pa"), list(b"ris")]))) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask()))
    assert [chunk.text for chunk in chunks] == ["Pa", "ris"]


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 9])
async def test_a_stop_string_ends_the_answer_however_the_tokens_come(serve: Serve, cut: int) -> None:
    answer = b"say STOP or STOP"
    parts = [list(answer[start : start + cut]) for start in range(0, len(answer), cut)]
    async with serve(FakeBackend(steps(parts))) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask(stop=["STOP", "zzz"], logprobs=0)))
        await gateway.backend.closed()
    assert "".join(chunk.text for chunk in chunks) == "say "
    assert bytes(token for chunk in chunks for token in chunk.token_ids) == b"say STOP"
    assert sum(len(chunk.logprobs) for chunk in chunks) == 8
    last = chunks[-1]
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.completion_tokens == 8
    assert last.usage.cached_tokens == 3
    assert last.timings.decode_s > 0


async def test_a_stop_string_of_one_choice_leaves_the_others_alone(serve: Serve) -> None:
    async with serve(FakeBackend(say("a.bcd", "efghijk"))) as gateway:
        response = await gateway.stub.Generate(ask(n=2, stop=["."]))
    assert [choice.text for choice in response.choices] == ["a", "efghijk"]
    assert bytes(response.choices[0].token_ids) == b"a."
    assert response.usage.completion_tokens == 2 + 8


async def test_text_held_back_for_a_stop_string_comes_when_it_is_none(serve: Serve) -> None:
    async with serve(FakeBackend(say("a STO"))) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask(stop=["STOP"])))
    assert [chunk.text for chunk in chunks] == ["a", " ", "", "", "STO"]


async def test_the_text_of_a_stop_token_is_not_part_of_the_answer(serve: Serve) -> None:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (
            EngineOutput(
                request_id=requests[0].request_id,
                token_ids=tuple(b"hi!"),
                finish_reason=FinishReason.STOP,
                stop_token_id=ord("!"),
            ),
        )

    async with serve(FakeBackend(script)) as gateway:
        response = await gateway.stub.Generate(ask(stop_token_ids=[ord("!")]))
    assert response.choices[0].text == "hi"
    assert bytes(response.choices[0].token_ids) == b"hi!"


async def test_prompt_logprobs_are_told_once(serve: Serve) -> None:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        for request in requests:
            scored = tuple(TokenLogprobs(token, -1.0) for token in request.prompt_token_ids[1:])
            yield (
                EngineOutput(request_id=request.request_id, choice=request.choice, prompt_logprobs=scored[:1]),
                EngineOutput(
                    request_id=request.request_id,
                    choice=request.choice,
                    token_ids=(ord("x"),),
                    prompt_logprobs=scored[1:],
                    finish_reason=FinishReason.LENGTH,
                ),
            )

    async with serve(FakeBackend(script)) as gateway:
        chunks = await collect(gateway.stub.GenerateStream(ask("hey", n=2, prompt_logprobs=0)))
        assert [request.sampling.prompt_logprobs for request in gateway.backend.requests] == [0, 0]
    assert bytes(each.token_id for chunk in chunks for each in chunk.prompt_logprobs) == b"hey"


async def test_chat_uses_the_models_format_and_its_text_is_only_text(serve: Serve) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="<|im_end|>")])
    async with serve() as gateway:
        await gateway.stub.Generate(pb.GenerateRequest(model="tiny", prompt=pb.Prompt(chat=chat)))
        [request] = gateway.backend.requests
    controls = [token for token in request.prompt_token_ids if token in (BOS, EOS, IM_START, IM_END)]
    assert controls == [IM_START, IM_END, IM_START]
    assert b"<|im_end|>" in bytes(token for token in request.prompt_token_ids if token < 256)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancel_closes_the_backend_at_once(serve: Serve, method: str) -> None:
    async with serve(FakeBackend(for_ever)) as gateway:
        call = getattr(gateway.stub, method)(ask())
        await asyncio.wait_for(gateway.backend.started.wait(), PATIENCE_S)
        assert gateway.backend.num_open == 1
        call.cancel()
        await gateway.backend.closed()
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_deadline_closes_the_backend(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever)) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(gateway.stub.GenerateStream(ask(), timeout=0.3))  # must expire
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await gateway.backend.closed()


async def test_a_client_that_goes_away_closes_the_backend(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever)) as gateway:
        async with grpc.aio.insecure_channel(gateway.target) as channel:
            stream = channel.unary_stream(
                "/packtrain.v1.Inference/GenerateStream",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateStreamResponse.FromString,
            )(ask())
            assert (await stream.read()).text == "x"
        await gateway.backend.closed()


def failing(error: Exception, *, after: int = 0) -> Any:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        for _ in range(after):
            yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("x"),)),)
        raise error

    return script


def ending(reason: FinishReason, kind: str = "") -> Any:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (
            EngineOutput(
                request_id=requests[0].request_id, finish_reason=reason, error="what happened", error_kind=kind
            ),
        )

    return script


Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("script", "code", "reason", "retry"),
    [
        (failing(GroupRefusedError("queue is full", kind="overloaded")), Code.RESOURCE_EXHAUSTED, "OVERLOADED", True),
        (failing(GroupUnavailableError("no live group")), Code.UNAVAILABLE, "NO_GROUP", True),
        (failing(GroupUnavailableError("lost"), after=2), Code.INTERNAL, "REQUEST_POISONED", False),
        (
            failing(GroupRefusedError("prompt over the KV cache", kind="invalid")),
            Code.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            False,
        ),
        (failing(ZeroDivisionError("/secret/path prompt")), Code.INTERNAL, "INTERNAL", False),
        (failing(GroupRefusedError("/secret twice", kind="duplicate")), Code.INTERNAL, "INTERNAL", False),
        (ending(FinishReason.ERROR, "unavailable"), Code.INTERNAL, "REQUEST_POISONED", False),
        (ending(FinishReason.ERROR, "numerical_error"), Code.INTERNAL, "NUMERICAL_ERROR", False),
        (ending(FinishReason.DEADLINE), Code.DEADLINE_EXCEEDED, "DEADLINE", False),
        (ending(FinishReason.CANCELLED), Code.CANCELLED, "CANCELLED", False),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_failures_have_their_status(
    serve: Serve, method: str, script: Any, code: grpc.StatusCode, reason: str, retry: bool
) -> None:
    async with serve(FakeBackend(script), retry_delay_s=2) as gateway:
        call = getattr(gateway.stub, method)(ask())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await (collect(call) if method == "GenerateStream" else call)
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            assert code is Code.CANCELLED  # how the client library tells of that status
        assert await call.code() is code
        assert "secret" not in (await call.details())
        trailers = dict(await call.trailing_metadata())
        pushback_ms = int(trailers["grpc-retry-pushback-ms"])
        assert 2000 <= pushback_ms <= 3000 if retry else pushback_ms == -1
        status = await rpc_status.aio.from_call(call)
        details = {each.TypeName(): each for each in status.details}
        info = error_details_pb2.ErrorInfo()
        assert details["google.rpc.ErrorInfo"].Unpack(info)
        assert (info.reason, info.domain) == (reason, "packtrain")
        assert ("google.rpc.RetryInfo" in details) == retry
        await gateway.backend.closed()


async def test_an_internal_error_is_logged_under_the_id_that_the_client_gets(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(FakeBackend(failing(ZeroDivisionError("inner")))) as gateway:
        call = gateway.stub.Generate(ask())
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        status = await rpc_status.aio.from_call(call)
    info = error_details_pb2.RequestInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    [record] = [record for record in caplog.records if "failed" in record.message]
    assert info.request_id in record.message
    assert record.exc_info is not None


@pytest.mark.parametrize(("sent", "echoed"), [("mine-1", "mine-1"), ("x" * 1000, "x" * 128), (None, None)])
async def test_the_clients_request_id_is_only_a_label(serve: Serve, sent: str | None, echoed: str | None) -> None:
    async with serve() as gateway:
        call = gateway.stub.GenerateStream(ask(), metadata=(("x-request-id", sent),) if sent else ())
        await collect(call)
        assert dict(await call.initial_metadata()).get("x-request-id") == echoed
        assert sent is None or sent not in gateway.backend.requests[0].request_id


async def test_no_metadata_goes_out_before_the_first_token(serve: Serve) -> None:
    """Clients retry by themselves only while they have seen nothing."""
    async with serve(FakeBackend(failing(GroupUnavailableError("none")))) as gateway:
        call = gateway.stub.GenerateStream(ask(), metadata=(("x-request-id", "mine"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(call)
        assert "x-request-id" not in dict(await call.initial_metadata())


async def test_models_are_listed_without_where_they_lie(serve: Serve) -> None:
    async with serve(FakeBackend(cards=[card("b"), card("a", bos_token_id=None)])) as gateway:
        listed = await gateway.stub.ListModels(pb.ListModelsRequest())
        got = await gateway.stub.GetModel(pb.GetModelRequest(model="a"))
    assert [model.name for model in listed.models] == ["a", "b"]
    assert got.model == listed.models[0]
    assert not got.model.HasField("bos_token_id")
    assert got.model.max_model_len == 100
    assert "secret" not in str(listed)


async def test_tokenize_and_detokenize(serve: Serve) -> None:
    async with serve() as gateway:
        stub = gateway.stub
        with_bos = await stub.Tokenize(pb.TokenizeRequest(model="tiny", text="cab é"))
        without = await stub.Tokenize(pb.TokenizeRequest(model="tiny", text="cab é", add_bos=False))
        assert list(with_bos.token_ids) == [BOS, *without.token_ids]
        assert list(without.tokens) == [b"c", b"ab", b" ", b"\xc3", b"\xa9"]
        back = await stub.Detokenize(pb.DetokenizeRequest(model="tiny", token_ids=with_bos.token_ids))
        assert back.text == "cab é"
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        await stub.Generate(pb.GenerateRequest(model="tiny", prompt=pb.Prompt(chat=chat)))
        tokenized = await stub.Tokenize(pb.TokenizeRequest(model="tiny", chat=chat))
        assert tuple(tokenized.token_ids) == gateway.backend.requests[0].prompt_token_ids
