"""Gateways, groups and clients of one model on a virtual clock, with faults drawn from a seed.

Real are the gateway's core with its continuation of requests, poison guard, metering and remembered refusals, the rule of
routing, and each group's engine, scheduler and KV blocks. Ranks are fake (tests/support/fake_executor.py: they check every read
of their KV cache). The link between group and gateway is a queue with delays, and so is the news of a death. A seed gives the
same history each time.
"""

import asyncio
import functools
import gc
import itertools
import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.support.fake_backend import ByteTokenizer, card
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.messages import StepResult
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError, RequestError
from serving.config import LimitsConfig
from serving.contracts.accounts import OPEN, Principal, RateLimits, UsageRecord
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError, ServingError
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import ModelCard
from serving.gateway.core.call import Call
from serving.gateway.core.choices import Chunk
from serving.gateway.core.generation import Generator
from serving.gateway.core.resume_tokens import KEY_BYTES, ResumeTokens
from serving.gateway.core.resumption import MAX_LOSSES
from serving.gateway.core.validate import GenerateQuery, TokenPrompt
from serving.gateway.groups.loads import (
    AVOIDED_WHEN_SILENT_S,
    PROMPT_TOKENS_A_SEQUENCE,
    GroupLoads,
    preference,
    prompt_load,
)
from tests.support.fake_executor import VOCAB_SIZE, FakeExecutor, next_token
from tests.support.virtual_loop import START_S, run_virtually

MODEL = "tiny"
MAX_MODEL_LEN = 64
BLOCK_SIZE = 4
POISON = VOCAB_SIZE + 1
"""A token that no rank survives, and that none draws."""
NOTICED_S = 0.05
"""From the death of a process to the end of its connections."""
SILENT_S = 2.0
"""A leader that is stopped is given up by its gateways after so long."""
LOOK_S = 0.5
"""How often a gateway looks whether a leader is silent."""
STUCK_S = 1.2
"""Ranks that are stopped are taken for lost after so long."""
RESUME_KEY = bytes(KEY_BYTES)
MAX_HISTORY_S = 600.0
"""Nothing is still open after so long: what waits for a group has it long before."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a client asks for, and when."""

    at_s: float
    prompt: tuple[int, ...]
    num_choices: int
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]
    timeout_s: float | None
    leaves_after: int | None
    """Chunks after which the client goes away."""

    @property
    def is_poisoned(self) -> bool:
        return POISON in self.prompt

    def answer(self) -> tuple[int, ...]:
        """What each choice must bring, worked out without any engine. (The fake ranks draw the same for each.)"""
        tokens = list(self.prompt)
        while len(tokens) - len(self.prompt) < self.max_tokens:
            tokens.append(next_token(tokens, self.seed))
            if tokens[-1] in self.stop_token_ids:
                break
        return tuple(tokens[len(self.prompt) :])


@dataclass(kw_only=True)
class Client:
    """What one client saw."""

    plan: Plan
    number: int
    task: "asyncio.Task[None] | None" = None
    """Its call of a gateway."""
    first_gateway: "Gateway | None" = None
    gateway: "Gateway | None" = None
    resume_token: bytes = b""
    num_chunks: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    outcome: str = ""
    """"ok", "left", or the reason of the error that it got."""
    ended_s: float = math.inf
    num_losses: int = 0
    """Groups that were lost while they ran it, as the world counts them."""
    records: list[UsageRecord] = field(default_factory=list)

    def take(self, chunk: Chunk) -> None:
        self.num_chunks += 1
        self.tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        self.take_end(chunk)

    def take_end(self, chunk: Chunk) -> None:
        """Of a chunk whose tokens it may have already."""
        if chunk.finish_reason is not None:
            self.finished[chunk.index] = chunk.finish_reason
        if chunk.summary is not None:
            self.usage = chunk.summary.num_prompt_tokens, chunk.summary.num_completion_tokens


def client_of(request_id: str) -> int:
    """Ids are made of the client's number and the number of its call; those of sequences begin with them."""
    return int(request_id[:16], 16)


class _Ranks(FakeExecutor):
    """They can die, and be stopped."""

    is_dead = False

    def collect(self) -> StepResult:
        plan = self._submitted[0]
        if self.is_dead or any(POISON in new.token_ids for new in plan.new_sequences):
            raise GroupFailedError("rank 1 died")
        return super().collect()


class Group:
    """One incarnation of a group: a leader and its ranks."""

    def __init__(self, world: "World", name: str) -> None:
        self.name, self._world = name, world
        self._num_blocks = world.cache.num_blocks
        self.ranks = _Ranks(num_blocks=self._num_blocks, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(world.scheduling, world.cache, epoch=1, clock=world.now)
        self.engine = Engine(self.ranks, self.scheduler, max_in_flight=world.draw.choice((1, 2)))
        self.step_s = world.draw.uniform(0.02, 0.06)
        self.stopped_until_s = 0.0
        """Its ranks compute nothing before."""
        self.silent_until_s = 0.0
        """Its leader says nothing before."""
        self.is_gone = False
        """The leader's process has ended."""
        self._inboxes: dict[str, tuple[str, asyncio.Queue[EngineOutput | Exception]]] = {}
        """By sequence: the gateway that reads it, and where."""
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def serves(self) -> bool:
        return not self.is_gone and self.engine.failure is None

    def add(
        self, gateway: str, requests: Sequence[EngineRequest], inbox: "asyncio.Queue[EngineOutput | Exception]"
    ) -> None:
        """Raises RequestError, GroupFailedError."""
        for request in requests:
            self.ranks.salts[request.sampling.seed] = request.cache_salt
        self.engine.add(*requests)
        self._inboxes.update({request.request_id: (gateway, inbox) for request in requests})
        self._wake.set()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """What a gateway wants no more of."""
        for request_id in request_ids:
            if self._inboxes.pop(request_id, None) is not None:
                self.engine.abort(request_id)
        self._wake.set()

    def lose_gateway(self, gateway: str) -> None:
        """Its connection has ended: nobody reads what it asked for."""
        self.cancel([request_id for request_id, (reader, _) in self._inboxes.items() if reader == gateway])

    def stop_leader(self, duration_s: float) -> None:
        """It says nothing for a while. Gateways give it up when they look and it has been silent for long."""
        self.silent_until_s = self._world.now() + duration_s
        for gateway in self._world.gateways:
            wait_s = SILENT_S + self._world.draw.uniform(0.0, LOOK_S)
            self._world.soon(wait_s, functools.partial(self._look, gateway))

    def _look(self, gateway: "Gateway") -> None:
        if self.silent_until_s <= self._world.now():
            return
        gateway.loads.refused(self.name, AVOIDED_WHEN_SILENT_S)
        own = {request_id: inbox for request_id, (name, inbox) in self._inboxes.items() if name == gateway.name}
        self._world.count_losses(own)
        for inbox in dict.fromkeys(own.values()):
            inbox.put_nowait(GroupUnavailableError("the leader is silent"))

    def kill_ranks(self) -> None:
        """The leader notices, and tells the gateways."""
        self.ranks.is_dead = True
        self._wake.set()

    def kill_leader(self) -> None:
        """Everything of the group is gone at once; gateways see their connections end."""
        self.is_gone = True
        self._world.count_losses(set(self._inboxes))
        self._task.cancel()
        for gateway, inbox in dict.fromkeys(self._inboxes.values()):
            self._world.later(NOTICED_S, gateway, inbox, GroupUnavailableError("the connection ended"))
        self._inboxes.clear()
        self._world.replace(self)

    async def close(self) -> list[str]:
        """What is wrong with it when nothing runs any more."""
        if self.serves:
            async with asyncio.timeout(60):
                while self.engine.has_work:
                    self._wake.set()  # a deadline of a request that has ended becomes due by itself
                    await asyncio.sleep(self.step_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.engine.check_integrity()
        if not self.is_gone and self.scheduler._kv.num_free != self._num_blocks:
            return [f"{self.name} has {self.scheduler._kv.num_free} of {self._num_blocks} blocks free at the end"]
        return []

    async def _run(self) -> None:
        now = self._world.now
        while True:
            if not self.engine.has_work:
                self._wake.clear()
                await self._wake.wait()
                continue
            await asyncio.sleep(self.step_s)
            began_s = now()
            while self.stopped_until_s > now() and self.engine.failure is None:
                if now() - began_s >= STUCK_S:
                    self.ranks.is_dead = True
                    break
                await asyncio.sleep(0.1)
            while self.silent_until_s > now():
                await asyncio.sleep(0.1)
            outputs = self.engine.step()
            if self.engine.failure is not None and not self.is_gone:
                self.is_gone = True
                self._world.count_losses(
                    {o.request_id for o in outputs if not o.was_waiting and o.error_kind == "unavailable"}
                )
                self._world.replace(self)
            for output in outputs:
                gateway, inbox = self._inboxes.get(output.request_id, ("", None))
                if inbox is None:
                    continue
                if output.finish_reason is not None:
                    del self._inboxes[output.request_id]
                self._world.later(self._world.draw.uniform(0.0, 0.02), gateway, inbox, output)


class Gateway:
    """The real core of one, on a backend that reaches the world's groups."""

    def __init__(self, world: "World", name: str) -> None:
        self.name, self._world = name, world
        self.models: Mapping[str, ModelCard] = {
            MODEL: card(MODEL, num_groups=len(world.places), max_model_len=MAX_MODEL_LEN)
        }
        self.loads = GroupLoads(clock=world.now)
        self.is_gone = False
        tokenizers: Any = {MODEL: ByteTokenizer()}
        self.generator = Generator(
            self,
            tokenizers,
            LimitsConfig(),
            accounts=Ledger(world, self),
            resume_tokens=ResumeTokens(RESUME_KEY),
            clock=world.now,
        )

    async def can_serve(self, model: str) -> bool:
        return True

    def is_new_to(self, client: Client) -> bool:
        """It did not begin the client's stream."""
        return client.first_gateway is not self

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        """See serving/gateway/core/backend.py."""
        await asyncio.sleep(self._world.draw.uniform(0.0, 0.01))
        while (group := self._choose()) is None:  # Serve holds a call for which there is no replica
            await self._world.has_groups.wait()
        inbox: asyncio.Queue[EngineOutput | Exception] = asyncio.Queue()
        if group.silent_until_s > self._world.now():
            await asyncio.sleep(min(SILENT_S, group.silent_until_s - self._world.now()))
            if group.silent_until_s > self._world.now():
                self.loads.refused(group.name, AVOIDED_WHEN_SILENT_S)
                raise GroupUnavailableError("the group does not answer", may_have_run=False)
        try:
            if group.is_gone:
                raise GroupFailedError("the leader is gone")
            group.add(self.name, requests, inbox)
        except GroupFailedError as error:
            self.loads.refused(group.name)
            raise GroupUnavailableError(str(error), may_have_run=False) from error
        except RequestError as error:
            if error.kind == "overloaded":
                self.loads.refused(group.name)
            raise GroupRefusedError(
                str(error), kind=error.kind, engine=group.name, retry_after_s=error.retry_after_s
            ) from error
        open_ids = [request.request_id for request in requests]
        self.loads.begin(group.name, len(requests))
        # Prompts are short here; as many times longer they count.
        load = prompt_load(PROMPT_TOKENS_A_SEQUENCE * len(requests[0].prompt_token_ids))
        self.loads.prompt_begins(group.name, load)
        try:
            yield GroupOutputs(group.name, ())
            while open_ids:
                output = await inbox.get()
                if isinstance(output, Exception):
                    raise output
                self.loads.prompt_ends(group.name, load)
                load = 0
                if output.finish_reason is not None:
                    open_ids.remove(output.request_id)
                yield GroupOutputs(group.name, (output,))
        finally:
            self.loads.prompt_ends(group.name, load)
            self.loads.end(group.name, len(requests))
            group.cancel(open_ids)

    def _choose(self) -> Group | None:
        groups = [group for group in self._world.places if group is not None]
        return min(
            groups, key=lambda group: preference(self.loads, group.name, 0, self._world.draw.random()), default=None
        )


class Ledger:
    """Accounts that only write down."""

    def __init__(self, world: "World", gateway: "Gateway") -> None:
        self._world, self._gateway = world, gateway

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        return OPEN

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> "Ledger":
        return self

    def rate_limits(self, principal: Principal) -> RateLimits:
        return RateLimits()

    def settle(self, record: UsageRecord) -> None:
        """A gateway that was killed writes nothing any more."""
        if not self._gateway.is_gone:
            self._world.clients[client_of(record.request_id)].records.append(record)

    async def recorded(self) -> None:
        pass


class World:
    """One history."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draw = draw = random.Random(seed)
        self.scheduling = SchedulerConfig(
            max_num_seqs=draw.choice((2, 4, 8)),
            max_num_batched_tokens=draw.choice((8, 32)),
            max_model_len=MAX_MODEL_LEN,
            max_waiting_requests=draw.choice((2, 4, 16)),
            max_waiting_tokens=1 << 20,
            max_prefill_chunk=1 << 30,
            max_prefill_tokens=None,
        )
        self.cache = CacheConfig(
            num_blocks=draw.choice((18, 24, 64)), block_size=BLOCK_SIZE, enable_prefix_caching=draw.random() < 0.5
        )
        self.places: list[Group | None] = []
        self.incarnations: list[Group] = []
        self.gateways: list[Gateway] = []
        self.clients: list[Client] = []
        self.faults: Counter[str] = Counter()
        self.has_groups = asyncio.Event()
        self._last: dict[int, float] = {}
        self._serial = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> list[str]:
        """What was wrong; empty when nothing was."""
        random.seed(self.seed)
        loop, draw = asyncio.get_running_loop(), self.draw
        self.places = [None] * draw.choice((1, 2, 2, 3))
        for place in range(len(self.places)):
            self._start(place)
        self.gateways = [Gateway(self, f"gateway-{next(self._serial)}") for _ in range(draw.choice((1, 2)))]
        plans = [self._plan(number) for number in range(draw.randint(2, 7))]
        self.clients = [Client(plan=plan, number=number) for number, plan in enumerate(plans)]
        asking = [loop.create_task(self._ask(client)) for client in self.clients]
        for _ in range(draw.randint(0, 4)):
            self.soon(draw.uniform(0.0, 3.0), self._fault)
        async with asyncio.timeout(MAX_HISTORY_S):
            await asyncio.gather(*asking)
        for task in list(self._tasks):  # starts that nobody waits for
            task.cancel()
        found = [f"request {c.number}: {what}" for c in self.clients for what in violations(c)]
        for group in self.incarnations:
            found += await group.close()
        for gateway in self.gateways:
            left = [group.name for group in self.incarnations if gateway.loads.load(group.name)]
            found += [f"{gateway.name} counts open sequences of {name}" for name in left if not gateway.is_gone]
        return found

    def later(
        self,
        delay_s: float,
        gateway: str,
        inbox: "asyncio.Queue[EngineOutput | Exception]",
        item: EngineOutput | Exception,
    ) -> None:
        """Bring it to a gateway, in the order in which it was sent."""
        at_s = max(self.now() + delay_s, self._last.get(id(inbox), 0.0))
        self._last[id(inbox)] = at_s + 1e-9
        asyncio.get_running_loop().call_at(at_s, inbox.put_nowait, item)

    def count_losses(self, request_ids: Iterable[str]) -> None:
        """A group was lost while it ran these."""
        for number in {client_of(request_id) for request_id in request_ids}:
            self.clients[number].num_losses += 1

    def replace(self, group: Group) -> None:
        """Another incarnation comes where it was."""
        place = self.places.index(group)
        self.places[place] = None
        if not any(self.places):
            self.has_groups.clear()
        self.soon(self.draw.uniform(0.2, 4.0), lambda: self._start(place))

    def _start(self, place: int) -> None:
        group = self.places[place] = Group(self, f"group-{len(self.incarnations)}")
        self.incarnations.append(group)
        self.has_groups.set()

    def soon(self, delay_s: float, what: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(delay_s)
            what()

        task = asyncio.get_running_loop().create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _plan(self, number: int) -> Plan:
        draw = self.draw
        prompt = tuple(draw.randrange(4) for _ in range(draw.randint(1, 8)))
        is_poisoned = draw.random() < 0.03
        return Plan(
            at_s=draw.uniform(0.0, 1.5),
            prompt=(*prompt, POISON) if is_poisoned else prompt,
            num_choices=draw.choice((1, 1, 2)),
            max_tokens=draw.randint(1, 20),
            seed=number,
            stop_token_ids=(draw.randrange(VOCAB_SIZE),) if draw.random() < 0.3 else (),
            timeout_s=draw.choice((None, None, None, 100.0, draw.uniform(0.05, 3.0))),
            leaves_after=draw.randint(0, 8) if draw.random() < 0.15 else None,
        )

    def _fault(self) -> None:
        draw = self.draw
        living = [group for group in self.places if group is not None]
        kind = draw.choice(("ranks", "ranks", "leader", "stop ranks", "stop leader", "gateway"))
        if kind == "gateway":
            place = draw.randrange(len(self.gateways))
            gateway = self.gateways[place]
            gateway.is_gone = True
            self.gateways[place] = Gateway(self, f"gateway-{next(self._serial)}")
            for client in self.clients:
                if client.gateway is gateway and client.task is not None:
                    client.task.cancel()
            for group in living:
                group.lose_gateway(gateway.name)
        elif not living:
            return
        elif kind == "ranks":
            draw.choice(living).kill_ranks()
        elif kind == "leader":
            draw.choice(living).kill_leader()
        elif kind == "stop ranks":
            draw.choice(living).stopped_until_s = self.now() + draw.choice((0.9, 30.0))
        else:
            draw.choice(living).stop_leader(draw.choice((1.0, 10.0)))
        self.faults[kind] += 1

    async def _ask(self, client: Client) -> None:
        """What our client does: it goes on at another gateway when its own is gone."""
        plan = client.plan
        await asyncio.sleep(plan.at_s)
        for attempt in itertools.count():
            client.gateway = self.draw.choice(self.gateways)
            client.first_gateway = client.first_gateway or client.gateway
            client.task = asyncio.get_running_loop().create_task(self._call(client, client.gateway, attempt))
            try:
                await client.task
            except asyncio.CancelledError:
                if not client.gateway.is_gone:
                    raise
                await asyncio.sleep(self.draw.uniform(0.0, 0.5))
                continue
            except TimeoutError:
                client.outcome = "DEADLINE"
            except ServingError as error:
                client.outcome = error.status.reason
                if client.tokens and client.outcome in ("OVERLOADED", "NO_GROUP") and client.gateway.is_new_to(client):
                    await asyncio.sleep(1.0)  # a resumed stream is asked for again, as any refused request is
                    continue
            break
        client.ended_s = self.now()

    async def _call(self, client: Client, gateway: Gateway, attempt: int) -> None:
        plan = client.plan
        left_s = None if plan.timeout_s is None else max(0.0, START_S + plan.at_s + plan.timeout_s - self.now())
        call = Call(
            request_id=f"{client.number:016x}{attempt:016x}", arrived_s=self.now(), timeout_s=left_s, is_streamed=True
        )
        query = GenerateQuery(
            model=MODEL,
            prompt=TokenPrompt(token_ids=plan.prompt),
            max_tokens=plan.max_tokens,
            n=plan.num_choices,
            seed=plan.seed,
            stop_token_ids=plan.stop_token_ids,
        )
        delivered = [len(client.tokens.get(choice, ())) for choice in range(plan.num_choices)]
        stream = gateway.generator.begin_stream(
            query, call, repr(plan).encode(), client.resume_token or None, delivered if client.resume_token else ()
        )
        # A front end ends a call at its deadline, whatever its generator waits for.
        async with asyncio.timeout(left_s), aclosing(gateway.generator.generate(query, call, stream)) as chunks:
            async for chunk in chunks:
                num_delivered = stream.num_delivered(chunk.index)
                if chunk.num_tokens <= num_delivered and num_delivered:
                    client.take_end(chunk)
                    continue
                if plan.leaves_after is not None and client.num_chunks >= plan.leaves_after:
                    client.outcome = "left"
                    return
                client.take(chunk)
                client.resume_token = stream.token()
        client.outcome = "ok"


def violations(client: Client) -> list[str]:
    """In what an answer differs from what it must be."""
    plan, found = client.plan, list[str]()
    expected = plan.answer()
    for choice, tokens in client.tokens.items():
        if tuple(tokens) != expected[: len(tokens)]:
            found.append(f"choice {choice} is {tokens} and not the beginning of {expected}")
    is_short = plan.timeout_s is not None and plan.timeout_s < 60
    match client.outcome:
        case "ok":
            if plan.is_poisoned:
                found.append("a request that no rank survives was answered")
            for choice in range(plan.num_choices):
                if tuple(client.tokens.get(choice, ())) != expected:
                    found.append(f"choice {choice} ends with {client.tokens.get(choice)} instead of {expected}")
            reason = FinishReason.STOP if expected[-1] in plan.stop_token_ids else FinishReason.LENGTH
            if client.finished != dict.fromkeys(range(plan.num_choices), reason):
                found.append(f"the choices ended with {client.finished} instead of {reason}")
            if client.usage != (len(plan.prompt), plan.num_choices * len(expected)):
                found.append(f"usage is {client.usage}")
        case "left":
            pass
        case "DEADLINE":
            if not is_short:
                found.append(f"the deadline of {plan.timeout_s} s passed, though there were groups")
        case "OVERLOADED":
            if client.tokens:
                found.append("it was refused after its first token")
        case "REQUEST_POISONED":
            if client.num_losses <= MAX_LOSSES:
                found.append(f"it was taken for poison after {client.num_losses} losses")
        case "NO_GROUP":
            if client.tokens:
                found.append("it was given up after its first token")
        case other:
            found.append(f"it ended with {other!r}")
    is_over = client.outcome != "gateway lost"
    if is_over and plan.timeout_s is not None and client.ended_s > 1000.0 + plan.at_s + plan.timeout_s + 1.0:
        found.append(
            f"it ended {client.ended_s - 1000.0 - plan.at_s:.1f} s after it began; its deadline is {plan.timeout_s} s"
        )
    return found if client.outcome == "gateway lost" else [*found, *_wrong_records(client)]


def _wrong_records(client: Client) -> list[str]:
    """Records of one id are one bill: the ledger keeps the most of them."""
    if len({record.request_id for record in client.records}) != 1:
        return [f"{len(client.records)} usage records instead of one: {client.records}"]
    num_charged = max(record.num_completion_tokens for record in client.records)
    num_tokens = sum(map(len, client.tokens.values()))
    if num_charged < num_tokens or (client.outcome == "ok" and num_charged != num_tokens):
        return [f"{num_charged} tokens are charged and {num_tokens} were delivered"]
    return []


@contextmanager
def _few_collections() -> Iterator[None]:
    """Python looks for cycles a hundred times as seldom: a history is short, and makes many objects."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def simulate(seed: int) -> tuple[list[str], World]:
    """One history: what was wrong in it, and how it ended."""
    world = World(seed)
    with _few_collections():
        return run_virtually(world.run()), world
