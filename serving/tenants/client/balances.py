"""What is left of rates, as far as a gateway can tell without asking anybody.

That is what the authority said last, less what this gateway has let in since, plus what has refilled since.
"""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

from serving.contracts.accounts import RateLimit, RateLimits
from serving.tenants.messages import NOTHING, Amounts, Balance
from serving.tenants.records import Limits


@dataclass(slots=True)
class _Known:
    told: Balance
    told_s: float
    unseen: Amounts
    """Taken out of leases here, less what was given back, of which the authority did not know when it said this."""
    unsent: Amounts
    """The part of it that no exchange has told of."""
    is_old: bool = False
    """There was no news since the last `forget_old`."""


class Balances:
    """Of the subjects that the authority has spoken of lately."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def take(self, subject: str, amounts: Amounts) -> None:
        """A request has taken this out of a lease."""
        if known := self._known.get(subject):
            known.unseen += amounts
            known.unsent += amounts

    def give_back(self, subject: str, amounts: Amounts) -> None:
        """A request has not used this."""
        if known := self._known.get(subject):
            known.unseen -= amounts
            known.unsent -= amounts

    def sent(self, subjects: Iterable[str]) -> None:
        """The exchange that goes out now tells what was taken and given back of these."""
        for subject in subjects:
            if known := self._known.get(subject):
                known.unsent = NOTHING

    def take_news(self, balances: Iterable[Balance], now_s: float) -> None:
        """Of the reply to that exchange."""
        for told in balances:
            known = self._known.get(told.subject)
            unsent = known.unsent if known else NOTHING
            self._known[told.subject] = _Known(told, now_s, unseen=unsent, unsent=unsent)

    def forget_old(self, in_use: Container[str]) -> None:
        """Those of which there was no news since the last call, unless requests or leases hold some of them."""
        for subject, known in list(self._known.items()):
            if known.is_old and subject not in in_use:
                del self._known[subject]
            known.is_old = True

    def rates(self, subject: str, limits: Limits, now_s: float) -> RateLimits:
        """None of a rate that has no limit, or of which nothing is known."""
        known = self._known.get(subject)
        if known is None:
            return RateLimits()
        elapsed_s = now_s - known.told_s
        requests, tokens = known.told.requests - known.unseen.requests, known.told.tokens - known.unseen.tokens
        return RateLimits(
            requests=_rate(limits.requests_per_minute, requests, elapsed_s),
            tokens=_rate(limits.tokens_per_minute, tokens, elapsed_s),
        )


def tighter(one: RateLimits, other: RateLimits) -> RateLimits:
    """Of each rate, the one of which less is left."""
    return RateLimits(requests=_tighter(one.requests, other.requests), tokens=_tighter(one.tokens, other.tokens))


def _tighter(*rates: RateLimit | None) -> RateLimit | None:
    return min((rate for rate in rates if rate), key=lambda rate: (rate.remaining, rate.limit), default=None)


def _rate(limit: int | None, remaining: float, elapsed_s: float) -> RateLimit | None:
    if limit is None:
        return None
    now_remaining = min(remaining + limit * elapsed_s / 60, float(limit))
    return RateLimit(
        limit=limit, remaining=max(0, math.floor(now_remaining)), reset_s=(limit - now_remaining) * 60 / limit
    )
