"""Decides what each step of a replica group computes: continuous batching over a paged KV cache.

Sequences run in order of arrival. Those that run are always the first to have arrived among all that live, so the last
of them is the one to preempt, and it waits again before everybody else.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.kv_blocks import KVBlocks
from model_parallel.engine.messages import NewSequence, Row, RowResult, StepPlan, StepResult
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.sequence import Sequence
from model_parallel.errors import GroupFailedError, RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
    """Load at this moment, and totals since the group started."""

    num_running: int
    num_waiting: int
    """Preempted ones included."""
    kv_usage: float
    """Share of the KV cache that sequences hold, 0 to 1. Published blocks that nobody holds count as free."""
    num_preemptions: int
    num_prefix_query_tokens: int
    """Tokens looked up in the prefix cache, once for each request."""
    num_prefix_hit_tokens: int


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A step while it is being planned."""

    budget: int
    """Tokens that it still has room for."""
    new_sequences: list[NewSequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Scheduler:
    """The one scheduler of a group. Its owner calls it from one thread at a time; it never waits.

    `schedule` looks at how many tokens a sequence has, never at which, and counts as computed what it has just planned. So a
    step can be planned, and sent, while the results of earlier ones are not in. Ranks run plans in order, and therefore:

    - A sequence whose pending token ends it (a stop token, an error) may have a row in a plan already sent. That row only
      writes behind the tokens known, so never into a block that is shared; its result finds no sequence and is dropped.
    - Blocks are free for others as soon as their sequence has ended or is preempted: whatever rows are under way write into
      them before any row of a later plan does.
    - Ranks forget a sequence with the plan after the last that names it.
    - A block is published when the result of the step that filled it is in, unless the sequence was preempted since: its
      blocks are then others'. Its token counts all the same, as the ranks have appended it too.
    - A preempted sequence is admitted again when all its tokens are known, because its prefix is looked up by content.
    - A last token is never computed, so a sequence that only waits for it is given no further row.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._kv = KVBlocks(cache)
        self._epoch = epoch
        self._clock = clock
        self._requests: dict[str, Sequence] = {}
        self._sequences: dict[int, Sequence] = {}
        """All that live, by seq_id, in order of arrival."""
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        """By seq_id, in order of arrival."""
        self._finished: list[int] = []
        """Sequences that the next plan tells the ranks to forget."""
        self._outputs: list[EngineOutput] = []
        self._last_seq_id = 0
        self._last_step_id = 0
        self._num_preemptions = 0
        self._num_prefix_query_tokens = 0
        self._num_prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """A step would compute something, deliver an output, or tell the ranks of a sequence to forget."""
        return bool(self._requests or self._finished or self._outputs)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_usage=1 - self._kv.num_free / self._kv.num_blocks,
            num_preemptions=self._num_preemptions,
            num_prefix_query_tokens=self._num_prefix_query_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
        )

    def add(self, request: EngineRequest) -> None:
        """Accept a request, which from now on ends in exactly one output with a finish_reason.

        Raises RequestError: "duplicate" while another request of this id lives, "invalid" when it can never fit,
        "overloaded" when too much is waiting.
        """
        self._check_new(request)
        self._check_fits(request)
        self._check_room(request)
        self._last_seq_id += 1
        sequence = Sequence(
            seq_id=self._last_seq_id,
            request=request,
            table=self._kv.new_table(request.cache_salt),
            accepted_s=self._clock(),
        )
        self._requests[request.request_id] = sequence
        self._sequences[sequence.seq_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str, reason: FinishReason) -> bool:
        """End a request now, whatever it is doing. Its last output comes with the next ones. False if it has ended."""
        sequence = self._requests.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, reason)
        return True

    def fail_all(self, error: str) -> None:
        """End every request because the group is lost. `error` is for the client to read."""
        for sequence in list(self._requests.values()):
            self._end(sequence, FinishReason.ERROR, error=error, error_kind="unavailable")
        self._finished.clear()

    def schedule(self) -> StepPlan | None:
        """Plan the next step: one token for each sequence that decodes, then as much prefill as there is room for.

        None when there is nothing to compute, before more results are in, and nothing to tell the ranks.
        """
        now_s = self._clock()
        self._expire(now_s)
        draft = _Draft(budget=self._config.max_num_batched_tokens)
        self._plan_decodes(draft)
        self._plan_prefills(draft)
        self._admit_waiting(draft, now_s)
        if not (draft.rows or self._finished):
            return None
        for row in draft.rows:
            self._sequences[row.seq_id].num_pending += row.sample
        finished, self._finished = tuple(self._finished), []
        self._last_step_id += 1
        return StepPlan(
            epoch=self._epoch,
            step_id=self._last_step_id,
            finished=finished,
            new_sequences=tuple(draft.new_sequences),
            rows=tuple(draft.rows),
        )

    def update(self, plan: StepPlan, result: StepResult) -> list[EngineOutput]:
        """Take in what the oldest step under way brought. Returns its outputs, and those of requests that ended without it.

        Raises GroupFailedError, with nothing changed, when `result` does not answer `plan` row for row.
        """
        _check_answers(plan, result)
        now_s = self._clock()
        for row, row_result in zip(plan.rows, result.rows, strict=True):
            sequence = self._sequences.get(row.seq_id)
            if sequence is not None:  # Otherwise it ended while the step was under way.
                self._update_sequence(sequence, row, row_result, step_id=plan.step_id, now_s=now_s)
        return self.take_outputs()

    def take_outputs(self) -> list[EngineOutput]:
        """Outputs of requests that ended since the last step."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self) -> None:
        """Raise RuntimeError unless exactly the running sequences hold blocks and every count agrees."""
        self._kv.check_integrity(sequence.table for sequence in self._running.values())
        living = list(self._sequences.values())
        if not [*self._running.values(), *self._waiting] == living == list(self._requests.values()):
            raise RuntimeError("the running and then the waiting sequences are not all that live, in order of arrival")

    def _check_new(self, request: EngineRequest) -> None:
        request_id = request.request_id
        if request_id in self._requests or any(output.request_id == request_id for output in self._outputs):
            raise RequestError(f"request id {request_id!r} is in use", kind="duplicate")

    def _check_fits(self, request: EngineRequest) -> None:
        num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        if not num_prompt:
            raise RequestError("the prompt is empty; at least one token is needed")
        if len(request.output_token_ids) > max_tokens:
            raise RequestError(f"max_tokens is {max_tokens} and {len(request.output_token_ids)} were delivered already")
        if num_prompt + max_tokens > self._config.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together at most "
                f"{self._config.max_model_len} are allowed"
            )
        # The last token to be drawn is never computed, so it needs no room.
        num_blocks = self._kv.num_blocks_for(num_prompt + max(max_tokens - 1, len(request.output_token_ids)))
        if num_blocks > self._kv.num_blocks:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; that takes {num_blocks} blocks "
                f"of the KV cache, which has {self._kv.num_blocks}"
            )

    def _check_room(self, request: EngineRequest) -> None:
        if len(self._waiting) >= self._config.max_waiting_requests:
            raise RequestError(
                f"{len(self._waiting)} requests are waiting; at most {self._config.max_waiting_requests} may",
                kind="overloaded",
            )
        num_waiting = sum(len(sequence.request.prompt_token_ids) for sequence in self._waiting)
        if num_waiting + len(request.prompt_token_ids) > self._config.max_waiting_tokens:
            raise RequestError(
                f"{num_waiting} prompt tokens are waiting and this prompt has {len(request.prompt_token_ids)}; "
                f"at most {self._config.max_waiting_tokens} may wait",
                kind="overloaded",
            )

    def _expire(self, now_s: float) -> None:
        for sequence in list(self._requests.values()):
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None and now_s - sequence.accepted_s >= deadline_s:
                self._end(sequence, FinishReason.DEADLINE)

    def _plan_decodes(self, draft: _Draft) -> None:
        for sequence in [sequence for sequence in self._running.values() if sequence.num_uncomputed == 1]:
            while sequence.seq_id in self._running:
                new_block_ids = self._kv.grow(sequence.table, sequence.num_tokens)
                if new_block_ids is not None:
                    self._plan_row(draft, sequence, new_block_ids=new_block_ids)
                    break
                self._preempt_latest()

    def _plan_prefills(self, draft: _Draft) -> None:
        for sequence in self._running.values():
            if sequence.num_uncomputed and draft.budget:
                self._plan_row(draft, sequence)

    def _admit_waiting(self, draft: _Draft, now_s: float) -> None:
        while self._waiting and draft.budget and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            if sequence.num_pending:
                return
            # A sequence gets the blocks of all its tokens at once, so that prefills never starve each other half way,
            # and leaves one for each that runs already, so that it is not preempted as soon as those grow.
            num_cached = self._kv.admit(
                sequence.table, sequence.token_ids, max_cached=sequence.max_cached, num_spare=len(self._running)
            )
            if num_cached is None:
                return
            self._waiting.popleft()
            self._running[sequence.seq_id] = sequence
            sequence.num_computed = num_cached
            sequence.admitted_step_id = self._last_step_id + 1
            is_new = sequence.started_s is None
            if is_new:
                draft.new_sequences.append(sequence.introduction())
                sequence.started_s = now_s
                sequence.num_cached_tokens = min(num_cached, len(sequence.request.prompt_token_ids))
                self._num_prefix_query_tokens += sequence.num_tokens
                self._num_prefix_hit_tokens += num_cached
            self._plan_row(draft, sequence, new_block_ids=tuple(sequence.table.block_ids), reset_blocks=not is_new)

    def _plan_row(
        self, draft: _Draft, sequence: Sequence, *, new_block_ids: tuple[int, ...] = (), reset_blocks: bool = False
    ) -> None:
        num_tokens = min(sequence.num_uncomputed, draft.budget, self._config.max_prefill_chunk)
        start = sequence.num_computed
        sequence.num_computed += num_tokens
        draft.budget -= num_tokens
        row = Row(
            seq_id=sequence.seq_id,
            start=start,
            num_tokens=num_tokens,
            sample=not (sequence.num_uncomputed or sequence.has_all_output),
            new_block_ids=new_block_ids,
            reset_blocks=reset_blocks,
        )
        draft.rows.append(row)

    def _preempt_latest(self) -> None:
        _, sequence = self._running.popitem()
        self._kv.release(sequence.table)
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _update_sequence(self, sequence: Sequence, row: Row, result: RowResult, *, step_id: int, now_s: float) -> None:
        if result.error_kind:
            # What its blocks hold may not be finite either, so no other request may meet it.
            self._kv.forget(sequence.table)
            error = f"the logits after token {row.start + row.num_tokens} are not finite"
            self._end(sequence, FinishReason.ERROR, error=error, error_kind=result.error_kind)
            return
        if sequence.seq_id in self._running and sequence.admitted_step_id <= step_id:
            self._kv.publish(sequence.table, sequence.token_ids, row.start + row.num_tokens)
        prompt_logprobs = sequence.take_prompt_logprobs(row, result)
        ended_at_last_token = row.start + row.num_tokens == len(sequence.token_ids)
        token_ids: tuple[int, ...] = ()
        reason: FinishReason | None = None
        if result.token_id is not None:
            sequence.append(result.token_id, now_s)
            token_ids = (result.token_id,)
        if not sequence.stop_ids.isdisjoint(token_ids):
            reason = FinishReason.STOP
        elif ended_at_last_token and sequence.has_all_output and not sequence.num_pending:
            reason = FinishReason.LENGTH
        output = EngineOutput(
            request_id=sequence.request.request_id,
            choice=sequence.request.choice,
            token_ids=token_ids,
            logprobs=() if result.logprobs is None else (result.logprobs,),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=result.token_id if reason is FinishReason.STOP else None,
        )
        if reason is not None:
            self._close(sequence, output)
        elif token_ids or prompt_logprobs:
            self._outputs.append(output)

    def _end(self, sequence: Sequence, reason: FinishReason, *, error: str = "", error_kind: str = "") -> None:
        output = EngineOutput(
            request_id=sequence.request.request_id,
            choice=sequence.request.choice,
            finish_reason=reason,
            error=error,
            error_kind=error_kind,
        )
        self._close(sequence, output)

    def _close(self, sequence: Sequence, output: EngineOutput) -> None:
        """Forget the sequence; `output` is its last."""
        del self._requests[sequence.request.request_id], self._sequences[sequence.seq_id]
        if self._running.pop(sequence.seq_id, None) is None:
            self._waiting.remove(sequence)
        self._kv.release(sequence.table)
        if sequence.started_s is not None:  # Otherwise the ranks never heard of it.
            self._finished.append(sequence.seq_id)
        timings = sequence.timings(self._clock())
        last = msgspec.structs.replace(output, num_cached_tokens=sequence.num_cached_tokens, timings=timings)
        self._outputs.append(last)


def _check_answers(plan: StepPlan, result: StepResult) -> None:
    """A result taken for another step's would give requests each other's tokens."""
    if (result.epoch, result.step_id) != (plan.epoch, plan.step_id):
        raise GroupFailedError(
            f"step {plan.step_id} of epoch {plan.epoch} was answered with step {result.step_id} of epoch {result.epoch}"
        )
    if [row.seq_id for row in result.rows] != [row.seq_id for row in plan.rows]:
        raise GroupFailedError(f"the rows of the answer to step {plan.step_id} are not the rows of its plan")
    for row, row_result in zip(plan.rows, result.rows, strict=True):
        if not row_result.error_kind and row.sample != (row_result.token_id is not None):
            raise GroupFailedError(
                f"step {plan.step_id}, sequence {row.seq_id}: sample is {row.sample}, token_id is {row_result.token_id}"
            )
