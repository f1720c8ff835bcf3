"""From what a client gives to the token ids that the engine computes."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial

from serving.contracts.errors import ValidationError
from serving.contracts.models import ModelCard
from serving.gateway.core.tools import ToolUse, with_tools
from serving.gateway.core.validate import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from serving.text.chat import ChatError, named_format, render_chat
from serving.text.tokenizer import Tokenizer

# Longer texts are tokenised in a thread: the event loop streams other requests' tokens meanwhile.
_LONG_TEXT_CHARS = 8192


class PromptEncoder:
    """Tokenises the prompts of one model. Every method takes prompts that `validate` has passed."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self._card = card
        self._tokenizer = tokenizer
        longest_token_bytes = max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
        self._max_text_bytes = card.max_model_len * longest_token_bytes

    async def encode(
        self,
        field: str,
        prompt: Prompt,
        *,
        parse_special: bool = False,
        tools: ToolUse | None = None,
        now: datetime | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a prompt; `tools` are told in a conversation. `now`: what a chat format writes as the date and time; the
        present when None.

        Raises ValidationError for a conversation out of order, or a hopelessly long text.
        """
        match prompt:
            case TokenPrompt(token_ids):
                return tuple(token_ids)
            case TextPrompt(text):
                return await self.encode_text(field, text, parse_special=parse_special)
            case ChatPrompt():
                return await self._encode_chat(prompt, tools, now or datetime.now())

    async def encode_text(
        self, field: str, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a text. Raises ValidationError for one that cannot fit whatever its tokens are."""
        self._check_length(field, len(text))
        encode = partial(self._tokenizer.encode, text, add_bos=add_bos, parse_special=parse_special)
        return tuple(await _run(len(text), encode))

    async def encode_pair(
        self, context: Prompt, index: int, continuation: TextPrompt | TokenPrompt
    ) -> tuple[tuple[int, ...], int]:
        """Token ids of context and continuation, and how many of them are the context's, which is at least one.

        As lm-eval's `_encode_pair` does it: texts are tokenised together, after the context's trailing spaces have
        moved to the continuation, and an empty context is the token that begins a sequence. Raises ValidationError.
        """
        field = f"continuations[{index}]"
        if isinstance(context, TextPrompt) and isinstance(continuation, TextPrompt):
            before = context.text.rstrip()
            after = context.text[len(before) :] + continuation.text
            if before:
                whole = await self.encode_text(field, before + after)
                start = len(await self.encode_text("context", before))
            else:
                whole = (self._first_token(), *await self.encode_text(field, after, add_bos=False))
                start = 1
        else:
            beginning = await self.encode("context", context) or (self._first_token(),)
            if isinstance(continuation, TextPrompt):
                end = await self.encode_text(field, continuation.text, add_bos=False)
            else:
                end = tuple(continuation.token_ids)
            whole, start = beginning + end, len(beginning)
        if len(whole) <= start:
            raise ValidationError(field, f"{field} adds no token to the context's {start}")
        if len(whole) > self._card.max_model_len:
            raise ValidationError(
                field,
                f"{field} has {len(whole)} tokens with its context; max_model_len is {self._card.max_model_len}",
                is_too_long=True,
            )
        return whole, start

    async def _encode_chat(self, prompt: ChatPrompt, tools: ToolUse | None, now: datetime) -> tuple[int, ...]:
        num_chars = 0
        for index, message in enumerate(prompt.messages):
            self._check_length(f"messages[{index}]", len(message.content))
            num_chars += len(message.content)
        self._check_length("messages", num_chars)
        chat_format = self._card.chat or named_format(self._card.chat_format, self._tokenizer)
        messages = prompt.messages
        if tools is not None and tools.is_used:
            messages = with_tools(messages, tools, chat_format, self._card.chat_default_system)
            num_chars = sum(len(message.content) for message in messages)
            self._check_length("tools", num_chars, "with messages ")
        try:
            token_ids = await _run(
                num_chars,
                lambda: render_chat(
                    messages,
                    chat_format=chat_format,
                    default_system=self._card.chat_default_system,
                    tokenizer=self._tokenizer,
                    continues_last=prompt.continues_last,
                    today=lambda: now,
                ),
            )
        except ChatError as error:
            field = f"messages[{error.index}]"
            raise ValidationError(field, f"{field}: {error.message}") from error
        return tuple(token_ids)

    def _check_length(self, field: str, num_chars: int, counted: str = "") -> None:
        # Refuses megabytes without spending seconds on their tokens; what passes is counted exactly later.
        if num_chars > self._max_text_bytes:
            raise ValidationError(
                field,
                f"{field} {counted}has {num_chars} characters, which cannot fit into max_model_len, {self._card.max_model_len}",
                is_too_long=True,
            )

    def _first_token(self) -> int:
        if self._card.bos_token_id is not None:
            return self._card.bos_token_id
        if self._card.eos_token_ids:
            return self._card.eos_token_ids[0]
        raise ValidationError("context", f"context is empty and model {self._card.name!r} has no token to stand for it")


async def _run(num_chars: int, tokenise: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(tokenise) if num_chars > _LONG_TEXT_CHARS else tokenise()
