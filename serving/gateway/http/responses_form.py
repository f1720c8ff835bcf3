"""/v1/responses: OpenAI's newer API, for text. Nothing is kept, so every request brings its whole conversation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from model_parallel.engine.request import FinishReason
from serving.contracts.models import ModelCard
from serving.gateway.core.choices import Chunk, Summary
from serving.gateway.core.error_responses import ErrorResponse
from serving.gateway.core.fields import NO_TOOLS, UNSUPPORTED, Unsupported
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.validate import ChatPrompt, GenerateQuery, normalised
from serving.gateway.http.body import Body
from serving.gateway.http.forms import TextFormat, TextOptions
from serving.gateway.http.responses import to_json
from serving.gateway.http.resuming import Event, Place
from serving.gateway.http.schemas import Message, StreamOptions
from serving.text.chat import ChatMessage

_WHOLE_INPUT = Unsupported(instead="send the whole conversation as input")
_UNSUPPORTED = {
    **UNSUPPORTED,
    **NO_TOOLS,
    "background": Unsupported(),
    "conversation": _WHOLE_INPUT,
    "include": Unsupported(),
    "logprobs": Unsupported(instead="ask /v1/chat/completions"),
    "max_completion_tokens": Unsupported(neutral=(-1,), instead="send max_output_tokens"),
    "max_tokens": Unsupported(neutral=(-1,), instead="send max_output_tokens"),
    "messages": Unsupported(instead="send input"),
    "n": Unsupported(neutral=(1,), instead="ask /v1/chat/completions"),
    "previous_response_id": _WHOLE_INPUT,
    "prompt": _WHOLE_INPUT,
    **{
        name: Unsupported(instead="send text.format")
        for name in ("guided_json", "response_format", "structured_outputs")
    },
    "top_logprobs": Unsupported(neutral=(0,), instead="ask /v1/chat/completions"),
    "truncation": Unsupported(neutral=("disabled",), instead="shorten the input"),
}


class ResponsesRequest(Body, frozen=True, kw_only=True):
    """A text or a conversation to answer. `instructions` are put before a system message of `input`."""

    model: str | None = None
    input: str | list[Message] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    text: TextOptions | None = None
    """The form of the answer."""
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None

    field_names: ClassVar[dict[str, str]] = {
        "prompt": "input", "messages": "input", "max_tokens": "max_output_tokens",
    }  # fmt: skip

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return _UNSUPPORTED

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        return normalised(
            GenerateQuery(
                model=self.model or "",
                prompt=None if self.input is None else ChatPrompt(self._messages(self.input)),
                max_tokens=self.max_output_tokens,
                constraint=self._format.constraint("text.format"),
                **{field: getattr(self, field) for field in _SAME_NAME},
            )
        )

    @property
    def _format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    @property
    def text_options(self) -> dict[str, Any]:
        """As the answer tells them."""
        form = self._format
        told: dict[str, Any] = {"type": form.type}
        if form.type == "json_schema":
            told |= {
                "name": form.name or "",
                "schema": form.schema,
                "strict": form.strict,
                "description": form.description,
            }
        return {"format": told}

    def _messages(self, given: str | list[Message]) -> tuple[ChatMessage, ...]:
        if isinstance(given, str):
            messages = [ChatMessage("user", given)]
        else:
            messages = [message.plain(f"input[{index}]") for index, message in enumerate(given)]
        if self.instructions and messages:
            if messages[0].role in ("system", "developer"):
                messages[0] = replace(messages[0], content=f"{self.instructions}\n\n{messages[0].content}")
            else:
                messages.insert(0, ChatMessage("system", self.instructions))
        return tuple(messages)


_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Part of the input's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Part of the output's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[None] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why the answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/responses, or its state in an event."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[None] = []
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One event of a streamed /v1/responses. What a type does not have is left out."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputMessage | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[None] | UnsetType = UNSET


class ResponsesForm:
    """One answer on its way out."""

    def __init__(self, stream: Stream, card: ModelCard, request: ResponsesRequest) -> None:
        self._id, self._item_id = f"resp_{stream.billed_id}", f"msg_{stream.billed_id}"
        self._created = stream.created_unix_s
        self._model = card.name
        self._request = request
        self._has_begun = False
        self._text: list[str] = []
        self._reason: FinishReason | None = None

    def whole(self, chunks: Sequence[Chunk]) -> ResponseObject:
        for chunk in chunks:
            self._take(chunk)
        return self._ended(chunks[-1].summary)

    def events(self, chunk: Chunk) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun = True
            yield from _ranked(0, 0, self._first_events())
        self._take(chunk)
        if chunk.text:
            delta = _event("response.output_text.delta", delta=chunk.text, logprobs=[], **self._place())
            yield Event(0, Place(chunk.num_tokens, _DELTA), delta)

    def last_events(self, summary: Summary) -> Iterator[Event]:
        return _ranked(summary.num_completion_tokens, _DELTA + 1, self._done_events(summary))

    def _first_events(self) -> Iterator[ResponseEvent]:
        yield _event("response.created", response=self._response("in_progress", []))
        yield _event("response.in_progress", response=self._response("in_progress", []))
        yield _event("response.output_item.added", item=self._message("in_progress", []), output_index=0)
        yield _event("response.content_part.added", part=OutputText(text=""), **self._place())

    def _done_events(self, summary: Summary) -> Iterator[ResponseEvent]:
        text = "".join(self._text)
        ended = self._ended(summary)
        yield _event("response.output_text.done", text=text, logprobs=[], **self._place())
        yield _event("response.content_part.done", part=OutputText(text=text), **self._place())
        yield _event("response.output_item.done", item=ended.output[0], output_index=0)
        yield _event(f"response.{ended.status}", response=ended)

    @staticmethod
    def encode(event: msgspec.Struct, number: int) -> bytes:
        numbered = msgspec.structs.replace(event, sequence_number=number)
        return _named(numbered.type, numbered)  # type: ignore[attr-defined]

    def _take(self, chunk: Chunk) -> None:
        self._text.append(chunk.text)
        self._reason = chunk.finish_reason or self._reason

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _message(self, status: str, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(id=self._item_id, status=status, content=content)

    def _ended(self, summary: Summary | None) -> ResponseObject:
        if summary is None:
            raise RuntimeError("the last chunk has no summary")
        status = "incomplete" if self._reason is FinishReason.LENGTH else "completed"
        message = self._message(status, [OutputText(text="".join(self._text))])
        usage = ResponseUsage(
            input_tokens=summary.num_prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=min(summary.num_cached_tokens, summary.num_prompt_tokens)),
            output_tokens=summary.num_completion_tokens,
            total_tokens=summary.num_prompt_tokens + summary.num_completion_tokens,
        )
        return self._response(status, [message], usage)

    def _response(self, status: str, output: list[OutputMessage], usage: ResponseUsage | None = None) -> ResponseObject:
        request = self._request
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self._model,
            output=output,
            temperature=1.0 if request.temperature is None else request.temperature,
            text=request.text_options,
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=usage,
        )


_DELTA = 4
"""Rank of an event with text: behind those that begin the answer."""


def _event(kind: str, **fields: Any) -> ResponseEvent:
    """Numbered when it is encoded."""
    return ResponseEvent(type=kind, sequence_number=0, **fields)


def _ranked(num_tokens: int, first_rank: int, events: Iterator[ResponseEvent]) -> Iterator[Event]:
    for rank, data in enumerate(events, first_rank):
        yield Event(0, Place(num_tokens, rank), data)


def response_error_event(error: ErrorResponse) -> bytes:
    """The error as the end of a stream that has begun."""
    data = {
        "type": "error", "code": error.status.error_code, "message": error.message, "param": error.field or None,
        "sequence_number": 0,
    }  # fmt: skip
    return _named("error", data)


def _named(kind: str, data: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + to_json(data) + b"\n\n"
