"""What the policy answers."""

from enum import StrEnum

import msgspec


class Cause(StrEnum):
    """Why a model gets the number of groups that it gets. A label of metrics, so there are few."""

    STEADY = "steady"
    DEMAND = "demand"
    BACKLOG = "backlog"
    KV_CACHE = "kv_cache"
    WAKE = "wake"
    FEWER_SUFFICE = "fewer_suffice"
    IDLE = "idle"
    BOUNDS = "bounds"
    BUDGET = "budget"
    COOLDOWN = "cooldown"
    STUCK_START = "stuck_start"
    NO_METRICS = "no_metrics"
    NOT_MEASURED = "not_measured"
    CLOCK = "clock"


class ModelDecision(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model."""

    target: int
    """Groups that there should be from now on."""
    before: int
    """Groups that there should have been."""
    cause: Cause
    reason: str
    """A sentence with the numbers."""
    victims: tuple[str, ...] = ()
    """Groups to stop, when there are to be fewer."""
    warnings: tuple[str, ...] = ()
    """What an operator should look at."""
    demand_s: float | None = None
    """Seconds of service a second that are expected when a group started now can serve."""
    capacity_s: float | None = None
    """Seconds of service a second that one group gives within the service level."""
    predicted_ttft_s: float | None = None
    """Of a mean request on `target` groups at that demand; None also where it would grow without bound."""
    predicted_tpot_s: float | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Of all models, at one time."""

    now_s: float
    models: dict[str, ModelDecision]
