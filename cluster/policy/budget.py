"""Models that share accelerators: who may start how many groups, and who gives some up. A group is whole or absent."""

from collections.abc import Mapping
from dataclasses import dataclass

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model wants."""

    wanted: int
    """Groups."""
    target: int
    """Groups at present."""
    num_held: int
    """Groups that hold accelerators or have been ordered, draining ones included."""
    min_groups: int
    per_group: float
    """Accelerators."""
    priority: int
    may_shrink: bool
    """Giving up a group for another model is a change of direction too, and waits for its turn."""


def share(claims: Mapping[str, Claim], num_accelerators: float | None) -> dict[str, int]:
    """Groups that each model gets.

    A model grows only into what nobody holds, so the sum never exceeds the budget, also while groups drain. What is missing
    for a model's minimum, and then for models of higher priority, is given up by those of lower priority, down to their minimum.
    """
    granted = {model: min(claim.wanted, claim.target) for model, claim in claims.items()}
    if num_accelerators is None:
        return {model: claim.wanted for model, claim in claims.items()}
    free = num_accelerators - sum(claim.num_held * claim.per_group for claim in claims.values())
    order = sorted(claims, key=lambda model: (-claims[model].priority, model))
    for bound in ("min_groups", "wanted"):
        for model in order:
            claim = claims[model]
            goal = min(claim.wanted, claim.min_groups) if bound == "min_groups" else claim.wanted
            while granted[model] < goal and claim.per_group <= free + _ROUNDING:
                granted[model] += 1
                free -= claim.per_group
            missing = (goal - granted[model]) * claim.per_group
            if missing > 0:
                below = None if bound == "min_groups" else claim.priority
                if _will_come_free(granted, claims, missing - max(free, 0.0), order, below):
                    free = 0.0  # It is waited for; whoever comes after would take it away.
    return granted


def _will_come_free(
    granted: dict[str, int], claims: Mapping[str, Claim], missing: float, order: list[str], below: int | None
) -> bool:
    """Whether so much will be there once all that is ordered has happened. Orders groups of the lowest priorities to be given
    up for it."""
    missing -= sum(max(0, claim.num_held - granted[model]) * claim.per_group for model, claim in claims.items())
    for model in reversed(order):
        claim = claims[model]
        if not claim.may_shrink or (below is not None and claim.priority >= below):
            continue
        while missing > _ROUNDING and claim.min_groups < granted[model] <= claim.target:
            granted[model] -= 1
            missing -= claim.per_group
    return missing <= _ROUNDING
