"""Scores against numbers worked out by hand, and lm-evaluation-harness's way to cut context from continuation."""

import math
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import AB, BOS, EOS, TIMINGS, ByteTokenizer, FakeBackend, card
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from protos import inference_pb2 as pb
from serving.gateway.core.prompts import PromptEncoder
from serving.gateway.core.validate import TextPrompt
from serving.gateway.grpc import convert
from tests.unit.gateway.conftest import Serve

A, B, C = ord("a"), ord("b"), ord("c")

# A model of three tokens that looks one token back: its probabilities are halves, quarters and eighths.
NEXT = {
    BOS: {A: 0.5, B: 0.25, C: 0.25},
    A: {A: 0.25, B: 0.25, C: 0.5},
    B: {A: 0.125, B: 0.75, C: 0.125},
    C: {A: 0.5, B: 0.25, C: 0.25},
}


async def bigram(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """Reports a position a step, choices interleaved, as an engine with tiny prefill chunks would."""
    for request in requests:
        assert request.sampling.max_tokens == 0
        assert request.sampling.prompt_logprobs == 1
    for position in range(1, max(len(request.prompt_token_ids) for request in requests)):
        outputs = []
        for request in requests:
            prompt = request.prompt_token_ids
            if position >= len(prompt):
                continue
            scored: tuple[TokenLogprobs, ...] = ()
            if position >= request.sampling.prompt_logprobs_start:
                chances = NEXT[prompt[position - 1]]
                best = max(chances, key=lambda token: (chances[token], -token))
                logprob = math.log(chances[prompt[position]])
                scored = (TokenLogprobs(prompt[position], logprob, ((best, math.log(chances[best])),)),)
            is_last = position == len(prompt) - 1
            outputs.append(
                EngineOutput(
                    request_id=request.request_id,
                    choice=request.choice,
                    prompt_logprobs=scored,
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    timings=TIMINGS if is_last else None,
                )
            )
        yield tuple(outputs)


def text_score(context: str, *continuations: str) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        model="tiny",
        context=pb.Prompt(text=context),
        continuations=[pb.Continuation(text=text) for text in continuations],
    )


async def test_scores_are_sums_of_log_probabilities(serve: Serve) -> None:
    async with serve(FakeBackend(bigram)) as gateway:
        response = await gateway.stub.Score(text_score("c", "ac", "bbb", "c"))
    ac, bbb, c = response.scores
    assert ac.logprob == pytest.approx(math.log(0.5 * 0.5), abs=1e-12)  # c→a, a→c
    assert bbb.logprob == pytest.approx(math.log(0.25 * 0.75 * 0.75), abs=1e-12)
    assert c.logprob == pytest.approx(math.log(0.25), abs=1e-12)
    assert [score.is_greedy for score in response.scores] == [True, False, False]
    assert [score.num_tokens for score in response.scores] == [2, 3, 1]
    assert [token.token for token in bbb.tokens] == [b"b"] * 3
    assert [token.top[0].token for token in bbb.tokens] == [b"a", b"b", b"b"]
    assert response.usage.prompt_tokens == (2 + 2) + (2 + 3) + (2 + 1)
    assert response.timings.prefill_s == TIMINGS.prefill_s


async def test_an_empty_context_is_the_beginning_of_a_sequence(serve: Serve) -> None:
    async with serve(FakeBackend(bigram)) as gateway:
        by_text = await gateway.stub.Score(text_score("", "ac"))
        assert [request.prompt_token_ids for request in gateway.backend.requests] == [(BOS, A, C)]
        by_tokens = await gateway.stub.Score(
            pb.ScoreRequest(
                model="tiny",
                context=pb.Prompt(token_ids=pb.TokenIds()),
                continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=[A, C]))],
            )
        )
    assert by_text.scores == by_tokens.scores
    assert by_text.scores[0].logprob == pytest.approx(math.log(0.5 * 0.5), abs=1e-12)
    assert by_text.scores[0].is_greedy


@pytest.mark.parametrize(("bos", "eos", "first"), [(BOS, (EOS,), BOS), (None, (EOS, 3), EOS)])
async def test_a_model_without_bos_begins_with_eos(bos: int | None, eos: tuple[int, ...], first: int) -> None:
    encoder = PromptEncoder(card(bos_token_id=bos, eos_token_ids=eos), ByteTokenizer())  # type: ignore[arg-type]
    assert await encoder.encode_pair(TextPrompt(""), 0, TextPrompt("c")) == ((first, C), 1)
    assert await encoder.encode_pair(TextPrompt("  "), 0, TextPrompt("c")) == ((first, 32, 32, C), 1)


def lm_eval_encode_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm_eval.api.model.TemplateLM._encode_pair, with its tok_encode being our tokenizer's."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = ByteTokenizer().encode(context + continuation)
    context_enc = ByteTokenizer().encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@given(context=st.text("ab c\n", max_size=8), continuation=st.text("ab c\n", min_size=1, max_size=5))
async def test_texts_are_cut_as_lm_eval_cuts_them(context: str, continuation: str) -> None:
    encoder = PromptEncoder(card(), ByteTokenizer())  # type: ignore[arg-type]
    context_ids, continuation_ids = lm_eval_encode_pair(context, continuation)
    if not continuation_ids:
        return
    whole, start = await encoder.encode_pair(TextPrompt(context), 0, TextPrompt(continuation))
    assert start == len(context_ids)
    assert list(whole[start:]) == continuation_ids


async def test_a_token_over_the_border_counts_as_the_contexts(serve: Serve) -> None:
    """ "a" + "bc" is the tokens "ab" and "c": what follows the context's one token is "c", as in lm-eval."""
    encoder = PromptEncoder(card(), ByteTokenizer())  # type: ignore[arg-type]
    assert await encoder.encode_pair(TextPrompt("a"), 0, TextPrompt("bc")) == ((BOS, AB, C), 2)
    async with serve(FakeBackend(bigram)) as gateway:
        with pytest.raises(grpc.aio.AioRpcError, match=r"continuations\[1\] adds no token"):
            await gateway.stub.Score(text_score("a", "c", "b"))


async def test_text_after_a_conversation_is_tokenised_alone(serve: Serve) -> None:
    encoder = PromptEncoder(card(), ByteTokenizer())  # type: ignore[arg-type]
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    request = pb.ScoreRequest(
        model="tiny", context=pb.Prompt(chat=chat), continuations=[pb.Continuation(text="ab"), pb.Continuation()]
    )
    query = convert.score_query(request)
    assert query.context is not None
    context = await encoder.encode("context", query.context)
    whole, start = await encoder.encode_pair(query.context, 0, TextPrompt("ab"))
    assert whole == (*context, AB)
    assert start == len(context)


async def test_a_group_that_reports_too_little_is_our_fault(serve: Serve) -> None:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, finish_reason=FinishReason.LENGTH),)

    async with serve(FakeBackend(script)) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Score(text_score("c", "a"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
