"""What clients send: OpenAI's fields, and those of this server's sampling that OpenAI's API lacks.

A field means the same as in packtrain.v1 (protos/inference.proto) unless its class says otherwise, and `validate` has the
rules about values. A field that would change the answer and is not here is refused by name.
"""

from typing import Any, ClassVar, Literal

import msgspec

from serving.contracts.errors import ValidationError
from serving.gateway.core.validate import (
    ChatPrompt,
    GenerateQuery,
    Prompt,
    PromptList,
    TextPrompt,
    TokenizeQuery,
    TokenPrompt,
)
from serving.gateway.http.body import Neutral, parse
from serving.text.chat import ChatMessage

DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions, as OpenAI has it."""

IGNORED = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user", "parallel_tool_calls"}
)
"""They never change an answer of this server, whatever they hold."""
_NEUTRAL: Neutral = {"store": (False,), "service_tier": ("auto", "default")}
_NEUTRAL_IN_COMPLETIONS: Neutral = {**_NEUTRAL, "best_of": (1,), "suffix": ("",)}
_NEUTRAL_IN_CHAT: Neutral = {
    **_NEUTRAL,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    """Token counts in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """With include_usage: and in every other chunk those of its choice until then, as vLLM has it."""
    include_obfuscation: Literal[None] = None


class _Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None

    def _query(self, **fields: Any) -> GenerateQuery:
        if self.stream_options is not None and not self.stream:
            raise ValidationError("stream_options", "stream_options is set, and stream is not true")
        return GenerateQuery(
            model=self.model,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
            **{field: getattr(self, field) for field in _SAME_NAME} | fields,
        )


_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "ignore_eos", "n",
)  # fmt: skip


class CompletionRequest(_Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts or token ids to continue. max_tokens is 16 when unset."""

    prompt: str | list[int | str | list[int]] | None = None
    """A text, token ids, a list of texts, or a list of lists of token ids."""
    echo: bool | None = None
    """Begin the answer with the prompt; with logprobs, the prompt's tokens have theirs."""
    logprobs: int | None = None
    """Of every token, and of this many most likely alternatives."""

    @classmethod
    def from_json(cls, body: bytes) -> "CompletionRequest":
        """Raises ValidationError."""
        return parse(cls, body, _NEUTRAL_IN_COMPLETIONS, IGNORED)

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        return self._query(
            prompt=None if self.prompt is None else _prompts(self.prompt),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            max_tokens=DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
        )


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message; parts of its text are joined by line breaks. The fields that can only be null are there because an
    answer's message has them, which clients send back as it came."""

    role: str
    content: str | list[TextPart]
    type: Literal["text", "message", None] = None
    name: Literal[None] = None
    refusal: Literal[None] = None
    annotations: list[None] | None = None
    audio: Literal[None] = None
    function_call: Literal[None] = None
    tool_calls: Literal[None] = None

    def plain(self) -> ChatMessage:
        content = self.content
        return ChatMessage(self.role, content if isinstance(content, str) else "\n".join(part.text for part in content))


class ChatRequest(_Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to answer. max_completion_tokens is another name of max_tokens."""

    messages: list[Message] = []
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    """Report the log-probability of every token of the answer."""
    top_logprobs: int | None = None
    """And of this many most likely alternatives; needs logprobs."""

    @classmethod
    def from_json(cls, body: bytes) -> "ChatRequest":
        """Raises ValidationError."""
        return parse(cls, body, _NEUTRAL_IN_CHAT, IGNORED)

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValidationError("top_logprobs", "top_logprobs is set, and logprobs is not true")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValidationError(
                "max_completion_tokens",
                f"max_completion_tokens is {self.max_completion_tokens} and max_tokens is {self.max_tokens}; give one",
            )
        return self._query(
            prompt=_conversation(self.messages),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            max_tokens=next(iter(given), None),
        )

    @property
    def field_names(self) -> dict[str, str]:
        """What this request calls fields of the query."""
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        return names if self.max_tokens is not None else names | {"max_tokens": "max_completion_tokens"}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation to tokenise; exactly one."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    """Put the beginning-of-sequence token before a text; unset is true. Not with messages."""

    field_names: ClassVar[dict[str, str]] = {"input": "prompt", "text": "prompt", "add_bos": "add_special_tokens"}

    @classmethod
    def from_json(cls, body: bytes) -> "TokenizeRequest":
        """Raises ValidationError."""
        return parse(cls, body, {}, frozenset())

    def query(self) -> TokenizeQuery:
        """The request as plain data. Raises ValidationError."""
        if self.prompt is not None and self.messages is not None:
            raise ValidationError("messages", "messages is set beside prompt; give one")
        prompt = None if self.prompt is None else TextPrompt(self.prompt)
        return TokenizeQuery(
            model=self.model,
            prompt=prompt if self.messages is None else _conversation(self.messages),
            add_bos=self.add_special_tokens,
        )


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids to turn into text."""

    model: str = ""
    tokens: list[int] = []

    field_names: ClassVar[dict[str, str]] = {"token_ids": "tokens"}

    @classmethod
    def from_json(cls, body: bytes) -> "DetokenizeRequest":
        """Raises ValidationError."""
        return parse(cls, body, {}, frozenset())


def _conversation(messages: list[Message]) -> ChatPrompt:
    return ChatPrompt(tuple(message.plain() for message in messages))


def _prompts(prompt: str | list[int | str | list[int]]) -> Prompt | PromptList:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if not prompt:
        return TokenPrompt(())
    kind = type(prompt[0])
    for index, item in enumerate(prompt):
        if type(item) is not kind:
            raise ValidationError(
                f"prompt[{index}]",
                f"prompt[{index}] is not of the same kind as prompt[0]; "
                "give a text, token ids, a list of texts, or a list of lists of token ids",
            )
    if kind is int:
        return TokenPrompt(tuple(prompt))  # type: ignore[arg-type]  # the loop has seen that all are
    return tuple(TextPrompt(item) if isinstance(item, str) else TokenPrompt(tuple(item)) for item in prompt)  # type: ignore[arg-type]


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """JSON's names are strings; only a number's usual spelling is one, so that no id can stand there twice."""
    biases = []
    for name, bias in given.items():
        if not name.isascii() or not name.isdecimal() or str(int(name[:20])) != name:
            raise ValidationError("logit_bias", f"logit_bias has {name[:40]!r}, which is not a token id")
        biases.append((int(name), bias))
    return tuple(sorted(biases))
