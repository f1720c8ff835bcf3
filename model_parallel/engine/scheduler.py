"""Decides what each step of a replica group computes: continuous batching over a paged KV cache, fair between tenants."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import msgspec

from model_parallel.config import AdapterConfig, CacheConfig, DraftConfig, SchedulerConfig
from model_parallel.engine.adapters import AdapterPool
from model_parallel.engine.answer_lengths import AnswerLengths
from model_parallel.engine.drafting import Drafting, make_drafter
from model_parallel.engine.fair_queue import FairQueue
from model_parallel.engine.grammars import GrammarTable
from model_parallel.engine.kv_blocks import KVBlocks
from model_parallel.engine.messages import DraftRequest, NewSequence, Row, RowResult, StepPlan, StepResult
from model_parallel.engine.overload import DEADLINE_MARGIN, Deadlines, Pace, check_fits, check_room
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.engine.sequence import Sequence
from model_parallel.engine.speculation import Drafter
from model_parallel.engine.stats import SchedulerStats, Totals
from model_parallel.errors import GroupFailedError, RequestError

ADAPTER_FAILED = "the adapter could not be loaded; the server's log says why"


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step while it is being planned."""

    now_s: float
    budget: int
    """Tokens that it still has room for."""
    prefill_budget: int
    """Prompt tokens among those; sequences below their fair share may have more."""
    new_sequences: list[NewSequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Scheduler:
    """The one scheduler of a group. Its owner calls it from one thread at a time; it never waits.

    **Order.** `FairQueue` decides which sequence is admitted next. A step computes one token for each sequence that decodes. Then
    it computes prompts of sequences below their fair share, then the other prompts in order of admission, and admits sequences
    while it has room. The group never idles for the sake of fairness. `max_prefill_tokens` keeps steps short, because a sequence
    below its fair share waits for the steps in flight.

    **Preemption.** When blocks run out, one sequence is preempted: in the lowest class, of the tenant that runs most for its
    weight (its first sequence not counted), the one admitted last. A sequence below its fair share that is next and does not fit
    preempts in the same way, from tenants of its class or below that would still run more for their weight. A preempted sequence
    is the next one of its tenant and is not charged again. So a tenant's sequences run and wait in their order of arrival.

    **Pauses.** A sequence whose reader does not keep up is paused: it has no row, no block, and no place among those that run or
    wait. When it is resumed it is the next one of its tenant, as after a preemption, but out of the order of arrival. This
    happens finitely often, because it gets tokens in between.

    **Nothing starves within a class.** The sequence admitted first in the highest class is never preempted, and so it ends. A
    tenant's first sequence is preempted only when every tenant of its class but one runs something, and only for sequences
    admitted before it; those are finitely many, and end. A waiting sequence is not charged and each one admitted before it is, so
    their number is bounded too. A lower class may starve.

    **Grammars.** A sequence whose grammar the ranks have not compiled yet is unready: it has no place among those that run or
    wait, and gets one when they have. Meanwhile, and when there is nothing else to do, steps without rows ask them.

    **Adapters.** A sequence whose adapter is not loaded has it loaded when it is next, or when it is accepted and there is room.
    While that goes on it steps aside and others pass, and when it is done it is the next one, unless a higher class has come. An
    adapter for which there is no room is waited for in the queue, as blocks are: a running sequence's adapter stays, and running
    sequences end. Nothing is preempted for it. Loading ends, so a sequence that has stepped aside does not wait for ever.

    **Alone.** A sequence that runs alone waits, when it is next, until nothing runs, and nothing is admitted while it does. Those
    that run end, so it does not wait for ever; nothing is preempted for it.

    **Steps in flight.** `schedule` uses how many tokens a sequence has, never which, and counts as computed what it has just
    planned. So a step can be planned and sent before the results of earlier steps are known. Ranks run plans in order. Hence:

    - A sequence that ends with its pending token (a stop token, an error) may have a row in a plan already sent. That row writes
      only behind the known tokens, never into a shared block. Its result finds no sequence and is dropped.
    - The blocks of a sequence are free as soon as it has ended or is preempted: its rows in flight write into them before any
      row of a later plan does. Within a plan nothing is preempted once the first row is planned.
    - Ranks forget a sequence with the first plan after the last one that names it.
    - A block is published when the result of the step that filled it is known, unless the sequence was preempted since: its
      blocks are then another's. Its token counts all the same, because the ranks have appended it too.
    - A preempted sequence is admitted again only when all its tokens are known, because its prefix is looked up by content.
    - The last token of an answer is never computed, so a sequence that only waits for it gets no further row.

    **Drafts** of tokens that may come take what the others leave over; see drafting.py.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterConfig | None = None,
        draft: DraftConfig | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`adapters` and `draft` are None for ranks that have none. `drafter` replaces that which `config.speculation` names."""
        self._config = config
        self._kv = KVBlocks(cache)
        self.adapters = AdapterPool(adapters)
        self._epoch = epoch
        self._clock = clock
        self._requests: dict[str, Sequence] = {}
        self._sequences: dict[int, Sequence] = {}
        """All that live, by seq_id, in order of arrival."""
        self._queue = FairQueue(burst=config.max_model_len)
        self._running: dict[int, Sequence] = {}
        """By seq_id, in order of admission."""
        self._paused: dict[int, Sequence] = {}
        """By seq_id."""
        self._unready: dict[int, Sequence] = {}
        """By seq_id: their grammar is being compiled."""
        self._aside: dict[int, Sequence] = {}
        """By seq_id, in the order of their turns: they have stepped aside while their adapter is loaded."""
        self._grammars = GrammarTable(config)
        self._finished: list[int] = []
        """Sequences that the next plan tells the ranks to forget."""
        self._outputs: list[EngineOutput] = []
        self._last_seq_id = 0
        self._last_step_id = 0
        self._deadlines = Deadlines()
        self._pace = Pace()
        self._totals = Totals()
        self.answer_lengths = AnswerLengths()
        drafter = drafter or make_drafter(config.speculation, draft)
        self._drafting = Drafting(drafter, self._kv, self._totals, max_num_seqs=config.max_num_seqs)

    @property
    def has_work(self) -> bool:
        """A step would compute something, deliver an output, or tell the ranks of a sequence to forget."""
        is_active = len(self._requests) > len(self._paused) or self._finished or self._outputs or self.adapters.has_work
        return bool(is_active) or self._deadlines.is_due(self._clock())

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that run, and that wait."""
        return len(self._running), len(self._queue) + len(self._aside)

    @property
    def num_paused(self) -> int:
        """Sequences that are paused. They can still expire, which only a step notices."""
        return len(self._paused)

    @property
    def stats(self) -> SchedulerStats:
        """Load and totals. May be read from any thread."""
        return SchedulerStats(
            **asdict(self._totals),
            num_running=len(self._running),
            num_waiting=len(self._queue) + len(self._aside),
            num_waiting_tokens=self._queue.num_tokens,
            num_paused=len(self._paused),
            num_grammars=len(self._grammars),
            num_compiled_grammars=self._grammars.num_compiled,
            kv_usage=1 - self._kv.num_free / self._kv.num_blocks,
            estimated_wait_s=self._pace.wait_s(self._queue.num_tokens) or 0.0,
        )

    def add(self, *requests: EngineRequest) -> None:
        """Accept the choices of one client request, all or none. Each ends from now on in exactly one output with a
        finish_reason.

        Raises RequestError: "duplicate" while another request of an id lives, "invalid" when one can never fit, "overloaded"
        when too much is waiting, or too many grammars are in use.
        """
        self._check_new(requests)
        for request in requests:
            check_fits(request, self._kv, self._config)
            if request.adapter is not None and not self.adapters.is_known(request.adapter.digest):
                raise RequestError("the request's adapter is not known to this group")
        try:
            check_room(requests, self._queue, len(self._running), self._pace, self._config)
            self._check_grammars(requests)
        except RequestError as error:
            self._totals.num_refused += error.kind == "overloaded"
            raise
        for request in requests:
            self._accept(request, self._clock())

    def sequence_of(self, request_id: str) -> Sequence:
        """An accepted request as it is kept here, for reading alone. Raises KeyError when it has ended."""
        return self._requests[request_id]

    def abort(self, request_id: str, reason: FinishReason) -> bool:
        """End a request now, whatever it is doing. Its last output comes with the next ones. False if it has ended."""
        sequence = self._requests.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, reason)
        return True

    def pause(self, request_id: str) -> None:
        """Compute no more of a request until `resume`. Tokens that are in flight still come. Nothing happens after its end."""
        sequence = self._requests.get(request_id)
        if sequence is None or sequence.seq_id in self._paused:
            return
        if sequence.seq_id in self._running:
            self._stop_running(sequence)
        self._leave(sequence)
        self._paused[sequence.seq_id] = sequence
        sequence.was_paused = True
        self._totals.num_pauses += 1

    def resume(self, request_id: str) -> None:
        """It is the next one of its tenant. Nothing happens when it is not paused."""
        sequence = self._requests.get(request_id)
        if sequence is not None and sequence.seq_id in self._paused:
            del self._paused[sequence.seq_id]
            if sequence.grammar is not None and not sequence.grammar.is_compiled:
                self._unready[sequence.seq_id] = sequence
            elif sequence.grammar is not None and sequence.grammar.error:
                self._queue.add_in_front(sequence)
                self._end_without_grammar(sequence, sequence.grammar.error)
            else:
                self._queue.add_in_front(sequence)

    def fail_all(self, error: str) -> None:
        """End every request because the group is lost. `error` is for the client to read."""
        for sequence in list(self._requests.values()):
            was_waiting = sequence.started_s is None
            self._end(sequence, FinishReason.ERROR, error=error, error_kind="unavailable", was_waiting=was_waiting)
        self._finished.clear()
        self._deadlines = Deadlines()  # of a lost group no step would take them, and it would have work for ever
        self.adapters.lose()

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when there is nothing to compute before more results are in, and nothing to tell the ranks."""
        budget = self._config.max_num_batched_tokens
        step = _Step(now_s=self._clock(), budget=budget, prefill_budget=self._config.max_prefill_tokens or budget)
        for seq_id in self._deadlines.take_expired(step.now_s):
            if seq_id in self._sequences:
                self._end(self._sequences[seq_id], FinishReason.DEADLINE)
        is_anything_waiting = len(self._queue) > 0
        requests = self._drafting.requests(
            self._running.values(), is_anything_waiting=is_anything_waiting, step_id=self._last_step_id + 1
        )
        if requests:
            return self._plan(step, requests)
        if self._drafting.waits_for_results(self._running.values(), is_anything_waiting=is_anything_waiting):
            return None
        num_tokens = self._admit_below_fair_share()
        decodes = self._grow_decodes()
        self._plan_rows(step, decodes)
        if len(decodes) < len(self._running):
            prefills = [sequence for sequence in self._running.values() if sequence.num_uncomputed > 1]
            self._plan_rows(step, sorted(prefills, key=lambda sequence: not sequence.is_below_fair_share))
        num_tokens += self._admit_in_order(step)
        self._pace.record_step(step.now_s, num_tokens, is_backlogged=len(self._queue) > 0)
        if not (step.rows or self._finished or self._grammars.has_news or self._unready or self.adapters.has_work):
            return None
        if not (step.new_sequences or len(self._queue)):
            runs = [self._sequences[row.seq_id] for row in step.rows]
            self._drafting.add_to(step.rows, runs, room=step.budget, step_id=self._last_step_id + 1)
        for row in step.rows:
            self._sequences[row.seq_id].num_pending += row.sample
        return self._plan(step)

    def _plan(self, step: _Step, draft_requests: tuple[DraftRequest, ...] = ()) -> StepPlan:
        """With all that the ranks are to be told."""
        finished, self._finished = tuple(self._finished), []
        new_grammars, dropped_grammars = self._grammars.take_news()
        adapters_to_drop, adapters_to_load = self.adapters.take_commands()
        self._last_step_id += 1
        return StepPlan(
            epoch=self._epoch,
            step_id=self._last_step_id,
            finished=finished,
            new_sequences=tuple(step.new_sequences),
            rows=tuple(step.rows),
            new_grammars=new_grammars,
            dropped_grammars=dropped_grammars,
            adapters_to_drop=adapters_to_drop,
            adapters_to_load=adapters_to_load,
            draft_requests=draft_requests,
        )

    def update(self, plan: StepPlan, result: StepResult) -> list[EngineOutput]:
        """Take in what the oldest step in flight brought. Returns its outputs, and those of requests that ended without it.

        Raises GroupFailedError, with nothing changed, when `result` does not answer `plan` row for row.
        """
        _check_answers(plan, result)
        now_s = self._clock()
        self._take_compiled(result)
        self._drafting.begin_update(plan, now_s)
        self._record_pace(plan, result, now_s)
        for row, row_result in zip(plan.rows, result.rows, strict=True):
            sequence = self._sequences.get(row.seq_id)
            if sequence is not None:  # Otherwise it ended while the step was in flight.
                self._update_sequence(sequence, row, row_result, step_id=plan.step_id, now_s=now_s)
        self._drafting.take_proposals(plan, result, self._running)
        self._end_without_adapter(self.adapters.take_outcomes(result.adapters))
        return self.take_outputs()

    def _end_without_adapter(self, failed: dict[int, str]) -> None:
        """End the sequences whose adapters could not be loaded. `failed` says why, by the adapter's id; it is not for clients."""
        for sequence in list(self._sequences.values()) if failed else ():
            if sequence.adapter_id in failed:
                self._end(sequence, FinishReason.ERROR, error=ADAPTER_FAILED, error_kind="adapter_failed")

    def take_outputs(self) -> list[EngineOutput]:
        """Outputs of requests that ended since the last step."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self) -> None:
        """Raise RuntimeError unless exactly the running sequences hold blocks and every count agrees."""
        self._kv.check_integrity(sequence.table for sequence in self._running.values())
        self._queue.check_integrity()
        self.adapters.check_integrity(
            Counter(_digests(self._sequences.values())), Counter(_digests(self._running.values()))
        )
        self._grammars.check_integrity(Counter(s.grammar.grammar_id for s in self._sequences.values() if s.grammar))
        if list(self._sequences.values()) != list(self._requests.values()):
            raise RuntimeError("the two indexes of living sequences disagree")
        placed = [*self._running.values(), *self._queue]
        elsewhere = [*self._paused, *self._unready, *self._aside]
        if sorted([s.seq_id for s in placed] + elsewhere) != sorted(self._sequences):
            raise RuntimeError(
                "a living sequence does not either run, wait, pause or have its grammar or adapter prepared"
            )
        in_order = _by_tenant(
            sequence
            for sequence in self._sequences.values()
            if not (sequence.was_paused or sequence.seq_id in self._unready)
        )
        if _by_tenant(sequence for sequence in placed if not sequence.was_paused) != in_order:
            raise RuntimeError("a tenant's running and then its waiting sequences are not its own in order of arrival")
        for sequences in _by_tenant(self._sequences.values()).values():
            num_running = sum(sequence.seq_id in self._running for sequence in sequences)
            if num_running != self._queue.tenant_of(sequences[0].request).num_running:
                raise RuntimeError(f"a tenant runs {num_running} sequences and is said to run others")

    def _record_pace(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        """A sequence that was preempted or paused had its last token long ago; the others had theirs in the step before."""
        living = (self._sequences.get(row.seq_id) for row in plan.rows)
        times = [
            sequence.last_token_s for sequence in living if sequence is not None and sequence.last_token_s is not None
        ]
        if times:
            num_rows, num_more = len(plan.rows), sum(len(row.more_token_ids) for row in result.rows)
            # A step that brought drafted tokens too counts as several: deadlines are told by how long a token takes.
            self._pace.record_decodes(num_rows, max(times), now_s, 1 + num_more / num_rows)

    def _accept(self, request: EngineRequest, now_s: float) -> None:
        self._last_seq_id += 1
        digest = "" if request.adapter is None else request.adapter.digest
        sequence = Sequence(
            seq_id=self._last_seq_id,
            request=request,
            table=self._kv.new_table(request.cache_salt, digest),
            accepted_s=now_s,
            adapter_id=self.adapters.join(digest) if digest else 0,
        )
        self._requests[request.request_id] = sequence
        self._sequences[sequence.seq_id] = sequence
        if request.grammar:
            sequence.grammar = self._grammars.acquire(request.grammar)
        if sequence.grammar is not None and not sequence.grammar.is_compiled:
            self._unready[sequence.seq_id] = sequence
        else:
            self._queue.add(sequence)
        if request.deadline_s is not None:
            self._deadlines.add(now_s + request.deadline_s, sequence.seq_id)

    def _check_grammars(self, requests: Iterable[EngineRequest]) -> None:
        """Raises RequestError "overloaded"."""
        texts = {request.grammar for request in requests if request.grammar}
        if not texts:
            return
        if len(self._unready) >= self._config.max_waiting_requests:
            raise RequestError(f"{len(self._unready)} requests wait for their grammars", kind="overloaded")
        self._grammars.check_room(texts)

    def _take_compiled(self, result: StepResult) -> None:
        """Sequences whose grammar is there now wait in the queue, out of the order of arrival."""
        for grammar in self._grammars.take_compiled(result.compiled_grammars):
            for sequence in [each for each in self._unready.values() if each.grammar is grammar]:
                if grammar.error:
                    self._end_without_grammar(sequence, grammar.error)
                    continue
                del self._unready[sequence.seq_id]
                sequence.was_paused = True
                self._queue.add(sequence)

    def _end_without_grammar(self, sequence: Sequence, why: str) -> None:
        error = f"the grammar cannot be compiled: {why}"
        self._end(sequence, FinishReason.ERROR, error=error, error_kind="constraint_error")

    def _check_new(self, requests: Iterable[EngineRequest]) -> None:
        taken = {output.request_id for output in self._outputs}
        for request in requests:
            if request.request_id in self._requests or request.request_id in taken:
                raise RequestError(f"request id {request.request_id!r} is in use", kind="duplicate")
            taken.add(request.request_id)

    def _admit_below_fair_share(self) -> int:
        """Admit the next sequences as long as they are below their fair share and this step can begin them; preempt others for
        them where that is fair. Called before the first row is planned. Returns the prompt tokens admitted.
        """
        if not self._is_anybody_next:
            return 0
        prefilling = [s for s in self._running.values() if s.is_below_fair_share and s.num_uncomputed > 1]
        room = self._config.max_num_batched_tokens - len(self._running) - sum(s.num_uncomputed for s in prefilling)
        num_tokens = 0
        while room > 0:
            sequence = self._next()
            if sequence is None or not self._queue.is_below_fair_share(sequence) or self._keeps_apart(sequence):
                break
            if not self._has_adapter(sequence):
                break
            while not self._try_to_admit(sequence):
                if sequence.num_pending or not self._preempt_for(sequence):
                    return num_tokens
            room -= sequence.num_uncomputed
            num_tokens += sequence.num_prompt_tokens
        return num_tokens

    def _admit_in_order(self, step: _Step) -> int:
        """Admit the next sequences while the step has room, and plan their first rows. Returns the prompt tokens admitted."""
        num_tokens = 0
        while step.budget and step.prefill_budget:
            sequence = self._next()
            if sequence is None or not self._try_to_admit(sequence):
                break
            self._plan_rows(step, [sequence])
            num_tokens += sequence.num_prompt_tokens
        return num_tokens

    @property
    def _is_anybody_next(self) -> bool:
        return bool(self._queue or self._aside)

    def _next(self) -> Sequence | None:
        """Whose turn it is. One whose adapter is being loaded steps aside, and has its turn as soon as it is."""
        while self._is_anybody_next:
            first = self._first_in_time()
            for sequence in self._aside.values():
                is_before = first is None or sequence.request.priority <= first.request.priority
                if is_before and not self._loads_adapter(sequence):
                    return sequence
            if first is None or not self._may_begin(first) or not self._loads_adapter(first):
                return first
            if len(self._aside) >= self._config.max_waiting_requests:
                return first
            self._queue.leave(first)
            first.was_paused = True
            self._aside[first.seq_id] = first
        return None

    def _loads_adapter(self, sequence: Sequence) -> bool:
        """Whether its adapter is on its way to the ranks; sends it, if it is not there and there is room."""
        adapter = sequence.request.adapter
        if adapter is None or self.adapters.is_ready(adapter.digest):
            return False
        return self.adapters.state_of(adapter.digest).is_loading

    def _may_begin(self, sequence: Sequence) -> bool:
        """Nothing but blocks and adapters can be in its way."""
        is_full = len(self._running) == self._config.max_num_seqs
        return not (sequence.num_pending or is_full or self._keeps_apart(sequence))

    def _first_in_time(self) -> Sequence | None:
        """The head of the queue. Heads that would miss their deadline are ended, without computing anything of them.

        While others wait, a margin is added to the estimate: a run that expires is wasted, and another could have used it.
        """
        while sequence := self._queue.first():
            deadline_s, sampling = sequence.request.deadline_s, sequence.request.sampling
            if deadline_s is None or sequence.was_admitted or not self._running:
                return sequence
            num_left = sampling.max_tokens - len(sequence.request.output_token_ids)
            run_s = self._pace.run_s(num_left, len(self._running) + 1)
            margin = DEADLINE_MARGIN if len(self._queue) > 1 else 1.0
            if self._clock() + margin * run_s <= sequence.accepted_s + deadline_s:
                return sequence
            self._end(sequence, FinishReason.DEADLINE)
        return None

    def _try_to_admit(self, sequence: Sequence) -> bool:
        if not self._may_begin(sequence) or not self._has_adapter(sequence):
            return False
        # A sequence gets the blocks of all its tokens at once, so that prefills never starve each other half way,
        # and leaves one for each that runs already, so that nobody is preempted as soon as those grow.
        num_cached = self._kv.admit(
            sequence.table, sequence.token_ids, max_cached=sequence.max_cached, num_spare=len(self._running)
        )
        if num_cached is None:
            return False
        if self._aside.pop(sequence.seq_id, None) is not None:
            self._queue.add_in_front(sequence)
        self._queue.admit(sequence, num_charged=0 if sequence.was_admitted else sequence.num_tokens - num_cached)
        self._running[sequence.seq_id] = sequence
        if sequence.request.adapter is not None:
            self.adapters.hold(sequence.request.adapter.digest)
        sequence.num_computed = num_cached
        sequence.admitted_step_id = self._last_step_id + 1
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            if not sequence.request.output_token_ids:  # one that another group began is one of the longer ones
                self.answer_lengths.begin(sequence.seq_id, lambda: sequence.num_output_tokens)
            self._totals.num_prompt_tokens += sequence.num_prompt_tokens
            self._totals.num_prefix_query_tokens += sequence.num_tokens
            self._totals.num_prefix_hit_tokens += num_cached
        return True

    def _has_adapter(self, sequence: Sequence) -> bool:
        """Whether the ranks have what it needs; begins to load it where there is room."""
        adapter = sequence.request.adapter
        return adapter is None or self.adapters.is_ready(adapter.digest)

    def _keeps_apart(self, sequence: Sequence) -> bool:
        """Whether it, or the one that runs, is to run alone: beside several there is none that is."""
        first = next(iter(self._running.values()), None)
        return first is not None and (sequence.request.runs_alone or first.request.runs_alone)

    def _grow_decodes(self) -> list[Sequence]:
        """Give each sequence that decodes the block that it needs, if it needs one; by preemption when none is free. Returns
        those that still run."""
        decodes = [sequence for sequence in self._running.values() if sequence.num_uncomputed == 1]
        for sequence in decodes:
            while sequence.seq_id in self._running and self._kv.grow(sequence.table, sequence.num_tokens) is None:
                self._preempt_one(self._running.values())
        return [sequence for sequence in decodes if sequence.seq_id in self._running]

    def _preempt_for(self, waiting: Sequence) -> bool:
        """Preempt one sequence for one below its fair share. False when there is none that fairness would preempt."""
        load = self._queue.tenant_of(waiting.request).load_with(1)
        return self._preempt_one(
            sequence
            for sequence in self._running.values()
            if sequence.request.priority >= waiting.request.priority
            and self._queue.tenant_of(sequence.request).load_with(-1) >= load
        )

    def _preempt_one(self, candidates: Iterable[Sequence]) -> bool:
        """Preempt the victim among the candidates, which are in order of admission. False when there are none."""
        victim: Sequence | None = None
        worst = (-math.inf, -math.inf)
        for sequence in candidates:
            rank = (sequence.request.priority, self._queue.tenant_of(sequence.request).load_with(-1))
            if rank >= worst:
                victim, worst = sequence, rank
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._queue.put_back(sequence)
        self._totals.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        """Take its blocks. What they held is computed again, but for the part that the prefix cache keeps."""
        del self._running[sequence.seq_id]
        self._release_adapter(sequence)
        self._kv.release(sequence.table)
        sequence.num_computed = 0
        sequence.num_told_blocks = 0

    def _release_adapter(self, sequence: Sequence) -> None:
        """It does not run any more."""
        if sequence.request.adapter is not None:
            self.adapters.release(sequence.request.adapter.digest)

    def _plan_rows(self, step: _Step, sequences: Iterable[Sequence]) -> None:
        """A row for each as long as the step has room."""
        for sequence in sequences:
            num_uncomputed = sequence.num_uncomputed
            num_tokens = min(num_uncomputed, step.budget, self._config.max_prefill_chunk)
            if num_uncomputed > 1 and not sequence.is_below_fair_share:
                num_tokens = min(num_tokens, step.prefill_budget)
                step.prefill_budget -= num_tokens
            if num_tokens == 0:
                return
            is_new = sequence.started_s is None
            if is_new:
                step.new_sequences.append(sequence.new_sequence())
                sequence.started_s = step.now_s
            start = sequence.num_computed
            sequence.num_computed += num_tokens
            step.budget -= num_tokens
            row = Row(
                seq_id=sequence.seq_id,
                start=start,
                num_tokens=num_tokens,
                sample=num_tokens == num_uncomputed and not sequence.has_all_output,
                new_block_ids=tuple(sequence.table.block_ids[sequence.num_told_blocks :]),
                reset_blocks=not is_new and sequence.num_told_blocks == 0,
            )
            sequence.num_told_blocks = len(sequence.table.block_ids)
            step.rows.append(row)

    def _update_sequence(self, sequence: Sequence, row: Row, result: RowResult, *, step_id: int, now_s: float) -> None:
        if result.error_kind == "constraint_error":
            error = f"after {sequence.num_output_tokens} tokens the grammar allows no token, or is too complex to tell"
            self._end(sequence, FinishReason.ERROR, error=error, error_kind=result.error_kind)
            return
        if result.error_kind:
            # What its blocks hold may not be finite either, so no other request may meet it.
            self._kv.forget(sequence.table)
            self._totals.num_corrupted += 1
            error = f"the logits after token {row.start + row.num_tokens} are not finite"
            self._end(sequence, FinishReason.ERROR, error=error, error_kind=result.error_kind)
            return
        prompt_logprobs = sequence.take_prompt_logprobs(row, result)
        ended_at_last_token = row.sample or row.start + row.num_tokens == len(sequence.token_ids)
        token_ids = self._take_tokens(sequence, row, result, now_s)
        if sequence.seq_id in self._running and sequence.admitted_step_id <= step_id:
            self._keep_computed(sequence, row, num_drawn=len(token_ids))
        reason: FinishReason | None = None
        stop_token_id: int | None = None
        if not sequence.stop_ids.isdisjoint(token_ids):
            reason, stop_token_id = FinishReason.STOP, token_ids[-1]
        elif result.is_complete:
            reason = FinishReason.STOP
        elif ended_at_last_token and sequence.has_all_output and not sequence.num_pending:
            reason = FinishReason.LENGTH
        if reason is None and not (token_ids or prompt_logprobs):
            return
        output = EngineOutput(
            request_id=sequence.request.request_id,
            choice=sequence.request.choice,
            token_ids=token_ids,
            logprobs=() if result.logprobs is None else (result.logprobs, *result.more_logprobs)[: len(token_ids)],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=sequence.num_cached_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
            num_rejected_tokens=sequence.num_rejected_tokens,
            timings=sequence.timings(now_s),
        )
        if reason is not None:
            self._close(sequence, output, reason)
        else:
            self._outputs.append(output)

    def _take_tokens(self, sequence: Sequence, row: Row, result: RowResult, now_s: float) -> tuple[int, ...]:
        """Append what was drawn, up to the token that ends the sequence. Returns that."""
        if result.token_id is None:
            return ()
        drawn = [result.token_id]
        if sequence.stop_ids.isdisjoint(drawn):
            for token_id in result.more_token_ids:
                drawn.append(token_id)
                if token_id in sequence.stop_ids:
                    break
        sequence.num_pending += len(drawn) - 1  # one was pending; of the others nobody knew
        for token_id in drawn:
            sequence.append(token_id, now_s)
            self._queue.charge_output(sequence)
        self._totals.num_generation_tokens += len(drawn)
        self._totals.num_accepted_tokens += len(drawn) - 1
        sequence.num_accepted_tokens += len(drawn) - 1
        sequence.num_rejected_tokens += len(row.draft_token_ids) - (len(drawn) - 1)
        return tuple(drawn)

    def _keep_computed(self, sequence: Sequence, row: Row, num_drawn: int) -> None:
        """Publish the blocks that a row filled, and give back what rejected drafts needed."""
        self._drafting.settle(sequence, row, num_drawn)
        num_computed = row.start + (num_drawn if row.draft_token_ids else row.num_tokens)
        self._kv.publish(sequence.table, sequence.token_ids, num_computed)
        self._drafting.observe(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """It neither runs nor waits any more."""
        if self._unready.pop(sequence.seq_id, None) is None and self._aside.pop(sequence.seq_id, None) is None:
            self._queue.leave(sequence)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        error: str = "",
        error_kind: str = "",
        was_waiting: bool = False,
    ) -> None:
        output = EngineOutput(
            request_id=sequence.request.request_id,
            choice=sequence.request.choice,
            finish_reason=reason,
            error=error,
            error_kind=error_kind,
            was_waiting=was_waiting,
        )
        self._close(sequence, output, reason)

    def _close(self, sequence: Sequence, output: EngineOutput, reason: FinishReason) -> None:
        """Forget the sequence; `output` is its last."""
        del self._requests[sequence.request.request_id], self._sequences[sequence.seq_id]
        if self._paused.pop(sequence.seq_id, None) is None:
            self._leave(sequence)
        if sequence.grammar is not None:
            self._grammars.release(sequence.grammar)
        if self._running.pop(sequence.seq_id, None) is not None:
            self._release_adapter(sequence)
        if sequence.request.adapter is not None:
            self.adapters.leave(sequence.request.adapter.digest)
        self._kv.release(sequence.table)
        self._drafting.forget(sequence.seq_id)
        self._deadlines.keep(self._sequences.keys())
        if sequence.started_s is not None:  # Otherwise the ranks never heard of it.
            self._finished.append(sequence.seq_id)
        self._totals.count_finished(reason)
        now_s = self._clock()
        if sequence.started_s is not None and reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            self._pace.record_end(sequence.num_output_tokens - len(sequence.request.output_token_ids))
        # Who cancels has what he wanted, or has found a stop text.
        is_whole = reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED)
        self.answer_lengths.end(sequence.seq_id, sequence.num_output_tokens, is_whole=is_whole)
        timings = sequence.timings(now_s)
        last = msgspec.structs.replace(
            output,
            num_cached_tokens=sequence.num_cached_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
            num_rejected_tokens=sequence.num_rejected_tokens,
            timings=timings,
        )
        self._outputs.append(last)


def _digests(sequences: Iterable[Sequence]) -> list[str]:
    return [sequence.request.adapter.digest for sequence in sequences if sequence.request.adapter is not None]


def _by_tenant(sequences: Iterable[Sequence]) -> dict[tuple[int, str], list[Sequence]]:
    by_tenant = defaultdict(list)
    for sequence in sequences:
        by_tenant[sequence.request.priority, sequence.request.tenant].append(sequence)
    return by_tenant


def _check_answers(plan: StepPlan, result: StepResult) -> None:
    """A result taken for another step's would give requests each other's tokens."""
    if (result.epoch, result.step_id) != (plan.epoch, plan.step_id):
        raise GroupFailedError(
            f"step {plan.step_id} of epoch {plan.epoch} was answered with step {result.step_id} of epoch {result.epoch}"
        )
    if [row.seq_id for row in result.rows] != [row.seq_id for row in plan.rows]:
        raise GroupFailedError(f"the rows of the answer to step {plan.step_id} are not the rows of its plan")
    if len(result.proposals) != len(plan.draft_requests):
        raise GroupFailedError(
            f"step {plan.step_id} asks for {len(plan.draft_requests)} drafts and got {len(result.proposals)}"
        )
    for row, row_result in zip(plan.rows, result.rows, strict=True):
        if not row_result.error_kind and row.sample != (row_result.token_id is not None):
            raise GroupFailedError(
                f"step {plan.step_id}, sequence {row.seq_id}: sample is {row.sample}, token_id is {row_result.token_id}"
            )
        if not row_result.more_token_ids:
            continue
        drawn = (row_result.token_id, *row_result.more_token_ids)
        if drawn[:-1] != row.draft_token_ids[: len(drawn) - 1]:
            raise GroupFailedError(
                f"step {plan.step_id}, sequence {row.seq_id}: {drawn} accepts other drafts than planned"
            )
