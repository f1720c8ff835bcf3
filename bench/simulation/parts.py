"""What a fleet is made of: groups, gateways, requests on their way, and what befalls them."""

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.simulation.balance import Balance
from bench.simulation.cost import CostTable
from bench.simulation.group import VirtualGroup
from bench.simulation.quotas import Grant
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.request import EngineRequest
from model_parallel.engine.sequence import Sequence as Run
from serving.gateway.core.admission import RecentRefusals
from serving.gateway.core.resumption import MIN_RECOVERY_PAUSE_S
from serving.gateway.groups.loads import GroupLoads

MODEL = "simulated"
"""What gateways call it."""


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """What every group of the fleet is like."""

    costs: CostTable
    scheduler: SchedulerConfig
    cache: CacheConfig
    start_s: float = 0.0
    """From being wanted to serving."""
    sharing: float = 0.0
    """Groups that share the processors of one machine: a step takes so much longer, as a part of its time, for each other group
    that computes."""


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """A fleet and what befalls it."""

    shape: GroupShape
    num_groups: int
    num_gateways: int = 1
    request_s: float = 0.0
    """From a request's arrival at a gateway until a group has it."""
    output_s: float = 0.0
    """From the end of a step until the client has what it brought."""
    detect_s: float = 1.0
    """From the loss of a group until the gateway knows."""
    failures_s: Sequence[float] = ()
    """At each of these times one group that serves, drawn at random, is lost, and replaced after `start_s`."""
    later_costs: Sequence[tuple[float, CostTable]] = ()
    """(time, costs): steps that begin from then on cost this, because the machine is slower or faster."""
    migration: bool = True
    """What a lost group was working on goes on in another one."""
    jumps: bool = True
    sample_s: float = 10.0
    """How often the state of the fleet is noted."""


@dataclass(slots=True, eq=False)
class Member:
    """A group of the fleet."""

    name: str
    group: VirtualGroup
    born_tick: int
    since_tick: int
    """When it entered its phase."""
    phase: str = "running"
    """starting, running or draining."""
    version: int = 0
    """Of its entry among the events that counts; older ones are void."""
    start_ticks: int | None = None
    """How long its start took, where there was one."""
    is_busy: bool = False
    """Its ranks compute, as far as other groups have been told."""
    num_open: int = 0
    tell_tick: int = -1
    """When it next tells gateways how busy it is."""
    jobs: "dict[str, Job]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the fleet."""

    index: int
    gateway: "VirtualGateway"
    request: EngineRequest
    run: Run | None = None
    member: Member | None = None
    num_tries: int = 0
    is_resumed: bool = False
    """Its group was lost, and it may wait for another."""
    recover_until_s: float = math.inf
    pause_s: float = MIN_RECOVERY_PAUSE_S
    """Until it is offered again."""
    first_token_s: float | None = None
    grant: Grant | None = None
    num_migrations: int = 0
    prompt_load: int = 0
    """What its prompt adds to the load of its group, until it is computed."""


class VirtualGateway:
    """The parts of a gateway that decide: loads of the groups, routing, and remembered refusals."""

    def __init__(self, name: str, clock: Callable[[], float], rng: random.Random) -> None:
        self.name = name
        self.loads = GroupLoads(clock)
        self.balance = Balance(self.loads, rng)
        self.refusals = RecentRefusals(clock, rng.uniform)
        self.on_their_way: dict[str, int] = {}
        self.num_sequences = 0
        """Of all requests that came, whatever became of them."""
        self.num_prompt_tokens = 0

    def refresh(self, engine: str) -> None:
        self.balance.refresh(engine, self.on_their_way.get(engine, 0))


@dataclass(slots=True)
class Samples:
    """The state of the fleet over time, summed over all groups."""

    at_s: "array[float]" = field(default_factory=lambda: array("d"))
    num_groups: "array[float]" = field(default_factory=lambda: array("d"))
    """That hold accelerators."""
    num_serving: "array[float]" = field(default_factory=lambda: array("d"))
    num_running: "array[float]" = field(default_factory=lambda: array("d"))
    num_waiting: "array[float]" = field(default_factory=lambda: array("d"))
