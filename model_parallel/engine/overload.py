"""What a group does when more comes than it can take on: whom it refuses, when they may come back, and who has expired."""

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from operator import sub

from model_parallel.config import SchedulerConfig
from model_parallel.engine.fair_queue import FairQueue
from model_parallel.engine.kv_blocks import KVBlocks
from model_parallel.engine.request import EngineRequest
from model_parallel.errors import RequestError

WINDOW_S = 30.0
"""What was measured so long ago counts for 1/e. Long beside the time that a sequence runs."""
WINDOW_ENDED = 100
"""The same for what so many sequences ago was measured."""
SHARE_OF_ROOM = 4
"""A tenant may have so many times as much waiting as there is room left (Choudhury and Hahne 1998, dynamic queue thresholds).

Alone it fills 4/5 of the queue, as one of k tenants 4/(4 k + 1) of it, and the last place is only for somebody who has fewer
than 4 waiting. So one tenant never fills a queue of 5 or more, and nobody who was accepted is thrown out for another.
"""


DEADLINE_MARGIN = 1.25
"""A run may take so many times longer than estimated. What is accepted and then expires is work for nothing."""


class StepTimes:
    """How long a step takes, by the number of sequences in it: a straight line through what was measured, by least squares."""

    def __init__(self) -> None:
        self._num = self._rows = self._time_s = self._rows_squared = self._rows_time_s = 0.0

    def record(self, num_rows: int, step_s: float) -> None:
        """A step with so many sequences took so long."""
        decay = math.exp(-step_s / WINDOW_S)
        self._num = self._num * decay + 1
        self._rows = self._rows * decay + num_rows
        self._time_s = self._time_s * decay + step_s
        self._rows_squared = self._rows_squared * decay + num_rows * num_rows
        self._rows_time_s = self._rows_time_s * decay + num_rows * step_s

    def record_many(self, num_rows: int, steps_s: Iterable[float]) -> None:
        """The same as `record` for each of several steps in turn, bit for bit."""
        num, rows, time_s = self._num, self._rows, self._time_s
        rows_squared, rows_time_s = self._rows_squared, self._rows_time_s
        squared, exp = num_rows * num_rows, math.exp
        for step_s in steps_s:
            decay = exp(-step_s / WINDOW_S)
            num = num * decay + 1
            rows = rows * decay + num_rows
            time_s = time_s * decay + step_s
            rows_squared = rows_squared * decay + squared
            rows_time_s = rows_time_s * decay + num_rows * step_s
        self._num, self._rows, self._time_s = num, rows, time_s
        self._rows_squared, self._rows_time_s = rows_squared, rows_time_s

    def estimate_s(self, num_rows: int) -> float:
        """Of a step with so many; 0 before anything was measured. More sequences never take less time, nor fewer more a piece."""
        if not self._num:
            return 0.0
        mean_rows, mean_s = self._rows / self._num, self._time_s / self._num
        variance = self._rows_squared / self._num - mean_rows**2
        covariance = self._rows_time_s / self._num - mean_rows * mean_s
        # Below a variance of 0.01 all steps had the same number, and a quotient would be noise.
        slope = min(max(0.0, covariance / variance), mean_s / mean_rows) if variance > 0.01 else 0.0
        return mean_s + slope * (num_rows - mean_rows)


class Pace:
    """How fast the group takes on what waits, and how long a sequence then runs."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._elapsed_s = 0.0
        self._last_s = 0.0
        self._was_backlogged = False
        self._num_output_tokens = 0.0
        self._num_ended = 0.0
        self._step_times = StepTimes()

    def record_step(self, now_s: float, num_admitted_tokens: int, *, is_backlogged: bool) -> None:
        """A step was planned that admits so many prompt tokens, and something still waits or not.

        Only the time counts in which something waits: then it is the group that sets the pace and not the clients.
        """
        if self._was_backlogged:
            passed_s = now_s - self._last_s
            decay = math.exp(-passed_s / WINDOW_S)
            self._num_tokens = self._num_tokens * decay + num_admitted_tokens
            self._elapsed_s = self._elapsed_s * decay + passed_s
        self._last_s, self._was_backlogged = now_s, is_backlogged

    def record_decode(self, num_rows: int, step_s: float) -> None:
        """Sequences got a token in a step of so many, and had the one before so long ago."""
        self._step_times.record(num_rows, step_s)

    def record_decodes(self, num_rows: int, ends_s: Sequence[float], last_s: float | None) -> None:
        """Steps of the same sequences ended at these moments. `last_s` is when they had the token before; None when they had
        none."""
        steps_s = map(sub, ends_s[1:], ends_s)
        self._step_times.record_many(num_rows, steps_s if last_s is None else chain((ends_s[0] - last_s,), steps_s))

    def record_empty_steps(self, times_s: Sequence[float], *, is_backlogged: bool) -> None:
        """Steps that admit nothing were planned at these moments."""
        if is_backlogged or self._was_backlogged:
            for now_s in times_s:
                self.record_step(now_s, 0, is_backlogged=is_backlogged)
        else:
            self._last_s = times_s[-1]

    def record_end(self, num_output_tokens: int) -> None:
        """A sequence came to its own end, or to that of its time."""
        decay = math.exp(-1 / WINDOW_ENDED)
        self._num_ended = self._num_ended * decay + 1
        self._num_output_tokens = self._num_output_tokens * decay + num_output_tokens

    def wait_s(self, num_tokens: float) -> float | None:
        """How long it takes until so many prompt tokens are admitted; None before anything was measured."""
        return num_tokens * self._elapsed_s / self._num_tokens if self._num_tokens else None

    def run_s(self, max_tokens: int, num_running: int) -> float:
        """How long a sequence runs among so many, if its answer is not more than twice as long as others; 0 before any has
        ended."""
        if not self._num_ended:
            return 0.0
        num_tokens = min(max_tokens, 2 * self._num_output_tokens / self._num_ended)
        return num_tokens * self._step_times.estimate_s(num_running)


class Deadlines:
    """Who expires next. A step costs constant time while nobody does."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, at_s: float, seq_id: int) -> None:
        heapq.heappush(self._heap, (at_s, seq_id))

    def is_due(self, now_s: float) -> bool:
        """Somebody's time has come."""
        return bool(self._heap) and self._heap[0][0] <= now_s

    def take_expired(self, now_s: float) -> list[int]:
        """Those whose time has come. Some may have ended before."""
        expired = []
        while self._heap and self._heap[0][0] <= now_s:
            expired.append(heapq.heappop(self._heap)[1])
        return expired

    def keep(self, living: Collection[int]) -> None:
        """Forget those that have ended, once they are more than half."""
        if len(self._heap) > 2 * len(living) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in living]
            heapq.heapify(self._heap)


def check_fits(request: EngineRequest, kv: KVBlocks, config: SchedulerConfig) -> None:
    """Raises RequestError when a request can never run."""
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if not num_prompt:
        raise RequestError("the prompt is empty; at least one token is needed")
    if not 0 < request.weight < math.inf:
        raise RequestError(f"the tenant's weight is {request.weight}; it must be greater than 0")
    if len(request.output_token_ids) > max_tokens:
        raise RequestError(f"max_tokens is {max_tokens} and {len(request.output_token_ids)} were delivered already")
    if num_prompt + max_tokens > config.max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together at most "
            f"{config.max_model_len} are allowed"
        )
    # The last token to be drawn is never computed, so it needs no room.
    num_blocks = kv.num_blocks_for(num_prompt + max(max_tokens - 1, len(request.output_token_ids)))
    if num_blocks > kv.num_blocks:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; that takes {num_blocks} blocks "
            f"of the KV cache, which has {kv.num_blocks}"
        )


def check_room(
    requests: Sequence[EngineRequest], queue: FairQueue, num_running: int, pace: Pace, config: SchedulerConfig
) -> None:
    """Raises RequestError when the choices of one client request cannot wait: "overloaded" for lack of room, or because
    after the wait too little is left of their deadline; "invalid" when there never is enough room.

    Its retry_after_s is how long they would have waited: who comes back earlier only waits here instead of there.
    """
    first, num_requests = requests[0], len(requests)
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    if num_requests > config.max_waiting_requests:
        raise RequestError(f"there are {num_requests} sequences; at most {config.max_waiting_requests} may wait")
    if num_tokens > config.max_waiting_tokens:
        raise RequestError(f"there are {num_tokens} prompt tokens; at most {config.max_waiting_tokens} may wait")
    tenant, num_ahead = queue.tenant_of(first), queue.num_tokens_ahead(first)

    def refusal(reason: str) -> RequestError:
        return RequestError(reason, kind="overloaded", retry_after_s=pace.wait_s(max(num_ahead, num_tokens)))

    room = config.max_waiting_requests - len(queue)
    if num_requests > room:
        raise refusal(f"{len(queue)} requests are waiting; at most {config.max_waiting_requests} may")
    if len(tenant.waiting) + num_requests > SHARE_OF_ROOM * room:
        raise refusal(
            f"{len(tenant.waiting)} requests of this tenant are waiting; it may have {SHARE_OF_ROOM} times as many as "
            f"there is room left, which is {room}"
        )
    room = config.max_waiting_tokens - queue.num_tokens
    if num_tokens > room:
        raise refusal(
            f"{queue.num_tokens} prompt tokens are waiting and this prompt has {num_tokens}; "
            f"at most {config.max_waiting_tokens} may wait"
        )
    if tenant.num_waiting_tokens + num_tokens > SHARE_OF_ROOM * room:
        raise refusal(
            f"{tenant.num_waiting_tokens} prompt tokens of this tenant are waiting and this prompt has {num_tokens}; "
            f"it may have {SHARE_OF_ROOM} times as many as there is room left, which is {room}"
        )
    if first.deadline_s is None or not (queue or num_running):  # An idle group tries, and learns how fast it is.
        return
    wait_s = pace.wait_s(num_ahead) or 0.0
    num_beside = min(config.max_num_seqs, num_running + len(queue) + num_requests)
    run_s = pace.run_s(first.sampling.max_tokens - len(first.output_token_ids), num_beside)
    if wait_s + DEADLINE_MARGIN * run_s > first.deadline_s:
        raise refusal(
            f"it would wait about {wait_s:.1f} s and run {run_s:.1f} s, and its deadline is in {first.deadline_s:.1f} s"
        )
