"""What came of one request, whichever way it went."""

import math
import time
from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from bench.loadtest.work import Content

OK = "OK"
CANCELLED_BY_US = "CANCELLED_BY_CLIENT"
TRUNCATED = "TRUNCATED"
"""A stream ended without saying that it had."""


class Outcome(StrEnum):
    """How a request ended. Each that was sent has exactly one."""

    FINISHED = "finished"
    REFUSED = "refused"
    """The server declined before it began: full, over a quota, draining."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """By us: the run was over, or interrupted."""


class Stages(msgspec.Struct, frozen=True, array_like=True):
    """Where the server says the time went, in seconds."""

    gateway_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


@dataclass(slots=True)
class Reply:
    """Filled by a transport while an answer comes, so that a cancelled one keeps what it brought. Times are monotonic."""

    sent_s: float = 0.0
    ended_s: float | None = None
    """When it was known what came of it; None while it is not."""
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Of every chunk that brought tokens."""
    num_chunk_tokens: int = 0
    """Tokens that the chunks told of; of a server that does not tell, the number of chunks."""
    usage_prompt: int | None = None
    usage_output: int | None = None
    """As the server counts."""
    hidden_tokens: int = 0
    """Of usage_output, what the server says it thought and no chunk showed."""
    outcome: Outcome = Outcome.CANCELLED
    code: str = CANCELLED_BY_US
    reason: str = ""
    """A stable label that came with an error."""
    retry_after_s: float | None = None
    """When a refused client may come back; None where the server did not say, or said never."""
    stages: Stages | None = None
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def arrived(self, num_tokens: int) -> None:
        """A chunk with tokens is here."""
        self.times_s.append(time.monotonic())
        self.num_chunk_tokens += num_tokens

    def finish(self) -> None:
        self.ended_s = time.monotonic()
        self.outcome, self.code = Outcome.FINISHED, OK

    def fail(
        self, code: str, reason: str = "", *, is_refusal: bool = False, retry_after_s: float | None = None
    ) -> None:
        """What had begun cannot be refused any more."""
        self.ended_s = time.monotonic()
        self.outcome = Outcome.REFUSED if is_refusal and not self.times_s else Outcome.FAILED
        self.code, self.reason, self.retry_after_s = code, reason, retry_after_s


def told_wait(seconds: float) -> float | None:
    """What a server told as the time to wait; None when it is no time."""
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


class Transport(Protocol):
    """A tenant's connections to its server."""

    num_connections: int
    """That were opened to send requests."""

    async def open(self, timeout_s: float) -> None:
        """Connect. Raises ConnectionError."""

    def prepare(self, prompt: Content, output_tokens: int, label: str) -> object:
        """The request as bytes, made before its time comes."""

    async def ask(self, prepared: object, timeout_s: float, reply: Reply) -> None:
        """Send it and read the answer into `reply`. Raises nothing but CancelledError."""

    async def close(self) -> None:
        """End all connections."""
