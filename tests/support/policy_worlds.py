"""Random histories of models, groups and gateways for the autoscaling policy, and a checker of what must hold in each."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cluster.policy import (
    Cause,
    Decision,
    GatewayLoad,
    GatewayObservation,
    GroupLoad,
    GroupObservation,
    ModelObservation,
    ModelPolicy,
    Observation,
    Phase,
    PolicyConfig,
    PolicyState,
    StepLine,
    decide,
    decode_state,
    encode_state,
)

Decide = Callable[[Observation, PolicyState, PolicyConfig, float], tuple[Decision, PolicyState]]

LINE = StepLine(base_s=0.02, sequence_s=0.0005, prompt_token_s=0.0001)
MAX_NUM_SEQS = 32
KV_TOKENS = 20_000


def group_load(now_s: float, **changed: object) -> GroupLoad:
    """Of an idle group, with what is to be different."""
    load = GroupLoad(
        measured_s=now_s,
        num_running=0,
        num_waiting=0,
        num_waiting_tokens=0,
        kv_usage=0.0,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_tokens=KV_TOKENS,
        line=LINE,
        mean_output_tokens=100.0,
    )
    return msgspec.structs.replace(load, **changed)


def running(name: str, now_s: float, **changed: object) -> GroupObservation:
    """A group that runs."""
    return GroupObservation(group=name, phase=Phase.RUNNING, since_s=now_s - 1000, load=group_load(now_s, **changed))


def starting(name: str, since_s: float) -> GroupObservation:
    """A group that is being placed or loads."""
    return GroupObservation(group=name, phase=Phase.STARTING, since_s=since_s)


def draining(name: str, since_s: float, **changed: object) -> GroupObservation:
    """A group that only finishes what it has."""
    return GroupObservation(group=name, phase=Phase.DRAINING, since_s=since_s, load=group_load(since_s, **changed))


class ViolationError(AssertionError):
    """A history in which something does not hold that must."""


@dataclass
class _Group:
    name: str
    phase: Phase
    since_s: float
    ready_s: float
    ordered_s: float
    gone_s: float = math.inf


@dataclass
class World:
    """Some models on a cluster, and what a policy makes of them. One seed is one history."""

    seed: int
    decide: Decide = decide
    num_ticks: int = 9
    now_s: float = 1000.0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.models: dict[str, ModelPolicy] = {}
        self.groups: dict[str, list[_Group]] = {}
        self.targets: dict[str, int] = {}
        self.totals: dict[str, list[int]] = {}
        self.rates: dict[str, float] = {}
        self.num_named = 0
        self.is_quiet = rng.random() < 0.15
        """Little arrives all the time, and each model has one group that never answers: nothing but that keeps the others."""
        self.silent: set[str] = set()
        budget = 0.0
        for model in ("a", "b")[: 1 + (rng.random() < 0.3)]:
            least = rng.choice((0, 0, 1, 1, 2))
            policy = ModelPolicy(
                min_groups=least,
                max_groups=max(1, least + rng.randrange(5)),
                accelerators_per_group=rng.choice((1.0, 2.0, 8.0)),
                priority=rng.randrange(3),
                expected_start_s=rng.choice((5.0, 30.0, 90.0)),
                shrink_after_s=rng.choice((None, 20.0, 60.0)),
                cooldown_s=rng.choice((10.0, 30.0, 120.0)),
                idle_s=rng.choice((20.0, 60.0)),
                start_timeout_s=60.0,
                ttft_p99_s=rng.choice((0.01, 1.0, 3.0)),
                tpot_p99_s=rng.choice((0.005, 0.03, 0.1)),
            )
            self.models[model] = policy
            self.targets[model] = rng.randint(least, policy.max_groups)
            self.groups[model] = []
            for _ in range(self.targets[model]):
                self._order(model, ready_after_s=0.0)
            self.silent |= {group.name for group in self.groups[model][:1] if self.is_quiet}
            self.totals[model] = [0, 0]
            self.rates[model] = 1.0 if self.is_quiet else rng.choice((0.0, 1.0, 10.0, 60.0))
            budget += self.targets[model] * policy.accelerators_per_group
        self.budget = None if rng.random() < 0.4 else budget + rng.randrange(12)
        self.config = PolicyConfig(models=self.models)
        self.state = PolicyState()

    def run(self) -> None:
        """Raises ViolationError."""
        checker = Checker(self.config, self.budget)
        for _ in range(self.num_ticks):
            rng = self.rng
            self.now_s += rng.choice((5.0, 5.0, 10.0, 20.0, 40.0)) if rng.random() < 0.97 else -rng.choice((5.0, 500.0))
            self._live()
            observation = self.observe()
            decision, self.state = self.decide(observation, self.state, self.config, self.now_s)
            checker.check(observation, decision, self.now_s)
            if rng.random() < 0.1 and decode_state(encode_state(self.state)) != self.state:
                raise ViolationError("the state is not the same after it was written and read")
            if rng.random() < 0.95:  # otherwise the order is lost on its way
                self._obey(decision)

    def _order(self, model: str, ready_after_s: float) -> None:
        self.num_named += 1
        phase = Phase.STARTING if ready_after_s else Phase.RUNNING
        self.groups[model].append(
            _Group(f"{model}{self.num_named}", phase, self.now_s, self.now_s + ready_after_s, self.now_s)
        )

    def _live(self) -> None:
        rng = self.rng
        for model, groups in self.groups.items():
            if not self.is_quiet and rng.random() < 0.25:
                self.rates[model] = rng.choice((0.0, 0.0, 1.0, 10.0, 60.0, 300.0))
            for group in list(groups):
                if group.phase is Phase.STARTING and self.now_s >= group.ready_s:
                    group.phase, group.since_s = Phase.RUNNING, self.now_s
                if self.now_s >= group.gone_s or rng.random() < 0.01:
                    groups.remove(group)
            while sum(group.phase is not Phase.DRAINING for group in groups) < self.targets[model]:
                self._order(model, rng.choice((5.0, 30.0, 1000.0)))
            num = int(self.rates[model] * 5)
            self.totals[model][0] += num
            self.totals[model][1] += num * rng.choice((10, 500))

    def _obey(self, decision: Decision) -> None:
        for model, made in decision.models.items():
            self.targets[model] = made.target
            for group in self.groups[model]:
                if group.name in made.victims and group.phase is not Phase.DRAINING:
                    group.gone_s = self.now_s + self.rng.choice((0.0, 10.0, 60.0))
                    group.phase, group.since_s = Phase.DRAINING, self.now_s

    def observe(self) -> Observation:
        """With what can be wrong with reports."""
        rng = self.rng
        is_dark = rng.random() < 0.06
        models = {}
        for model, groups in self.groups.items():
            gateways = tuple(
                GatewayObservation(gateway=f"gateway-{n}", load=None if is_dark else self._gateway_load(model, n))
                for n in range(1 + rng.randrange(2))
            )
            models[model] = ModelObservation(
                target=self.targets[model],
                groups=tuple(self._observe_group(group, is_dark) for group in groups),
                gateways=gateways,
            )
        return Observation(models=models, num_accelerators=self.budget)

    def _gateway_load(self, model: str, number: int) -> GatewayLoad | None:
        rng = self.rng
        if number:
            return GatewayLoad(measured_s=self.now_s, num_sequences=0, num_prompt_tokens=0)
        if rng.random() < 0.04:
            return rng.choice((None, GatewayLoad(measured_s=math.nan, num_sequences=1, num_prompt_tokens=1)))
        held = rng.randrange(5) if not self.targets[model] and self.rates[model] else 0
        sequences, tokens = self.totals[model]
        if rng.random() < 0.02:
            sequences = -sequences
        return GatewayLoad(
            measured_s=self.now_s - (0 if rng.random() < 0.9 else rng.choice((3.0, 100.0))),
            num_sequences=sequences,
            num_prompt_tokens=tokens,
            num_held=held,
            num_held_tokens=held * 100,
        )

    def _observe_group(self, group: _Group, is_dark: bool) -> GroupObservation:
        rng = self.rng
        load: GroupLoad | None = None
        if group.phase is not Phase.STARTING and not is_dark and group.name not in self.silent:
            num_running = rng.randrange(2 if self.is_quiet else MAX_NUM_SEQS + 1)
            load = group_load(
                self.now_s - rng.random(),
                num_running=num_running,
                num_waiting=0 if self.is_quiet else rng.choice((0, 0, 50)),
                kv_usage=min(1.0, num_running / MAX_NUM_SEQS),
                line=LINE if rng.random() < 0.95 else None,
            )
            if rng.random() < 0.05:
                load = msgspec.structs.replace(load, **rng.choice(BAD_LOADS))
        return GroupObservation(
            group=group.name,
            phase=group.phase,
            since_s=group.since_s,
            load=load,
            start_s=None if group.phase is Phase.STARTING else rng.choice((None, 20.0)),
        )


BAD_LOADS: tuple[dict[str, object], ...] = (
    {"measured_s": math.nan},
    {"measured_s": 0.0},
    {"measured_s": 1e12},
    {"kv_usage": math.nan},
    {"kv_usage": -0.5},
    {"kv_usage": 7.0},
    {"num_running": -1},
    {"num_running": 10**9},
    {"num_waiting_tokens": -3},
    {"mean_output_tokens": math.inf},
    {"num_ended_answers": -1},
    {"line": StepLine(base_s=math.nan, sequence_s=0.0, prompt_token_s=0.0)},
    {"line": StepLine(base_s=0.0, sequence_s=0.0, prompt_token_s=0.0)},
    {"line": StepLine(base_s=-1.0, sequence_s=0.1, prompt_token_s=0.0)},
    {"cached_share": 1.5},
    {"kv_cache_tokens": 0},
)
"""Each is a report that cannot be."""


def is_bad(load: GroupLoad | None, now_s: float) -> bool:
    """Written without the policy's own checks."""
    if load is None or not now_s - 15 <= load.measured_s <= now_s + 1:
        return True
    shares = (load.kv_usage, load.cached_share)
    counts = (load.num_running, load.num_waiting, load.num_waiting_tokens)
    numbers = [load.mean_output_tokens or 0.0]
    if load.line is not None:
        numbers += [load.line.base_s, load.line.sequence_s, load.line.prompt_token_s]
    is_number = all(math.isfinite(number) and number >= 0 for number in numbers)
    takes_time = load.line is None or load.line.base_s + load.line.sequence_s > 0
    is_count = min(counts) >= 0 and load.num_running <= load.max_num_seqs and load.kv_cache_tokens > 0
    return not (all(0 <= share <= 1 for share in shares) and is_count and is_number and takes_time)


class Checker:
    """What must hold for every decision, told from observations and decisions alone."""

    def __init__(self, config: PolicyConfig, budget: float | None) -> None:
        self._config, self._budget = config, budget
        self._last: dict[str, int] = {}
        self._direction: dict[str, int] = {}
        self._reversed_s: dict[str, float] = {}
        self._last_s = -math.inf
        self._was_set_back = False

    def check(self, observation: Observation, decision: Decision, now_s: float) -> None:
        """Raises ViolationError."""
        self._was_set_back = now_s < self._last_s
        if self._was_set_back:  # times from before mean nothing any more
            self._reversed_s = {model: min(at_s, now_s) for model, at_s in self._reversed_s.items()}
        self._last_s = now_s
        held = 0.0
        has_grown = False
        for model, made in decision.models.items():
            observed, policy = observation.models[model], self._config.models[model]
            self._check_turns(model, observed, policy, now_s)
            self._check_bounds(made.target, observed.target, policy)
            self._check_victims(made.victims, observed, made.target)
            self._check_bad_input(made.target, made.cause, observed, policy, now_s)
            if not made.reason or made.before != observed.target:
                raise ViolationError(f"{model}: no reason, or another number of groups before")
            for predicted in (made.predicted_ttft_s, made.predicted_tpot_s, made.demand_s, made.capacity_s):
                if predicted is not None and not 0 <= predicted < math.inf:
                    raise ViolationError(f"{model}: a predicted value is {predicted}")
            num_draining = sum(group.phase is Phase.DRAINING for group in observed.groups)
            standing = len(observed.groups) - num_draining
            held += (max(made.target, observed.target, standing) + num_draining) * policy.accelerators_per_group
            has_grown |= made.target > observed.target
        if has_grown and self._budget is not None and held > self._budget + 1e-6:
            raise ViolationError(f"{held} accelerators are held or ordered, and there are {self._budget}")

    def _check_bounds(self, target: int, before: int, policy: ModelPolicy) -> None:
        if target > max(policy.max_groups, 0) or target < 0:
            raise ViolationError(f"{target} groups, max_groups is {policy.max_groups}")
        if target < policy.min_groups and target < before:
            raise ViolationError(f"{target} groups, min_groups is {policy.min_groups}")

    def _check_turns(self, model: str, observed: ModelObservation, policy: ModelPolicy, now_s: float) -> None:
        last = self._last.get(model)
        self._last[model] = observed.target
        if last is None or observed.target == last:
            return
        direction = 1 if observed.target > last else -1
        if self._direction.get(model) == -direction:
            # What is seen now was ordered at the last look, so a clock that was set back since does not tell how long ago
            # the other reversal was then.
            before_s = None if self._was_set_back else self._reversed_s.get(model)
            if before_s is not None and last != 0 and now_s - before_s < policy.cooldown_s:
                raise ViolationError(f"{model}: two reversals within {now_s - before_s:.0f} s")
            self._reversed_s[model] = now_s
        self._direction[model] = direction

    def _check_victims(self, victims: tuple[str, ...], observed: ModelObservation, target: int) -> None:
        standing = {group.group for group in observed.groups if group.phase is not Phase.DRAINING}
        most = min(len(standing), max(0, observed.target - target))
        if len(set(victims)) != len(victims) or not set(victims) <= standing or len(victims) != most:
            raise ViolationError(f"from {observed.target} to {target} groups, and the victims are {victims}")

    def _check_bad_input(
        self, target: int, cause: Cause, observed: ModelObservation, policy: ModelPolicy, now_s: float
    ) -> None:
        up = [group for group in observed.groups if group.phase is Phase.RUNNING]
        bad = [group for group in up if is_bad(group.load, now_s)]
        is_outside = not policy.min_groups <= observed.target <= policy.max_groups
        if bad and target < observed.target and not is_outside:
            raise ViolationError(f"stopped groups, and {len(bad)} of {len(up)} had told nothing ({cause})")
        if up and len(bad) == len(up) and target > observed.target and not is_outside and observed.target:
            raise ViolationError(f"started groups although none had told anything ({cause})")
        if all(gateway.load is None for gateway in observed.gateways) and target != observed.target and not is_outside:
            raise ViolationError(f"changed although no gateway had told anything ({cause})")
