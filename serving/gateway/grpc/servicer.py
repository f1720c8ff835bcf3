"""The methods of packtrain.v1.Inference. Exceptions pass through; `interceptors` answers them."""

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.gateway.core.call import Call, printable_label
from serving.gateway.core.generation import Generator
from serving.gateway.grpc import convert
from serving.gateway.grpc.interceptors import observer, principal
from serving.observability.log import request_id

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Turns requests into queries and chunks into responses; the work is the Generator's."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        call = self._call(context)
        query = convert.generate_query(request)
        seed = secrets.randbits(64) if query.seed is None else query.seed
        async with aclosing(self._generator.generate(query, call, seed)) as chunks:
            response = convert.generate_response(
                [chunk async for chunk in chunks], self._generator.tokenizers[query.model]
            )
        response.request.CopyFrom(pb.RequestInfo(request_id=call.request_id, seed=seed))
        await _send_label(context)
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call = self._call(context, is_streamed=True)
        query = convert.generate_query(request)
        seed = secrets.randbits(64) if query.seed is None else query.seed
        is_first = True
        async with aclosing(self._generator.generate(query, call, seed)) as chunks:
            async for chunk in chunks:
                response = convert.stream_response(chunk, self._generator.tokenizers[query.model])
                if is_first or chunk.summary is not None:
                    response.request.CopyFrom(pb.RequestInfo(request_id=call.request_id, seed=seed))
                if is_first:
                    # Not before: errors until here go out as trailers alone, which clients may retry by themselves.
                    await _send_label(context)
                    is_first = False
                yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        call = self._call(context)
        scores, summary = await self._generator.score(convert.score_query(request), call)
        tokenizer = self._generator.tokenizers[request.model]
        await _send_label(context)
        return pb.ScoreResponse(
            request_id=call.request_id,
            scores=[convert.score(scored, tokenizer) for scored in scores],
            usage=convert.usage(summary),
            timings=convert.timings(summary),
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        query = convert.tokenize_query(request)
        token_ids = await self._generator.tokenize(query, self._call(context))
        tokenizer = self._generator.tokenizers[query.model]
        await _send_label(context)
        return pb.TokenizeResponse(token_ids=token_ids, tokens=[tokenizer.token_bytes(token) for token in token_ids])

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        text = self._generator.detokenize(request.model, tuple(request.token_ids), self._call(context))
        await _send_label(context)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        await _send_label(context)
        cards = self._generator.visible_models(principal.get())
        return pb.ListModelsResponse(models=[convert.model_card(card) for card in cards])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        card = self._generator.model_for(self._call(context), request.model)
        await _send_label(context)
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


async def _send_label(context: Context) -> None:
    """Echo the client's x-request-id, which is a label and nothing else."""
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id":
            await context.send_initial_metadata((("x-request-id", printable_label(str(value))),))
            return
