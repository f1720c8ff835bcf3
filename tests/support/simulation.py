"""The real engine and scheduler on ranks that compute nothing: a step takes `step_s` of virtual time, and `row_s` for each
sequence in it."""

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.messages import RowResult, StepPlan, StepResult
from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import RequestError


@dataclass
class Sent:
    """A request that was accepted."""

    tenant: str
    weight: float
    num_prompt_tokens: int
    max_tokens: int
    arrived_s: float
    first_token_s: float | None = None
    finish_reason: FinishReason | None = None


class Simulation:
    """Clients, a clock of steps, and an account of the service that everybody got, kept from what the ranks see."""

    def __init__(
        self,
        *,
        seed: int = 0,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 256,
        kv_cache_tokens: int = 4096,
        max_model_len: int = 1024,
        max_waiting_requests: int = 64,
        max_in_flight: int = 2,
        step_s: float = 1.0,
        row_s: float = 0.0,
        is_fair: bool = True,
    ) -> None:
        """Without `is_fair` the scheduler is not told whose a request is, so that everybody is served in order of arrival."""
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.step_s, self.row_s = step_s, row_s
        self.sent: list[Sent] = []
        self.num_refused: dict[str, int] = defaultdict(int)
        self.plans: list[StepPlan] = []
        self.service: dict[str, float] = defaultdict(float)
        """What each tenant got: a prompt token is 1, a generated one 2, divided by its weight."""
        self.history: list[tuple[dict[str, float], frozenset[str]]] = []
        """After each step: service, and who has something waiting."""
        self.is_fair = is_fair
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_waiting_requests=max_waiting_requests,
        )
        self.cache = CacheConfig(num_blocks=kv_cache_tokens // 16, block_size=16, enable_prefix_caching=False)
        self.scheduler = Scheduler(self.config, self.cache, epoch=1, clock=lambda: self.now_s)
        self.engine = Engine(self, self.scheduler, max_in_flight=max_in_flight)
        self._submitted: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._submitted.append(plan)
        for new in plan.new_sequences:
            sent = self.sent[new.sampling.seed]
            self.service[sent.tenant] += sent.num_prompt_tokens / sent.weight

    def collect(self) -> StepResult:
        plan = self._submitted.popleft()
        self.plans.append(plan)
        self.now_s += self.step_s + self.row_s * len(plan.rows)
        return StepResult(
            plan.epoch, plan.step_id, tuple(RowResult(r.seq_id, 1 if r.sample else None) for r in plan.rows)
        )

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        raise AssertionError("nobody asks for it")

    def shutdown(self) -> None:
        raise AssertionError("nobody asks for it")

    def send(
        self,
        tenant: str,
        num_prompt_tokens: int,
        max_tokens: int,
        *,
        weight: float = 1.0,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> RequestError | None:
        """Returns the refusal, if it is one."""
        number = len(self.sent)
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=(0,) * num_prompt_tokens,
            sampling=SamplingParams(max_tokens=max_tokens, seed=number),
            tenant=tenant if self.is_fair else "",
            weight=weight,
            priority=priority,
            deadline_s=deadline_s,
        )
        try:
            self.engine.add(request)
        except RequestError as error:
            self.num_refused[tenant] += 1
            return error
        self.sent.append(Sent(tenant, weight, num_prompt_tokens, max_tokens, self.now_s))
        return None

    def step(self) -> None:
        """One step of the group. Time passes also when there is nothing to do."""
        before_s = self.now_s
        for output in self.engine.step():
            sent = self.sent[int(output.request_id)]
            self.service[sent.tenant] += 2 * len(output.token_ids) / sent.weight
            if output.token_ids and sent.first_token_s is None:
                sent.first_token_s = self.now_s
            sent.finish_reason = output.finish_reason or sent.finish_reason
        if self.now_s == before_s:
            self.now_s += self.step_s
        waiting = frozenset(self.sent[int(s.request.request_id)].tenant for s in self.scheduler._queue)
        self.history.append((dict(self.service), waiting))

    def max_gap(self, one: str, other: str) -> float:
        """The most by which the services of two tenants differ over any time in which both always have something waiting."""
        gap, lowest, highest = 0.0, float("inf"), float("-inf")
        for service, waiting in self.history:
            if one not in waiting or other not in waiting:
                lowest, highest = float("inf"), float("-inf")
                continue
            difference = service.get(one, 0.0) - service.get(other, 0.0)
            lowest, highest = min(lowest, difference), max(highest, difference)
            gap = max(gap, highest - lowest)
        return gap

    def ttfts(self, tenant: str) -> list[float]:
        """Steps from arrival to the first token."""
        mine = (sent for sent in self.sent if sent.tenant == tenant)
        return [sent.first_token_s - sent.arrived_s for sent in mine if sent.first_token_s is not None]


def arrivals(rng: random.Random, rate: float) -> int:
    """How many requests come in one step, Poisson."""
    num, time_s = 0, rng.expovariate(rate)
    while time_s < 1.0:
        num, time_s = num + 1, time_s + rng.expovariate(rate)
    return num
