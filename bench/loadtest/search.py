"""The highest rate that keeps an SLO, by bisection; every rate is measured several times, and the majority decides.

That a server which cannot keep its SLO at one rate cannot at a higher one is taken for granted (monotony), so each verdict rules
out all rates on one side. A single unlucky run must not do that, hence the repeats.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

MAX_PROBES = 64


@dataclass(frozen=True, slots=True)
class Probe:
    """One run at one rate."""

    rate: float
    passed: bool
    why: str
    """What did not hold."""
    result: dict[str, Any]


@dataclass(slots=True)
class Found:
    """What a search came to."""

    rate: float | None = None
    """The highest rate that passed; None when none did."""
    failed_at: float | None = None
    """The lowest that did not; None when the search ended before there was one."""
    ended_because: str = ""
    is_cut_short: bool = False
    """A run said nothing of the rates that the server bears."""
    probes: list[Probe] = field(default_factory=list)


class NothingKnownError(Exception):
    """A run says nothing of the rates that the server bears: the client cannot send so much, it was interrupted, or the server is
    gone. It is the last."""


Measure = Callable[[float], Awaitable[Probe]]


async def search(
    measure: Measure, *, start: float, lowest: float, highest: float, precision: float, repeats: int
) -> Found:
    """Doubles or halves from `start` until a passing and a failing rate are known, then bisects to a ratio of 1 + precision.

    `start` is between `lowest` and `highest`.
    """
    found = Found()
    rate = start
    while len(found.probes) < MAX_PROBES:
        try:
            passed = await _majority(measure, rate, repeats, found.probes)
        except NothingKnownError as error:
            found.ended_because, found.is_cut_short = f"at {rate:g}/s {error}", True
            return found
        if passed:
            found.rate = rate
        else:
            found.failed_at = rate
        step = _next(found, lowest, highest, precision)
        if isinstance(step, str):
            found.ended_because = step
            return found
        rate = step
    found.ended_because = f"{MAX_PROBES} runs were made"
    return found


def _next(found: Found, lowest: float, highest: float, precision: float) -> float | str:
    """The rate to try, or why there is none."""
    if found.rate is None:
        assert found.failed_at is not None
        return "even the lowest rate does not pass" if found.failed_at <= lowest else max(lowest, found.failed_at / 2)
    if found.failed_at is None:
        return "the highest rate allowed passes" if found.rate >= highest else min(highest, 2 * found.rate)
    if found.failed_at <= found.rate * (1 + precision):
        return f"known to {precision:.0%}"
    return float((found.rate * found.failed_at) ** 0.5)


async def _majority(measure: Measure, rate: float, repeats: int, probes: list[Probe]) -> bool:
    """More than half of `repeats` runs must pass. Stops as soon as the rest cannot change it."""
    passed = failed = 0
    while 2 * passed <= repeats and 2 * failed < repeats:
        probe = await measure(rate)
        probes.append(probe)
        passed, failed = passed + probe.passed, failed + (not probe.passed)
    return 2 * passed > repeats
