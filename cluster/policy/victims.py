"""Which groups to stop: those with the least to move."""

from collections.abc import Iterable

from cluster.policy.observation import GroupObservation, Phase


def choose_victims(groups: Iterable[GroupObservation], num: int) -> tuple[str, ...]:
    """Ids of so many groups, of none for a number below 1.

    Starting ones come first, the youngest before others, for nobody is on them; then those with the fewest open sequences, and of
    these with the least in their KV cache. A group that does not answer comes last.
    """

    def cost(group: GroupObservation) -> tuple[int, float, float, str]:
        if group.phase is Phase.STARTING:
            return (0, -group.since_s, 0.0, group.group)
        if group.load is None:
            return (2, 0.0, 0.0, group.group)
        return (1, group.load.num_open, group.load.kv_usage, group.group)

    if num <= 0:
        return ()
    standing = sorted((g for g in groups if g.phase is not Phase.DRAINING), key=cost)
    return tuple(group.group for group in standing[:num])
