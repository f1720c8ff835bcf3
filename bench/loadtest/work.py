"""What each request asks: a pure function of (seed, tenant, index), whoever sends it, so that a run can be repeated."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from bench.loadtest.scenario import (
    SHAREGPT_MEANS,
    Fixed,
    JsonLines,
    Lengths,
    LogNormal,
    ShareGptLike,
    Synthetic,
    Tenant,
    Trace,
    Uniform,
)
from bench.loadtest.words import WORDS

FIRST_TOKEN_ID = 100
"""Below it lie control tokens and single bytes in most vocabularies."""
MOONCAKE_BLOCK = 512
"""Tokens that one entry of hash_ids stands for (Mooncake's trace, FAST '25)."""

Message = tuple[str, str]
"""Role and content."""
Content = list[int] | str | list[Message]
"""Token ids, a text, or messages."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One line of a file. Of a trace: when and how long; otherwise what is asked, turn by turn."""

    at_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int | None = None
    blocks: list[int] = []
    turns: list[str] = []
    ids: list[int] = []
    messages: list[Message] = []


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a session."""

    content: Content
    """What is new in this turn."""
    output_tokens: int
    think_s: float
    """Between the answer before and this request."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a run must know of a tenant's server, found out once by whoever starts the run."""

    model: str
    vocab_size: int
    tokens_per_word: float


class Workload:
    """The sessions of one tenant."""

    def __init__(self, tenant: Tenant, seed: int, facts: Facts, entries: Sequence[Entry]) -> None:
        self._tenant, self._facts, self._entries = tenant, facts, entries
        self._root = f"{seed}/{tenant.name}"
        self._block = lru_cache(maxsize=4096)(self._make_block)
        self._prefix = lru_cache(maxsize=1024)(self._make_prefix)

    @property
    def num_sessions(self) -> int | None:
        """None: as many as wanted. A trace ends; other files begin again."""
        return len(self._entries) if isinstance(self._tenant.work, Trace) else None

    def at_s(self, index: int) -> float:
        """When a trace's request is due."""
        return self._entries[index].at_s

    def session(self, index: int) -> list[Turn]:
        """The turns of session `index`."""
        draw = random.Random(f"{self._root}/{index}")
        work = self._tenant.work
        if isinstance(work, Synthetic):
            return self._synthetic(work, draw)
        entry = self._entries[index % len(self._entries)]
        if isinstance(work, Trace):
            return [self._of_trace(entry, draw)]
        if isinstance(work, JsonLines):
            output_tokens = entry.output_tokens or sample(work.output_tokens, draw, "output")
            content: Content = entry.ids or entry.messages or entry.turns[0]
            return [Turn(content=self._as_form(content), output_tokens=output_tokens, think_s=0.0)]
        return [
            Turn(
                content=self._as_form(text),
                output_tokens=sample(work.output_tokens, draw, "output"),
                think_s=_pause(work.think_s, draw) if number else 0.0,
            )
            for number, text in enumerate(entry.turns[: work.max_turns])
        ]

    def _synthetic(self, work: Synthetic, draw: random.Random) -> list[Turn]:
        turns = []
        for number in range(sample(work.turns.count, draw, "output")):
            num_tokens = sample(work.input_tokens, draw, "input")
            shared = self._prefix(draw.randrange(work.prefix.count)) if work.prefix and not number else ()
            turns.append(
                Turn(
                    content=self._content(shared, num_tokens, draw),
                    output_tokens=sample(work.output_tokens, draw, "output"),
                    think_s=_pause(work.turns.think_s, draw) if number else 0.0,
                )
            )
        return turns

    def _of_trace(self, entry: Entry, draw: random.Random) -> Turn:
        assert isinstance(self._tenant.work, Trace)
        longest = self._tenant.work.max_tokens
        output_tokens = min(entry.output_tokens or 1, longest - 1)
        num_tokens = max(1, min(entry.input_tokens, longest - output_tokens))
        shared: list[int] = []
        for block in entry.blocks:
            if len(shared) >= num_tokens:
                break
            shared += self._block(block)
        shared = shared[:num_tokens]
        return Turn(
            content=self._content(shared, num_tokens - len(shared), draw), output_tokens=output_tokens, think_s=0.0
        )

    def _content(self, shared: Sequence[int], num_tokens: int, draw: random.Random) -> Content:
        """Random tokens after shared ones, in the tenant's form."""
        if self._tenant.chosen_form == "ids":
            return [*shared, *self._ids(num_tokens, draw)]
        num_words = max(1, round(num_tokens / self._facts.tokens_per_word)) if num_tokens else 0
        words = [WORDS[token % len(WORDS)] for token in shared[: round(len(shared) / self._facts.tokens_per_word)]]
        return self._as_form(" ".join(words + draw.choices(WORDS, k=num_words)))

    def _as_form(self, content: Content) -> Content:
        """Text as a message where the tenant sends those."""
        if isinstance(content, str) and self._tenant.chosen_form == "chat":
            return [("user", content)]
        return content

    def _ids(self, num_tokens: int, draw: random.Random) -> list[int]:
        lowest = min(FIRST_TOKEN_ID, self._facts.vocab_size // 2)
        width, uniform = self._facts.vocab_size - lowest, draw.random
        return [lowest + int(uniform() * width) for _ in range(num_tokens)]

    def _make_prefix(self, number: int) -> tuple[int, ...]:
        assert isinstance(self._tenant.work, Synthetic) and self._tenant.work.prefix
        draw = random.Random(f"{self._root}/prefix/{number}")
        return tuple(self._ids(self._tenant.work.prefix.tokens, draw))

    def _make_block(self, number: int) -> tuple[int, ...]:
        return tuple(self._ids(MOONCAKE_BLOCK, random.Random(f"{self._root}/block/{number}")))


def sample(lengths: Lengths, draw: random.Random, side: str) -> int:
    """A number of tokens. `side` is "input" or "output"."""
    match lengths:
        case Fixed():
            return lengths.tokens
        case Uniform():
            return draw.randint(lengths.min, lengths.max)
        case LogNormal():
            return _log_normal(lengths.mean, lengths.sigma, lengths.min, lengths.max, draw)
        case ShareGptLike():
            return _log_normal(SHAREGPT_MEANS[side], 1.0, 4, lengths.max, draw)


def _log_normal(mean: float, sigma: float, lowest: int, highest: int, draw: random.Random) -> int:
    """The mean is that before the bounds; mu = ln(mean) − sigma² / 2."""
    return min(highest, max(lowest, round(draw.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def _pause(mean_s: float, draw: random.Random) -> float:
    return draw.expovariate(1 / mean_s) if mean_s else 0.0


def extended(history: Content | None, new: Content) -> Content:
    """A conversation with `new` after `history`; both in the same form."""
    if history is None:
        return new
    if isinstance(history, str):
        assert isinstance(new, str)
        return f"{history}\n{new}"
    assert not isinstance(new, str)
    return [*history, *new]


def answered(prompt: Content, text: str, token_ids: list[int]) -> Content:
    """The history after an answer."""
    if isinstance(prompt, str):
        return prompt + text
    if prompt and isinstance(prompt[0], tuple):
        return [*prompt, ("assistant", text)]
    return [*prompt, *token_ids]
