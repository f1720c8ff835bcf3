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

    A model grows only into what nobody holds, so the sum never exceeds the budget, also while groups drain. What a model lacks
    for its minimum, and then for what it wants, is given up by models of lower priority (for a minimum, by all), down to their
    own minimum: as much as a whole group needs, or nothing. If more is held than there is, the lowest priorities give it up.
    """
    granted = {model: min(claim.wanted, claim.target) for model, claim in claims.items()}
    if num_accelerators is None:
        return {model: claim.wanted for model, claim in claims.items()}
    free = num_accelerators - sum(claim.num_held * claim.per_group for claim in claims.values())
    order = sorted(claims, key=lambda model: (-claims[model].priority, model))
    granted, _ = _given_up(granted, claims, -free, order, below=None)
    promised = 0.0
    """To groups that wait until enough comes free. Nobody starts meanwhile, who would take it away."""
    num_waiting = dict.fromkeys(claims, 0)
    for bound in ("min_groups", "wanted"):
        for model in order:
            claim = claims[model]
            goal = min(claim.wanted, claim.min_groups) if bound == "min_groups" else claim.wanted
            below = None if bound == "min_groups" else claim.priority
            while granted[model] < goal and not promised and claim.per_group <= free + _ROUNDING:
                granted[model] += 1
                free -= claim.per_group
            while granted[model] + num_waiting[model] < goal:
                missing = promised + claim.per_group - free
                others, missing = _given_up(granted, claims, missing, order, below)
                if missing > _ROUNDING:
                    break
                granted = others
                promised += claim.per_group
                num_waiting[model] += 1
    return granted


def _given_up(
    granted: Mapping[str, int], claims: Mapping[str, Claim], missing: float, order: list[str], below: int | None
) -> tuple[dict[str, int], float]:
    """What is granted when the lowest priorities (`below` that one) give up what is missing, and how much is missing still. What
    will come free by itself, because it drains or was ordered to, counts first."""
    left = dict(granted)
    missing -= sum(max(0, claim.num_held - left[model]) * claim.per_group for model, claim in claims.items())
    for model in reversed(order):
        claim = claims[model]
        if not claim.may_shrink or (below is not None and claim.priority >= below):
            continue
        while missing > _ROUNDING and claim.min_groups < left[model] <= claim.target:
            left[model] -= 1
            missing -= claim.per_group
    return left, missing
