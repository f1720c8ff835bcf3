"""Streams through faults: each must bring what it brings alone, and each fault that was planned must have happened."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from bench.chaos.faults import FAULTS, POINTS, Proof
from bench.chaos.history import Answer, History, Reference, check_faults, violations
from bench.chaos.processes import Group
from bench.chaos.proxy import Proxy
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from serving.client.client import Client

STREAM_TIMEOUT_S = 600.0
READY_S = 300.0
"""For groups to start anew on a busy machine."""
PROMPT = "Once upon a time, in a land far away,"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A campaign."""

    faults: tuple[str, ...]
    """Names of FAULTS, of which each turn takes the next."""
    point: str = "random"
    num_turns: int = 10
    num_streams: int = 16
    num_tokens: int = 120
    seed: int = 1
    model: str = ""
    api_key: str = ""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name in self.faults:
            if name not in FAULTS:
                raise ConfigError(f"--faults has {name!r}; allowed: {', '.join(FAULTS)}")
        if not self.faults:
            raise ConfigError(f"--faults names none; allowed: {', '.join(FAULTS)}")
        if self.point not in POINTS:
            raise ConfigError(f"--at is {self.point!r}; allowed: {', '.join(POINTS)}")

    def request(self, number: int) -> pb.GenerateRequest:
        """Greedy and seeded in turn."""
        sampling = pb.Sampling(max_tokens=self.num_tokens, seed=number, temperature=float(number % 2), ignore_eos=True)
        return pb.GenerateRequest(model=self.model, prompt=pb.Prompt(text=PROMPT), sampling=sampling)


class Stack(Protocol):
    """What is tormented."""

    def groups(self) -> list[Group]: ...

    def await_groups(self, sizes: Sequence[int], timeout_s: float, without: Sequence[int] = ()) -> list[Group]: ...


@dataclass(kw_only=True)
class Recorded:
    """A stream as its client saw it."""

    history: History = field(default_factory=History)
    fault_s: float | None = None
    pause_s: float = 0.0
    """Its longest pause since the fault."""


@dataclass(kw_only=True)
class Outcome:
    """Of a campaign."""

    found: list[str] = field(default_factory=list)
    """Everything that was wrong."""
    planned: Counter[str] = field(default_factory=Counter)
    observed: Counter[str] = field(default_factory=Counter)
    pauses_s: dict[str, list[float]] = field(default_factory=dict)
    """Longest pause of each stream, by fault."""


class Campaign:
    """Faults for one stack."""

    def __init__(
        self, plan: Plan, stack: Stack, proxy: Proxy, report: Callable[[str], None], draw: random.Random | None = None
    ) -> None:
        self._plan, self._stack, self._proxy, self._report = plan, stack, proxy, report
        self._draw = draw or random.Random(plan.seed)
        self._num_tokens = 0
        self._progress = threading.Condition()

    def run(self) -> Outcome:
        """Raises TimeoutError when groups do not come back, ConfigError when there is none to begin with."""
        plan, outcome = self._plan, Outcome()
        sizes = [len(group.ranks) for group in self._stack.groups()]
        if not sizes:
            raise ConfigError("no replica group of this stack serves")
        references = [self._reference(number) for number in range(plan.num_streams)]
        self._report(f"{len(sizes)} groups; {plan.num_streams} streams alone are recorded")
        lost: tuple[int, ...] = ()
        for turn in range(plan.num_turns):
            groups = self._stack.await_groups(sizes, READY_S, lost)
            name = plan.faults[turn % len(plan.faults)]
            group = self._draw.choice(groups)
            recorded, proof = self._turn(name, group)
            lost = group.pids if proof.loses_group else ()
            outcome.planned[name] += 1
            outcome.observed[name] += proof.happened
            wrong = violations([each.history for each in recorded], references)
            outcome.found += [f"turn {turn}, {name}: {what}" for what in wrong]
            pauses_s = [each.pause_s for each in recorded]
            outcome.pauses_s.setdefault(name, []).extend(pauses_s)
            self._report(
                f"{turn}: {name}: {proof.detail}; {len(wrong)} wrong; longest pause {max(pauses_s, default=0.0):.2f} s"
            )
        self._stack.await_groups(sizes, READY_S, lost)
        outcome.found += check_faults(outcome.planned, outcome.observed)
        return outcome

    def _turn(self, name: str, group: Group) -> tuple[list[Recorded], Proof]:
        plan = self._plan
        part = POINTS[plan.point](self._draw)
        recorded = [Recorded() for _ in range(plan.num_streams)]
        self._num_tokens = 0
        with ThreadPoolExecutor(plan.num_streams) as threads:
            streams = [threads.submit(self._read, number, record) for number, record in enumerate(recorded)]
            with self._progress:
                enough = part * plan.num_streams * plan.num_tokens
                self._progress.wait_for(
                    lambda: self._num_tokens >= enough or all(stream.done() for stream in streams), STREAM_TIMEOUT_S
                )
            for record in recorded:
                record.fault_s = time.monotonic()
            proof = FAULTS[name](group, self._draw.choice(group.pids), self._proxy)
            for stream in streams:
                stream.result()
        return recorded, proof

    def _read(self, number: int, recorded: Recorded) -> None:
        last_s = time.monotonic()
        try:
            for message in self._chunks(number):
                now_s = time.monotonic()
                if recorded.fault_s is not None:
                    recorded.pause_s = max(recorded.pause_s, now_s - max(last_s, recorded.fault_s))
                last_s = now_s
                recorded.history.record(message)
                with self._progress:
                    self._num_tokens += len(message.token_ids)
                    self._progress.notify_all()
            recorded.history.status = grpc.StatusCode.OK
        except grpc.RpcError as error:
            recorded.history.status = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        finally:
            with self._progress:
                self._progress.notify_all()

    def _chunks(self, number: int) -> Iterator[pb.GenerateStreamResponse]:
        with Client(self._proxy.address, api_key=self._plan.api_key) as client:
            chunks, _ = client.stream(self._plan.request(number), timeout_s=STREAM_TIMEOUT_S)
            yield from chunks

    def _reference(self, number: int) -> Reference:
        """The stream alone, without any fault."""
        chunks = list(self._chunks(number))
        token_ids = tuple(token for chunk in chunks for token in chunk.token_ids)
        answer = Answer(token_ids=token_ids, finish_reason=chunks[-1].finish_reason)
        return Reference(choices=(answer,), num_prompt_tokens=chunks[-1].usage.prompt_tokens)
