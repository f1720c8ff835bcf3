"""Ids of a stream's events, by which it is resumed: a client sends the last one that it has, as SSE's `Last-Event-ID`.

    TOKEN.EVENTS.TOKENS-EVENT,TOKENS-EVENT,...

is the resume token, the number of events until then, and of each choice the tokens until its last event and which of the
events at that token it was; nothing for a choice that has had none. A client needs to know nothing but to send the id back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from serving.contracts.errors import ValidationError
from serving.gateway.core.resume_tokens import Stream, as_text, from_text

RESUMABLE_HEADER = "x-packtrain-resumable"
LAST_EVENT_HEADER = "last-event-id"

_MAX_SHOWN_CHARS = 24
_MAX_CHOICES = 4096
"""More than limits.max_prompts and max_choices allow together."""


class Place(NamedTuple):
    """Of an event within its choice. Later ones are greater, however the tokens came together."""

    num_tokens: int
    """Of the choice, until the event."""
    rank: int
    """Among the events at so many tokens."""


class Event(NamedTuple):
    """One event of a stream before it is numbered."""

    choice: int
    place: Place
    data: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream had come."""

    token: bytes
    num_events: int
    places: tuple[Place | None, ...]
    """Of the last event of each choice; None where there was none."""

    @property
    def delivered(self) -> tuple[int, ...]:
        """Tokens of each choice."""
        return tuple(0 if place is None else place.num_tokens for place in self.places)


def resumable_of(values: Sequence[str]) -> bool:
    """Whether a client wants ids, from the values of its headers. Raises ValidationError."""
    if values and values not in (["0"], ["1"]):
        raise ValidationError(
            RESUMABLE_HEADER, f"{RESUMABLE_HEADER} is {values[0]!r:.40}; allowed: 1 for events with ids, or 0"
        )
    return values == ["1"]


def position_of(values: Sequence[str]) -> Position | None:
    """Where a client wants to go on, from the values of its headers. Raises ValidationError."""
    if not values:
        return None
    text = values[0]
    try:
        token, num_events, places = text.split(".")
        parts = places.split(",")
        if len(values) > 1 or len(parts) > _MAX_CHOICES:
            raise ValueError
        return Position(from_text(token), _number(num_events), tuple(map(_place, parts)))
    except ValueError:
        shown = text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"
        raise ValidationError(
            LAST_EVENT_HEADER,
            f"{LAST_EVENT_HEADER} is {shown!r}; allowed: the id of the last event that was received, as it came",
        ) from None


class EventIds:
    """Numbers the events of one stream, and leaves out what its client has."""

    def __init__(self, stream: Stream, has_ids: bool, resumed: Position | None) -> None:
        self._stream = stream
        self._has_ids = has_ids
        self._known = () if resumed is None else resumed.places
        self._places: list[Place | None] = list(self._known)
        self.num_events = 0 if resumed is None else resumed.num_events
        self._token = b""
        self._token_text = ""

    def new(self, events: Iterator[Event]) -> Iterator[tuple[msgspec.Struct, int, bytes]]:
        """(event, its number in the whole stream, the line with its id) of events that the client lacks."""
        for event in events:
            known = self._known[event.choice] if event.choice < len(self._known) else None
            if known is not None and event.place <= known:
                continue
            while len(self._places) <= event.choice:
                self._places.append(None)
            self._places[event.choice] = event.place
            self.num_events += 1
            yield event.data, self.num_events - 1, self._line()

    def _line(self) -> bytes:
        if not self._has_ids or not (token := self._stream.token()):
            return b""
        if token != self._token:
            self._token, self._token_text = token, as_text(token)
        places = ",".join("" if place is None else f"{place.num_tokens}-{place.rank}" for place in self._places)
        return f"id: {self._token_text}.{self.num_events}.{places}\n".encode()


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError
    return int(text)


def _place(text: str) -> Place | None:
    if not text:
        return None
    num_tokens, rank = text.split("-")
    return Place(_number(num_tokens), _number(rank))
