"""Conversations to token ids, in code: no template language runs, so none can be abused.

Control tokens come from the format alone, placed by id. Llama 2 also marks roles with ordinary text ([INST] and its
like); a message that holds such a mark could forge a role, and is refused as Meta's reference does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model_parallel.errors import ConfigError
from serving.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_LLAMA_2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


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


def render_chat(
    messages: Sequence[ChatMessage], *, chat_format: str, default_system: str, tokenizer: Tokenizer
) -> list[int]:
    """The prompt that asks for the assistant's next answer. `default_system` is used when there is no system message.

    Raises ChatError for a wrong conversation, and ConfigError for a format that the model cannot have.
    """
    if chat_format not in ("llama-2", "chatml"):
        raise ConfigError(f"chat format {chat_format!r} is not known; allowed: llama-2, chatml")
    _check_roles(messages, alternate=chat_format == "llama-2")
    if messages[0].role != "system" and default_system:
        messages = [ChatMessage("system", default_system), *messages]
    return _llama_2(messages, tokenizer) if chat_format == "llama-2" else _chatml(messages, tokenizer)


def _check_roles(messages: Sequence[ChatMessage], *, alternate: bool) -> None:
    if not messages:
        raise ChatError(0, "at least one message is needed")
    num_system = messages[0].role == "system"
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise ChatError(index, f"role is {message.role!r:.40}; allowed: {', '.join(ROLES)}")
        if message.role == "system" and index > 0:
            raise ChatError(index, "a system message may only come first")
        expected = ROLES[1 + (index - num_system) % 2]
        if alternate and index >= num_system and message.role != expected:
            raise ChatError(index, f"role is {message.role!r}; roles must alternate user/assistant, here {expected!r}")
        if alternate and any(tag in message.content for tag in _LLAMA_2_TAGS):
            raise ChatError(index, f"special tags are not allowed in a message: {', '.join(_LLAMA_2_TAGS)}")
    if messages[-1].role != "user":
        raise ChatError(len(messages) - 1, f"the last message is of {messages[-1].role!r}; it must be the user's")


def _llama_2(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[int]:
    """BOS [INST] user [/INST] assistant EOS BOS [INST] …; the system text stands inside the first user turn."""
    if tokenizer.bos_token_id is None or not tokenizer.eos_token_ids:
        raise ConfigError("the llama-2 chat format needs a tokenizer with BOS and EOS")
    system = ""
    if messages[0].role == "system":
        system, messages = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n", messages[1:]
    ids: list[int] = []
    for index in range(0, len(messages), 2):
        text = f"[INST] {(system + messages[index].content).strip()} [/INST]"
        system = ""
        ids.append(tokenizer.bos_token_id)
        if index + 1 == len(messages):
            return ids + tokenizer.encode(text, add_bos=False)
        ids += tokenizer.encode(f"{text} {messages[index + 1].content.strip()} ", add_bos=False)
        ids.append(tokenizer.eos_token_ids[0])
    return ids


def _chatml(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[int]:
    """<|im_start|>role, line break, content<|im_end|>, line break; then the assistant's turn is opened."""
    start, end = tokenizer.control_token_id("<|im_start|>"), tokenizer.control_token_id("<|im_end|>")
    ids: list[int] = []
    for message in messages:
        ids += [start, *tokenizer.encode(f"{message.role}\n{message.content}", add_bos=False), end]
        ids += tokenizer.encode("\n", add_bos=False)
    return [*ids, start, *tokenizer.encode("assistant\n", add_bos=False)]
