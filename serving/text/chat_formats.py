"""The chat formats that Llama-architecture models come with, as plain strings, by the names of a configuration.

"{bos}" and "{eos}" stand for the texts of these tokens. Sources are the models' published templates; the tests compare with
them.
"""

from collections.abc import Mapping
from types import MappingProxyType

from msgspec.structs import replace

from serving.contracts.chat import ANSWER, ASSISTANT, START, SYSTEM, USER, ChatFormat, between

CONTENT = "{content}"
"""Where a message stands in a plain-string format."""
BOS, EOS = "{bos}", "{eos}"
TEMPLATE, CUSTOM, NONE = "template", "custom", "none"
_ROLES = (SYSTEM, USER, ASSISTANT)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def from_strings(
    name: str,
    *,
    system: str,
    user: str,
    assistant: str,
    answer: str,
    begin: str = "",
    trim: bool = False,
    default_system: str = "",
    systems_anywhere: bool = True,
) -> ChatFormat:
    """A format in which every message has a text before and after it: strings with `{content}`; `answer` opens the answer.

    An empty `system` is a format without system messages. Without `systems_anywhere` one may only come first.
    """
    around = {
        role: (text.partition(CONTENT)[0], text.partition(CONTENT)[2])
        for role, text in zip(_ROLES, (system, user, assistant), strict=True)
        if text
    }
    opens = {START: begin} | {role: after for role, (_, after) in around.items()}
    literals = {
        between(before, role): opens[before] + around[role][0]
        for before in opens
        for role in around
        if systems_anywhere or role != SYSTEM or before == START
    }
    literals |= {between(role, ANSWER): opens[role] + answer for role in around}
    keys = tuple(literals) if trim else ()
    return ChatFormat(
        name=name,
        literals=literals,
        trimmed_left=tuple(key for key in keys if not key.endswith(f">{ANSWER}")),
        trimmed_right=tuple(key for key in keys if not key.startswith(f"{START}>")),
        default_system=default_system,
    )


def _alternating(
    name: str,
    *,
    first: str,
    asked: str,
    answered: str,
    following: str,
    system: tuple[str, str] | None = None,
    opens_answer: str | None = None,
    trims_user: bool = False,
    trims_assistant: bool = False,
    system_before_last: bool = False,
    system_joins_user: bool = False,
    every_part_is_first: bool = False,
) -> ChatFormat:
    """One in which user and assistant take turns, and the system message stands inside a user's: `system` has what stands
    before it and after it."""
    literals = {
        between(START, USER): first,
        between(USER, ASSISTANT): answered,
        between(USER, ANSWER): asked if opens_answer is None else opens_answer,
        between(ASSISTANT, USER): following,
    }
    if system is not None:
        literals |= {between(START, SYSTEM): first + system[0], between(SYSTEM, USER): system[1]}
        if system_before_last:
            literals[between(ASSISTANT, SYSTEM)] = following + system[0]
    left, right = [], []
    if trims_user:
        left += [between(START, USER), between(ASSISTANT, USER)]
        right += [between(USER, ASSISTANT), between(USER, ANSWER)]
    if trims_assistant:
        left.append(between(USER, ASSISTANT))
        right += [
            between(ASSISTANT, USER),
            *([between(ASSISTANT, SYSTEM)] if between(ASSISTANT, SYSTEM) in literals else []),
        ]
    return ChatFormat(
        name=name,
        literals=literals,
        trimmed_left=tuple(left),
        trimmed_right=tuple(right),
        system_before_last=system_before_last,
        system_joins_user=system_joins_user,
        every_part_is_first=every_part_is_first,
    )


def _tagged(name: str, end: str, *, begin: str = "") -> ChatFormat:
    """<|role|>, line break, content, end, line break."""
    system, user, assistant = (f"<|{role}|>\n{CONTENT}{end}\n" for role in _ROLES)
    return from_strings(name, begin=begin, system=system, user=user, assistant=assistant, answer="<|assistant|>\n")


def _with_headers(name: str, opens: str, closes: str, end: str, *, begin: str = "", trim: bool = False) -> ChatFormat:
    system, user, assistant = (f"{opens}{role}{closes}{CONTENT}{end}" for role in _ROLES)
    answer = f"{opens}{ASSISTANT}{closes}"
    return from_strings(name, begin=begin, system=system, user=user, assistant=assistant, answer=answer, trim=trim)


NAMED_FORMATS: Mapping[str, ChatFormat] = MappingProxyType(
    {
        chat_format.name: chat_format
        for chat_format in (
            _alternating(
                "llama-2",
                first=f"{BOS}[INST] ",
                asked=" [/INST]",
                answered=" [/INST] ",
                following=f" {EOS}{BOS}[INST] ",
                system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
                trims_user=True,
                trims_assistant=True,
                system_joins_user=True,
                every_part_is_first=True,
            ),
            _with_headers(
                "llama-3", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", begin=BOS, trim=True
            ),
            _with_headers("chatml", "<|im_start|>", "\n", "<|im_end|>\n"),
            _tagged("zephyr", EOS),
            _tagged("phi-3", "<|end|>"),
            from_strings(
                "vicuna",
                begin=BOS,
                system=f"{CONTENT} ",
                user=f"USER: {CONTENT} ",
                assistant=f"ASSISTANT: {CONTENT}{EOS}",
                answer="ASSISTANT:",
                default_system=_VICUNA_SYSTEM,
                systems_anywhere=False,
            ),
            _alternating(
                "mistral-v0.1",
                first=f"{BOS}[INST] ",
                asked=" [/INST]",
                answered=" [/INST]",
                following=f"{EOS} [INST] ",
            ),
            _alternating(
                "mistral-v0.2",
                first=f"{BOS}[INST] ",
                asked=" [/INST]",
                answered=" [/INST]",
                following=f"{EOS}[INST] ",
            ),
            _alternating(
                "mistral-v0.3",
                first=f"{BOS}[INST] ",
                asked="[/INST]",
                answered="[/INST] ",
                following=f"{EOS}[INST] ",
                system=("", "\n\n"),
                trims_assistant=True,
                system_before_last=True,
            ),
        )
    }
)
CHAT_FORMATS = tuple(NAMED_FORMATS)


def with_tokens(chat_format: ChatFormat, *, bos: str, eos: str) -> ChatFormat:
    """The format with the texts of a tokenizer's tokens."""
    literals = {key: text.replace(BOS, bos).replace(EOS, eos) for key, text in chat_format.literals.items()}
    return replace(chat_format, literals=literals)
