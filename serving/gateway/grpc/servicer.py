"""The methods of packtrain.v1.Inference. Exceptions pass through; `interceptors` answers them."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.gateway.core.call import Call, printable_label
from serving.gateway.core.choices import Chunk
from serving.gateway.core.fields import IGNORED_HEADER, ignored_header
from serving.gateway.core.generation import Generator
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.ticks import KEEP_ALIVE_HEADER, keep_alive_of, with_ticks
from serving.gateway.grpc import convert
from serving.gateway.grpc.interceptors import ignored, observer, principal
from serving.observability.log import request_id

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Turns requests into queries and chunks into responses; the work is the Generator's."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        convert.refuse_resumption(request)
        call = self._call(context)
        query = convert.generate_query(request)
        stream = self._generator.begin(query, call)
        tokenizer = self._generator.tokenizer_of(call, query.model)
        async with aclosing(self._generator.generate(query, call, stream)) as chunks:
            response = convert.generate_response([chunk async for chunk in chunks], tokenizer)
        response.request.CopyFrom(pb.RequestInfo(request_id=call.request_id, seed=stream.seed))
        await _send_headers(context)
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call = self._call(context, is_streamed=True)
        query = convert.generate_query(request)
        stream = self._generator.begin_stream(
            query,
            call,
            convert.canonical(query),
            request.resume_token or None,
            convert.delivered(request),
        )
        tokenizer = self._generator.tokenizer_of(call, query.model)
        keep_alive_s = keep_alive_of(_metadata(context, KEEP_ALIVE_HEADER), None)
        chunks: AsyncGenerator[Chunk | None, None] = _new_to_client(
            self._generator.generate(query, call, stream), stream, request.resume_from.num_prompt_logprobs
        )
        if keep_alive_s is not None:
            chunks = with_ticks(chunks, keep_alive_s)
        is_first, has_told, told_token = True, False, b""
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk is None:
                    if is_first:
                        await context.send_initial_metadata(_headers(context))
                        is_first = False
                    continue
                response = convert.stream_response(chunk, tokenizer)
                if not has_told or chunk.summary is not None:
                    has_told = True
                    response.request.CopyFrom(pb.RequestInfo(request_id=stream.billed_id, seed=stream.seed))
                if (token := stream.token()) != told_token:
                    response.resume_token = told_token = token
                if is_first:
                    # Not before: errors until here go out as trailers alone, which clients may retry by themselves.
                    await _send_headers(context)
                    is_first = False
                yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        call = self._call(context)
        tokenizer = self._generator.tokenizer_of(call, request.model)
        scores, summary = await self._generator.score(convert.score_query(request), call)
        await _send_headers(context)
        return pb.ScoreResponse(
            request_id=call.request_id,
            scores=[convert.score(scored, tokenizer) for scored in scores],
            usage=convert.usage(summary),
            timings=convert.timings(summary),
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        query = convert.tokenize_query(request)
        call = self._call(context)
        tokenizer = self._generator.tokenizer_of(call, query.model)
        token_ids = await self._generator.tokenize(query, call)
        await _send_headers(context)
        return pb.TokenizeResponse(token_ids=token_ids, tokens=[tokenizer.token_bytes(token) for token in token_ids])

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        text = self._generator.detokenize(request.model, tuple(request.token_ids), self._call(context))
        await _send_headers(context)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        await _send_headers(context)
        cards = self._generator.visible_models(principal.get())
        return pb.ListModelsResponse(models=[convert.model_card(card) for card in cards])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        card = self._generator.model_for(self._call(context), request.model)
        await _send_headers(context)
        return pb.GetModelResponse(model=convert.model_card(card))

    def _call(self, context: Context, *, is_streamed: bool = False) -> Call:
        return Call(
            request_id=request_id.get(),
            arrived_s=self._generator.clock(),
            timeout_s=context.time_remaining(),
            principal=principal.get(),
            observer=observer.get(),
            is_streamed=is_streamed,
        )


async def _new_to_client(
    chunks: AsyncGenerator[Chunk, None], stream: Stream, num_prompt_logprobs: int
) -> AsyncGenerator[Chunk, None]:
    """Chunks without what the client of a resumed stream has: of choices that have no token yet, so many prompt
    log-probabilities; of others, everything until the last token that it has."""
    async with aclosing(chunks):
        async for chunk in chunks:
            num_delivered = stream.num_delivered(chunk.index)
            if chunk.num_tokens > num_delivered or not num_delivered:
                num_skipped = min(num_prompt_logprobs, len(chunk.prompt_logprobs))
                num_prompt_logprobs -= num_skipped
                yield replace(chunk, prompt_logprobs=chunk.prompt_logprobs[num_skipped:]) if num_skipped else chunk
            elif chunk.summary is not None:
                yield Chunk(index=chunk.index, finish_reason=chunk.finish_reason, summary=chunk.summary)


async def _send_headers(context: Context) -> None:
    """What goes before the answer: the client's x-request-id, which is a label and nothing else, and what was ignored."""
    if headers := _headers(context):
        await context.send_initial_metadata(headers)


def _headers(context: Context) -> tuple[tuple[str, str], ...]:
    headers = [("x-request-id", printable_label(value)) for value in _metadata(context, "x-request-id")[:1]]
    if names := ignored.get():
        headers.append((IGNORED_HEADER, ignored_header(names)))
    return tuple(headers)


def _metadata(context: Context, name: str) -> list[str]:
    return [str(value) for key, value in context.invocation_metadata() or () if key == name]
