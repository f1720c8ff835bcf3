"""Which groups to stop: those with the least to move."""

from collections.abc import Iterable

from cluster.policy.observation import GroupObservation, Phase


def choose_victims(groups: Iterable[GroupObservation], num: int) -> tuple[str, ...]:
    """Ids of so many groups, of none for a number below 1.

    Starting ones come first, the youngest before others, for nobody is on them; then those that would have the fewest tokens
    computed again elsewhere, idle ones before all others, and of equals the one that frees a node, or is nearest to it. A group
    that does not answer comes last.
    """

    def cost(group: GroupObservation) -> tuple[int, float, float, float, str]:
        if group.phase is Phase.STARTING:
            return (0, -group.since_s, 0.0, 0.0, group.group)
        if (load := group.load) is None:
            return (2, 0.0, 0.0, 0.0, group.group)
        num_tokens = load.kv_usage * load.kv_cache_tokens + load.num_waiting_tokens
        return (1, num_tokens if load.num_open else -1.0, load.num_open, group.num_beside, group.group)

    if num <= 0:
        return ()
    standing = sorted((g for g in groups if g.phase is not Phase.DRAINING), key=cost)
    return tuple(group.group for group in standing[:num])
