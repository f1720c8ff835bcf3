"""A token bucket."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """Holds at most one minute's worth, and refills evenly. Without a limit it is endless, so that a new limit starts full."""

    level: float = math.inf
    refilled_s: float = 0.0

    def refill(self, limit: int | None, num_leased: int, now_s: float) -> None:
        """Bring the level up to date. `num_leased` are on lease and unused, and count as still inside."""
        elapsed_s = max(0.0, now_s - self.refilled_s)
        self.refilled_s = now_s
        self.level = math.inf if limit is None else min(self.level + limit * elapsed_s / 60, float(limit - num_leased))
