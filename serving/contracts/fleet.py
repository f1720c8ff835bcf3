"""What the autoscaler tells every gateway of the groups, what a gateway answers of its demand, and a group of its end."""

from enum import StrEnum

import msgspec


class Departure(StrEnum):
    """How far a group is that is to be one too many."""

    NONE = ""
    RETIRING = "retiring"
    """Takes nothing new."""
    RETIRED = "retired"
    """Nothing runs on it any more. It waits for its leave."""


class ModelDemand(msgspec.Struct, frozen=True):
    """What has arrived for a model since the gateway serves it, whatever became of it."""

    num_sequences: int
    """Choices of all requests."""
    num_prompt_tokens: int
    """Of those sequences."""
    num_held: int = 0
    """Sequences that wait in the gateway now because the model has no group."""
    num_held_tokens: int = 0
    """Prompt tokens of those."""


class GatewayDemand(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway's answer."""

    gateway: str
    """Id, new with every incarnation."""
    models: dict[str, ModelDemand]
    """All that it serves, also those that nobody has asked for."""


class FleetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One replica group."""

    group: str
    """Id, new with every incarnation."""
    state: str
    """starting, running or draining; lost where no autoscaler looks and a rank is gone."""
    since_s: float | None = None
    """Wall clock, when it entered the state, as far as somebody has seen it."""
    num_running: int | None = None
    """Sequences; None when the group does not answer."""
    num_waiting: int | None = None
    kv_usage: float | None = None
    """0 to 1."""


class FleetModel(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of one model."""

    mode: str
    """What becomes of decisions: advise or on; off where none are made."""
    target: int
    """Groups that there should be."""
    min_groups: int
    max_groups: int
    groups: tuple[FleetGroup, ...]
    state: str = "serving"
    """Or "replacing", while its groups are replaced by others."""
    num_decisions: dict[str, int] = {}
    """Changes of the number of groups that were decided, by cause, since the autoscaler's process started."""

    @property
    def num_running(self) -> int:
        """Groups that take requests."""
        return sum(group.state == "running" for group in self.groups)

    @property
    def is_asleep(self) -> bool:
        """It has no group, and gets one when somebody asks."""
        return self.mode == "on" and not self.min_groups and not self.num_running


class FleetDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision of the autoscaler, and from when to when it was the same."""

    first_s: float
    """Wall clock."""
    last_s: float
    model: str
    mode: str
    before: int
    """Groups."""
    target: int
    """Groups."""
    cause: str
    reason: str
    warnings: tuple[str, ...] = ()
    error: str = ""
    """Why it was not carried out."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """All models that the autoscaler looks after. Where there is none, a gateway makes it up of what groups report."""

    at_s: float
    """Wall clock, when it looked."""
    shown_by: str = ""
    """Id of the gateway whose metrics show it: one, so that sums over gateways are true."""
    models: dict[str, FleetModel] = {}
    decisions: tuple[FleetDecision, ...] = ()
    """The last ones, oldest first."""
