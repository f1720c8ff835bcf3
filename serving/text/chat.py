"""Conversations to token ids, in code: no template language runs, so none can be abused.

Control tokens come from the format alone, placed by id. Some formats also mark roles with ordinary text ([INST] and its
like); a message that holds such a mark could forge a role, and is refused as Meta's reference does.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from model_parallel.errors import ConfigError
from serving.contracts.chat import (
    ANSWER,
    ASSISTANT,
    DATE_CLOSES,
    DATE_OPENS,
    START,
    SYSTEM,
    USER,
    ChatFormat,
    between,
)
from serving.text.chat_formats import BOS, EOS, NAMED_FORMATS, with_tokens
from serving.text.tokenizer import Part, Tokenizer

ROLES = (SYSTEM, USER, ASSISTANT)
_DATE = re.compile(f"{DATE_OPENS}([^{DATE_CLOSES}]*){DATE_CLOSES}")
# How roles are marked in text: <|user|>, [INST], [/INST], <<SYS>>, <</SYS>>.
_MARK = re.compile(r"<\|[^|<>\s]+\|>|\[/?[A-Z_]{2,}\]|<</?[A-Z]+>>")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


class ChatError(ValueError):
    """A conversation that the format cannot express; `index` is the message at fault."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.message = message


def named_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A known format with this tokenizer's tokens. Raises ConfigError for one that is not known, or that it cannot have."""
    if name not in NAMED_FORMATS:
        raise ConfigError(f"chat format {name!r} is not known; allowed: {', '.join(NAMED_FORMATS)}")
    known = NAMED_FORMATS[name]
    written = "".join(known.literals.values())
    bos, eos = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
    if (BOS in written and bos is None) or (EOS in written and eos is None):
        raise ConfigError(f"the {name} chat format needs a tokenizer with BOS and EOS")
    made = with_tokens(known, bos=tokenizer.control_token_text(bos) or "", eos=tokenizer.control_token_text(eos) or "")
    check_control_tokens(made, tokenizer)
    return made


_NEEDED = re.compile(r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|end)\|>")


def check_control_tokens(chat_format: ChatFormat, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when the format writes a control token that the tokenizer does not have.

    `<|user|>` and its like are ordinary text in some formats (Zephyr's), so they are not asked for.
    """
    for mark in dict.fromkeys(_NEEDED.findall("".join(chat_format.literals.values()))):
        if not tokenizer.has_control_token(mark):
            raise ConfigError(
                f"the {chat_format.name} chat format needs the control token {mark!r}, which the model's tokenizer does not "
                "have; set chat.format to another format, or to none to serve the model without chat"
            )


def end_of_answer(chat_format: ChatFormat, tokenizer: Tokenizer) -> int | None:
    """The token that the format ends an answer with; None when it ends with text."""
    literal = chat_format.literal(ASSISTANT, USER) or ""
    for piece in tokenizer.split_markup(literal):
        if not isinstance(piece, str):
            return piece.id
        if piece.strip():
            return None
    return None


def render_chat(
    messages: Sequence[ChatMessage],
    *,
    chat_format: ChatFormat | str,
    tokenizer: Tokenizer,
    default_system: str = "",
    continues_last: bool = False,
    today: Callable[[], date] = datetime.now,
) -> list[int]:
    """The prompt that asks for the assistant's next answer. `default_system`, or the format's own, is used when there is no
    system message. With `continues_last` the last message, which must be the assistant's, is left open.

    Raises ChatError for a wrong conversation, and ConfigError for a format that the model cannot have.
    """
    if isinstance(chat_format, str):
        chat_format = named_format(chat_format, tokenizer)
    _check_order(messages, chat_format, continues_last=continues_last)
    _check_marks(messages, chat_format, tokenizer)
    default_system = default_system or chat_format.default_system
    if messages[0].role != SYSTEM and default_system:
        messages = [ChatMessage(SYSTEM, default_system), *messages]
    parts = render_parts(messages, chat_format, continues_last=continues_last)
    now = today()
    dated = [Part(with_date(part.text, now), is_markup=True) if part.is_markup else part for part in parts]
    return tokenizer.encode_parts(dated, every_part_is_first=chat_format.every_part_is_first)


def with_date(literal: str, now: date) -> str:
    """A format's text, with the date in the places that are marked for it."""
    return _DATE.sub(lambda match: now.strftime(match[1]), literal)


def render_parts(
    messages: Sequence[ChatMessage], chat_format: ChatFormat, *, continues_last: bool = False
) -> list[Part]:
    """Literals and messages in their order, trimmed as the format says. The order has been checked."""
    if chat_format.system_before_last and messages[0].role == SYSTEM and len(messages) > 1:
        last = max(index for index, message in enumerate(messages) if message.role == USER)
        messages = [*messages[1:last], messages[0], *messages[last:]]
    roles = [START, *(message.role for message in messages), *([] if continues_last else [ANSWER])]
    parts: list[Part] = []
    for index, role in enumerate(roles[1:]):
        key = between(roles[index], role)
        literal = chat_format.literals[key]
        parts.append(Part(literal, is_markup=True))
        if role == ANSWER:
            break
        content = messages[index].content
        following = between(role, roles[index + 2]) if index + 2 < len(roles) else ""
        if key in chat_format.trimmed_left:
            content = content.lstrip()
        if following in chat_format.trimmed_right:
            content = content.rstrip()
            if not content and roles[index] == SYSTEM and chat_format.system_joins_user:
                parts[-1] = Part(literal.rstrip(), is_markup=True)
        parts.append(Part(content, is_markup=False))
    return parts


def _check_order(messages: Sequence[ChatMessage], chat_format: ChatFormat, *, continues_last: bool) -> None:
    if not messages:
        raise ChatError(0, "at least one message is needed")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise ChatError(index, f"role is {message.role!r:.40}; allowed: {', '.join(ROLES)}")
        if message.role == SYSTEM and index > 0 and not _may_follow(chat_format, messages[index - 1].role):
            raise ChatError(
                index, f"in the model's chat format ({chat_format.name}) a system message may only come first"
            )
    if messages[0].role == SYSTEM and not _has_system(chat_format):
        raise ChatError(0, f"the model's chat format ({chat_format.name}) has no system messages")
    if continues_last:
        _check_continued(messages)
    conversation = messages[1:] if messages[0].role == SYSTEM else messages
    num_system = len(messages) - len(conversation)
    before = START if not num_system or chat_format.system_before_last else SYSTEM
    for index, message in enumerate(conversation, start=num_system):
        if chat_format.literal(before, message.role) is None:
            expected = USER if before in (START, SYSTEM, ASSISTANT) else ASSISTANT
            raise ChatError(index, f"role is {message.role!r}; roles must alternate user/assistant, here {expected!r}")
        before = message.role
    last = messages[-1].role
    is_answered = last == USER or (last == SYSTEM and chat_format.literal(SYSTEM, ANSWER) is not None)
    if not continues_last and not is_answered:
        hint = ", or continue_final_message true" if last == ASSISTANT else ""
        raise ChatError(len(messages) - 1, f"the last message is of {last!r}; it must be the user's{hint}")


def _check_continued(messages: Sequence[ChatMessage]) -> None:
    """The last message is the beginning of the answer to the one before it."""
    if messages[-1].role != ASSISTANT:
        raise ChatError(
            len(messages) - 1, f"the last message is of {messages[-1].role!r}; only the assistant's can be continued"
        )
    if len(messages) < 2:
        raise ChatError(0, "a message of the user's is needed first")
    if messages[-2].role != USER:
        raise ChatError(
            len(messages) - 2, f"the message before the last is of {messages[-2].role!r}; it must be the user's"
        )


def _may_follow(chat_format: ChatFormat, before: str) -> bool:
    """Whether a system message may stand after one of that role."""
    return not chat_format.system_before_last and chat_format.literal(before, SYSTEM) is not None


def _has_system(chat_format: ChatFormat) -> bool:
    return chat_format.literal(START, SYSTEM) is not None


def _check_marks(messages: Sequence[ChatMessage], chat_format: ChatFormat, tokenizer: Tokenizer) -> None:
    marks = sorted(role_marks(chat_format, tokenizer))
    for index, message in enumerate(messages):
        if any(mark in message.content for mark in marks):
            raise ChatError(index, f"special tags are not allowed in a message: {', '.join(marks)}")


def role_marks(chat_format: ChatFormat, tokenizer: Tokenizer) -> frozenset[str]:
    """What the format marks roles with and is ordinary text to the tokenizer."""
    found = {mark for literal in chat_format.literals.values() for mark in _MARK.findall(literal)}
    return frozenset(mark for mark in found if not tokenizer.has_control_token(mark))
