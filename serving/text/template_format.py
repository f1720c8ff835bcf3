"""A checkpoint's chat template as plain strings (contracts/chat.py), found by what it writes around probe conversations.

Nothing is guessed from how a template looks: what it writes between two messages is read off, and the format so found must give
the template's own text, character by character, for other conversations. What it does not, is said.
"""

import json
import re
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path

from msgspec.structs import replace

from serving.contracts.chat import ANSWER, ASSISTANT, START, SYSTEM, USER, ChatFormat, between
from serving.text.chat import ChatMessage, render_parts, with_date
from serving.text.chat_formats import NAMED_FORMATS, TEMPLATE, with_tokens

_RUNNER = Path(__file__).with_name("template_runner.py")
_TIMEOUT_S = 120.0
MAX_CPU_S = 10
"""Of the processor, for all conversations."""
_LEFT, _RIGHT = " \n\t ", "\t \n "
"""Spaces around a probe's messages: those that are gone in the text were trimmed."""
_KINDS = {"s": SYSTEM, "u": USER, "a": ASSISTANT}
_NEEDED = ("u", "uau")
_SHAPES = ("u", "s", "su", "uau", "suau", "uauau", "suauau", "uu", "suu", "au", "sau", "uaau", "uuau")
"""Roles of the probes, from which literals are read."""
_LATER_SYSTEMS = ("ssu", "us", "usu", "uas", "uasu", "sausu", "uasuau")
"""Likewise, with system messages that do not come first. A template that does not write them down in their order has none."""

Conversation = Sequence[ChatMessage]


class TemplateError(Exception):
    """A template that is no plain-string format. The message says why, after "the chat template "."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A template's format, and where the two differ, as sentences."""

    chat_format: ChatFormat
    differences: tuple[str, ...]


_REASONING = "leaves reasoning before </think> out of earlier answers"
_REASONED = "Zqr"
_CHANGES = "changes what messages say"
_OTHER_CONTENTS = (
    "a\r\nb\rc\r\n\r\nd",
    "a  b   c\n\n\nd \n e",
    "a\tb\t\tc",
    "a\u00a0b\u200bc\ufeffd",
    "ﬁ e\u0301 Å ½",
    *(f"{mark}a{mark}" for mark in string.punctuation),
    *(f"{mark * 3} a" for mark in "#*->"),
)
_MOMENTS = ("2021-03-04T05:06:07", "2038-11-25T21:43:59")
_LONG_CONTENT = " ".join(["x" * 900, *(f"word{index}" for index in range(900))])
_MAX_CONSTANTS, _MAX_CONSTANT_CHARS = 200, 200
_CONSTANT = re.compile(r"""'((?:[^'\\]|\\.|\\\Z)*)(?:'|\Z)|"((?:[^"\\]|\\.|\\\Z)*)(?:"|\Z)""", re.DOTALL)
"""One that nothing closes goes on to the end: so each character is looked at once."""


def _everywhere(content: str) -> tuple[Conversation, ...]:
    """Conversations whose messages, of every role, are this one."""
    return tuple([ChatMessage(_KINDS[kind], content) for kind in shape] for shape in ("u", "su", "uau", "suau"))


# Contents that some templates change. The format keeps what it is given.
_SPECIAL: Mapping[str, tuple[Conversation, ...]] = {
    _REASONING: (
        (
            ChatMessage(USER, "a1"),
            ChatMessage(ASSISTANT, f"<think>\n{_REASONED}\n</think>\n\nb1"),
            ChatMessage(USER, "c1"),
        ),
    ),
    "treats empty messages in another way": (
        (ChatMessage(SYSTEM, ""), ChatMessage(USER, "b1")),
        (ChatMessage(SYSTEM, "a1"), ChatMessage(USER, "")),
        (ChatMessage(USER, ""),),
        (ChatMessage(USER, "a1"), ChatMessage(ASSISTANT, ""), ChatMessage(USER, "c1")),
    ),
    "trims some kinds of spaces around messages and leaves others": tuple(
        conversation
        # Each kind alone, and each outermost.
        for space in (" ", "\n", "\t", "\r", "\u00a0", "\n ", "\t\n", " \t")
        for conversation in _everywhere(f"{space}a{space[::-1]}")
    ),
    _CHANGES: (
        (ChatMessage(SYSTEM, "{{ 1 }} <b> & 'q' \"d\" \\n {% x %}"), ChatMessage(USER, "[INST] é🙂\n\nline")),
        (ChatMessage(USER, "None"), ChatMessage(ASSISTANT, "0"), ChatMessage(USER, '{"a": [1]}')),
        *(conversation for content in _OTHER_CONTENTS for conversation in _everywhere(content)),
    ),
    "shortens or wraps long messages": _everywhere(_LONG_CONTENT),
}
_LONG = tuple(
    ChatMessage((USER, ASSISTANT)[index % 2] if index else SYSTEM, f"word{index}") for index in [0, *range(2, 14), 14]
)


def derive(template: str, tokens: Mapping[str, str]) -> Derived:
    """`tokens` are the tokenizer's special tokens by the names that templates know them by ("bos_token", …).

    Raises TemplateError when the template fails, or does more than put texts between messages.
    """
    probes = [(shape, _probe(shape), padded) for shape in _SHAPES for padded in (False, True)]
    later = [(_probe(shape), _padded(_probe(shape))) for shape in _LATER_SYSTEMS]
    special = [(said, conversation) for said, group in _SPECIAL.items() for conversation in group]
    special += [(_CHANGES, each) for content in _with_constants(template) for each in _everywhere(content)]
    conversations = [_padded(messages) if padded else messages for _, messages, padded in probes]
    texts = run_template(template, [*conversations, *(c for _, c in special), _LONG, *chain(*later)], tokens)
    texts, later_texts = texts[: -2 * len(later)], texts[-2 * len(later) :]
    chat_format = _read(probes, texts[: len(probes)])
    written = list(zip(chain(*later), later_texts, strict=True))
    for number in range(len(later)):
        candidate = _with_later_systems(chat_format, *written[2 * number : 2 * number + 2])
        if all(not _has_shape(candidate, messages) or _text(candidate, messages) == text for messages, text in written):
            chat_format = candidate
    for (_, messages, padded), text in zip(probes, texts, strict=False):
        given = _padded(messages) if padded else messages
        if isinstance(text, str) and _has_shape(chat_format, given) and _text(chat_format, given) != text:
            raise TemplateError("writes something else around the same roles in another conversation")
    differences = {
        _CHANGES if said == _REASONING and _REASONED in text else said
        for (said, conversation), text in zip(special, texts[len(probes) :], strict=False)
        if isinstance(text, str) and _has_shape(chat_format, conversation) and _text(chat_format, conversation) != text
    }
    if isinstance(texts[-1], str) and _has_shape(chat_format, _LONG) and _text(chat_format, _LONG) != texts[-1]:
        raise TemplateError("writes something else into a long conversation")
    if "strftime_now" in template:
        _check_dates(template, tokens, chat_format)
    return Derived(_named(chat_format, tokens), tuple(sorted(differences)))


def _check_dates(template: str, tokens: Mapping[str, str], chat_format: ChatFormat) -> None:
    """Raise TemplateError for a template that does more with a date than to write it: its mark could be cut, or lost."""
    conversations = [messages for messages in map(_probe, _SHAPES) if _has_shape(chat_format, messages)]
    for moment in _MOMENTS:
        now = datetime.fromisoformat(moment)
        for messages, text in zip(
            conversations, run_template(template, conversations, tokens, now=moment), strict=True
        ):
            if isinstance(text, str) and with_date(_text(chat_format, messages), now) != text:
                raise TemplateError("does more with the date of the day than to write it")


def run_template(
    template: str, conversations: Sequence[Conversation], tokens: Mapping[str, str], *, now: str = ""
) -> list[str | Exception]:
    """What a template makes of each conversation: a text, or an error. With `now` its dates are of that time, and marks
    otherwise. Raises TemplateError when it cannot be run at all."""
    request = {
        "template": template,
        "conversations": [
            {"messages": [{"role": m.role, "content": m.content} for m in messages]} for messages in conversations
        ],
        "tokens": dict(tokens),
        "now": now,
        "max_cpu_s": MAX_CPU_S,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_RUNNER)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={},
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise TemplateError(f"did not end within {_TIMEOUT_S:.0f} s") from error
    except ValueError as error:
        raise TemplateError("takes more time, memory or files than it may") from error
    if "error" in answer:
        raise TemplateError(f"is not valid: {_one_line(answer['error'])}")
    return [each["text"] if "text" in each else ValueError(_one_line(each["error"])) for each in answer["answers"]]


def _one_line(message: str) -> str:
    """A template may raise whatever it likes."""
    return " ".join(message.split())


def _with_constants(template: str) -> list[str]:
    """Contents with the texts that the template itself holds: where it takes one out of messages, or looks for one, that shows.

    No spaces stand around them, and nothing of reasoning in them: both have conversations of their own.
    """
    texts: dict[str, None] = {}
    for match in _CONSTANT.finditer(template):
        written = match[1] or match[2] or ""
        try:  # as jinja2 reads it
            text = written.encode("ascii", "backslashreplace").decode("unicode-escape")
        except UnicodeError:
            continue
        if text.strip() and len(text) <= _MAX_CONSTANT_CHARS and "think" not in text:
            texts[text] = None
    return [f"{text.lstrip()}a{text}b{text.rstrip()}" for text in list(texts)[:_MAX_CONSTANTS]]


def _probe(shape: str) -> list[ChatMessage]:
    return [ChatMessage(_KINDS[kind], f"Zq{index}{kind}Zq") for index, kind in enumerate(shape)]


def _padded(messages: Conversation) -> list[ChatMessage]:
    return [ChatMessage(message.role, f"{_LEFT}{message.content}{_RIGHT}") for message in messages]


def _read(probes: Sequence[tuple[str, list[ChatMessage], bool]], texts: Sequence[str | Exception]) -> ChatFormat:
    literals: dict[str, str] = {}
    before_last: set[bool] = set()
    orders: dict[str, list[str]] = {}
    for (shape, messages, padded), text in zip(probes, texts, strict=True):
        if padded:
            continue
        order = None if isinstance(text, Exception) else _order(messages, text)
        if order is None or isinstance(text, Exception):
            if shape in _NEEDED:
                reason = (
                    f"refuses a plain conversation ({text})" if isinstance(text, Exception) else "leaves messages out"
                )
                raise TemplateError(reason)
            continue
        if shape in ("suau", "suauau"):
            before_last.add(order[0].role != SYSTEM)
        orders[shape] = [message.content for message in order]
        _note(literals, order, text)
    if len(before_last) > 1:
        raise TemplateError("puts the system message into different places")
    padded_texts = {
        shape: (messages, text)
        for (shape, messages, padded), text in zip(probes, texts, strict=True)
        if padded and isinstance(text, str) and shape in orders
    }
    left: set[str] = set()
    right: set[str] = set()
    for shape, (messages, text) in padded_texts.items():
        by_content = {message.content: message for message in messages}
        _note_trims(literals, [by_content[content] for content in orders[shape]], text, left, right)
    found = ChatFormat(
        name=TEMPLATE,
        literals=literals,
        trimmed_left=tuple(sorted(left)),
        trimmed_right=tuple(sorted(right)),
        system_before_last=True in before_last,
    )
    # Only Llama 2 and what is made like it trims the system text along with an empty message.
    joins = between(USER, ANSWER) in right and between(SYSTEM, USER) not in left
    return replace(found, system_joins_user=joins)


def _with_later_systems(
    chat_format: ChatFormat,
    plain: tuple[Conversation, str | Exception],
    padded: tuple[Conversation, str | Exception],
) -> ChatFormat:
    """With the literals of one more conversation. They may also allow others, which the template need not write in this way."""
    (messages, text), (_, padded_text) = plain, padded
    if isinstance(text, Exception) or isinstance(padded_text, Exception) or chat_format.system_before_last:
        return chat_format
    literals = dict(chat_format.literals)
    left, right = set(chat_format.trimmed_left), set(chat_format.trimmed_right)
    try:
        if _order(messages, text) != messages:
            return chat_format
        _note(literals, messages, text)
        _note_trims(literals, messages, padded_text, left, right)
    except TemplateError:
        return chat_format
    return replace(chat_format, literals=literals, trimmed_left=tuple(sorted(left)), trimmed_right=tuple(sorted(right)))


def _order(messages: Sequence[ChatMessage], text: str) -> list[ChatMessage] | None:
    """The messages as they stand in the text, each once; None where one is missing."""
    counts = [text.count(message.content) for message in messages]
    if 0 in counts:
        return None
    if max(counts) > 1:
        raise TemplateError("repeats messages")
    return sorted(messages, key=lambda message: text.index(message.content))


def _note(literals: dict[str, str], order: Sequence[ChatMessage], text: str) -> None:
    """Each literal of one conversation; it must be the same wherever the same roles follow each other."""
    position, before = 0, START
    for message in order:
        start = text.index(message.content, position)
        _set(literals, between(before, message.role), text[position:start])
        position, before = start + len(message.content), message.role
    if before in (USER, SYSTEM):
        _set(literals, between(before, ANSWER), text[position:])


def _set(literals: dict[str, str], key: str, literal: str) -> None:
    if literals.setdefault(key, literal) != literal:
        before, after = key.split(">")
        raise TemplateError(f"writes different things between {before} and {after}, depending on where they stand")


def _note_trims(
    literals: Mapping[str, str], order: Sequence[ChatMessage], text: str, left: set[str], right: set[str]
) -> None:
    """Which sides of messages are trimmed at each literal, from a conversation whose messages have spaces around them."""
    pattern, keys, before = [], [], START
    for message in [*order, None]:
        role = ANSWER if message is None else message.role
        key = between(before, role)
        if message is None and key not in literals:
            break
        keys.append(key)
        if before != START:
            pattern.append(f"({re.escape(_RIGHT)})?")
        pattern.append(re.escape(literals[key]))
        if message is not None:
            pattern.append(f"({re.escape(_LEFT)})?{re.escape(message.content)}")
        before = role
    match = re.fullmatch("".join(pattern), text)
    if match is None:
        raise TemplateError("changes the spaces around messages in a way of its own")
    groups = iter(match.groups())
    for key in keys:
        before, _, role = key.partition(">")
        if before != START:
            _agree(right, key, is_trimmed=next(groups) is None)
        if role != ANSWER:
            _agree(left, key, is_trimmed=next(groups) is None)


def _agree(trimmed: set[str], key: str, *, is_trimmed: bool) -> None:
    kept = f"kept {key}"
    trimmed.add(key if is_trimmed else kept)
    if {key, kept} <= trimmed:
        raise TemplateError(f"trims messages at {key} depending on where they stand")


def _has_shape(chat_format: ChatFormat, messages: Conversation) -> bool:
    try:
        render_parts(messages, chat_format)
    except KeyError:
        return False
    return True


def _text(chat_format: ChatFormat, messages: Conversation) -> str:
    return "".join(part.text for part in render_parts(messages, chat_format))


def _named(found: ChatFormat, tokens: Mapping[str, str]) -> ChatFormat:
    """With the name of the known format that is the same up to a system text of its own, and that text."""
    found = replace(
        found,
        trimmed_left=tuple(key for key in found.trimmed_left if not key.startswith("kept ")),
        trimmed_right=tuple(key for key in found.trimmed_right if not key.startswith("kept ")),
    )
    shown = _own_system(found)
    for name, known in NAMED_FORMATS.items():
        made = with_tokens(known, bos=tokens.get("bos_token", ""), eos=tokens.get("eos_token", ""))
        if _is_like(found, made, without_start=bool(shown)):
            return replace(found, name=name, shown_system=shown, every_part_is_first=made.every_part_is_first)
    return replace(found, shown_system=shown)


def _own_system(found: ChatFormat) -> str:
    """The system text that the template writes for a conversation without one, "" when it writes none."""
    opens, closes = found.literal(START, SYSTEM), found.literal(SYSTEM, USER)
    without = found.literal(START, USER) or ""
    if opens is None or closes is None or len(without) <= len(opens) + len(closes):
        return ""
    return without[len(opens) : -len(closes) or None] if without.startswith(opens) and without.endswith(closes) else ""


def _is_like(found: ChatFormat, known: ChatFormat, *, without_start: bool) -> bool:
    """The same for every order of roles that both have."""
    both = found.literals.keys() & known.literals.keys()
    ignored = {between(START, USER), between(START, ASSISTANT)} if without_start else set()
    needed = {between(USER, ASSISTANT), between(ASSISTANT, USER), between(USER, ANSWER)}
    if not needed <= both or found.system_before_last != known.system_before_last:
        return False
    if (found.literal(START, SYSTEM) is None) != (known.literal(START, SYSTEM) is None):
        return False
    for key in both - ignored:
        sides = ("trimmed_left", "trimmed_right")
        same_trims = all((key in getattr(found, side)) == (key in getattr(known, side)) for side in sides)
        if found.literals[key] != known.literals[key] or not same_trims:
            return False
    return True
