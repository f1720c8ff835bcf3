"""Chunks of an answer in OpenAI's forms: a whole object, or the events of a stream."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol, TypedDict

import msgspec
from msgspec import UNSET, UnsetType

from model_parallel.engine.request import FinishReason, TokenLogprobs
from serving.contracts.models import ModelCard
from serving.gateway.core.choices import Chunk, Summary
from serving.gateway.core.resume_tokens import Stream
from serving.gateway.core.tools import CallDelta, CallReader, ToolUse
from serving.gateway.http.objects import (
    CachedTokens,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatTopLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Model,
    ModelPermission,
    PredictedTokens,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from serving.gateway.http.responses import event
from serving.gateway.http.resuming import Event, Place
from serving.gateway.http.schemas import StreamOptions
from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.tokenizer import Tokenizer


class Identity(TypedDict):
    """What all objects of one answer have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def identity(kind: str, stream: Stream, card: ModelCard) -> Identity:
    """The same whichever gateways send the answer."""
    return Identity(
        id=f"{kind}-{stream.billed_id}",
        created=stream.created_unix_s,
        model=card.name,
        system_fingerprint=system_fingerprint(card),
    )


class AnswerForm(Protocol):
    """One answer on its way out: either `whole`, or `events` for each chunk and then `last_events`."""

    def whole(self, chunks: Sequence[Chunk]) -> msgspec.Struct:
        """All chunks together."""
        ...

    def events(self, chunk: Chunk) -> Iterator[Event]:
        """What goes out for a chunk; nothing for one that brings nothing to see."""
        ...

    def last_events(self, summary: Summary) -> Iterator[Event]:
        """What goes out at the end: token counts without choices, if they are wanted."""
        ...

    def encode(self, event: msgspec.Struct, number: int) -> bytes:
        """An event on the wire, without its id; the `number` is its place in the whole stream."""
        ...


_ROLE, _CONTENT, _FINISH, _USAGE = range(4)
"""Ranks of events that are at the same token."""


def _unnumbered(data: msgspec.Struct, number: int) -> bytes:
    return event(data)


class CompletionForm:
    """Of /v1/completions."""

    encode = staticmethod(_unnumbered)

    def __init__(
        self,
        identity: Identity,
        tokenizer: Tokenizer,
        *,
        num_choices: int,
        echo: Sequence[str | None] | None,
        logprobs: bool,
        stream_options: StreamOptions | None,
    ) -> None:
        """`num_choices` of each prompt. `echo` has the prompts' texts, None for one given as token ids."""
        self._identity = identity
        self._tokenizer = tokenizer
        self._num_choices = num_choices
        self._echo = echo
        self._logprobs = logprobs
        self._usage = _StreamUsage(stream_options)
        self._num_first_tokens = 0
        """Of the first choice, until now."""
        self._echoed: dict[int, int] = {}
        """Length of the prompt's text before the answer, of each choice that has begun."""
        self._prompt_logprobs: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
        self._held: defaultdict[int, list[Chunk]] = defaultdict(list)
        """Chunks that wait until all of their prompt's log-probabilities are there."""

    def whole(self, chunks: Sequence[Chunk]) -> Completion:
        by_choice: defaultdict[int, list[CompletionChoice]] = defaultdict(list)
        for chunk in chunks:
            for _, choice in self._choices(chunk):
                by_choice[choice.index].append(choice)
        choices = [_joined(parts) for _, parts in sorted(by_choice.items())]
        return Completion(**self._identity, choices=choices, usage=_usage(chunks[-1].summary))

    def events(self, chunk: Chunk) -> Iterator[Event]:
        usage = self._usage.take(chunk)
        if chunk.index == 0:
            self._num_first_tokens = chunk.num_tokens
        for num_tokens, choice in self._choices(chunk):
            if choice.text or choice.finish_reason or choice.logprobs:
                place = Place(num_tokens, _FINISH if choice.finish_reason else _CONTENT)
                yield Event(choice.index, place, Completion(**self._identity, choices=[choice], usage=usage))

    def last_events(self, summary: Summary) -> Iterator[Event]:
        if self._usage.include:
            data = Completion(**self._identity, choices=[], usage=_usage(summary))
            yield Event(0, Place(self._num_first_tokens, _USAGE), data)

    def _choices(self, chunk: Chunk) -> Iterator[tuple[int, CompletionChoice]]:
        """(tokens of the choice until then, what the chunk brings)."""
        prompt = chunk.index // self._num_choices
        ready = [chunk]
        if self._echo is not None and self._logprobs:
            known = self._prompt_logprobs[prompt]
            known += chunk.prompt_logprobs
            self._held[prompt].append(chunk)
            if len(known) < len(chunk.prompt_token_ids) - 1:
                return
            ready = self._held.pop(prompt)
        for each in ready:
            yield each.num_tokens, self._choice(each, prompt)

    def _choice(self, chunk: Chunk, prompt: int) -> CompletionChoice:
        text, logprobs = chunk.text, list(chunk.logprobs)
        is_first = chunk.index not in self._echoed
        prompt_offsets: list[int] = []
        num_unscored = 0
        if is_first and self._echo is not None:
            given = self._echo[prompt]
            echoed = self._tokenizer.decode(chunk.prompt_token_ids) if given is None else given
            text = echoed + text
            self._echoed[chunk.index] = len(echoed)
            if self._logprobs:
                first = TokenLogprobs(chunk.prompt_token_ids[0], 0.0)
                logprobs = [first, *self._prompt_logprobs[prompt], *logprobs]
                prompt_offsets = _offsets(chunk.prompt_token_ids, self._tokenizer, len(echoed))
                num_unscored = 1
        num_echoed = self._echoed.setdefault(chunk.index, 0)
        reported = None
        if self._logprobs and logprobs:
            offsets = [*prompt_offsets, *(num_echoed + offset for offset in chunk.offsets)]
            reported = _completion_logprobs(logprobs, num_unscored, self._tokenizer, offsets)
        reason = None if chunk.finish_reason is None else chunk.finish_reason.value
        return CompletionChoice(index=chunk.index, text=text, logprobs=reported, finish_reason=reason)


class ChatForm:
    """Of /v1/chat/completions."""

    encode = staticmethod(_unnumbered)

    def __init__(
        self,
        identity: Identity,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        stream_options: StreamOptions | None,
        tools: ToolUse | None = None,
        has_form: bool = False,
    ) -> None:
        """Answers are read for calls where `tools` may be called; with `has_form` one that does not call has a form."""
        self._identity = identity
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = _StreamUsage(stream_options)
        self._num_first_tokens = 0
        """Of the first choice, until now."""
        self._begun: set[int] = set()
        self._tools = tools if tools is not None and tools.is_used else None
        self._readers: defaultdict[int, CallReader] = defaultdict(partial(CallReader, has_form=has_form))
        """By choice."""

    def whole(self, chunks: Sequence[Chunk]) -> ChatCompletion:
        by_choice: defaultdict[int, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            by_choice[chunk.index].append(chunk)
        choices = [
            ChatChoice(
                index=index,
                message=self._message(index, "".join(part.text for part in parts)),
                logprobs=self._chat_logprobs([token for part in parts for token in part.logprobs]),
                finish_reason=self._finish_reason(index, parts[-1].finish_reason),
            )
            for index, parts in sorted(by_choice.items())
        ]
        return ChatCompletion(**self._identity, choices=choices, usage=_usage(chunks[-1].summary))

    def events(self, chunk: Chunk) -> Iterator[Event]:
        usage = self._usage.take(chunk)
        if chunk.index == 0:
            self._num_first_tokens = chunk.num_tokens
        for place, choice in self._choices(chunk):
            yield Event(chunk.index, place, ChatChunk(**self._identity, choices=[choice], usage=usage))

    def last_events(self, summary: Summary) -> Iterator[Event]:
        if self._usage.include:
            data = ChatChunk(**self._identity, choices=[], usage=_usage(summary))
            yield Event(0, Place(self._num_first_tokens, _USAGE), data)

    def _choices(self, chunk: Chunk) -> Iterator[tuple[Place, ChatChunkChoice]]:
        index, num_tokens = chunk.index, chunk.num_tokens
        if index not in self._begun:
            self._begun.add(index)
            yield Place(0, _ROLE), ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
        text, calls = chunk.text, []
        if self._tools is not None:  # what is certain depends on the text until now alone, and not on how it was cut
            reader = self._readers[index]
            text, deltas = reader.push(chunk.text)
            # One entry for each call: clients take two of an event for two calls, whatever their index.
            together = groupby(deltas, key=lambda delta: delta.index)
            calls = [self._call_delta(index, number, [*of_call]) for number, of_call in together]
            text += reader.flush() if chunk.finish_reason is not None else ""
        if text or calls or (self._logprobs and chunk.logprobs):
            delta = ChatDelta(content=text if text or not calls else UNSET, tool_calls=calls or UNSET)
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=self._chat_logprobs(chunk.logprobs))
            yield Place(num_tokens, _CONTENT), choice
        if chunk.finish_reason is not None:
            reason = self._finish_reason(index, chunk.finish_reason)
            yield Place(num_tokens, _FINISH), ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason)

    def _message(self, index: int, text: str) -> ChatMessage:
        if self._tools is None:
            return ChatMessage(text)
        reader = self._readers[index]
        said, deltas = reader.push(text)
        said += reader.flush()
        if not reader.num_calls:
            return ChatMessage(said)
        names = [delta.name for delta in deltas if delta.name is not None]
        calls = [
            ToolCall(
                id=self._call_id(index, number),
                function=CalledFunction(
                    name=name, arguments="".join(delta.arguments for delta in deltas if delta.index == number)
                ),
            )
            for number, name in enumerate(names)
        ]
        return ChatMessage(said or None, tool_calls=calls)

    def _call_delta(self, index: int, number: int, deltas: Sequence[CallDelta]) -> ToolCallDelta:
        arguments = "".join(delta.arguments for delta in deltas)
        name = deltas[0].name
        if name is None:
            return ToolCallDelta(index=number, function=CalledFunction(arguments=arguments))
        return ToolCallDelta(
            index=number,
            id=self._call_id(index, number),
            type="function",
            function=CalledFunction(name=name, arguments=arguments),
        )

    def _call_id(self, index: int, number: int) -> str:
        return f"call_{self._identity['id'].removeprefix('chatcmpl-')}_{index}_{number}"

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        """As OpenAI has it: an answer that calls ends with tool_calls, but with stop where the function was named. So does
        one that a stop text or token cuts within a call: its arguments are no JSON, and nobody should act on them."""
        if reason is None:
            return None
        if self._tools is None or self._tools.named is not None or reason is not FinishReason.STOP:
            return reason.value
        reader = self._readers[index]
        return "tool_calls" if reader.num_calls and not reader.is_within_arguments else reason.value

    def _chat_logprobs(self, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        tokenizer = self._tokenizer
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    _token_name(tokenizer, token.token_id),
                    token.logprob,
                    list(tokenizer.token_bytes(token.token_id)),
                    [
                        ChatTopLogprob(_token_name(tokenizer, other), logprob, list(tokenizer.token_bytes(other)))
                        for other, logprob in token.top
                    ],
                )
                for token in tokens
            ]
        )


class _StreamUsage:
    """Token counts of a stream as far as they are wanted in it."""

    def __init__(self, options: StreamOptions | None) -> None:
        self.include = options is not None and options.include_usage
        self._in_every_event = options is not None and self.include and options.continuous_usage_stats
        self._num_tokens: defaultdict[int, int] = defaultdict(int)

    def take(self, chunk: Chunk) -> Usage | UnsetType | None:
        """What the chunk's events hold: without include_usage nothing, otherwise null or the counts of its choice until now."""
        if not self._in_every_event:
            return None if self.include else UNSET
        self._num_tokens[chunk.index] += len(chunk.token_ids)
        num_prompt_tokens, num_tokens = len(chunk.prompt_token_ids), self._num_tokens[chunk.index]
        return Usage(
            prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens, total_tokens=num_prompt_tokens + num_tokens
        )


def model(card: ModelCard, created: int) -> Model:
    """A model as OpenAI lists it."""
    return Model(
        id=card.name,
        created=created,
        root=card.base,
        parent=card.parent or None,
        max_model_len=card.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{card.name}", created=created)],
    )


def system_fingerprint(card: ModelCard) -> str:
    """The same seed gives the same answer while this stays the same."""
    adapter = "" if card.adapter is None else card.adapter.digest[:12]
    return "-".join(filter(None, ("packtrain", card.dtype, f"tp{card.tensor_parallel_size}", card.kernels, adapter)))


def _usage(summary: Summary | None) -> Usage:
    if summary is None:
        raise RuntimeError("the last chunk has no summary")
    return Usage(
        prompt_tokens=summary.num_prompt_tokens,
        completion_tokens=summary.num_completion_tokens,
        total_tokens=summary.num_prompt_tokens + summary.num_completion_tokens,
        prompt_tokens_details=CachedTokens(summary.num_cached_tokens),
        completion_tokens_details=PredictedTokens(
            accepted_prediction_tokens=summary.num_accepted_tokens,
            rejected_prediction_tokens=summary.num_rejected_tokens,
        ),
    )


def _joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    reported = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs, text = None, "".join(part.text for part in parts)
    if reported:
        logprobs = CompletionLogprobs(
            tokens=[token for each in reported for token in each.tokens],
            token_logprobs=[logprob for each in reported for logprob in each.token_logprobs],
            top_logprobs=[top for each in reported for top in each.top_logprobs],
            # Tokens of a stop text lie behind the end.
            text_offset=[min(offset, len(text)) for each in reported for offset in each.text_offset],
        )
    return msgspec.structs.replace(parts[-1], text=text, logprobs=logprobs)


def _offsets(token_ids: Sequence[int], tokenizer: Tokenizer, num_chars: int) -> list[int]:
    """Where in the prompt's text of `num_chars` each of its tokens begins: with the character that its first byte is part of."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    offsets, offset = [], 0
    for token_id in token_ids:
        offsets.append(min(offset, num_chars))
        offset += len(detokenizer.push((token_id,)))
    return offsets


def _completion_logprobs(
    tokens: Sequence[TokenLogprobs], num_unscored: int, tokenizer: Tokenizer, offsets: list[int]
) -> CompletionLogprobs:
    """The first `num_unscored` tokens have nothing before them."""
    scored = tokens[num_unscored:]
    # As OpenAI does it, the token itself is among its alternatives.
    tops: list[dict[str, float] | None] = [None] * num_unscored
    for token in scored:
        names: dict[str, float] = {}
        for token_id, logprob in ((token.token_id, token.logprob), *token.top):
            names.setdefault(_token_name(tokenizer, token_id), logprob)
        tops.append(names)
    return CompletionLogprobs(
        tokens=[_token_name(tokenizer, token.token_id) for token in tokens],
        token_logprobs=[None] * num_unscored + [token.logprob for token in scored],
        top_logprobs=tops,
        text_offset=offsets,
    )


def _token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one without text of its own is spelt as OpenAI's and vLLM's servers spell it."""
    data = tokenizer.token_bytes(token_id)
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
