"""Token ids to text as they come: no character is ever split, and no part of a stop string is ever let through."""

import codecs
from collections.abc import Sequence

from serving.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence, in pieces that join to what `Tokenizer.decode` gives for the whole.

    With `continues_text` the sequence goes on after other text, so a leading space belongs to it and is kept. With
    `shows_special` control tokens are spelt.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues_text: bool = False, shows_special: bool = False) -> None:
        self._token_bytes = tokenizer.spelt_bytes if shows_special else tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_leading_space and not continues_text

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete; the bytes of an unfinished one wait."""
        data = b"".join(map(self._token_bytes, token_ids))
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What waits, at the end: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a text at the first stop string that is completed in it, however the text is cut into pieces.

    Where two are completed by the same character, the longer one, which begins earlier, wins. Text that may be the
    beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings; the validator has seen to it."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show. After a match, shown by `matched`, always empty."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
