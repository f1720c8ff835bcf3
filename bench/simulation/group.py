"""A replica group on a virtual clock: the real Engine, Scheduler, fair queue and KV blocks over ranks that are a cost model."""

from collections import deque
from collections.abc import Callable, Sequence
from math import ceil, isqrt

from bench.simulation.clock import TICK_S, TICKS_PER_S, VirtualClock
from bench.simulation.cost import CostTable
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.messages import RowResult, StepPlan, StepResult
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.engine.stretch import Moments, Stretch, find_stretch, take

STOP_TOKEN = -1
"""What the ranks draw when an answer is to end before max_tokens."""
TOKENS_PER_CONTENT = 1 << 24
"""Token ids are made up: content number times this, plus position. So prompts and answers are equal only where they are meant
to be, and the prefix cache finds what it should."""


def first_token_of(content: int) -> int:
    """Id of the token at position 0 of a content, which is one request's own or a shared prefix."""
    return content * TOKENS_PER_CONTENT


class VirtualRanks:
    """The executor. A step begins when it is there and the one before has ended, and takes what the cost model says."""

    def __init__(
        self, clock: VirtualClock, costs: CostTable, end_of: Callable[[int], int], *, with_content: bool
    ) -> None:
        """`end_of` says, for a request's seed, at which position the stop token is drawn. Without content all other tokens are 0,
        as in Requests.prompt."""
        self._clock = clock
        self._with_content = with_content
        self._costs = costs
        self._end_of = end_of
        self._sequences: dict[int, tuple[int, int]] = {}
        """First token and end, by seq_id."""
        self._done: deque[tuple[StepPlan, int]] = deque()
        self._last_tick = 0
        self.busy_ticks = 0

    @property
    def next_tick(self) -> int | None:
        """When the oldest step ends."""
        return self._done[0][1] if self._done else None

    def submit(self, plan: StepPlan) -> None:
        for new in plan.new_sequences:
            seed = new.sampling.seed
            self._sequences[new.seq_id] = first_token_of(seed), self._end_of(seed)
        for seq_id in plan.finished:
            self._sequences.pop(seq_id, None)
        ticks = self._costs.ticks(plan)
        self._last_tick = max(self._clock.tick, self._last_tick) + ticks
        self.busy_ticks += ticks
        self._done.append((plan, self._last_tick))

    def collect(self) -> StepResult:
        plan, _ = self._done.popleft()
        rows = []
        for row in plan.rows:
            token: int | None = None
            if row.sample:
                first, end = self._sequences.get(row.seq_id, (0, 0))
                position = row.start + row.num_tokens
                token = STOP_TOKEN if position >= end else first + position if self._with_content else 0
            rows.append(RowResult(row.seq_id, token))
        return StepResult(plan.epoch, plan.step_id, tuple(rows))

    def set_costs(self, costs: CostTable) -> None:
        """Of steps that are submitted from now on."""
        self._costs = costs

    def tokens_of(self, run: Run, start: int, stop: int) -> Sequence[int]:
        """What is drawn in a stretch of decode."""
        if not self._with_content:
            return bytes(stop - start)
        first = first_token_of(run.request.sampling.seed)
        return range(first + start, first + stop)

    def replace(self, plan: StepPlan, end_tick: int) -> None:
        """Instead of the step in flight there is this one, which ends then; the ranks did nothing else since."""
        self.busy_ticks += end_tick - self._last_tick
        self._last_tick = end_tick
        self._done.clear()
        self._done.append((plan, end_tick))

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        raise NotImplementedError("virtual ranks fail when VirtualGroup.fail is called, and tell nobody")

    def shutdown(self) -> None:
        self._done.clear()


class VirtualGroup:
    """Moves from event to event. `next_tick` says when something happens by itself; then call `advance`.

    All calls come in the order of time. A call at the very moment of an event comes before it.
    """

    def __init__(
        self,
        name: str,
        costs: CostTable,
        scheduler: SchedulerConfig,
        cache: CacheConfig,
        *,
        end_of: Callable[[int], int],
        epoch: int = 1,
        began_tick: int = 0,
        jumps: bool = True,
    ) -> None:
        """Without `jumps` every step is planned and taken in by itself, which comes to the same and takes longer."""
        self.name = name
        self.clock = VirtualClock()
        self.clock.move_to(began_tick)
        self.next_tick: int | None = None
        self.ranks = VirtualRanks(self.clock, costs, end_of, with_content=cache.enable_prefix_caching)
        self.engine = Engine(self.ranks, Scheduler(scheduler, cache, epoch=epoch, clock=self.clock))
        self.num_steps = 0
        """Taken in, those in stretches included."""
        self.num_jumped = 0
        self._costs = costs
        self._end_of = end_of
        self._jumps = jumps
        self._stretch: Stretch | None = None
        self._num_ahead = 0
        """Steps of the stretch that will be taken at `next_tick`, if nobody comes before."""
        self._began_s = 0.0
        """When the step before the stretch was taken in."""

    def add(self, tick: int, request: EngineRequest) -> Run:
        """It arrives. Raises RequestError when it is refused."""
        self.come_to(tick)
        self.engine.add(request)
        run = self.engine.scheduler.sequence_of(request.request_id)
        if self.ranks.next_tick is None:
            self.engine.submit()
            self.next_tick = self.ranks.next_tick
        return run

    def abort(self, tick: int, request_id: str, reason: FinishReason) -> bool:
        """End a request; its last output comes with the next event. False when it has ended already."""
        self.come_to(tick)
        found = self.engine.abort(request_id, reason)
        if found and self.ranks.next_tick is None:
            self.engine.submit()
            self.next_tick = tick if self.ranks.next_tick is None else self.ranks.next_tick
        return found

    def fail(self, tick: int, reason: str) -> list[EngineOutput]:
        """The group is lost. Returns the last outputs of all its requests."""
        self.come_to(tick)
        self.engine.fail(reason)
        self.ranks.shutdown()
        self.next_tick = None
        return self.engine.collect()

    def advance(self) -> list[EngineOutput]:
        """What happens at `next_tick`. Returns the outputs of that moment; a stretch has none that matter."""
        if self.next_tick is None:
            raise RuntimeError(f"nothing happens by itself in group {self.name}")
        self.clock.move_to(self.next_tick)
        if self._stretch is not None:
            self._take(self._stretch, self._num_ahead)
            outputs: list[EngineOutput] = []
        else:
            self.num_steps += self.ranks.next_tick is not None
            outputs = self.engine.collect()
        self._look_ahead()
        while self.next_tick is None and self.engine.has_work:
            outputs += self.engine.collect()
            self._look_ahead()
        return outputs

    def set_costs(self, tick: int, costs: CostTable) -> None:
        """Steps cost something else from now on. Those that the ranks have already take as long as they would have."""
        if costs is not self._costs:
            if tick >= self.clock.tick:  # else the group has not started yet
                self.come_to(tick)
            self._costs = costs
            self.ranks.set_costs(costs)

    def _look_ahead(self) -> None:
        """After a step was taken in: find what comes next."""
        if self._jumps:
            stretch = find_stretch(self.engine, self._num_outputs_of)
            if stretch is not None and (num_steps := self._num_in_time(stretch)):
                self._stretch, self._num_ahead, self._began_s = stretch, num_steps, self.clock.now_s
                self.next_tick = self._end_tick(stretch, num_steps)
                return
        self.engine.submit()
        self.next_tick = self.ranks.next_tick

    def _num_in_time(self, stretch: Stretch) -> int:
        """Steps until somebody may expire: each is planned when the one before the last has ended."""
        if stretch.deadline_s is None:
            return stretch.num_steps
        if stretch.deadline_s <= self.clock.now_s:
            return 0
        return min(stretch.num_steps, 1 + self._num_ends_before(stretch, ceil(stretch.deadline_s * TICKS_PER_S)))

    def _num_outputs_of(self, run: Run) -> int:
        return self._end_of(run.request.sampling.seed) - len(run.token_ids)

    def come_to(self, tick: int) -> None:
        """Take those steps of a stretch that have ended before `tick`, and plan the next one as the scheduler has by then."""
        stretch = self._stretch
        if stretch is not None:
            num_steps = min(self._num_ends_before(stretch, tick), self._num_ahead)
            if num_steps:
                self.clock.move_to(self._end_tick(stretch, num_steps))
                self._take(stretch, num_steps)
            self._stretch = None
            self.engine.submit()
            self.next_tick = self.ranks.next_tick
        self.clock.move_to(tick)

    def _take(self, stretch: Stretch, num_steps: int) -> None:
        """The first steps of the stretch, the last of which ends now."""
        first_tick, second, growth = self._durations(stretch)
        planned_s = self._end_tick(stretch, num_steps - 1) * TICK_S if num_steps > 1 else self._began_s
        moments = Moments(self._began_s, first_tick * TICK_S, planned_s, self.clock.now_s)
        plan = take(self.engine, stretch, num_steps, moments, self.ranks.tokens_of)
        self.ranks.replace(plan, self.clock.tick + second + growth * (num_steps - 1))
        self.num_steps += num_steps
        self.num_jumped += num_steps
        self._stretch = None

    def _durations(self, stretch: Stretch) -> tuple[int, int, int]:
        """When the first step of a stretch ends, how long the second takes, and by how much each later one takes longer."""
        first_tick = self.ranks.next_tick
        if first_tick is None:
            raise RuntimeError("no step is in flight")
        num_rows = len(stretch.runs)
        growth = self._costs.context_ticks * num_rows
        context_ticks = self._costs.context_ticks * stretch.num_context_tokens
        return first_tick, self._costs.decode_ticks(num_rows) + context_ticks + growth, growth

    def _end_tick(self, stretch: Stretch, num_steps: int) -> int:
        """When so many steps have ended."""
        first_tick, second, growth = self._durations(stretch)
        num_more = num_steps - 1
        return first_tick + num_more * second + growth * (num_more * (num_more - 1) // 2)

    def _num_ends_before(self, stretch: Stretch, tick: int) -> int:
        """How many steps end before `tick`, if the stretch went on for ever."""
        first_tick, second, growth = self._durations(stretch)
        left = tick - 1 - first_tick
        if left < 0:
            return 0
        if not growth:
            return 1 + left // second
        # The largest m with m·second + growth·m·(m−1)/2 ≤ left.
        linear = 2 * second - growth
        return 1 + (isqrt(linear * linear + 8 * growth * left) - linear) // (2 * growth)
