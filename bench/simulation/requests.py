"""The requests of a simulation as columns, and how each of them ended."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from bench.simulation.group import first_token_of


class Status(IntEnum):
    """How a request ended. Each that was sent ends in exactly one of these but NOT_SENT."""

    NOT_SENT = 0
    """Its time never came: the simulation ended, or the turn before it had no answer."""
    OPEN = 1
    """In flight. None is when a simulation has ended."""
    FINISHED = 2
    REFUSED_OVERLOADED = 3
    REFUSED_QUOTA = 4
    REFUSED_INVALID = 5
    """It can never fit."""
    FAILED_DEADLINE = 6
    FAILED_LOST = 7
    """Its group was lost, or there was no group."""
    CANCELLED = 8
    """Its client gave up."""


FINISHED = frozenset({Status.FINISHED})
REFUSED = frozenset({Status.REFUSED_OVERLOADED, Status.REFUSED_QUOTA, Status.REFUSED_INVALID})
FAILED = frozenset({Status.FAILED_DEADLINE, Status.FAILED_LOST})
CANCELLED = frozenset({Status.CANCELLED})


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantTraits:
    """What all requests of a tenant have in common."""

    name: str
    weight: float = 1.0
    priority: int = 0
    deadline_s: float | None = None
    patience_s: float | None = None
    """The client gives up when no token has come after so long."""


@dataclass(kw_only=True)
class Requests:
    """Columns of equal length, in order of `ticks`. Request i is content i + 1, see group.first_token_of."""

    tenants: Sequence[TenantTraits]
    ticks: "array[int]"
    """When each arrives. Of a later turn of a session: how long after the end of the turn before."""
    tenant: "array[int]"
    prompt_tokens: "array[int]"
    """New ones; a later turn's prompt is these after all that the session had until then."""
    output_tokens: "array[int]"
    """What the answer has in the end."""
    max_tokens: "array[int]"
    """What the client allows. Where it is more, a stop token ends the answer."""
    prefixes: dict[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """Of a request that begins with shared content: (content below 0, tokens) in order."""
    next_turn: dict[int, int] = field(default_factory=dict)
    """The request that follows when this one has finished."""
    later_turns: frozenset[int] = frozenset()
    num_cut: int = 0
    """Whose prompt or answer was cut to the model's length."""
    notes: Sequence[str] = ()
    """What of the scenario was cut or left out."""

    def __len__(self) -> int:
        return len(self.ticks)

    def end_of(self, index: int, num_prompt_tokens: int) -> int:
        """Position of the stop token; beyond everything where max_tokens ends the answer."""
        output = self.output_tokens[index]
        return num_prompt_tokens + output - 1 if output < self.max_tokens[index] else sys.maxsize

    def prompt(self, index: int, history: Sequence[int], *, with_content: bool) -> tuple[int, ...]:
        """Token ids. Without content all are 0, which takes less time and only matters to a prefix cache."""
        num_new = self.prompt_tokens[index]
        if not with_content:
            return _without_content(len(history) + num_new)
        tokens = list(history)
        end = len(history) + num_new
        for content, length in self.prefixes.get(index, ()):
            first, start = first_token_of(content), len(tokens)
            tokens.extend(range(first, first + min(length, end - start)))
        own, start = first_token_of(index + 1), len(tokens)
        tokens.extend(range(own + start, own + end))
        return tuple(tokens)


@lru_cache(maxsize=4096)
def _without_content(num_tokens: int) -> tuple[int, ...]:
    """Prompts of a length are one object: a large fleet is slow where its memory does not fit the processor's caches."""
    return (0,) * num_tokens


class Outcomes:
    """What became of the requests: columns of the same length."""

    def __init__(self, num_requests: int) -> None:
        def zeros(kind: str) -> "array[float]":
            return array(kind, bytes(array(kind).itemsize * num_requests))

        self.status = bytearray(num_requests)
        self.arrived_s = zeros("d")
        self.ttft_s = zeros("d")
        """From arrival to the first token at the client; 0 where none came."""
        self.e2e_s = zeros("d")
        """From arrival to the end."""
        self.queue_s = zeros("f")
        self.prefill_s = zeros("f")
        self.decode_s = zeros("f")
        self.num_prompt = zeros("f")
        """Of the prompt as it was sent: of a later turn with all that the session had until then."""
        self.num_output = zeros("f")
        self.num_cached = zeros("f")
        self.num_migrations = zeros("f")

    def __len__(self) -> int:
        return len(self.status)
