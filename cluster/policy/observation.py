"""What the policy is told. Times are seconds of one wall clock, the one that `now` is read from."""

from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """Where a group is in its life."""

    STARTING = "starting"
    """Wanted: it is being placed or loads its weights. Holds accelerators, serves nobody."""
    RUNNING = "running"
    DRAINING = "draining"
    """Takes nothing new and ends when its last request has. Holds accelerators."""


class StepLine(msgspec.Struct, frozen=True, kw_only=True):
    """How long one step of a group takes, fitted to measured steps: base + sequence · decoding sequences + prompt_token ·
    prompt tokens."""

    base_s: float
    sequence_s: float
    prompt_token_s: float

    def step_s(self, num_sequences: float, num_prompt_tokens: float = 0.0) -> float:
        """Of a step with so many of each."""
        return self.base_s + self.sequence_s * num_sequences + self.prompt_token_s * num_prompt_tokens


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a running group tells of itself."""

    measured_s: float
    """When."""
    num_running: int
    """Sequences that decode or whose prompt is computed."""
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens of those."""
    kv_usage: float
    """Share of the KV cache that sequences hold, 0 to 1."""
    max_num_seqs: int
    kv_cache_tokens: int
    line: StepLine | None = None
    """None before enough was measured."""
    mean_output_tokens: float | None = None
    """Of a whole answer; None before one has ended."""
    num_ended_answers: int = 1
    """That the mean is known from: so much it counts beside those of other groups."""
    cached_share: float = 0.0
    """Share of prompt tokens that the prefix cache holds, 0 to 1. Those cost nothing."""

    @property
    def num_open(self) -> int:
        """What would have to end or move before the group can stop."""
        return self.num_running + self.num_waiting


class GroupObservation(msgspec.Struct, frozen=True, kw_only=True):
    """One replica group. It is one group whatever the number of its ranks and nodes."""

    group: str
    """Id, new with every incarnation."""
    phase: Phase
    since_s: float
    """When it entered the phase."""
    load: GroupLoad | None = None
    """None when it does not answer."""
    start_s: float | None = None
    """How long its start took, from being wanted to serving; None where nobody saw it."""
    num_beside: int = 0
    """Other groups on its leader's node. When the last one has gone, the node can go."""


class GatewayLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has seen of one model. Demand is counted here, where it arrives, once and whatever becomes of it:
    requests that are refused or held are demand too."""

    measured_s: float
    num_sequences: int
    """Choices of all requests since the gateway started."""
    num_prompt_tokens: int
    """Of those sequences, since the gateway started."""
    num_held: int = 0
    """Sequences that wait in the gateway now because the model has no group."""
    num_held_tokens: int = 0
    """Prompt tokens of those."""


class GatewayObservation(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway, as far as it concerns one model."""

    gateway: str
    """Id, new with every incarnation."""
    load: GatewayLoad | None = None
    """None when it does not answer."""


class ModelObservation(msgspec.Struct, frozen=True, kw_only=True):
    """One model: its groups, and the gateways that take its requests."""

    target: int
    """Groups that there should be at present, draining ones not counted: what was last ordered."""
    groups: tuple[GroupObservation, ...]
    gateways: tuple[GatewayObservation, ...]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """All models, at one time."""

    models: dict[str, ModelObservation]
    num_accelerators: float | None = None
    """What the groups of all models may hold together; None where nothing bounds them but `max_groups`."""
