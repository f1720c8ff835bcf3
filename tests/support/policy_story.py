"""One model under a load that the test sets, told to the policy every few seconds."""

from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from cluster.policy import (
    GatewayLoad,
    GatewayObservation,
    GroupObservation,
    ModelDecision,
    ModelObservation,
    ModelPolicy,
    Observation,
    Phase,
    PolicyConfig,
    PolicyState,
    StepLine,
    decide,
)
from tests.support.policy_worlds import group_load

PERIOD_S = 5.0
LINE = StepLine(base_s=0.02, sequence_s=0.0005, prompt_token_s=0.0001)
NUM_PROMPT, NUM_OUTPUT = 200, 100
SERVICE_S = NUM_PROMPT * 0.0001 + NUM_OUTPUT * 0.0005
"""Price of a sequence: 0.07 s."""
RATE_OF_A_GROUP = (1 - 0.02 / 0.05) / SERVICE_S
"""Sequences a second within a TPOT of 50 ms: 8.57."""


@dataclass
class Story:
    """Groups that do what the policy says, after `start_s`."""

    policy: ModelPolicy
    num_groups: int = 1
    rate: float = 0.0
    start_s: float = 30.0
    period_s: float = PERIOD_S
    now_s: float = 10_000.0
    state: PolicyState = field(default_factory=PolicyState)
    is_advice: bool = False
    """The policy is asked and not obeyed."""
    changed: dict[str, object] = field(default_factory=dict)
    """What every running group tells otherwise."""
    changed_of: dict[str, dict[str, object]] = field(default_factory=dict)
    """The same of one group, by its name."""
    silent: set[str] = field(default_factory=set)
    """Groups that do not answer."""
    gateway_is_silent: bool = False
    num_held: int = 0
    num_prompt: int = NUM_PROMPT
    targets: list[int] = field(default_factory=list)
    decisions: list[ModelDecision] = field(default_factory=list)
    groups: list[GroupObservation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target, self.num_sequences, self.num_tokens, self.num_named = self.num_groups, 0.0, 0.0, 0
        for _ in range(self.num_groups):
            self.groups.append(self._named(Phase.RUNNING))

    def _named(self, phase: Phase) -> GroupObservation:
        self.num_named += 1
        return GroupObservation(group=f"g{self.num_named}", phase=phase, since_s=self.now_s)

    @property
    def num_running(self) -> int:
        return sum(group.phase is Phase.RUNNING for group in self.groups)

    def run(self, seconds: float) -> ModelDecision:
        """Let time pass; the last decision."""
        for _ in range(int(seconds / self.period_s)):
            self.tick()
        return self.decisions[-1]

    def tick(self) -> ModelDecision:
        """One look."""
        self.now_s += self.period_s
        self.num_sequences += self.rate * self.period_s
        self.num_tokens += self.rate * self.period_s * self.num_prompt
        self.groups = [self._grown(group) for group in self.groups if group.phase is not Phase.DRAINING]
        observation = Observation(models={"m": self.observed()})
        decision, self.state = decide(observation, self.state, PolicyConfig(models={"m": self.policy}), self.now_s)
        made = decision.models["m"]
        self.decisions.append(made)
        self.targets.append(made.target)
        if not self.is_advice:
            self._obey(made)
        return made

    def observed(self) -> ModelObservation:
        load = GatewayLoad(
            measured_s=self.now_s,
            num_sequences=int(self.num_sequences),
            num_prompt_tokens=int(self.num_tokens),
            num_held=self.num_held,
            num_held_tokens=self.num_held * self.num_prompt,
        )
        gateway = GatewayObservation(gateway="gateway", load=None if self.gateway_is_silent else load)
        return ModelObservation(target=self.target, groups=tuple(self.groups), gateways=(gateway,))

    def _grown(self, group: GroupObservation) -> GroupObservation:
        start_s = group.start_s
        if group.phase is Phase.STARTING:
            if self.now_s - group.since_s < self.start_s:
                return group
            start_s = self.now_s - group.since_s
            group = msgspec.structs.replace(group, phase=Phase.RUNNING, since_s=self.now_s)
        share = self.rate / max(self.num_running, 1)
        utilisation = min(share * SERVICE_S, 0.9)
        num_running = min(int(share * NUM_OUTPUT * 0.02 / (1 - utilisation)), 32)
        load = group_load(self.now_s, num_running=num_running, kv_usage=min(num_running * 250 / 20_000, 1.0))
        load = (
            None
            if group.group in self.silent
            else msgspec.structs.replace(load, **{**self.changed, **self.changed_of.get(group.group, {})})
        )
        return msgspec.structs.replace(group, load=load, start_s=start_s)

    def _obey(self, made: ModelDecision) -> None:
        self.groups = [
            msgspec.structs.replace(group, phase=Phase.DRAINING) if group.group in made.victims else group
            for group in self.groups
        ]
        self.groups += [self._named(Phase.STARTING) for _ in range(made.target - self.target)]
        self.target = made.target

    @property
    def num_reversals(self) -> int:
        changes = [b - a for a, b in pairwise(self.targets) if a != b]
        return sum(a * b < 0 for a, b in pairwise(changes))
