"""/v1/responses: OpenAI's newer API, for text and calls of functions. Nothing is kept: every request brings all that was said."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from model_parallel.engine.request import FinishReason
from serving.contracts.errors import ValidationError
from serving.contracts.models import ModelCard
from serving.gateway.core.choices import Chunk, Summary
from serving.gateway.core.error_responses import ErrorResponse
from serving.gateway.core.fields import UNSUPPORTED, Unsupported
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.tools import (
    TOOL,
    CallDelta,
    CallReader,
    Tool,
    ToolCall,
    ToolUse,
    Turn,
    call_text,
    in_order_of_calls,
)
from serving.gateway.core.validate import ChatPrompt, GenerateQuery, normalised
from serving.gateway.http.body import Body
from serving.gateway.http.forms import TextFormat, TextOptions
from serving.gateway.http.responses import to_json
from serving.gateway.http.resuming import Event, Place
from serving.gateway.http.schemas import ContentPart, FunctionSpec, Message, NamedFunction, StreamOptions
from serving.text.chat import ChatMessage

ASSISTANT = "assistant"
_WHOLE_INPUT = Unsupported(instead="send the whole conversation as input")
_CHATS = Unsupported(instead="ask /v1/chat/completions")
_NEVER_THERE = frozenset(
    {
        "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
        "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
        "web_search_call.results",
    }
)  # fmt: skip
"""What `include` may ask for: parts of items that no answer of this server has."""
_UNSUPPORTED = {
    **UNSUPPORTED,
    "add_special_tokens": Unsupported(instead="leave that to the chat format"),
    "background": Unsupported(),
    "best_of": Unsupported(neutral=(1,), instead="ask /v1/chat/completions for n choices and pick one"),
    "continue_final_message": _CHATS,
    "conversation": _WHOLE_INPUT,
    "echo": Unsupported(instead="send a prompt to /v1/completions"),
    "ignore_eos": _CHATS,
    "logit_bias": _CHATS,
    "logprobs": _CHATS,
    "max_completion_tokens": Unsupported(neutral=(-1,), instead="send max_output_tokens"),
    "max_tokens": Unsupported(neutral=(-1,), instead="send max_output_tokens"),
    "max_tool_calls": Unsupported(instead="send parallel_tool_calls: false for one call"),
    "messages": Unsupported(instead="send input"),
    "n": Unsupported(neutral=(1,), instead="ask /v1/chat/completions"),
    "parse_special": Unsupported(instead="send a prompt to /v1/completions"),
    "previous_response_id": _WHOLE_INPUT,
    "prompt": _WHOLE_INPUT,
    "prompt_logprobs": Unsupported(instead="send a prompt to /v1/completions with echo: true and logprobs"),
    "guided_json": Unsupported(refused=({},), instead="send text.format"),
    "response_format": Unsupported(neutral=({"type": "text"},), instead="send text.format"),
    "structured_outputs": Unsupported(instead="send text.format"),
    **{
        name: Unsupported(instead="send structured_outputs to /v1/chat/completions")
        for name in ("guided_choice", "guided_grammar", "guided_regex", "guided_whitespace_pattern")
    },
    "skip_special_tokens": Unsupported(neutral=(True,), refused=(False,), instead="ask /v1/chat/completions"),
    "stop": _CHATS,
    "stop_token_ids": _CHATS,
    "top_logprobs": Unsupported(neutral=(0,), instead="ask /v1/chat/completions"),
    "truncation": Unsupported(neutral=("disabled",), instead="shorten the input"),
}


class InputItem(Message, frozen=True, kw_only=True):
    """A message; or a call that an answer held, or its result, which the user's side brings back."""

    role: str = ""
    type: Literal["text", "message", "function_call", "function_call_output", None] = None  # type: ignore[assignment]
    name: str | None = None
    """Of the function that was called."""
    arguments: str | None = None
    output: str | list[ContentPart | str] | None = None
    """What came of a call."""
    call_id: str | None = None
    """Of a call, or of the call whose result it is."""

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"output"})

    def plain(self, where: str) -> ChatMessage:
        """Raises ValidationError."""
        if self.type == "function_call":
            if self.name is None:
                raise ValidationError(f"{where}.name", f"{where}.name is missing")
            return ChatMessage(ASSISTANT, call_text(ToolCall(name=self.name, arguments=self.arguments or "{}")))
        if self.type == "function_call_output":
            if self.output is None:
                raise ValidationError(f"{where}.output", f"{where}.output is missing")
            return Message(role=TOOL, content=self.output).plain(where)
        if not self.role:
            raise ValidationError(f"{where}.role", f"{where}.role is missing")
        return super().plain(where)

    def turn(self, where: str) -> Turn:
        if self.type == "function_call":
            return Turn(message=self.plain(where), call_ids=(self.call_id,))
        if self.type == "function_call_output":
            return Turn(message=self.plain(where), result_of=self.call_id, field=f"{where}.call_id")
        return super().turn(where)


class ResponseTool(FunctionSpec, frozen=True, kw_only=True):
    """A function that may be called. Unlike a chat's it has its name beside its type."""

    type: Literal["function"] = "function"


class ResponseNamedTool(NamedFunction, frozen=True, kw_only=True):
    """The function that must be called."""

    type: Literal["function"] = "function"


class ResponsesRequest(Body, frozen=True, kw_only=True):
    """A text or a conversation to answer. `instructions` are put before a system message of `input`."""

    model: str | None = None
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    include: list[str] | None = None
    """Parts of items that no answer here has; others are refused."""
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    text: TextOptions | None = None
    """The form of the answer."""
    tools: list[ResponseTool] | None = None
    """Functions that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    """Unset is auto: the model decides. required: at least one; or the one that must be called."""
    parallel_tool_calls: bool | None = None
    """An answer may hold several calls. Unset is true."""
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

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"input"})

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        if self.input is None:
            raise ValidationError("input", "input is missing; give a text, or a list of messages")
        for index, name in enumerate(self.include or ()):
            if name not in _NEVER_THERE:
                where = f"include[{index}]"
                raise ValidationError(
                    where,
                    f"{where} is {name!r:.80}, which this server does not give here; leave it out"
                    + ("; instead, ask /v1/chat/completions for logprobs" if name.endswith(".logprobs") else ""),
                )
        return normalised(
            GenerateQuery(
                model=self.model or "",
                prompt=ChatPrompt(self._messages(self.input)),
                max_tokens=self.max_output_tokens,
                constraint=self._format.constraint("text.format"),
                tools=self._tool_use(),
                **{field: getattr(self, field) for field in _SAME_NAME},
            )
        )

    def _tool_use(self) -> ToolUse | None:
        if not self.tools and self.tool_choice in (None, "none", "auto"):
            return None
        tools = [
            Tool(
                name=tool.name,
                description=tool.description or "",
                parameters=tool.parameters,
                is_strict=bool(tool.strict or self.strict),
                field=f"tools[{index}]",
            )
            for index, tool in enumerate(self.tools or ())
        ]
        choice = self.tool_choice or "auto"
        is_named = isinstance(choice, ResponseNamedTool)
        return ToolUse(
            tools=tuple(tools),
            choice="required" if isinstance(choice, ResponseNamedTool) else choice,
            named=choice.name if isinstance(choice, ResponseNamedTool) else None,
            is_parallel=self.parallel_tool_calls is not False and not is_named,
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

    def _messages(self, given: str | list[InputItem]) -> tuple[ChatMessage, ...]:
        if isinstance(given, str):
            messages = [ChatMessage("user", given)]
        else:
            turns: list[list[Turn]] = []
            """An answer comes back as several items: its text and its calls."""
            for index, item in enumerate(given):
                turn = item.turn(f"input[{index}]")
                if item.type == "function_call" and turns and turns[-1][0].message.role == ASSISTANT:
                    turns[-1].append(turn)
                else:
                    turns.append([turn])
            messages = in_order_of_calls(map(_joined, turns))
        if self.instructions and messages:
            if messages[0].role in ("system", "developer"):
                messages[0] = replace(messages[0], content=f"{self.instructions}\n\n{messages[0].content}")
            else:
                messages.insert(0, ChatMessage("system", self.instructions))
        return tuple(messages)


def _joined(turns: Sequence[Turn]) -> Turn:
    """One answer of several items."""
    if len(turns) == 1:
        return turns[0]
    content = "\n".join(turn.message.content for turn in turns if turn.message.content)
    call_ids = tuple([call_id for turn in turns for call_id in turn.call_ids])
    return Turn(message=ChatMessage(ASSISTANT, content), call_ids=call_ids)


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


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """The answer."""

    id: str
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


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
    output: list[OutputMessage | FunctionCallItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | ResponseNamedTool
    tools: list[ResponseTool]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One event of a streamed /v1/responses. What a type does not have is left out."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputMessage | FunctionCallItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[None] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


@dataclass(slots=True)
class _Call:
    """A call of the answer until now."""

    name: str
    arguments: str = ""


class ResponsesForm:
    """One answer on its way out: a message, then calls. There is no message where the answer calls and says nothing."""

    def __init__(
        self,
        stream: Stream,
        card: ModelCard,
        request: ResponsesRequest,
        *,
        tools: ToolUse | None = None,
        has_form: bool = False,
    ) -> None:
        """Answers are read for calls where `tools` may be called; with `has_form` one that does not call has a form."""
        self._billed_id = stream.billed_id
        self._id, self._item_id = f"resp_{stream.billed_id}", f"msg_{stream.billed_id}"
        self._created = stream.created_unix_s
        self._model = card.name
        self._default_sampling = card.default_sampling
        self._request = request
        self._has_begun = False
        self._text: list[str] = []
        self._reason: FinishReason | None = None
        self._reader = CallReader(has_form=has_form) if tools is not None and tools.is_used else None
        self._calls: list[_Call] = []
        self._num_chars = 0
        """Of the text, calls included, until now."""
        self._has_message = self._reader is None
        """Otherwise it begins with the first text."""

    def whole(self, chunks: Sequence[Chunk]) -> ResponseObject:
        for chunk in chunks:
            for _ in self._take(chunk):
                pass
        return self._ended(chunks[-1].summary)

    def events(self, chunk: Chunk) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun = True
            for rank, event in enumerate(self._first_events()):
                yield Event(0, Place(0, rank), event)
        for place, event in self._take(chunk):
            yield Event(0, place, event)

    def last_events(self, summary: Summary) -> Iterator[Event]:
        ended = self._ended(summary)
        events = [*self._close_message(is_last=True), *self._close_call(is_last=True)]
        if not (self._has_message or self._calls):  # said nothing at all
            self._has_message = True
            events = [*self._open_message(), *self._close_message(is_last=True)]
        for rank, event in (*events, (_LAST, _event(f"response.{ended.status}", response=ended))):
            yield Event(0, Place(summary.num_completion_tokens, rank), event)

    def _first_events(self) -> Iterator[ResponseEvent]:
        yield _event("response.created", response=self._response("in_progress", []))
        yield _event("response.in_progress", response=self._response("in_progress", []))
        if self._has_message:
            yield from (event for _, event in self._open_message())

    # The places of events that begin or end something depend on the tokens alone, and not on how they came together. Pieces of
    # text or arguments that do are one event, with the place of the last token; none reaches across such an event.

    def _take(self, chunk: Chunk) -> Iterator[tuple[Place, ResponseEvent]]:
        """What a chunk adds."""
        self._reason = chunk.finish_reason or self._reason
        pending: tuple[Place, ResponseEvent] | None = None
        for num_tokens, piece in self._pieces(chunk):
            for rank, event in self._read(piece, is_last=num_tokens == chunk.num_tokens):
                place = Place(num_tokens, rank)
                if pending is not None and event.type == pending[1].type and event.item_id == pending[1].item_id:
                    delta = f"{pending[1].delta}{event.delta}"
                    pending = place, msgspec.structs.replace(event, delta=delta)
                    continue
                if pending is not None:
                    yield pending
                pending = None
                if event.delta is UNSET:
                    yield place, event
                else:
                    pending = place, event
        if pending is not None:
            yield pending

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[int, str]]:
        """(tokens until then, text) of each token, where calls are looked for; otherwise of all together."""
        first = chunk.num_tokens - len(chunk.offsets)
        begin, self._num_chars = self._num_chars, self._num_chars + len(chunk.text)
        if self._reader is None or len(chunk.offsets) < 2:
            yield chunk.num_tokens, chunk.text
            return
        at = 0
        for number, offset in enumerate((*chunk.offsets[1:], self._num_chars), 1):
            end = max(at, min(offset - begin, len(chunk.text)))
            yield first + number, chunk.text[at:end]
            at = end

    def _read(self, piece: str, *, is_last: bool) -> Iterator[tuple[int, ResponseEvent]]:
        """What a piece adds, with ranks."""
        text = piece
        deltas: list[CallDelta] = []
        if self._reader is not None:
            text, deltas = self._reader.push(piece)
            text += self._reader.flush() if is_last and self._reason is not None else ""
        if text:
            if not self._has_message:
                self._has_message = True
                yield from self._open_message()
            self._text.append(text)
            yield _DELTA, _event("response.output_text.delta", delta=text, logprobs=[], **self._place())
        for delta in deltas:
            if delta.name is not None:
                yield from self._close_message()
                yield from self._close_call()
                self._calls.append(_Call(delta.name))
                yield self._rank(_ADDED), _event("response.output_item.added", **self._item("in_progress"))
            if delta.arguments:
                self._calls[-1].arguments += delta.arguments
                place = {"item_id": self._call_item(-1, "").id, "output_index": self._output_index}
                event = _event("response.function_call_arguments.delta", delta=delta.arguments, **place)
                yield self._rank(_DELTA), event

    def _open_message(self) -> Iterator[tuple[int, ResponseEvent]]:
        yield _ADDED, _event("response.output_item.added", item=self._message("in_progress", []), output_index=0)
        yield _ADDED + 1, _event("response.content_part.added", part=OutputText(text=""), **self._place())

    def _close_message(self, *, is_last: bool = False) -> Iterator[tuple[int, ResponseEvent]]:
        """If it is open: behind it come calls, or nothing."""
        if not self._has_message or self._calls:
            return
        part = OutputText(text="".join(self._text))
        yield _DONE, _event("response.output_text.done", text=part.text, logprobs=[], **self._place())
        yield _DONE + 1, _event("response.content_part.done", part=part, **self._place())
        item = self._message(self._status if is_last else "completed", [part])
        yield _DONE + 2, _event("response.output_item.done", item=item, output_index=0)

    def _close_call(self, *, is_last: bool = False) -> Iterator[tuple[int, ResponseEvent]]:
        """The last one, if there is one."""
        if not self._calls:
            return
        item = self._item(self._status if is_last else "completed")
        call: FunctionCallItem = item["item"]
        place = {"item_id": call.id, "output_index": self._output_index}
        done = _event("response.function_call_arguments.done", name=call.name, arguments=call.arguments, **place)
        yield self._rank(_DONE), done
        yield self._rank(_DONE + 1), _event("response.output_item.done", **item)

    @property
    def _output_index(self) -> int:
        """Of the last call."""
        return len(self._calls) - 1 + self._has_message

    def _rank(self, kind: int) -> int:
        """Of an event of the last call. The message counts even where there is none."""
        return _ITEM * len(self._calls) + kind

    def _item(self, status: str) -> dict[str, Any]:
        """The last call, and its place."""
        return {"item": self._call_item(-1, status), "output_index": self._output_index}

    def _call_item(self, number: int, status: str) -> FunctionCallItem:
        number %= len(self._calls)
        call = self._calls[number]
        return FunctionCallItem(
            id=f"fc_{self._billed_id}_{number}",
            call_id=f"call_{self._billed_id}_{number}",
            status=status,
            name=call.name,
            arguments=call.arguments,
        )

    @staticmethod
    def encode(event: msgspec.Struct, number: int) -> bytes:
        numbered = msgspec.structs.replace(event, sequence_number=number)
        return _named(numbered.type, numbered)  # type: ignore[attr-defined]

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _message(self, status: str, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(id=self._item_id, status=status, content=content)

    def _ended(self, summary: Summary | None) -> ResponseObject:
        if summary is None:
            raise RuntimeError("the last chunk has no summary")
        status, last = self._status, len(self._calls) - 1
        output: list[OutputMessage | FunctionCallItem] = []
        if self._has_message or not self._calls:
            message_status = "completed" if self._calls else status
            output.append(self._message(message_status, [OutputText(text="".join(self._text))]))
        output += [self._call_item(n, status if n == last else "completed") for n in range(len(self._calls))]
        usage = ResponseUsage(
            input_tokens=summary.num_prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=summary.num_cached_tokens),
            output_tokens=summary.num_completion_tokens,
            total_tokens=summary.num_prompt_tokens + summary.num_completion_tokens,
        )
        return self._response(status, output, usage)

    def _response(
        self, status: str, output: list[OutputMessage | FunctionCallItem], usage: ResponseUsage | None = None
    ) -> ResponseObject:
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
            parallel_tool_calls=request.parallel_tool_calls is not False,
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            temperature=self._used("temperature"),
            text=request.text_options,
            top_p=self._used("top_p"),
            usage=usage,
        )

    def _used(self, field: str) -> float:
        """The request's value, or the model's own."""
        given: float | None = getattr(self._request, field)
        return self._default_sampling.get(field, 1.0) if given is None else given


_ITEM = 8
"""Ranks of an item: those of the message begin with 0, those of calls follow."""
_ADDED, _DELTA, _DONE = 2, 4, 5
"""Of an item's events, among its ranks. The message's two first ones have those of the two that it makes at the beginning."""
_LAST = 1 << 16


def _event(kind: str, **fields: Any) -> ResponseEvent:
    """Numbered when it is encoded."""
    return ResponseEvent(type=kind, sequence_number=0, **fields)


def response_error_event(error: ErrorResponse, number: int) -> bytes:
    """The error as the end of a stream that has begun."""
    data = {
        "type": "error", "code": error.status.error_code, "message": error.message, "param": error.field or None,
        "sequence_number": number,
    }  # fmt: skip
    return _named("error", data)


def _named(kind: str, data: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + to_json(data) + b"\n\n"
