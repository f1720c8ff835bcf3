"""What a group does when more comes than it can take on: whom it refuses, when they may come back, and who has expired."""

import heapq
import math
from collections.abc import Collection, Sequence

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
    """How long a step takes, by the number of sequences in it: a straight line through what was measured, by least squares.

    Steps that follow one another with the same number of sequences are a run, and count as if all of it were equally long.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        """Before the run: weights of steps, and weighted sequences, seconds, squares of sequences, sequences times seconds."""
        self._num_rows = 0
        self._num_steps = 0.0
        self._began_s = self._ended_s = -math.inf
        """Of the run."""

    def record(self, num_rows: int, began_s: float, ended_s: float, num_steps: float = 1.0) -> None:
        """So many steps, one after the other, each with so many sequences, began and ended then."""
        if num_rows != self._num_rows or began_s != self._ended_s:
            self._sums = self._sums_with_run()
            self._num_rows, self._num_steps, self._began_s = num_rows, 0.0, began_s
        self._num_steps += num_steps
        self._ended_s = ended_s

    def estimate_s(self, num_rows: int) -> float:
        """Of a step with so many; 0 before anything was measured. More sequences never take less time, nor fewer more a piece."""
        num, rows, time_s, rows_squared, rows_time_s = self._sums_with_run()
        if not num:
            return 0.0
        mean_rows, mean_s = rows / num, time_s / num
        variance = rows_squared / num - mean_rows**2
        covariance = rows_time_s / num - mean_rows * mean_s
        # Below a variance of 0.01 all steps had the same number, and a quotient would be noise.
        slope = min(max(0.0, covariance / variance), mean_s / mean_rows) if variance > 0.01 else 0.0
        return mean_s + slope * (num_rows - mean_rows)

    def _sums_with_run(self) -> tuple[float, float, float, float, float]:
        """The run's steps have weights 1, d, d², … from the last one back, where d = exp(-step_s / WINDOW_S): a geometric sum."""
        if not self._num_steps:
            return self._sums
        num, rows, time_s, rows_squared, rows_time_s = self._sums
        run_s, num_rows = self._ended_s - self._began_s, self._num_rows
        step_s = run_s / self._num_steps
        lost = -math.expm1(-run_s / WINDOW_S)
        decay, weight = 1 - lost, lost / -math.expm1(-step_s / WINDOW_S) if step_s else self._num_steps
        return (
            num * decay + weight,
            rows * decay + weight * num_rows,
            time_s * decay + weight * step_s,
            rows_squared * decay + weight * num_rows * num_rows,
            rows_time_s * decay + weight * num_rows * step_s,
        )


class Pace:
    """How fast the group takes on what waits, and how long a sequence then runs."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._elapsed_s = 0.0
        self._counted_s = 0.0
        """Until then, if something has waited since."""
        self._last_s = 0.0
        self._was_backlogged = False
        self._num_output_tokens = 0.0
        self._num_ended = 0.0
        self._step_times = StepTimes()

    def record_step(self, now_s: float, num_admitted_tokens: int, *, is_backlogged: bool) -> None:
        """A step was planned that admits so many prompt tokens, and something still waits or not.

        Only the time counts in which something waits: then it is the group that sets the pace and not the clients.
        """
        if not self._was_backlogged:
            self._counted_s = now_s
        elif num_admitted_tokens or not is_backlogged:
            num_tokens, self._elapsed_s = self._backlog_at(now_s)
            self._num_tokens = num_tokens + num_admitted_tokens
            self._counted_s = now_s
        self._last_s, self._was_backlogged = now_s, is_backlogged

    def record_decodes(self, num_rows: int, began_s: float, ended_s: float, num_steps: float = 1.0) -> None:
        """Steps of so many sequences, one after the other: each of these got so many tokens between these moments."""
        self._step_times.record(num_rows, began_s, ended_s, num_steps)

    def record_end(self, num_output_tokens: int) -> None:
        """A sequence came to its own end, or to that of its time."""
        decay = math.exp(-1 / WINDOW_ENDED)
        self._num_ended = self._num_ended * decay + 1
        self._num_output_tokens = self._num_output_tokens * decay + num_output_tokens

    def wait_s(self, num_tokens: float) -> float | None:
        """How long it takes until so many prompt tokens are admitted; None before anything was measured."""
        num_admitted, elapsed_s = self._backlog_at(self._last_s if self._was_backlogged else self._counted_s)
        return num_tokens * elapsed_s / num_admitted if num_admitted else None

    def _backlog_at(self, now_s: float) -> tuple[float, float]:
        """Tokens admitted while something waited, and how long that was, if nothing has been admitted since they were counted."""
        passed_s = now_s - self._counted_s
        decay = math.exp(-passed_s / WINDOW_S)
        return self._num_tokens * decay, self._elapsed_s * decay + passed_s

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
