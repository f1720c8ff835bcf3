"""The scheduler's part for drafts: when a step waits for the results of the one before it, and which rows get drafts.

Drafts (speculation.py) are rows of tokens that may not come. They follow the last token, which must be known, so a step with
drafts is planned when no step is in flight, and the next one when its results are known. That is done when nothing but decode is
left to do. Drafts take rows and blocks that are left over: nobody is preempted for them, and blocks beyond the tokens that came
are given back with the result. Blocks are published up to the tokens that came, so never with a wrong draft.

A draft model is asked in a step of its own without rows, which is sent behind the one that draws the last token. Ranks know that
token when the step's turn comes, so the leader need not, and clients get it while drafts are made.
"""

from collections.abc import Collection, Sequence

import msgspec

from model_parallel.config import DraftConfig
from model_parallel.engine.kv_blocks import KVBlocks
from model_parallel.engine.messages import DraftRequest, Row, StepPlan, StepResult
from model_parallel.engine.model_drafter import ModelDrafter
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.engine.speculation import Drafter, PromptLookupDrafter
from model_parallel.engine.stats import Totals


class Drafting:
    """See the module. With no drafter nothing is ever drafted."""

    def __init__(self, drafter: Drafter | None, kv: KVBlocks, totals: Totals, *, max_num_seqs: int) -> None:
        self._drafter = drafter
        self._kv = kv
        self._totals = totals
        self._max_num_seqs = max_num_seqs
        self._rows_step_id: int | None = None
        """The step in flight that has rows with drafts."""
        self._request_step_id: int | None = None
        """The step in flight that asks the draft model."""
        self._has_asked = False
        """The drafter was asked since the last step with rows was planned."""
        self._decoded_s: float | None = None
        """When the last results came in. A step of decode follows them at once."""

    @property
    def is_on(self) -> bool:
        return self._drafter is not None

    def requests(
        self, running: Collection[Run], *, is_anything_waiting: bool, step_id: int
    ) -> tuple[DraftRequest, ...]:
        """What step `step_id` is to ask the draft model for; nothing if it had better compute rows, or wait."""
        if self._drafter is None or self._has_asked or is_anything_waiting or not self._drafter.has_model:
            return ()
        if self._request_step_id is not None:
            return ()
        runs = self._decodes(running)
        if not runs or len(runs) >= self._max_num_seqs:
            return ()
        most = [run.num_prompt_tokens + run.request.sampling.max_tokens - run.num_tokens - 1 for run in runs]
        wanted = self._drafter.ask(runs, most, self._max_num_seqs)
        requests = tuple([DraftRequest(run.seq_id, n) for run, n in zip(runs, wanted, strict=True) if n > 0])
        self._has_asked = True
        if requests:
            self._request_step_id = step_id
        return requests

    def waits_for_results(self, running: Collection[Run], *, is_anything_waiting: bool) -> bool:
        """Whether the next step is planned when those in flight are done, because of drafts in it or in them."""
        if self._rows_step_id is not None or self._request_step_id is not None:
            return True
        if self._drafter is None or not self._drafter.has_prospects or is_anything_waiting:
            return False
        if not any(run.num_pending for run in running):
            return False
        runs = self._decodes(running)
        return bool(runs) and self._drafter.is_worth_waiting(runs, self._max_num_seqs)

    def add_to(self, rows: list[Row], runs: Sequence[Run], *, room: int, step_id: int) -> None:
        """Turn rows of decode into rows with drafts, when there is nothing but decode and all tokens are known.

        `runs` are the rows' sequences; `room` is how many tokens the step can still take.
        """
        self._has_asked = False
        if self._drafter is None or not rows or runs[0].num_pending:  # as in most steps
            return
        if not all(row.num_tokens == 1 and row.sample for row in rows) or any(run.num_pending for run in runs):
            return
        most = [run.num_prompt_tokens + run.request.sampling.max_tokens - run.num_tokens - 1 for run in runs]
        max_rows = min(self._max_num_seqs, len(runs) + room)
        for index, proposed in enumerate(self._drafter.draft(runs, most, max_rows)):
            row, run = rows[index], runs[index]
            num_room = (len(run.table.block_ids) + self._kv.num_free) * self._kv.block_size - run.num_tokens
            if not (drafts := proposed[:num_room]):
                continue
            self._rows_step_id = step_id
            self._totals.num_draft_tokens += len(drafts)
            added = self._kv.grow(run.table, run.num_tokens + len(drafts)) or ()
            run.num_told_blocks += len(added)
            rows[index] = msgspec.structs.replace(
                row,
                num_tokens=1 + len(drafts),
                new_block_ids=row.new_block_ids + added,
                draft_token_ids=drafts,
            )

    def begin_update(self, plan: StepPlan, now_s: float) -> None:
        """The results of a step are in, and are now taken in row by row."""
        began_s, self._decoded_s = self._decoded_s, now_s
        if plan.step_id == self._rows_step_id:
            self._rows_step_id = None
        if plan.step_id == self._request_step_id:
            self._request_step_id = None
        if self._drafter is None or began_s is None:
            return
        if plan.rows and all(row.sample and row.num_tokens == 1 + len(row.draft_token_ids) for row in plan.rows):
            self._drafter.record_step(sum(row.num_tokens for row in plan.rows), now_s - began_s)
        elif plan.draft_requests:
            self._drafter.record_requests(plan.draft_requests, now_s - began_s)

    def take_proposals(self, plan: StepPlan, result: StepResult, runs: dict[int, Run]) -> None:
        """What the draft model says. `runs` are those that run, by seq_id."""
        for request, token_ids in zip(plan.draft_requests, result.proposals, strict=True):
            run = runs.get(request.seq_id)
            if run is not None and self._drafter is not None:  # otherwise it has ended, or lost its blocks
                self._drafter.take_proposals(run, token_ids)

    def settle(self, run: Run, row: Row, num_drawn: int) -> None:
        """Some of a running sequence's row came true: give back the blocks that wrong drafts needed."""
        if not row.draft_token_ids:
            return
        run.num_computed = row.start + num_drawn
        self._kv.shrink(run.table, run.num_computed)
        run.num_told_blocks = len(run.table.block_ids)
        if self._drafter is not None:
            self._drafter.judge(run, len(row.draft_token_ids), num_drawn - 1)

    def observe(self, run: Run) -> None:
        """It runs, and has new tokens."""
        if self._drafter is not None:
            self._drafter.observe(run)

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        if self._drafter is not None:
            self._drafter.forget(seq_id)

    def _decodes(self, running: Collection[Run]) -> list[Run]:
        """Those that want another token, if all that run do no more than decode."""
        runs = [run for run in running if not run.has_all_output]
        return runs if all(run.num_uncomputed <= 1 for run in runs) else []


def make_drafter(speculation: str, draft: DraftConfig | None) -> Drafter | None:
    """As `SchedulerConfig.speculation` says; with a draft model when the ranks have one. None: nothing is drafted."""
    if speculation == "off":
        return None
    return PromptLookupDrafter() if draft is None else ModelDrafter(draft.share)
