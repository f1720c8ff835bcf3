"""What each path does: a request to a query, the Generator's work, and its result in OpenAI's form."""

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace

from serving.contracts.errors import ValidationError
from serving.gateway.core.call import Call
from serving.gateway.core.choices import Chunk
from serving.gateway.core.generation import Generator
from serving.gateway.core.health import HealthMonitor
from serving.gateway.core.validate import GenerateQuery, TextPrompt
from serving.gateway.http.answers import AnswerForm, ChatForm, CompletionForm, identity, model
from serving.gateway.http.exchange import Answer, EventStream, Request, event
from serving.gateway.http.objects import DetokenizeAnswer, ModelList, TokenizeAnswer
from serving.gateway.http.openapi import document, page
from serving.gateway.http.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

Endpoint = Callable[[Request], Awaitable[Answer | EventStream]]

MODELS = "/v1/models/"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health"})
"""All others need credentials."""
METERED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""What they use counts against quotas."""

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", MODELS, "/tokenize", "/detokenize", "/openapi.json", "/docs",
    *OPEN_PATHS,
)  # fmt: skip


class Endpoints:
    """The endpoints of one gateway."""

    def __init__(self, generator: Generator, health: HealthMonitor) -> None:
        self._generator = generator
        self._health = health
        self._started = int(time.time())
        self.routes: Mapping[str, Mapping[str, Endpoint]] = {
            "/v1/chat/completions": {"POST": self.chat_completions},
            "/v1/completions": {"POST": self.completions},
            "/v1/models": {"GET": self.list_models},
            MODELS: {"GET": self.get_model},
            "/tokenize": {"POST": self.tokenize},
            "/detokenize": {"POST": self.detokenize},
            "/healthz": {"GET": self.healthz},
            "/readyz": {"GET": self.readyz},
            "/health": {"GET": self.readyz},  # vLLM's name, which load generators ask for
            "/openapi.json": {"GET": self.openapi},
            "/docs": {"GET": self.docs},
        }

    async def chat_completions(self, request: Request) -> Answer | EventStream:
        body = ChatRequest.from_json(request.body)
        query = body.query()
        card = self._generator.model_for(request.call, query.model)
        form = ChatForm(
            identity(f"chatcmpl-{request.call.request_id}", card),
            self._generator.tokenizers[card.name],
            logprobs=query.logprobs is not None,
            stream_options=body.stream_options,
        )
        return await self._generate(query, request.call, form, body, body.field_names)

    async def completions(self, request: Request) -> Answer | EventStream:
        body = CompletionRequest.from_json(request.body)
        query = body.query()
        card = self._generator.model_for(request.call, query.model)
        form = CompletionForm(
            identity(f"cmpl-{request.call.request_id}", card),
            self._generator.tokenizers[card.name],
            num_choices=query.n or 1,
            echo=_texts(query) if body.echo else None,
            logprobs=query.logprobs is not None,
            stream_options=body.stream_options,
        )
        return await self._generate(query, request.call, form, body, {})

    async def _generate(
        self,
        query: GenerateQuery,
        call: Call,
        form: AnswerForm,
        body: ChatRequest | CompletionRequest,
        names: Mapping[str, str],
    ) -> Answer | EventStream:
        seed = secrets.randbits(64) if query.seed is None else query.seed
        headers = (("x-seed", str(seed)),)
        if body.stream:
            chunks = self._generator.generate(query, replace(call, is_streamed=True), seed)
            return EventStream(_events(chunks, form, names), headers)
        with _called(names):
            async with aclosing(self._generator.generate(query, call, seed)) as chunks:
                return Answer(form.whole([chunk async for chunk in chunks]), headers=headers)

    async def list_models(self, request: Request) -> Answer:
        cards = self._generator.visible_models(request.call.principal)
        return Answer(ModelList(data=[model(card, self._started) for card in cards]))

    async def get_model(self, request: Request) -> Answer:
        card = self._generator.model_for(request.call, request.path.removeprefix(MODELS))
        return Answer(model(card, self._started))

    async def tokenize(self, request: Request) -> Answer:
        body = TokenizeRequest.from_json(request.body)
        with _called(body.field_names):
            token_ids = await self._generator.tokenize(body.query(), request.call)
        card = self._generator.models[body.model]
        return Answer(TokenizeAnswer(count=len(token_ids), max_model_len=card.max_model_len, tokens=list(token_ids)))

    async def detokenize(self, request: Request) -> Answer:
        body = DetokenizeRequest.from_json(request.body)
        with _called(body.field_names):
            return Answer(DetokenizeAnswer(self._generator.detokenize(body.model, body.tokens, request.call)))

    async def healthz(self, request: Request) -> Answer:
        return Answer({"status": "ok"})

    async def readyz(self, request: Request) -> Answer:
        if self._health.is_serving:
            return Answer({"status": "ready"})
        return Answer({"status": "not ready"}, 503, [("retry-after", "1")])

    async def openapi(self, request: Request) -> Answer:
        return Answer(document())

    async def docs(self, request: Request) -> Answer:
        return Answer(page(), media_type="text/html; charset=utf-8")


async def _events(
    chunks: AsyncGenerator[Chunk, None], form: AnswerForm, names: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; those that are ready together come together."""
    with _called(names):
        async with aclosing(chunks):
            async for chunk in chunks:
                part = b"".join(map(event, form.events(chunk)))
                if chunk.summary is not None:
                    part += b"".join(map(event, form.last_events(chunk.summary)))
                if part:
                    yield part


def _texts(query: GenerateQuery) -> list[str | None]:
    """What the client sent as text, prompt by prompt; None for token ids."""
    prompts = query.prompt if isinstance(query.prompt, tuple) else (query.prompt,)
    return [prompt.text if isinstance(prompt, TextPrompt) else None for prompt in prompts]


@contextmanager
def _called(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the field as this request calls it."""
    try:
        yield
    except ValidationError as error:
        field, bracket, index = error.field.partition("[")
        if field not in names:
            raise
        message = str(error).replace(field, names[field], 1)
        renamed = ValidationError(names[field] + bracket + index, message, is_too_long=error.is_too_long)
        raise renamed from error
