"""What clients send: OpenAI's fields, and those of this server's sampling that OpenAI's API lacks.

A field means the same as in packtrain.v1 (protos/inference.proto) unless its class says otherwise. `validate` has the rules about
values, and `fields` those about fields that are not here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from serving.contracts.errors import ValidationError
from serving.gateway.core.fields import NO_TOOLS, UNSUPPORTED, Unsupported
from serving.gateway.core.tools import Tool, ToolCall, ToolUse, Turn, call_text, in_order_of_calls
from serving.gateway.core.validate import (
    ChatPrompt,
    GenerateQuery,
    Prompt,
    PromptList,
    TextPrompt,
    TokenizeQuery,
    TokenPrompt,
    normalised,
)
from serving.gateway.http.body import Body, Object
from serving.gateway.http.forms import Forms
from serving.text.chat import ChatMessage

DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions, as OpenAI has it."""


class StreamOptions(Object, frozen=True, kw_only=True):
    """What a stream holds besides the answer. Without a stream they ask for nothing: a whole answer has its token counts."""

    include_usage: bool = False
    """Token counts in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """With include_usage: and in every other chunk those of its choice until then, as vLLM has it."""


class _Sampling(Forms, frozen=True, kw_only=True):
    model: str | None = None
    """May be left out where the sender may use one alone."""
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
    skip_special_tokens: bool | None = None

    def _query(self, **fields: Any) -> GenerateQuery:
        given = {field: getattr(self, field) for field in _SAME_NAME}
        return normalised(
            GenerateQuery(
                **{
                    **given,
                    "model": self.model or "",
                    "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                    "stop_token_ids": tuple(self.stop_token_ids or ()),
                    "logit_bias": _logit_bias(self.logit_bias or {}),
                    "constraint": self.constraint(),
                    **fields,
                }
            )
        )


_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "ignore_eos", "n", "skip_special_tokens",
)  # fmt: skip


class CompletionRequest(_Sampling, frozen=True, kw_only=True):
    """Texts or token ids to continue. max_tokens is 16 when unset, and all that is left of the model's length when -1."""

    prompt: str | list[int | str | list[int]] | None = None
    """A text, token ids, a list of texts, or a list of lists of token ids."""
    echo: bool | None = None
    """Begin the answer with the prompt; with logprobs, the prompt's tokens have theirs."""
    logprobs: int | bool | None = None
    """Of every token, and of this many most likely alternatives. False is none."""
    best_of: int | None = None
    """Not more than n."""
    parse_special: bool | None = None
    """Read control tokens in the text where it spells them. Only of a model with allow_parse_special."""

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return _UNSUPPORTED_IN_COMPLETIONS

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"prompt"})

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        if self.best_of not in (None, self.n or 1):
            raise ValidationError(
                "best_of",
                f"best_of is {self.best_of}; only n, {self.n or 1}, is supported: ask for n choices and pick one",
            )
        logprobs = _number_of("logprobs", self.logprobs)
        return self._query(
            prompt=None if self.prompt is None else _prompts(self.prompt),
            logprobs=logprobs,
            prompt_logprobs=logprobs if self.echo else None,
            max_tokens=DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            parse_special=self.parse_special,
        )


class ContentPart(Object, frozen=True, kw_only=True):
    """A piece of a message's text."""

    type: str = "text"
    """"text", or "input_text", "output_text" or "refusal", as other APIs call it."""
    text: str | None = None
    refusal: str | None = None

    @classmethod
    def no_effect(cls) -> frozenset[str]:
        return frozenset({"annotations", "logprobs"})  # an answer's part has them

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"text", "refusal"})

    def plain(self, where: str) -> str:
        """Its text. Raises ValidationError for another kind of part."""
        if self.type not in _TEXT_PARTS:
            raise ValidationError(
                f"{where}.type",
                f"{where}.type is {self.type!r:.40}; this server reads text alone: {', '.join(_TEXT_PARTS)}",
            )
        text = self.refusal if self.type == "refusal" else self.text
        if text is None:
            name = "refusal" if self.type == "refusal" else "text"
            raise ValidationError(f"{where}.{name}", f"{where}.{name} is missing")
        return text


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class CalledFunction(Object, frozen=True, kw_only=True):
    """What an answer called."""

    name: str
    arguments: str = "{}"


class MessageCall(Object, frozen=True, kw_only=True):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class FunctionSpec(Object, frozen=True, kw_only=True):
    """A function that may be called. With `strict` it is refused where its calls could not be held to the schema."""

    name: str
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class ToolSpec(Object, frozen=True, kw_only=True):
    """A tool, which is a function."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(Object, frozen=True, kw_only=True):
    """By its name."""

    name: str


class NamedTool(Object, frozen=True, kw_only=True):
    """The function that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class Message(Object, frozen=True, kw_only=True):
    """One message; parts of its text are joined by line breaks. No content is an empty one. What the assistant refused to say,
    with its reason, is its content. Calls follow the content, in the form of core/tools.py; a result has the role tool."""

    role: str
    content: str | list[ContentPart | str] | None = None
    refusal: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None
    """Of a result: the call that it belongs to."""
    type: Literal["text", "message", None] = None

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return {
            "function_call": Unsupported(instead="send tool_calls"),
            "audio": Unsupported(instead="send its transcript"),
        }

    @classmethod
    def no_effect(cls) -> frozenset[str]:
        return frozenset({"annotations", "id", "phase", "status", "parsed"})  # an answer's message has them

    def turn(self, where: str) -> Turn:
        """Raises ValidationError."""
        return Turn(
            message=self.plain(where),
            call_ids=tuple([call.id for call in self.tool_calls or ()]),
            result_of=self.tool_call_id,
            field=f"{where}.tool_call_id",
        )

    def plain(self, where: str) -> ChatMessage:
        """Raises ValidationError."""
        parts = [self.content] if isinstance(self.content, str) else self.content or []
        texts = [
            part if isinstance(part, str) else part.plain(f"{where}.content[{index}]")
            for index, part in enumerate(parts)
        ]
        if self.refusal:
            texts = [*filter(None, texts), self.refusal]
        if self.role == "function":
            raise ValidationError(f"{where}.role", f"{where}.role is 'function'; send a message of the role 'tool'")
        calls = [ToolCall(name=call.function.name, arguments=call.function.arguments) for call in self.tool_calls or ()]
        if calls and self.role != "assistant":
            raise ValidationError(f"{where}.tool_calls", f"{where}.tool_calls is set in a message of {self.role!r:.40}")
        texts = [*(filter(None, texts) if calls else texts), *map(call_text, calls)]
        return ChatMessage(self.role, "\n".join(texts))


class ChatRequest(_Sampling, frozen=True, kw_only=True):
    """A conversation to answer. max_completion_tokens is another name of max_tokens."""

    messages: list[Message] = msgspec.field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    """Report the log-probability of every token of the answer."""
    top_logprobs: int | bool | None = None
    """And of this many most likely alternatives; needs logprobs. False is none."""
    continue_final_message: bool | None = None
    """The last message is the assistant's and the beginning of its answer; the answer goes on where it ends."""
    add_generation_prompt: bool | None = None
    """False only with continue_final_message, which decides."""
    tools: list[ToolSpec] | None = None
    """Functions that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Unset is auto: the model decides. required: at least one; or the one that must be called."""
    parallel_tool_calls: bool | None = None
    """An answer may hold several calls. Unset is true."""

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return _UNSUPPORTED_IN_CHAT

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"messages"})

    def query(self) -> GenerateQuery:
        """The request as plain data. Raises ValidationError."""
        top_logprobs = _number_of("top_logprobs", self.top_logprobs)
        if top_logprobs and not self.logprobs:
            raise ValidationError("top_logprobs", "top_logprobs is set, and logprobs is not true")
        given = {self.max_tokens, self.max_completion_tokens} - {None, -1}  # −1 is the default
        if len(given) > 1:
            raise ValidationError(
                "max_completion_tokens",
                f"max_completion_tokens is {self.max_completion_tokens} and max_tokens is {self.max_tokens}; give one",
            )
        return self._query(
            prompt=_conversation(self.messages, self.continue_final_message, self.add_generation_prompt),
            logprobs=(top_logprobs or 0) if self.logprobs else None,
            max_tokens=next(iter(given), None),
            tools=self._tool_use(),
        )

    def _tool_use(self) -> ToolUse | None:
        if not self.tools and self.tool_choice in (None, "none", "auto"):
            return None
        tools = [
            Tool(
                name=spec.function.name,
                description=spec.function.description or "",
                parameters=spec.function.parameters,
                is_strict=bool(spec.function.strict or self.strict),
            )
            for spec in self.tools or ()
        ]
        choice = self.tool_choice or "auto"
        named = choice.function.name if isinstance(choice, NamedTool) else None
        return ToolUse(
            tools=tuple(tools),
            choice="required" if isinstance(choice, NamedTool) else choice,
            named=named,
            is_parallel=self.parallel_tool_calls is not False and named is None,
        )

    @property
    def field_names(self) -> dict[str, str]:
        """What this request calls fields of the query."""
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        return names if self.max_tokens is not None else names | {"max_tokens": "max_completion_tokens"}


class TokenizeRequest(Body, frozen=True, kw_only=True):
    """A text or a conversation to tokenise; exactly one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    """Put the beginning-of-sequence token before a text; unset is true. Not with messages."""
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    """False only with continue_final_message, which decides."""
    parse_special: bool | None = None

    field_names: ClassVar[dict[str, str]] = {"input": "prompt", "text": "prompt", "add_bos": "add_special_tokens"}

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return _UNSUPPORTED_IN_TOKENIZE

    @classmethod
    def as_given(cls) -> frozenset[str]:
        return frozenset({"prompt", "messages"})

    def query(self) -> TokenizeQuery:
        """The request as plain data. Raises ValidationError."""
        if self.prompt is not None and self.messages is not None:
            raise ValidationError("messages", "messages is set beside prompt; give one")
        prompt = None if self.prompt is None else TextPrompt(self.prompt)
        return TokenizeQuery(
            model=self.model or "",
            prompt=prompt
            if self.messages is None
            else _conversation(self.messages, self.continue_final_message, self.add_generation_prompt),
            add_bos=self.add_special_tokens,
            parse_special=self.parse_special,
        )


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: list[int]

    field_names: ClassVar[dict[str, str]] = {"token_ids": "tokens"}

    @classmethod
    def unsupported(cls) -> Mapping[str, Unsupported]:
        return {name: Unsupported(instead="send tokens") for name in ("ids", "token_ids")}


_TEXT = Unsupported(neutral=({"format": {"type": "text"}},), instead="send response_format for the form of the answer")
_UNSUPPORTED_IN_COMPLETIONS = {
    **UNSUPPORTED,
    **NO_TOOLS,
    "add_special_tokens": Unsupported(
        neutral=(True,), refused=(False,), instead="send token ids, which /tokenize gives without the first token"
    ),
    "continue_final_message": Unsupported(instead="send a prompt, which is always continued"),
    "input": Unsupported(instead="send prompt"),
    "instructions": Unsupported(instead="put them into the prompt"),
    "max_completion_tokens": Unsupported(neutral=(-1,), instead="send max_tokens"),
    "max_output_tokens": Unsupported(neutral=(-1,), instead="send max_tokens"),
    "messages": Unsupported(instead="send prompt, or a conversation to /v1/chat/completions"),
    "prompt_logprobs": Unsupported(instead="send echo: true with logprobs"),
    "text": _TEXT,
    "top_logprobs": Unsupported(neutral=(0,), instead="send logprobs"),
}
_UNSUPPORTED_IN_CHAT = {
    **UNSUPPORTED,
    "add_special_tokens": Unsupported(instead="leave that to the chat format"),
    "best_of": Unsupported(neutral=(1,), instead="ask for n choices and pick one"),
    "echo": Unsupported(instead="send a prompt to /v1/completions"),
    "input": Unsupported(instead="send messages"),
    "instructions": Unsupported(instead="send a message of the role system"),
    "max_output_tokens": Unsupported(neutral=(-1,), instead="send max_tokens"),
    "parse_special": Unsupported(instead="send a prompt to /v1/completions"),
    "prompt": Unsupported(instead="send messages, or a text to /v1/completions"),
    "prompt_logprobs": Unsupported(instead="send a prompt to /v1/completions with echo: true and logprobs"),
    "text": _TEXT,
}
_UNSUPPORTED_IN_TOKENIZE = {name: UNSUPPORTED[name] for name in ("chat_template", "chat_template_kwargs")} | {
    "tools": NO_TOOLS["tools"],
    "content": Unsupported(instead="send prompt"),
    "return_token_strs": Unsupported(instead="send each token to /detokenize"),
    "with_pieces": Unsupported(instead="send each token to /detokenize"),
}


def _number_of(field: str, value: int | bool | None) -> int | None:
    """False is none; true is no number. Raises ValidationError."""
    if value is True:
        raise ValidationError(field, f"{field} is true; send the number of alternatives")
    return None if value is False else value


def _conversation(messages: list[Message], continues_last: bool | None, asks_for_answer: bool | None) -> ChatPrompt:
    if asks_for_answer is False and not continues_last:
        name = "add_generation_prompt"
        raise ValidationError(name, UNSUPPORTED[name].refusal(name))
    turns = [message.turn(f"messages[{index}]") for index, message in enumerate(messages)]
    return ChatPrompt(tuple(in_order_of_calls(turns)), bool(continues_last))


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
