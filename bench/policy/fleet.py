"""Replica groups as queues in continuous time: prompts are computed one after the other, decoding sequences share the steps.

A group's rates change only when a request arrives, has its first token or ends, so time jumps from one of these to the next. What
is left out: preemption (a sequence waits until the KV cache has room for its whole prompt and half its answer), the prefix cache,
and the difference between groups.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.policy import GroupLoad, GroupObservation, Phase, StepLine
from model_parallel.engine.answer_lengths import AnswerLengths

MAX_CHUNK = 512
"""Prompt tokens of one step."""

_LINE = StepLine(base_s=0.040, sequence_s=0.0004, prompt_token_s=0.00012)


@dataclass(frozen=True, kw_only=True)
class GroupModel:
    """What a group is like. The numbers are of the size of a 70B model's on four A100: see docs/autoscaling.md."""

    line: StepLine = _LINE
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    kv_cache_tokens: int = 400_000
    max_waiting: int = 256
    start_s: float = 90.0


@dataclass(slots=True, eq=False)
class Request:
    """One, and what became of it."""

    arrived_s: float
    num_prompt: int
    num_output: int
    first_s: float = math.inf
    ended_s: float = math.inf
    is_refused: bool = False
    is_aborted: bool = False

    def is_within(self, ttft_s: float, tpot_s: float) -> bool:
        """It was answered in time."""
        if self.is_refused or self.is_aborted or self.ended_s == math.inf:
            return False
        per_token_s = (self.ended_s - self.first_s) / max(self.num_output - 1, 1)
        return self.first_s - self.arrived_s <= ttft_s and per_token_s <= tpot_s


_number = itertools.count()


@dataclass(slots=True, eq=False)
class Group:
    """One group. Times go forward from call to call."""

    name: str
    model: GroupModel
    ordered_s: float
    ready_s: float
    phase: Phase = Phase.STARTING
    phase_since_s: float = 0.0
    abort_at_s: float = math.inf
    now_s: float = 0.0
    tokens: float = 0.0
    """That each decoding sequence has got since the group started (virtual time of processor sharing)."""
    decoding: list[tuple[float, int, Request]] = field(default_factory=list)
    """By the virtual time of the end."""
    waiting: deque[Request] = field(default_factory=deque)
    num_waiting_tokens: int = 0
    prefilling: Request | None = None
    prompt_left: float = 0.0
    kv_tokens: float = 0.0
    lengths: AnswerLengths = field(default_factory=AnswerLengths)
    num_open: int = 0
    """Requests that it has and that have not ended."""
    step_s: float = 0.0
    """Of the steps that it does at present."""
    chunk: int = 0
    """Prompt tokens of those."""
    version: int = 0
    """Of its next event; an earlier one is void."""

    def next_event_s(self) -> float:
        """When something changes, if nothing arrives."""
        at_s = math.inf
        if self.prefilling:
            at_s = self.now_s + self.prompt_left / self.chunk * self.step_s
        if self.decoding:
            end_s = self.now_s + (self.decoding[0][0] - self.tokens) * self.step_s
            if end_s < at_s:
                return end_s
        return at_s

    def advance(self, now_s: float) -> None:
        """Let time pass, up to the next event at most."""
        if now_s > self.now_s and self.num_open:
            num_steps = (now_s - self.now_s) / self.step_s
            self.tokens += num_steps
            if self.prefilling:
                self.prompt_left -= num_steps * self.chunk
        self.now_s = now_s

    def settle(self) -> None:
        """End and begin what is due now."""
        decoding = self.decoding
        while decoding and decoding[0][0] <= self.tokens + 1e-6:
            _, number, request = heapq.heappop(decoding)
            request.ended_s = self.now_s
            self.kv_tokens -= _held(request)
            self.num_open -= 1
            self.lengths.end(number, request.num_output, is_whole=True)
        if self.prefilling and self.prompt_left <= 1e-3:
            request = self.prefilling
            request.first_s = self.now_s + self.step_s / 2  # its last chunk shares a step with others
            number = next(_number)
            heapq.heappush(decoding, (self.tokens + request.num_output, number, request))
            self.lengths.begin(number, self._tokens_since(self.tokens))
            self.prefilling = None
        if self.prefilling is None and self.waiting and len(decoding) < self.model.max_num_seqs:
            request = self.waiting[0]
            if self.kv_tokens + _held(request) <= self.model.kv_cache_tokens:
                self.waiting.popleft()
                self.num_waiting_tokens -= request.num_prompt
                self.kv_tokens += _held(request)
                self.prefilling, self.prompt_left = request, float(request.num_prompt)
        line, num = self.model.line, len(decoding)
        self.step_s = line.base_s + line.sequence_s * num
        if self.prefilling:
            self.chunk = min(self.model.max_num_batched_tokens - num, MAX_CHUNK)
            self.step_s += line.prompt_token_s * self.chunk

    def offer(self, request: Request) -> bool:
        """Whether the group takes it."""
        if len(self.waiting) >= self.model.max_waiting:
            return False
        self.waiting.append(request)
        self.num_waiting_tokens += request.num_prompt
        self.num_open += 1
        return True

    def abort_all(self) -> None:
        """It is killed."""
        for request in [
            *(r for _, _, r in self.decoding),
            *self.waiting,
            *([self.prefilling] if self.prefilling else []),
        ]:
            request.is_aborted = True
        self.decoding.clear()
        self.waiting.clear()
        self.num_open = 0
        self.prefilling = None

    def _tokens_since(self, began: float) -> Callable[[], int]:
        return lambda: int(self.tokens - began)

    def observe(self) -> GroupObservation:
        """As an autoscaler sees it."""
        load = None
        if self.phase is not Phase.STARTING:
            load = GroupLoad(
                measured_s=self.now_s,
                num_running=len(self.decoding) + (self.prefilling is not None),
                num_waiting=len(self.waiting),
                num_waiting_tokens=self.num_waiting_tokens,
                kv_usage=min(1.0, self.kv_tokens / self.model.kv_cache_tokens),
                max_num_seqs=self.model.max_num_seqs + 1,  # one more is in prefill
                kv_cache_tokens=self.model.kv_cache_tokens,
                line=self.model.line,
                mean_output_tokens=self.lengths.mean(),
                num_ended_answers=self.lengths.num_ended,
            )
        is_up = self.phase is not Phase.STARTING
        return GroupObservation(
            group=self.name,
            phase=self.phase,
            since_s=self.phase_since_s,
            load=load,
            start_s=self.ready_s - self.ordered_s if is_up and self.ordered_s >= 0 else None,
        )


def _held(request: Request) -> float:
    return request.num_prompt + request.num_output / 2
