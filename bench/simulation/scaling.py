"""Who decides how many groups there are: the autoscaler's own policy, or Ray Serve's rule to compare it with."""

import math
from collections import deque
from collections.abc import Sequence

from bench.simulation.fleet import Controller, Fleet
from bench.simulation.scenario import Scaling


def make_controller(scaling: Scaling | None) -> Controller | None:
    """Of a scenario; None keeps the number of groups."""
    if scaling is None:
        return None
    if scaling.policy == "ongoing":
        return OngoingController(scaling)
    from bench.simulation.packtrain_policy import PolicyController  # noqa: PLC0415  # of an optional part

    return PolicyController(scaling)


class OngoingController:
    """Ray Serve's default: open requests over target_ongoing, once that has been asked for long enough without a break."""

    def __init__(self, scaling: Scaling) -> None:
        self.period_s = scaling.period_s
        self._scaling = scaling
        self._asked: deque[tuple[float, int]] = deque()
        """(time, groups) of the longest delay."""

    def decide(self, fleet: Fleet) -> tuple[int, Sequence[str]]:
        scaling, now_s = self._scaling, fleet.clock.now_s
        standing = [member for member in fleet.members.values() if member.phase != "draining"]
        num_open = sum(len(member.jobs) for member in standing)
        wanted = min(max(math.ceil(num_open / scaling.target_ongoing), scaling.min_groups), scaling.max_groups)
        self._asked.append((now_s, wanted))
        longest_s = max(scaling.upscale_delay_s, scaling.downscale_delay_s)
        while self._asked and self._asked[0][0] < now_s - longest_s:
            self._asked.popleft()
        target = len(standing)
        if now_s >= scaling.upscale_delay_s:
            lately = [groups for at_s, groups in self._asked if at_s >= now_s - scaling.upscale_delay_s]
            target = max(target, min(lately))
        if target == len(standing) and now_s >= scaling.downscale_delay_s:
            since = [groups for at_s, groups in self._asked if at_s >= now_s - scaling.downscale_delay_s]
            target = min(target, max(since))
        # Serve stops those that do not run yet first, and otherwise the newest.
        order = sorted(standing, key=lambda member: (member.phase == "running", -member.born_tick))
        return target, [member.name for member in order]
