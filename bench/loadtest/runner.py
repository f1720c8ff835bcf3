"""One process's part of a load test: it sends what is its own at the moments that were fixed before, and records what comes."""

import asyncio
import random
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from bench.loadtest.curves import Curve, arrival_times, of_stages
from bench.loadtest.records import Health, Record
from bench.loadtest.replies import Outcome, Reply, Transport
from bench.loadtest.sampling import Sample
from bench.loadtest.scenario import AtOnce, Closed, OpenLoop, Scenario, Tenant, has_turns
from bench.loadtest.work import Content, Entry, Facts, Turn, Workload, answered, extended

MAX_GAPS = 20_000_000
"""Inter-token latencies that one process keeps (80 MB)."""
MAX_WAITING = 20_000
"""Requests that wait for room, prepared. More are prepared later; their latency counts from when they were due all the same."""
_TICK_S = 0.02
"""How often the event loop's own delay is looked at."""
_USER_POLL_S = 0.05
"""How often a user who is not wanted yet looks again."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about a tenant before the run."""

    facts: Facts
    entries: list[Entry]
    num_unanswered: int = 0
    """Requests of a trace that had no answer, and are not sent."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work is whose: number `index` of `count` processes."""

    index: int
    count: int

    def of(self, total: int) -> int:
        """How many of `total` things are this process's."""
        return (total - self.index + self.count - 1) // self.count


@dataclass(slots=True)
class Counts:
    """What has become of the requests of one tenant."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    output_tokens: int = 0

    @property
    def in_flight(self) -> int:
        return self.sent - self.outcomes.total()


class Source:
    """One tenant's requests of this process."""

    def __init__(
        self, place: int, tenant: Tenant, workload: Workload, transport: Transport, share: Share, seed: int
    ) -> None:
        self.place, self.tenant, self.workload, self.transport, self.share = place, tenant, workload, transport, share
        self.seed = seed
        self.counts = Counts()
        self.keeps_answers = has_turns(tenant.work)
        limit = tenant.max_concurrency
        self.slots = None if limit is None else asyncio.Semaphore(share.of(limit))

    def arrivals(self, duration_s: float) -> Iterator[tuple[int, float]]:
        """(session, seconds) of this process's part of an open loop, in order of time."""
        bounds = [n for n in (self.tenant.max_requests, self.workload.num_sessions) if n is not None]
        most = min(bounds) if bounds else None
        arrivals = self.tenant.arrivals
        if isinstance(arrivals, OpenLoop):
            times = arrival_times(arrivals, duration_s, random.Random(f"{self.seed}/{self.tenant.name}/arrivals"))
        elif isinstance(arrivals, AtOnce):
            times = (0.0 for _ in range(most or 0))
        else:
            times = (self.workload.at_s(index) for index in range(self.workload.num_sessions or 0))
        for index, at_s in enumerate(times):
            if at_s >= duration_s or (most is not None and index >= most):
                return
            if index % self.share.count == self.share.index:
                yield index, at_s


class Runner:
    """Runs the sources of one process against their servers."""

    def __init__(
        self,
        scenario: Scenario,
        resolved: Sequence[Resolved],
        transports: Sequence[Transport],
        share: Share,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._scenario, self._share, self._clock, self._sleep = scenario, share, clock, sleep
        self.sources = [
            Source(
                place,
                tenant,
                Workload(tenant, scenario.seed, known.facts, known.entries),
                transport,
                share,
                scenario.seed,
            )
            for place, (tenant, known, transport) in enumerate(zip(scenario.tenants, resolved, transports, strict=True))
        ]
        self.records: list[Record] = []
        self._slots = asyncio.Semaphore(max(1, share.of(scenario.max_in_flight)))
        self._room = share.of(scenario.max_requests)
        self._num_begun = 0
        self._bound_reached_s: float | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._errors: list[BaseException] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._lags, self._delays = Sample(), Sample()
        self._num_held_back = self._num_held_back_by_bound = self._num_unsent = 0
        self._num_gaps = self._num_gaps_dropped = 0
        self._start_s = self._end_s = 0.0
        self._wall_s = self._cpu_s = 0.0
        self.recent_ttfts_s: list[float] = []
        """Since they were last taken, for who watches."""

    async def open(self, timeout_s: float) -> None:
        """Connect, and send what warms up. Raises ConnectionError."""
        for source in self.sources:
            await source.transport.open(timeout_s)
        for source in self.sources:
            for number in range(self._scenario.warmup_requests):
                turn = source.workload.session(-1 - self._share.index - number * self._share.count)[0]
                prepared = source.transport.prepare(turn.content, turn.output_tokens, "packtrain-load-warm-up")
                await source.transport.ask(prepared, self._scenario.timeout_s, Reply())

    async def run(self, start_s: float, stop: asyncio.Event) -> None:
        """From `start_s` on this process's clock until all have ended; at once when `stop` is set."""
        self._start_s, self._end_s = start_s, start_s + self._scenario.duration_s
        await self._until(start_s)
        wall_s, cpu_s = self._clock(), time.process_time()
        drivers = asyncio.create_task(self._drive_all())
        watch = asyncio.create_task(self._watch_loop())
        stopped = asyncio.create_task(stop.wait())
        try:
            first: set[asyncio.Task[Any]] = {drivers, stopped}
            left_s = self._end_s - self._clock()
            await asyncio.wait(first, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                await self._drain(stopped)
        finally:
            ended = await _end(drivers, watch, stopped)
            # Only now: until its driver has ended, a user whose session ends just then begins another one.
            ended += await _end(*self._sessions)
            self._wall_s, self._cpu_s = self._clock() - wall_s, time.process_time() - cpu_s
        for error in (*self._errors, *ended):
            if isinstance(error, Exception):
                raise error

    async def _drain(self, stopped: "asyncio.Task[bool]") -> None:
        """Wait for what is under way, no longer than drain_s after the end of sending. What waits for room is given up then."""
        idle = asyncio.create_task(self._idle.wait())
        try:
            for limit_s in (self._end_s, self._end_s + self._scenario.drain_s):
                left_s = max(0.0, limit_s - self._clock())
                done, _ = await asyncio.wait({idle, stopped}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return
                for task in self._waiting:
                    task.cancel()
        finally:
            idle.cancel()

    async def close(self) -> None:
        for source in self.sources:
            await source.transport.close()

    def health(self, process: int) -> Health:
        return Health(
            process=process,
            wall_s=self._wall_s,
            cpu_s=self._cpu_s,
            lags_s=self._lags.values,
            max_lag_s=self._lags.largest,
            loop_delays_s=self._delays.values,
            max_loop_delay_s=self._delays.largest,
            num_held_back=self._num_held_back,
            num_held_back_by_bound=self._num_held_back_by_bound,
            num_unsent=self._num_unsent,
            num_gaps_dropped=self._num_gaps_dropped,
            bound_reached_s=self._bound_reached_s,
            num_connections=sum(source.transport.num_connections for source in self.sources),
        )

    async def _drive_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for source in self.sources:
                group.create_task(self._drive(source))

    async def _drive(self, source: Source) -> None:
        if isinstance(source.tenant.arrivals, Closed):
            await self._drive_users(source, source.tenant.arrivals)
            return
        for index, at_s in source.arrivals(self._scenario.duration_s):
            if self._clock() >= self._end_s:  # so late is this process
                self._num_unsent += 1
                continue
            turns = source.workload.session(index)
            prepared = source.transport.prepare(turns[0].content, turns[0].output_tokens, _label(source, index, 0))
            await self._until(self._start_s + at_s)
            while len(self._waiting) >= MAX_WAITING and self._clock() < self._end_s:
                await self._sleep(_TICK_S)
            if not self._take_room():
                return
            self._begin(self._session(source, index, self._start_s + at_s, turns, prepared))

    def _begin(self, session: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(session)
        self._sessions.add(task)
        self._idle.clear()
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._sessions.discard(task)
        if not self._sessions:
            self._idle.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    async def _drive_users(self, source: Source, arrivals: Closed) -> None:
        """Each user is a task; they take the process's sessions in order."""
        wanted = of_stages(arrivals.stages) if arrivals.stages else Curve([(0.0, float(arrivals.users))])
        numbers = iter(range(self._share.index, source.tenant.max_requests or 1 << 62, self._share.count))
        users = range(self._share.index, arrivals.most_users, self._share.count)
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(self._user(source, arrivals, wanted, user, numbers))

    async def _user(self, source: Source, arrivals: Closed, wanted: Curve, user: int, numbers: Iterator[int]) -> None:
        draw = random.Random(f"{source.seed}/{source.tenant.name}/user/{user}")
        due_s = self._start_s
        while due_s < self._end_s:
            await self._until(due_s)
            if wanted.value(max(0.0, due_s - self._start_s)) <= user:
                due_s = max(due_s, self._clock()) + _USER_POLL_S
                continue
            index = next(numbers, None)
            if index is None or not self._take_room():
                return
            turns = source.workload.session(index)
            prepared = source.transport.prepare(turns[0].content, turns[0].output_tokens, _label(source, index, 0))
            # A user asks when it is ready; what the client itself takes to prepare is not the server's.
            due_s = max(due_s, self._clock())
            await asyncio.wait({self._begin(self._session(source, index, due_s, turns, prepared))})
            due_s = self._clock() + (draw.expovariate(1 / arrivals.think_s) if arrivals.think_s else 0.0)

    def _take_room(self) -> bool:
        """Whether the run's own bound lets a request be sent that is due. When it first does not is noted."""
        if self._num_begun < self._room:
            self._num_begun += 1
            return True
        if self._bound_reached_s is None:
            self._bound_reached_s = max(0.0, self._clock() - self._start_s)
        return False

    async def _session(self, source: Source, index: int, due_s: float, turns: Sequence[Turn], prepared: object) -> None:
        history: Content | None = None
        for number, turn in enumerate(turns):
            prompt = extended(history, turn.content)
            if number:
                due_s = self._clock() + turn.think_s
                if due_s >= self._end_s or not self._take_room():
                    return
                await self._until(due_s)
                prepared = source.transport.prepare(prompt, turn.output_tokens, _label(source, index, number))
            estimated = len(prompt) if prompt and isinstance(prompt[0], int) else 0
            reply = await self._request(source, (index, number), due_s, prepared, (estimated, turn.output_tokens))
            if reply.outcome is not Outcome.FINISHED:
                return
            if source.keeps_answers:
                history = answered(prompt, "".join(reply.text), reply.token_ids)

    async def _request(
        self, source: Source, place: tuple[int, int], due_s: float, prepared: object, sizes: tuple[int, int]
    ) -> Reply:
        """Ask until it is answered, or for as long as a refused client does. One record, whatever happens once it is sent."""
        retries, attempts, first_sent_s = source.tenant.retries, 0, 0.0
        lag_s = max(0.0, self._clock() - due_s)
        reply = Reply()
        try:
            while True:
                async with AsyncExitStack() as room:
                    await self._enter(room, source, is_first=attempts == 0)
                    if attempts == 0:
                        self._lags.add(lag_s)
                        source.counts.sent += 1
                        first_sent_s = self._clock()
                    attempts += 1
                    reply = Reply()
                    await source.transport.ask(prepared, self._scenario.timeout_s, reply)
                wait_s = reply.retry_after_s
                if (
                    reply.outcome is not Outcome.REFUSED
                    or attempts >= retries.max_attempts
                    or wait_s is None
                    or wait_s > retries.max_wait_s
                    or self._clock() + wait_s >= self._end_s
                ):
                    return reply
                await self._sleep(wait_s)
        finally:
            if attempts:
                self._record(source, place, due_s, first_sent_s, attempts, reply, sizes)

    async def _enter(self, room: AsyncExitStack, source: Source, *, is_first: bool) -> None:
        """Wait for room under the tenant's and the run's limit. Who is cancelled here has not sent anything."""
        task = asyncio.current_task()
        assert task is not None
        if is_first:
            self._waiting.add(task)
        try:
            if source.slots is not None:
                self._num_held_back += source.slots.locked()
                await room.enter_async_context(source.slots)
            self._num_held_back_by_bound += self._slots.locked()
            await room.enter_async_context(self._slots)
        except asyncio.CancelledError:
            self._num_unsent += is_first
            raise
        finally:
            self._waiting.discard(task)

    def _record(
        self,
        source: Source,
        place: tuple[int, int],
        due_s: float,
        sent_s: float,
        attempts: int,
        reply: Reply,
        sizes: tuple[int, int],
    ) -> None:
        estimated, asked = sizes
        times, is_finished = reply.times_s, reply.outcome is Outcome.FINISHED
        told = reply.usage_output if is_finished else None
        output_tokens = reply.num_chunk_tokens if told is None else told
        gaps = array("f", (after - before for before, after in pairwise(times)))
        self._num_gaps += len(gaps)
        if self._num_gaps > MAX_GAPS:
            self._num_gaps_dropped += len(gaps)
            gaps = array("f")
        record = Record(
            tenant=source.place,
            session=place[0],
            turn=place[1],
            intended_s=due_s - self._start_s,
            sent_s=sent_s - self._start_s,
            ended_s=(self._clock() if reply.ended_s is None else reply.ended_s) - self._start_s,
            outcome=reply.outcome,
            code=reply.code,
            reason=reply.reason,
            attempts=attempts,
            first_s=times[0] - self._start_s if times else None,
            last_s=times[-1] - self._start_s if times else None,
            prompt_tokens=estimated if reply.usage_prompt is None else reply.usage_prompt,
            output_tokens=output_tokens,
            # A score has what its prompt leaves of that, and is never short.
            asked_tokens=0 if source.tenant.chosen_api == "score" else asked,
            gaps=gaps.tobytes(),
            stages=reply.stages,
            seen_tokens=reply.num_chunk_tokens,
            seen_chunks=len(times),
            hidden_tokens=reply.hidden_tokens if is_finished else 0,
        )
        self.records.append(record)
        source.counts.outcomes[reply.outcome] += 1
        source.counts.output_tokens += output_tokens
        if record.ttft_s is not None and len(self.recent_ttfts_s) < 1000:
            self.recent_ttfts_s.append(record.ttft_s)

    async def _until(self, at_s: float) -> None:
        await self._sleep(max(0.0, at_s - self._clock()))  # also when it is late: others have their turn

    async def _watch_loop(self) -> None:
        """How much later than asked a timer of this loop fires."""
        while True:
            before_s = self._clock()
            await self._sleep(_TICK_S)
            self._delays.add(max(0.0, self._clock() - before_s - _TICK_S))


def _label(source: Source, session: int, turn: int) -> str:
    return f"packtrain-load-{source.tenant.name}-{session}-{turn}"


async def _end(*tasks: "asyncio.Task[Any]") -> list[Any]:
    """Cancel them; what they returned or raised."""
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)
