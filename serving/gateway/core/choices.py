"""From the engine's tokens to the text of one choice: detokenisation, stop strings, and where the choice ends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from model_parallel.engine.request import EngineOutput, FinishReason, Timings, TokenLogprobs
from serving.contracts.errors import ValidationError
from serving.text.detokenizer import IncrementalDetokenizer, StopStrings
from serving.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a whole request took, told once at its end."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache gave to every choice of their prompt."""
    num_accepted_tokens: int
    """Completion tokens that had been drafted."""
    num_rejected_tokens: int
    """Tokens that were drafted and are not in the answer."""
    group: Timings | None
    """Of the slowest choice, stage by stage."""
    gateway_s: float
    """From arrival until a group got the request."""
    total_s: float
    """From arrival to the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What one step brought for one choice."""

    index: int
    num_tokens: int = 0
    """Of the choice until now, this chunk's included."""
    prompt_token_ids: tuple[int, ...] = ()
    """What the choice's prompt became; the same on every chunk."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    """Of each token, where in the choice's whole text its first character stands."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """STOP or LENGTH, on the last chunk of the choice."""
    summary: Summary | None = None
    """On the last chunk of the request."""


class Choice:
    """One choice on its way: the engine's outputs in, chunks of text out."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        prompt_token_ids: tuple[int, ...],
        reports_prompt: bool,
        continues_text: bool,
        shows_special: bool = False,
    ) -> None:
        """The first choice of a prompt reports its log-probabilities. With `continues_text` the answer goes on where the
        prompt's text ends, so a space that begins it is kept. With `shows_special` control tokens are part of the text."""
        self.index = index
        self._prompt_token_ids = prompt_token_ids
        self._reports_prompt = reports_prompt
        self.finished = False
        self.num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, continues_text=continues_text, shows_special=shows_special
        )
        self._num_chars = 0
        """Of the text until now, with what is held back."""
        self._stops = StopStrings(stops)

    def take_around(self, output: EngineOutput, num_known: int) -> Iterator[Chunk]:
        """The same in chunks that end, or do not, with the first `num_known` tokens of the choice, which the client has.

        Raises ValidationError when the choice ends before.
        """
        num_first = num_known - self.num_tokens
        for part in _split(output, num_first) if 0 < num_first < len(output.token_ids) else (output,):
            chunk = self.take(part)
            if self.finished and self.num_tokens < num_known:
                field = f"resume_from.num_tokens[{self.index}]"
                raise ValidationError(field, f"{field} is {num_known}, and the choice has {self.num_tokens} tokens")
            yield chunk
            if self.finished:
                return

    def take(self, output: EngineOutput) -> Chunk:
        """The chunk that an output makes. Tokens after a stop string are dropped, however many came with it.

        The text of a token that ends the choice is not part of the answer; the token is.
        """
        speaks = output.token_ids if output.stop_token_id is None else output.token_ids[:-1]
        text, offsets = self._push(speaks)
        num_tokens = len(offsets)
        finish_reason = output.finish_reason
        if self._stops.matched is None:
            num_tokens = len(output.token_ids)
            offsets += [self._num_chars] * (num_tokens - len(offsets))
            if finish_reason is not None:
                text += self._stops.push(self._detokenizer.flush())
                if self._stops.matched is None:
                    text += self._stops.flush()
        if self._stops.matched is not None:
            finish_reason = FinishReason.STOP
        self.finished = finish_reason is not None
        self.num_tokens += num_tokens
        return Chunk(
            index=self.index,
            num_tokens=self.num_tokens,
            prompt_token_ids=self._prompt_token_ids,
            text=text,
            token_ids=output.token_ids[:num_tokens],
            offsets=tuple(offsets),
            logprobs=output.logprobs[:num_tokens],
            prompt_logprobs=output.prompt_logprobs if self._reports_prompt else (),
            finish_reason=finish_reason,
        )

    def _push(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Text of the tokens up to a stop string, and where each of these begins."""
        text, offsets = "", []
        for token_id in token_ids:
            offsets.append(self._num_chars)
            new = self._detokenizer.push((token_id,))
            self._num_chars += len(new)
            text += self._stops.push(new)
            if self._stops.matched is not None:
                break
        return text, offsets


def _split(output: EngineOutput, num_first: int) -> tuple[EngineOutput, EngineOutput]:
    """Two outputs, as two steps would have brought them: the first has so many tokens."""
    replace = msgspec.structs.replace
    token_ids, logprobs = output.token_ids, output.logprobs
    first = replace(
        output, token_ids=token_ids[:num_first], logprobs=logprobs[:num_first], finish_reason=None, stop_token_id=None
    )
    return first, replace(output, token_ids=token_ids[num_first:], logprobs=logprobs[num_first:], prompt_logprobs=())
