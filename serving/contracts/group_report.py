"""What the leader of a replica group reports to the gateways."""

import msgspec

PERIOD_S = 2.0
"""Between two reports of a group to a gateway."""
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class GroupReport(msgspec.Struct, frozen=True, kw_only=True):
    """One group at this moment."""

    engine: str
    """Id of the group, new with every incarnation."""
    is_healthy: bool = True
    stats: dict[str, float] = {}
    """Load and totals of its scheduler, by name. Empty when the group counts with another gateway."""
    iteration_counts: tuple[int, ...] = ()
    """Steps by their number of tokens: one number for each of ITERATION_TOKENS_BUCKETS, and one for more."""
    num_iteration_tokens: int = 0
    cache_config: dict[str, str] = {}
