"""What each path does: a request to a query, the Generator's work, and its result in OpenAI's form."""

import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from itertools import chain

import msgspec
from starlette.responses import HTMLResponse, Response

from serving import __version__
from serving.contracts.errors import ValidationError
from serving.gateway.core.choices import Chunk
from serving.gateway.core.generation import Generator
from serving.gateway.core.health import HealthMonitor
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.validate import GenerateQuery, TextPrompt
from serving.gateway.http.answers import AnswerForm, ChatForm, CompletionForm, identity, model
from serving.gateway.http.objects import DetokenizeAnswer, ModelList, TokenizeAnswer, TokenizerInfo, Version
from serving.gateway.http.openapi import document, page
from serving.gateway.http.requests import Request
from serving.gateway.http.responses import DONE, EventStream, json_answer
from serving.gateway.http.responses_form import ResponsesForm, ResponsesRequest
from serving.gateway.http.resuming import LAST_EVENT_HEADER, EventIds
from serving.gateway.http.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

Handler = Callable[[Request], Awaitable[Response]]
AnsweredBody = ChatRequest | CompletionRequest | ResponsesRequest

MODELS = "/v1/models/"
RESPONSES = "/v1/responses"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health", "/ping"})
"""All others need credentials."""
METERED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", RESPONSES})
"""What they use counts against quotas."""

PATHS = (
    "/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/models", MODELS, "/tokenize", "/detokenize", "/tokenizer_info",
    "/version", "/openapi.json", "/docs", *OPEN_PATHS,
)  # fmt: skip


class Endpoints:
    """The endpoints of one gateway."""

    def __init__(self, generator: Generator, health: HealthMonitor) -> None:
        self._generator = generator
        self._health = health
        self._started = int(time.time())
        self.routes: Sequence[tuple[str, Sequence[str], Handler]] = (
            ("/v1/chat/completions", ["POST"], self.chat_completions),
            ("/v1/completions", ["POST"], self.completions),
            (RESPONSES, ["POST"], self.responses),
            ("/v1/models", ["GET"], self.list_models),
            (MODELS, ["GET"], self.get_model),
            ("/tokenize", ["POST"], self.tokenize),
            ("/detokenize", ["POST"], self.detokenize),
            ("/tokenizer_info", ["GET"], self.tokenizer_info),
            ("/version", ["GET"], self.version),
            ("/healthz", ["GET"], self.healthz),
            ("/readyz", ["GET"], self.readyz),
            ("/health", ["GET"], self.readyz),  # vLLM's name, which load generators ask for
            ("/ping", ["GET", "POST"], self.readyz),  # SageMaker's
            ("/openapi.json", ["GET"], self.openapi),
            ("/docs", ["GET"], self.docs),
        )

    async def chat_completions(self, request: Request) -> Response:
        body = request.read(ChatRequest)
        query = body.query()
        card = self._generator.model_for(request.call, query.model)
        stream = self._begin(query, request, body)
        form = ChatForm(
            identity("chatcmpl", stream, card),
            self._generator.tokenizers[card.base],
            logprobs=query.logprobs is not None,
            stream_options=body.stream_options,
            tools=query.tools,
            has_form=query.constraint is not None,
        )
        return await self._generate(query, request, form, stream, body.stream, body.field_names)

    async def completions(self, request: Request) -> Response:
        body = request.read(CompletionRequest)
        query = body.query()
        card = self._generator.model_for(request.call, query.model)
        stream = self._begin(query, request, body)
        form = CompletionForm(
            identity("cmpl", stream, card),
            self._generator.tokenizers[card.base],
            num_choices=query.n or 1,
            echo=_texts(query) if body.echo else None,
            logprobs=query.logprobs is not None,
            stream_options=body.stream_options,
        )
        return await self._generate(query, request, form, stream, body.stream, {})

    async def responses(self, request: Request) -> Response:
        body = request.read(ResponsesRequest)
        query = body.query()
        card = self._generator.model_for(request.call, query.model)
        stream = self._begin(query, request, body)
        form = ResponsesForm(stream, card, body, tools=query.tools, has_form=query.constraint is not None)
        return await self._generate(query, request, form, stream, body.stream, body.field_names, end=b"")

    def _begin(self, query: GenerateQuery, request: Request, body: AnsweredBody) -> Stream:
        """Raises ValidationError for an event's id without a stream, and what `begin_stream` does."""
        if not body.stream:
            if request.resumed is not None:
                raise ValidationError(
                    LAST_EVENT_HEADER, f"{LAST_EVENT_HEADER} is set, and the request is not one for a stream"
                )
            return self._generator.begin(query, request.call)
        canonical = type(body).__name__.encode() + b"\0" + msgspec.json.encode(body, order="deterministic")
        resumed = request.resumed
        if resumed is None:
            return self._generator.begin_stream(query, request.call, canonical)
        return self._generator.begin_stream(
            query, request.call, canonical, resumed.token, resumed.delivered, LAST_EVENT_HEADER
        )

    async def _generate(
        self,
        query: GenerateQuery,
        request: Request,
        form: AnswerForm,
        stream: Stream,
        is_streamed: bool | None,
        names: Mapping[str, str],
        end: bytes = DONE,
    ) -> Response:
        headers = (("x-seed", str(stream.seed)),)
        if is_streamed:
            chunks = self._generator.generate(query, replace(request.call, is_streamed=True), stream)
            ids = EventIds(stream, request.has_event_ids, request.resumed)
            names = {**names, "resume_from.num_tokens": LAST_EVENT_HEADER}
            return EventStream(
                _events(chunks, form, ids, names),
                headers,
                num_events=lambda: ids.num_events,
                keep_alive_s=request.keep_alive_s,
                end=end,
            )
        with _called(names):
            async with aclosing(self._generator.generate(query, request.call, stream)) as chunks:
                return json_answer(form.whole([chunk async for chunk in chunks]), headers=headers)

    async def list_models(self, request: Request) -> Response:
        cards = self._generator.visible_models(request.call.principal)
        return json_answer(ModelList(data=[model(card, self._started) for card in cards]))

    async def get_model(self, request: Request) -> Response:
        card = self._generator.model_for(request.call, request.path_params["model"])
        return json_answer(model(card, self._started))

    async def tokenize(self, request: Request) -> Response:
        body = request.read(TokenizeRequest)
        with _called(body.field_names):
            token_ids = await self._generator.tokenize(body.query(), request.call)
        card = self._generator.model_for(request.call, body.model or "")
        return json_answer(
            TokenizeAnswer(count=len(token_ids), max_model_len=card.max_model_len, tokens=list(token_ids))
        )

    async def detokenize(self, request: Request) -> Response:
        body = request.read(DetokenizeRequest)
        with _called(body.field_names):
            return json_answer(
                DetokenizeAnswer(self._generator.detokenize(body.model or "", body.tokens, request.call))
            )

    async def tokenizer_info(self, request: Request) -> Response:
        card = self._generator.model_for(request.call, request.query_params.get("model", ""))
        tokenizer = self._generator.tokenizers[card.base]
        return json_answer(
            TokenizerInfo(
                bos_token=tokenizer.control_token_text(card.bos_token_id),
                eos_token=tokenizer.control_token_text(next(iter(card.eos_token_ids), None)),
                model_max_length=card.max_model_len,
                vocab_size=card.vocab_size,
            )
        )

    async def version(self, request: Request) -> Response:
        return json_answer(Version(__version__))

    async def healthz(self, request: Request) -> Response:
        return json_answer({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        if self._health.is_serving:
            return json_answer({"status": "ready"})
        return json_answer({"status": "not ready"}, 503, [("retry-after", "1")])

    async def openapi(self, request: Request) -> Response:
        return json_answer(document())

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(page())


async def _events(
    chunks: AsyncGenerator[Chunk, None], form: AnswerForm, ids: EventIds, names: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; those that are ready together come together."""
    with _called(names):
        async with aclosing(chunks):
            async for chunk in chunks:
                events = form.events(chunk)
                if chunk.summary is not None:
                    events = chain(events, form.last_events(chunk.summary))
                if part := b"".join(line + form.encode(data, number) for data, number, line in ids.new(events)):
                    yield part


def _texts(query: GenerateQuery) -> list[str | None]:
    """What the client sent as text, prompt by prompt; None for token ids."""
    prompts = query.prompt if isinstance(query.prompt, tuple) else (query.prompt,)
    return [prompt.text if isinstance(prompt, TextPrompt) else None for prompt in prompts]


@contextmanager
def _called(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name fields as this request calls them: the one at fault, and others where they say what these are or have."""
    try:
        yield
    except ValidationError as error:
        if not names:
            raise
        field, bracket, index = error.field.partition("[")
        told = rf"(?<![\w.])({'|'.join(map(re.escape, names))})(?=(?:\[\d+\])*(?:\.\w+)*(?::| is | has | holds | were | of ))"
        renamed = ValidationError(
            names.get(field, field) + bracket + index,
            re.sub(told, lambda found: names[found[1]], str(error)),
            is_too_long=error.is_too_long,
            max_tokens=error.max_tokens,
        )
        raise renamed from error
