"""Many groups behind gateways on one virtual clock: who gets which request, what is lost with a group, and how many groups
there are."""

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Protocol

from bench.simulation.clock import TICKS_PER_S, VirtualClock, to_ticks
from bench.simulation.cost import CostTable
from bench.simulation.group import STOP_TOKEN, VirtualGroup
from bench.simulation.parts import MODEL, FleetSpec, Job, Member, Samples, VirtualGateway
from bench.simulation.quotas import Grant, Quotas
from bench.simulation.requests import Outcomes, Requests, Status
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, SamplingParams
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.errors import RequestError
from serving.contracts.errors import GroupRefusedError
from serving.contracts.group_link import HEARTBEAT_S
from serving.gateway.core.resumption import MAX_RECOVERY_PAUSE_S, MIN_RECOVERY_PAUSE_S, RECOVERY_TIMEOUT_S
from serving.gateway.groups.loads import prompt_load
from serving.tenants.messages import Decision
from serving.tenants.records import Limits

CONTROL, DELIVERY, ARRIVAL, GROUP = range(4)
"""Order of what happens at the same moment."""
TELL_TICKS = to_ticks(HEARTBEAT_S)


class Controller(Protocol):
    """Decides how many groups there should be."""

    period_s: float

    def decide(self, fleet: "Fleet") -> tuple[int, Sequence[str]]:
        """The target, and which groups are to go first when it is lower."""
        ...


class Fleet:
    """One simulation. Build it, `run` it once, and read what came of it."""

    def __init__(
        self,
        spec: FleetSpec,
        requests: Requests,
        *,
        seed: int = 0,
        limits: Mapping[str, Limits] | None = None,
        controller: Controller | None = None,
        on_progress: Callable[["Fleet"], None] | None = None,
    ) -> None:
        self.spec = spec
        self.requests = requests
        self.outcomes = Outcomes(len(requests))
        self.clock = VirtualClock()
        self.samples = Samples()
        self.members: dict[str, Member] = {}
        self.num_failures = 0
        self.group_ticks = 0
        """Time that groups held their accelerators, summed."""
        self.busy_ticks = 0
        """Time that their ranks computed."""
        self.num_steps = self.num_jumped = self.num_preemptions = 0
        self._rng = random.Random(seed)
        self._controller = controller
        self._on_progress = on_progress
        self._serial = count()
        self._names = count(1)
        self._events: list[tuple[int, int, int, Callable[..., None], tuple[object, ...]]] = []
        later = requests.later_turns
        self._first_turns = iter(
            [index for index in range(len(requests)) if index not in later] if later else range(len(requests))
        )
        self._is_expecting = False
        """A request is still to come."""
        self._ends: dict[int, int] = {}
        """Of open requests, by seed: where the stop token is."""
        self._history: dict[int, tuple[int, ...]] = {}
        """What a session has so far, for the request that is its next turn."""
        self._num_unsettled = 0
        self._request_ticks = to_ticks(spec.request_s)
        self._costs = [spec.shape.costs]
        """Of a step, by how many other groups compute on the same machine."""
        self.gateways = [VirtualGateway(f"gateway-{i}", self.clock, self._rng) for i in range(spec.num_gateways)]
        names = [gateway.name for gateway in self.gateways]
        self.quotas = Quotas(limits, names, self.clock, self._later) if limits else None
        for _ in range(spec.num_groups):
            self._start_member(0, is_running=True)

    @property
    def num_unsettled(self) -> int:
        """Requests that have arrived and not ended."""
        return self._num_unsettled

    def run(self, until_s: float | None = None) -> Outcomes:
        """All requests, until the last has ended or that moment; what is open then is counted as cancelled."""
        spec = self.spec
        for at_s in spec.failures_s:
            self._at(to_ticks(at_s), self._lose_one)
        for at_s, costs in spec.later_costs:
            self._at(to_ticks(at_s), self._change_costs, costs)
        self._at(0, self._sample)
        if self._controller is not None:
            self._at(to_ticks(self._controller.period_s), self._control)
        last_tick = None if until_s is None else to_ticks(until_s)
        self._expect_next()
        events, clock = self._events, self.clock
        while self._is_expecting or self._num_unsettled or self._history:
            tick, _, _, act, arguments = heapq.heappop(events)
            if last_tick is not None and tick > last_tick:
                break
            clock.move_to(tick)
            act(*arguments)
        self._close(last_tick)
        return self.outcomes

    # Requests.

    def _expect_next(self) -> None:
        """Note when the next request comes that is not a later turn."""
        index = next(self._first_turns, None)
        self._is_expecting = index is not None
        if index is not None:
            self._push(self.requests.ticks[index], ARRIVAL, self._arrive_first, index)

    def _arrive_first(self, index: int) -> None:
        self._arrive(index, self.clock.tick)
        self._expect_next()

    def _arrive(self, index: int, tick: int) -> None:
        requests = self.requests
        traits = requests.tenants[requests.tenant[index]]
        gateway = self.gateways[0] if len(self.gateways) == 1 else self._rng.choice(self.gateways)
        prompt = requests.prompt(
            index, self._history.pop(index, ()), with_content=self.spec.shape.cache.enable_prefix_caching
        )
        self._ends[index + 1] = requests.end_of(index, len(prompt))
        request = EngineRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling=SamplingParams(seed=index + 1, max_tokens=requests.max_tokens[index]),
            eos_token_ids=(STOP_TOKEN,),
            tenant=traits.name,
            weight=traits.weight,
            priority=traits.priority,
            deadline_s=traits.deadline_s,
        )
        job = Job(index, gateway, request)
        self.outcomes.arrived_s[index] = tick / TICKS_PER_S
        self.outcomes.num_prompt[index] = len(prompt)
        self.outcomes.status[index] = Status.OPEN
        self._num_unsettled += 1
        gateway.num_sequences += 1
        gateway.num_prompt_tokens += len(prompt)
        if traits.patience_s is not None:
            self._at(tick + to_ticks(traits.patience_s), self._lose_patience, job)
        if self.quotas is None or not self.quotas.has_limits(traits.name):
            self._dispatch(job)
            return

        def granted(grant: Grant) -> None:
            job.grant = grant
            if self.outcomes.status[index] == Status.OPEN:
                self._dispatch(job)
            else:  # its client has gone meanwhile
                self._settle_grant(job, 0, 0)

        def refused(_: Decision) -> None:
            if self.outcomes.status[index] == Status.OPEN:
                self._settle(job, Status.REFUSED_QUOTA)

        num_tokens = len(prompt) + requests.max_tokens[index]
        self.quotas.reserve(gateway.name, traits.name, num_tokens, granted, refused)

    def _dispatch(self, job: Job) -> None:
        """Send it to the group that the gateway's rule prefers."""
        gateway = job.gateway
        try:
            if not job.is_resumed:
                gateway.refusals.check(MODEL, max(1, len(gateway.balance)), (job.request,))
        except GroupRefusedError:
            self._settle(job, Status.REFUSED_OVERLOADED)
            return
        engine = gateway.balance.choose()
        if engine is None:
            self._not_taken(job, Status.FAILED_LOST)
            return
        job.num_tries += 1
        job.member = self.members[engine]
        if self._request_ticks:
            gateway.on_their_way[engine] = gateway.on_their_way.get(engine, 0) + 1
            gateway.refresh(engine)
            self._push(self.clock.tick + self._request_ticks, DELIVERY, self._deliver, job)
        else:
            self._deliver(job)

    def _deliver(self, job: Job) -> None:
        """A group takes it in, or refuses it and another one is asked."""
        member, gateway = job.member, job.gateway
        if member is None:
            raise RuntimeError("a request was sent to no group")
        if self._request_ticks:
            self._take_off_its_way(gateway, member.name)
        if self.outcomes.status[job.index] != Status.OPEN:
            return  # its client has gone meanwhile
        if member.name not in self.members:
            job.is_resumed = job.is_resumed or self.spec.migration
            self._try_again(job)
            return
        try:
            job.run = self._add(member, job.request)
        except RequestError as error:
            if error.kind != "overloaded":
                self._settle(job, Status.REFUSED_INVALID)
                return
            refusal = GroupRefusedError(
                str(error), kind=error.kind, engine=member.name, retry_after_s=error.retry_after_s
            )
            gateway.loads.refused(member.name)
            gateway.refusals.remember(MODEL, member.name, (job.request,), refusal)
            if job.num_tries < len(self.members):
                self._dispatch(job)
            else:
                self._not_taken(job, Status.REFUSED_OVERLOADED)
            return
        job.recover_until_s, job.pause_s = math.inf, MIN_RECOVERY_PAUSE_S
        member.jobs[job.request.request_id] = job
        gateway.loads.begin(member.name, 1)
        job.prompt_load = prompt_load(len(job.request.prompt_token_ids))
        gateway.loads.prompt_begins(member.name, job.prompt_load)
        self._load_changed(member, gateway, 1)

    def _add(self, member: Member, request: EngineRequest) -> Run:
        """Raises RequestError. A group that refuses has come to this moment as well, so what happens next in it may change."""
        try:
            return member.group.add(self.clock.tick, request)
        finally:
            self._schedule(member)

    def _take_off_its_way(self, gateway: VirtualGateway, engine: str) -> None:
        gateway.on_their_way[engine] -= 1
        gateway.refresh(engine)

    def _try_again(self, job: Job) -> None:
        job.member = None
        self._dispatch(job)

    def _not_taken(self, job: Job, status: Status) -> None:
        """By any group now. One whose group was lost waits for another as long as a gateway lets it; others end."""
        now_s, deadline_s = self.clock.now_s, self._deadline_s(job)
        job.recover_until_s = min(job.recover_until_s, now_s + RECOVERY_TIMEOUT_S)
        if not job.is_resumed or now_s >= job.recover_until_s:
            self._settle(job, status)
            return
        pause_s, job.pause_s = min(job.pause_s, deadline_s - now_s), min(2 * job.pause_s, MAX_RECOVERY_PAUSE_S)
        self._at(self.clock.tick + to_ticks(pause_s), self._resume, job, job.request.output_token_ids)

    def _deadline_s(self, job: Job) -> float:
        """Of its client; inf without one."""
        deadline_s = self.requests.tenants[self.requests.tenant[job.index]].deadline_s
        return math.inf if deadline_s is None else self.outcomes.arrived_s[job.index] + deadline_s

    def _resume(self, job: Job, delivered: tuple[int, ...]) -> None:
        """What was delivered counts as output, and the answer goes on after it."""
        if self.outcomes.status[job.index] != Status.OPEN:
            return
        left_s = self._deadline_s(job) - self.clock.now_s
        if left_s <= 0:
            self._settle(job, Status.FAILED_DEADLINE)
            return
        job.request = EngineRequest(
            request_id=job.request.request_id,
            prompt_token_ids=job.request.prompt_token_ids,
            sampling=job.request.sampling,
            output_token_ids=delivered,
            eos_token_ids=job.request.eos_token_ids,
            tenant=job.request.tenant,
            weight=job.request.weight,
            priority=job.request.priority,
            deadline_s=None if math.isinf(left_s) else left_s,
        )
        job.num_tries = 0
        self._try_again(job)

    def _load_changed(self, member: Member, gateway: VirtualGateway, change: int) -> None:
        member.num_open += change
        gateway.refresh(member.name)
        if len(self.gateways) > 1 and member.tell_tick <= self.clock.tick:
            since = self.clock.tick - member.since_tick
            member.tell_tick = member.since_tick + (since // TELL_TICKS + 1) * TELL_TICKS
            self._at(member.tell_tick, self._tell, member)

    def _tell(self, member: Member) -> None:
        """The group says to each gateway how many sequences of others it has."""
        if member.name in self.members:
            for gateway in self.gateways:
                own = sum(job.gateway is gateway for job in member.jobs.values())
                gateway.loads.tell(member.name, member.num_open - own)
                gateway.refresh(member.name)

    def _schedule(self, member: Member) -> None:
        """Note when something happens next in a group by itself."""
        member.version += 1
        tick = member.group.next_tick
        if tick is not None:
            self._push(tick, GROUP, self._advance, member, member.version)
        if self.spec.shape.sharing and member.is_busy != (tick is not None):
            member.is_busy = tick is not None
            self._share()

    def _share(self) -> None:
        """Another number of groups computes on the machine that all share."""
        num_busy = sum(member.is_busy for member in self.members.values())
        for member in self.members.values():
            member.group.set_costs(self.clock.tick, self._costs_beside(num_busy - member.is_busy))
            self._schedule(member)

    def _change_costs(self, costs: CostTable) -> None:
        self._costs = [costs]
        self._share()

    def _costs_beside(self, num_others: int) -> CostTable:
        while len(self._costs) <= num_others:
            factor = 1 + self.spec.shape.sharing * len(self._costs)
            self._costs.append(self._costs[0].slower(factor))
        return self._costs[num_others]

    def _advance(self, member: Member, version: int) -> None:
        if version != member.version:
            return
        for output in member.group.advance():
            if job := member.jobs.get(output.request_id):
                self._prompt_ended(member, job)
            if output.finish_reason is not None:
                self._end(member, output)
        self._schedule(member)
        if member.phase == "draining" and not member.jobs:
            self._remove_member(member)

    def _prompt_ended(self, member: Member, job: Job) -> None:
        """It is computed, or lost."""
        if job.prompt_load:
            job.gateway.loads.prompt_ends(member.name, job.prompt_load)
            job.prompt_load = 0
            job.gateway.refresh(member.name)

    def _end(self, member: Member, output: EngineOutput) -> None:
        """The last output of a request has come."""
        job = member.jobs.pop(output.request_id)
        self._prompt_ended(member, job)
        job.gateway.loads.end(member.name, 1)
        self._load_changed(member, job.gateway, -1)
        match output.finish_reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                self._settle(job, Status.FINISHED, output)
            case FinishReason.DEADLINE:
                self._settle(job, Status.FAILED_DEADLINE, output)
            case FinishReason.CANCELLED:
                self._settle(job, Status.CANCELLED, output)
            case _:
                self._settle(job, Status.FAILED_LOST, output)

    def _settle(self, job: Job, status: Status, output: EngineOutput | None = None) -> None:
        """It has ended."""
        index, run, outcomes = job.index, job.run, self.outcomes
        if outcomes.status[index] != Status.OPEN:
            raise RuntimeError(f"request {index} has ended twice")
        outcomes.status[index] = status
        self._num_unsettled -= 1
        del self._ends[index + 1]
        arrived_s, output_s = outcomes.arrived_s[index], self.spec.output_s
        outcomes.e2e_s[index] = self.clock.now_s - arrived_s + output_s
        outcomes.num_migrations[index] = job.num_migrations
        num_output = 0
        if run is not None:
            first_s = run.first_token_s if job.first_token_s is None else job.first_token_s
            num_output = len(run.token_ids) - run.num_prompt_tokens
            if first_s is not None:
                outcomes.ttft_s[index] = first_s - arrived_s + output_s
            outcomes.num_output[index] = num_output
        if output is not None and output.timings is not None:
            outcomes.queue_s[index] = output.timings.queue_s
            outcomes.prefill_s[index] = output.timings.prefill_s
            outcomes.decode_s[index] = output.timings.decode_s
            outcomes.num_cached[index] = output.num_cached_tokens
        self._settle_grant(job, len(job.request.prompt_token_ids) if run else 0, num_output)
        following = self.requests.next_turn.get(index)
        if following is not None and status is Status.FINISHED and run is not None:
            self._history[following] = tuple(run.token_ids)
            self._at(self.clock.tick + self.requests.ticks[following], self._next_turn, following)

    def _settle_grant(self, job: Job, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        grant, job.grant = job.grant, None
        if grant is not None and self.quotas is not None:
            self.quotas.settle(
                grant,
                num_prompt_tokens=num_prompt_tokens,
                num_completion_tokens=num_completion_tokens,
                outcome=Status(self.outcomes.status[job.index]).name.lower(),
            )

    def _next_turn(self, index: int) -> None:
        self._arrive(index, self.clock.tick)

    def _lose_patience(self, job: Job) -> None:
        """The client goes if it has no token yet."""
        if self.outcomes.status[job.index] != Status.OPEN or job.first_token_s is not None:
            return
        member = job.member
        if member is None or job.run is None or member.jobs.get(job.request.request_id) is not job:
            self._settle(job, Status.CANCELLED)  # no group has it: it waits for a quota or a group, or is on its way
            return
        member.group.come_to(self.clock.tick)
        if job.run.first_token_s is None:
            member.group.abort(self.clock.tick, job.request.request_id, FinishReason.CANCELLED)
        self._schedule(member)

    # Groups.

    def _start_member(self, tick: int, *, is_running: bool = False) -> None:
        name, shape = f"group-{next(self._names)}", self.spec.shape
        ready_tick = tick if is_running else tick + to_ticks(shape.start_s)
        group = VirtualGroup(
            name,
            self._costs_beside(sum(member.is_busy for member in self.members.values())),
            shape.scheduler,
            shape.cache,
            end_of=self._ends.__getitem__,
            began_tick=ready_tick,
            jumps=self.spec.jumps,
        )
        member = Member(name, group, tick, tick, phase="running" if is_running else "starting")
        self.members[name] = member
        if is_running:
            self._serve(member)
        else:
            self._at(ready_tick, self._serve, member)

    def _serve(self, member: Member) -> None:
        if self.members.get(member.name) is member and member.phase != "draining":
            if member.phase == "starting":
                member.start_ticks = self.clock.tick - member.born_tick
            member.phase, member.since_tick = "running", self.clock.tick
            for gateway in self.gateways:
                gateway.balance.add(member.name)

    def drain(self, name: str) -> None:
        """A group takes nothing new, and goes when what it has has ended."""
        member = self.members[name]
        for gateway in self.gateways:
            gateway.balance.remove(name)
        member.phase, member.since_tick = "draining", self.clock.tick
        if not member.jobs:
            self._remove_member(member)

    def _remove_member(self, member: Member) -> None:
        member.version += 1
        for gateway in self.gateways:
            gateway.balance.remove(member.name)
            gateway.loads.forget(member.name)
        self._account(member)
        del self.members[member.name]
        if self.spec.shape.sharing and member.is_busy:
            self._share()

    def _account(self, member: Member) -> None:
        """Add up what is of interest of a group that ends."""
        group = member.group
        totals = group.engine.stats
        self.group_ticks += self.clock.tick - member.born_tick
        self.busy_ticks += group.ranks.busy_ticks
        self.num_steps += group.num_steps
        self.num_jumped += group.num_jumped
        self.num_preemptions += totals.num_preemptions

    def _lose_one(self) -> None:
        """A group that serves is lost, with all its ranks."""
        serving = [member for member in self.members.values() if member.phase == "running"]
        if not serving:
            return
        self.num_failures += 1
        member = serving[int(self._rng.random() * len(serving))]
        jobs, tick = dict(member.jobs), self.clock.tick
        outputs = member.group.fail(tick, "a node was lost")
        for job in jobs.values():
            if job.run is not None and job.first_token_s is None:
                job.first_token_s = job.run.first_token_s
        if self.spec.migration:
            member.jobs.clear()
            for job in jobs.values():
                self._prompt_ended(member, job)
                job.gateway.loads.end(member.name, 1)
                self._at(tick + to_ticks(self.spec.detect_s), self._migrate, job)
        else:
            for output in outputs:
                if output.finish_reason is not None:
                    self._end(member, output)
        self._remove_member(member)
        self._start_member(tick)

    def _migrate(self, job: Job) -> None:
        """The gateway knows that its group is lost."""
        if self.outcomes.status[job.index] != Status.OPEN or job.run is None:
            return
        job.is_resumed = True
        if self._deadline_s(job) > self.clock.now_s:
            job.num_migrations += 1
        self._resume(job, tuple(job.run.token_ids[len(job.request.prompt_token_ids) :]))

    # The fleet as a whole.

    def _control(self) -> None:
        controller = self._controller
        if controller is None:
            return
        target, victims = controller.decide(self)
        staying = [member for member in self.members.values() if member.phase != "draining"]
        for _ in range(target - len(staying)):
            self._start_member(self.clock.tick)
        for name in victims[: max(0, len(staying) - target)]:
            self.drain(name)
        self._at(self.clock.tick + to_ticks(controller.period_s), self._control)

    def _sample(self) -> None:
        samples, members = self.samples, self.members.values()
        samples.at_s.append(self.clock.now_s)
        samples.num_groups.append(len(members))
        samples.num_serving.append(sum(member.phase == "running" for member in members))
        loads = [member.group.engine.scheduler.load for member in members]
        samples.num_running.append(sum(running for running, _ in loads))
        samples.num_waiting.append(sum(waiting for _, waiting in loads))
        if self._on_progress is not None:
            self._on_progress(self)
        self._at(self.clock.tick + to_ticks(self.spec.sample_s), self._sample)

    def _at(self, tick: int, act: Callable[..., None], *arguments: object) -> None:
        self._push(tick, CONTROL, act, *arguments)

    def _push(self, tick: int, kind: int, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (tick, kind, next(self._serial), act, arguments))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(self.clock.tick + to_ticks(seconds), act)

    def _close(self, last_tick: int | None) -> None:
        """Nothing more happens: clients that still wait go."""
        if last_tick is not None and last_tick > self.clock.tick and self._num_unsettled:
            self.clock.move_to(last_tick)
        for member in list(self.members.values()):
            for job in list(member.jobs.values()):
                member.group.come_to(self.clock.tick)
                self._settle(job, Status.CANCELLED)
            self._account(member)
        for index, status in enumerate(self.outcomes.status):
            if status == Status.OPEN:  # on its way, or between two groups
                self.outcomes.status[index] = Status.CANCELLED
                self.outcomes.e2e_s[index] = self.clock.now_s - self.outcomes.arrived_s[index]
                self._num_unsettled -= 1
