"""What is wanted of each model, and the bounds that no decision ever breaks."""

import math

import msgspec

from model_parallel.errors import ConfigError

STALE_AFTER_S = 15.0


class ModelPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model."""

    min_groups: int = 1
    """0 lets a model that nobody asks for go to sleep."""
    max_groups: int = 1
    ttft_p99_s: float = 2.0
    """99 of 100 requests have their first token within this."""
    tpot_p99_s: float = 0.1
    """99 of 100 requests have each further token within this, on average over the request."""
    accelerators_per_group: float = 1.0
    """What a whole group holds of `Observation.num_accelerators`."""
    priority: int = 0
    """When accelerators are short, higher goes first."""
    expected_start_s: float = 60.0
    """How long a start takes, until one was measured."""
    start_timeout_s: float = 600.0
    """A start that takes longer is not expected to end any more."""
    shrink_after_s: float | None = None
    """How long fewer groups must have been enough before some are stopped, and how long after growing nothing is. None is
    half of the measured start time."""
    cooldown_s: float = 30.0
    """The direction changes at most once in this time; waking a sleeping model alone is exempt."""
    idle_s: float = 600.0
    """Without a request for so long, a model with min_groups 0 goes to sleep."""
    stale_after_s: float = STALE_AFTER_S
    """What was measured longer ago is not known any more. At least the time between two looks."""
    max_kv_usage: float = 0.9
    """Of a group's KV cache. Beyond, sequences are preempted for want of blocks."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field."""
        if not 0 <= self.min_groups <= self.max_groups or self.max_groups < 1:
            raise ConfigError(
                f"min_groups is {self.min_groups} and max_groups {self.max_groups}; "
                "0 <= min_groups <= max_groups and 1 <= max_groups must hold"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be greater than 0")
        if self.shrink_after_s is not None and not 0 < self.shrink_after_s < math.inf:
            raise ConfigError(f"shrink_after_s is {self.shrink_after_s}; it must be greater than 0")
        if not 0 < self.max_kv_usage <= 1:
            raise ConfigError(f"max_kv_usage is {self.max_kv_usage}; it must be greater than 0 and at most 1")


_POSITIVE = (
    "ttft_p99_s", "tpot_p99_s", "accelerators_per_group", "expected_start_s", "start_timeout_s", "cooldown_s", "idle_s",
    "stale_after_s",
)  # fmt: skip


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of all models."""

    models: dict[str, ModelPolicy]
    advised: frozenset[str] = frozenset()
    """Of those, the ones whose decisions are told and not carried out. Nobody gives up a group for them."""
