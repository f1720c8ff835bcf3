"""What a client may ask. One validator for every front end: gRPC and HTTP build the same plain queries, checked here.

An error names the field (as the HTTP API calls it: `temperature`, `stop[2]`, `messages[0]`), its value and what is
allowed. Text of prompts is never quoted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving.config import LimitsConfig
from serving.contracts.accounts import Principal
from serving.contracts.chat import ASSISTANT, SYSTEM, USER
from serving.contracts.errors import UnknownModelError, ValidationError
from serving.contracts.models import ModelCard
from serving.gateway.core.constraints import Constraint, check_constraint
from serving.gateway.core.fields import GREEDY_BELOW, SAMPLING, Integer
from serving.gateway.core.tools import TOOL, ToolUse, check_tools, with_results
from serving.text.chat import ChatMessage


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, to be tokenised with the beginning-of-sequence token before it."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, oldest message first."""

    messages: Sequence[ChatMessage]
    continues_last: bool = False
    """The last message is the assistant's beginning of the answer, and the answer goes on where it ends."""


Prompt = TextPrompt | TokenPrompt | ChatPrompt
PromptList = Sequence[TextPrompt | TokenPrompt]
"""Prompts of one request, which share everything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateQuery:
    """A prompt to answer, as the client sent it. None is unset; SamplingParams says what the fields mean."""

    model: str
    prompt: Prompt | PromptList | None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Sequence[tuple[int, float]] = ()
    skip_special_tokens: bool | None = None
    """Leave control tokens out of the text; unset is true."""
    parse_special: bool | None = None
    """Read control tokens in a text prompt, where the model allows it; unset is false."""
    constraint: Constraint | None = None
    """What the answer must be; None for any text."""
    tools: ToolUse | None = None
    """Functions that the answer to a conversation may call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreQuery:
    """Continuations to score after one context. An empty text or token context is the beginning of a sequence."""

    model: str
    context: Prompt | None
    continuations: Sequence[TextPrompt | TokenPrompt | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeQuery:
    """A text or a conversation to tokenise."""

    model: str
    prompt: TextPrompt | ChatPrompt | None
    add_bos: bool | None = None
    """Of a text; unset is true."""
    parse_special: bool | None = None
    """As in GenerateQuery."""


DEVELOPER = "developer"
ROLES = (SYSTEM, DEVELOPER, USER, ASSISTANT, TOOL)
"""Of messages as clients send them."""
_MAX_BIAS = 100
_MAX_LISTED = 20
"""Names of models in an error."""


def find_model(models: Mapping[str, ModelCard], name: str, sender: Principal) -> ModelCard:
    """A model that exists to the sender's tenant. Raises UnknownModelError, and ValidationError when no name is given; both list
    what the sender's key allows."""
    if (card := models.get(name)) is not None and card.is_visible_to(sender.tenant_id):
        return card
    names = sorted(
        name
        for name, card in models.items()
        if (sender.models is None or name in sender.models) and card.is_visible_to(sender.tenant_id)
    )
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    served = f"served: {', '.join(names[:_MAX_LISTED]) or 'nothing that you may use'}{more}"
    if not name:
        raise ValidationError("model", f"model is missing; {served}")
    raise UnknownModelError(f"model {_quote(name)} is not served; {served}")


def normalised(query: GenerateQuery) -> GenerateQuery:
    """The query with every value that asks for nothing taken away, and every other spelling of a value made the usual one."""
    changes: dict[str, Any] = {
        name: None
        for name, rule in SAMPLING.items()
        if isinstance(rule, Integer) and rule.unset is not None and getattr(query, name) == rule.unset
    }
    if query.temperature is not None and 0 < query.temperature < GREEDY_BELOW:
        changes["temperature"] = 0.0
    if query.seed is not None and -(2**63) <= query.seed < -1:
        changes["seed"] = query.seed % 2**64  # the same bits
    return replace(query, **changes) if changes else query


def check_generate(query: GenerateQuery, card: ModelCard, limits: LimitsConfig) -> dict[str, Prompt]:
    """Check a normalised query, but for the prompts' lengths, which only tokenising tells (`output_budget`). Returns the
    prompts, which are there, by what errors call them. Raises ValidationError."""
    prompts = _named_prompts(query.prompt, limits)
    checked = {field: check_prompt(field, prompt, card, limits) for field, prompt in prompts.items()}
    for field, prompt in checked.items():
        if _is_empty(prompt):
            raise ValidationError(field, f"{field} is empty; it needs at least one token")
    highest = {"n": limits.max_choices, "logprobs": limits.max_logprobs, "prompt_logprobs": limits.max_logprobs}
    for field, rule in SAMPLING.items():
        value = getattr(query, field)
        if isinstance(rule, Integer):
            _check_integer(field, value, rule.low, highest.get(field, rule.high), unset=rule.unset)
        elif value is not None and not rule.is_allowed(value):
            raise ValidationError(field, f"{field} is {value}; allowed: {rule.allowed}")
    if query.max_tokens == 0 and query.prompt_logprobs is None:
        raise ValidationError(
            "max_tokens",
            "max_tokens is 0, which is for requests about the prompt alone (gRPC with prompt_logprobs; "
            "/v1/completions with echo and logprobs); allowed: 1 or more",
        )
    _check_parse_special(query.parse_special, card)
    if query.constraint is not None:
        if not card.structured_output:
            field = query.constraint.field
            raise ValidationError(field, f"{field} is set, and model {card.name!r} has structured_output: false")
        check_constraint(query.constraint, limits)
    _check_tools(query, card, limits)
    _check_stops(query, card, limits)
    _check_count("logit_bias", query.logit_bias, limits.max_logit_bias)
    for token_id, bias in query.logit_bias:
        _check_integer("logit_bias", token_id, 0, card.vocab_size - 1, what="logit_bias has token id")
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise ValidationError(
                "logit_bias", f"logit_bias[{token_id}] is {bias}; allowed: from -{_MAX_BIAS} to {_MAX_BIAS}"
            )
    return checked


def _check_tools(query: GenerateQuery, card: ModelCard, limits: LimitsConfig) -> None:
    if query.tools is None:
        return
    if query.tools.is_used and not card.structured_output:
        raise ValidationError("tools", f"tools is set, and model {card.name!r} has structured_output: false")
    if query.tools.is_used and isinstance(query.prompt, ChatPrompt) and query.prompt.continues_last:
        raise ValidationError("continue_final_message", "continue_final_message is true beside tools; leave one out")
    check_tools(query.tools, query.constraint, limits)


def _check_parse_special(parse_special: bool | None, card: ModelCard) -> None:
    if parse_special and not card.allow_parse_special:
        raise ValidationError(
            "parse_special",
            f"parse_special is true, and model {card.name!r} does not allow it; its allow_parse_special does, for callers "
            "who are trusted with control tokens",
        )


def check_score(
    query: ScoreQuery, card: ModelCard, limits: LimitsConfig
) -> tuple[Prompt, list[TextPrompt | TokenPrompt]]:
    """Check all but lengths in tokens. Returns context and continuations, which are there. Raises ValidationError."""
    context = check_prompt("context", query.context, card, limits)
    if not query.continuations:
        raise ValidationError("continuations", "continuations is empty; it needs at least one")
    _check_count("continuations", query.continuations, limits.max_continuations)
    continuations = []
    for index, continuation in enumerate(query.continuations):
        field = f"continuations[{index}]"
        if continuation is None or _is_empty(continuation):
            raise ValidationError(field, f"{field} is empty; it needs at least one token")
        check_prompt(field, continuation, card, limits)
        if {type(context), type(continuation)} == {TextPrompt, TokenPrompt}:
            raise ValidationError(
                field, f"{field} and the context mix text and token ids; where the text's tokens end would be a guess"
            )
        continuations.append(continuation)
    return context, continuations


def check_tokenize(query: TokenizeQuery, card: ModelCard, limits: LimitsConfig) -> Prompt:
    """Returns the prompt, which is there. Raises ValidationError."""
    if isinstance(query.prompt, ChatPrompt) and query.add_bos:
        raise ValidationError("add_bos", "add_bos is true beside chat, whose format decides about it; leave it unset")
    _check_parse_special(query.parse_special, card)
    return check_prompt("input", query.prompt, card, limits)


def check_prompt(field: str, prompt: Prompt | None, card: ModelCard, limits: LimitsConfig) -> Prompt:
    """Check what can be seen without tokenising; an empty text or token prompt passes. Returns the prompt, which is
    there. Raises ValidationError."""
    match prompt:
        case None:
            raise ValidationError(field, f"{field} is missing; give text, token ids or chat messages")
        case TokenPrompt(token_ids):
            check_token_ids(field, token_ids, card)
        case ChatPrompt(messages, continues_last):
            if not card.chat_format:
                raise ValidationError(
                    "messages",
                    f"messages were given, but model {card.name!r} has no chat format; give text or token ids",
                )
            if not messages:
                raise ValidationError("messages", "messages is empty; it needs at least one")
            _check_count("messages", messages, limits.max_chat_messages)
            for index, message in enumerate(messages):
                _num_bytes(f"messages[{index}]", message.content)
                if message.role not in ROLES:
                    where = f"messages[{index}].role"
                    raise ValidationError(where, f"{where} is {message.role!r:.40}; allowed: {', '.join(ROLES)}")
            if continues_last and (messages[-1].role != "assistant" or not messages[-1].content):
                raise ValidationError(
                    "continue_final_message",
                    "continue_final_message is true, and the last message is not the assistant's with some text to continue",
                )
            return ChatPrompt(tuple(with_results([_known_role(message) for message in messages])), continues_last)
        case TextPrompt(text):
            _num_bytes(field, text)
    return prompt


def _known_role(message: ChatMessage) -> ChatMessage:
    """OpenAI's newer name of the system's role is understood."""
    return replace(message, role=SYSTEM) if message.role == DEVELOPER else message


def check_token_ids(field: str, token_ids: Sequence[int], card: ModelCard) -> None:
    """Ids are checked against the width of the logits, which can exceed the tokenizer's. Raises ValidationError."""
    if len(token_ids) > card.max_model_len:
        raise ValidationError(
            field,
            f"{field} has {len(token_ids)} tokens; max_model_len is {card.max_model_len}",
            is_too_long=True,
        )
    for index, token_id in enumerate(token_ids):
        _check_integer(f"{field}[{index}]", token_id, 0, card.vocab_size - 1)


def output_budget(
    num_prompt_tokens: int, max_tokens: int | None, card: ModelCard, limits: LimitsConfig, field: str = "prompt"
) -> int:
    """Most output tokens after a prompt of that length. Raises ValidationError when prompt and answer do not fit."""
    left = card.max_model_len - num_prompt_tokens
    if left < 1 and max_tokens != 0:
        raise ValidationError(
            field,
            f"{field} has {num_prompt_tokens} tokens; max_model_len is {card.max_model_len}, "
            f"at least one of them for the answer: send at most {card.max_model_len - 1}",
            is_too_long=True,
        )
    if left < 0:
        raise ValidationError(
            field,
            f"{field} has {num_prompt_tokens} tokens; max_model_len is {card.max_model_len}",
            is_too_long=True,
        )
    if max_tokens is None:
        return left
    if max_tokens > left and not limits.clamp_max_tokens:
        raise ValidationError(
            "max_tokens",
            f"max_tokens is {max_tokens} and {field} has {num_prompt_tokens} tokens, which leave {left} of max_model_len, "
            f"{card.max_model_len}; send max_tokens of at most {left}, or none",
            is_too_long=True,
            max_tokens=left,
        )
    return min(max_tokens, left)


def check_delivered(delivered: Sequence[int], max_tokens: Sequence[int]) -> None:
    """What a client says that it has of a broken stream, by choice, and the most that each can have. Raises ValidationError."""
    if len(delivered) > len(max_tokens):
        raise ValidationError(
            "resume_from.num_tokens",
            f"resume_from.num_tokens has {len(delivered)} entries; the request has {len(max_tokens)} choices",
        )
    for index, (num_tokens, most) in enumerate(zip(delivered, max_tokens, strict=False)):
        _check_integer(f"resume_from.num_tokens[{index}]", num_tokens, 0, most)


def _named_prompts(prompt: Prompt | PromptList | None, limits: LimitsConfig) -> dict[str, Prompt | None]:
    if prompt is None or isinstance(prompt, Prompt):
        return {"prompt": prompt}
    if not prompt:
        raise ValidationError("prompt", "prompt is empty; it needs at least one")
    _check_count("prompt", prompt, limits.max_prompts)
    return {f"prompt[{index}]": each for index, each in enumerate(prompt)}


def _check_stops(query: GenerateQuery, card: ModelCard, limits: LimitsConfig) -> None:
    _check_count("stop", query.stop, limits.max_stop_strings)
    for index, stop in enumerate(query.stop):
        # An empty one is taken for none: it would end every answer before it begins, which nobody asks for.
        if (num_bytes := _num_bytes(f"stop[{index}]", stop)) > limits.max_stop_string_bytes:
            raise ValidationError(
                f"stop[{index}]",
                f"stop[{index}] has {num_bytes} bytes; allowed: at most {limits.max_stop_string_bytes}",
            )
    _check_count("stop_token_ids", query.stop_token_ids, limits.max_stop_token_ids)
    for index, token_id in enumerate(query.stop_token_ids):
        _check_integer(f"stop_token_ids[{index}]", token_id, 0, card.vocab_size - 1)


def _check_integer(
    field: str, value: int | None, low: int, high: int | None, *, what: str = "", unset: int | None = None
) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        default = "" if unset is None else f", or {unset} for the default"
        raise ValidationError(field, f"{what or f'{field} is'} {value!s:.40}; allowed: from {low} to {high}{default}")


def _check_count(field: str, values: Sequence[object], limit: int) -> None:
    if len(values) > limit:
        raise ValidationError(field, f"{field} has {len(values)} entries; at most {limit} are allowed")


def _num_bytes(field: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValidationError(field, f"{field} holds half of a surrogate pair at character {error.start}") from None


def _is_empty(prompt: Prompt) -> bool:
    return prompt == TextPrompt("") or (isinstance(prompt, TokenPrompt) and not prompt.token_ids)


def _quote(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
