"""When a draft model is asked, and for how much. It is on rank 0 (runtime/draft_model.py); here are its chances and its price.

A draft model guesses the next token as the model would draw it: by the same noise, penalties and grammar. What it costs is a pass
for each draft, so it is asked while the drafts that are likely to be right take less time than the steps that they save. Where
prompt lookup has been right lately, drafts come from there, because they cost no pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul

from model_parallel.engine.messages import DraftRequest
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.engine.speculation import (
    MAX_DRAFTS,
    MIN_GAIN,
    WEIGHT_OF_LAST,
    PromptLookupDrafter,
    worthwhile,
)

MAX_TOKENS_AT_A_TIME = 256
"""That the draft model reads in a pass beside a few of each sequence: a long prompt is read over several."""
FIRST_CHANCE = 0.6
"""That a draft is right, before anything was measured."""
WEIGHT_IN_GROUP = 1 / 32
"""Of a draft in what is remembered about all sequences: new ones begin with that."""
FIRST_GAP, LONGEST_GAP = 16, 1024
"""Steps between two trials while the draft model does not pay; each that fails doubles it."""
NUM_TRIED, NUM_TRIAL_DRAFTS = 2, 2
"""Sequences, and drafts of each, of a trial."""
WEIGHT_OF_LAST_COST = 1 / 8
"""Of the last request in what is remembered about the time that they take."""
REPAID = 0.25
"""A sequence is read by the draft model if that takes at most so much of what its drafts may save until its answer ends."""


@dataclass(slots=True)
class _Known:
    """What is remembered of one sequence."""

    chance: float
    num_read: int = 0
    """Tokens that the draft model has read."""
    proposal: tuple[int, ...] = ()
    length: int = 0
    """Of the sequence, when it was proposed."""


class ModelDrafter:
    """See speculation.Drafter."""

    has_model = True

    def __init__(self, share: float) -> None:
        """`share`: how long a pass of the draft model takes beside a step with as many rows, as far as their sizes tell."""
        self._share = share
        self._lookup = PromptLookupDrafter()
        self._costs = self._lookup.costs
        self._chance = FIRST_CHANCE
        self._known: dict[int, _Known] = {}
        """By seq_id, of those that were asked about."""
        self._gap = FIRST_GAP
        self._num_steps = 0
        """Since the last trial."""
        self._asked_rows: list[int] = []
        """Rows of each pass of the last request."""

    @property
    def has_prospects(self) -> bool:
        return self._lookup.has_prospects

    def is_worth_waiting(self, runs: Sequence[Run], max_rows: int) -> bool:
        return self._lookup.is_worth_waiting(runs, max_rows)

    def ask(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[int]:
        known = [self._known.get(run.seq_id) or _Known(self._chance) for run in runs]
        lags = [run.num_tokens - each.num_read for run, each in zip(runs, known, strict=True)]
        num_rows = len(runs)
        step_s = self._costs.step_s(num_rows)
        able = [
            index
            for index, (run, each) in enumerate(zip(runs, known, strict=True))
            if most[index] > 0
            and self._lookup.heat_of(run.seq_id) < each.chance
            and self._read_s(lags[index]) <= REPAID * most[index] * each.chance * step_s / num_rows
        ]
        able.sort(key=lambda index: -known[index].chance)
        num_extra, num_lookup_drafts = self._lookup.expect(runs, max_rows)
        lookup_rate = (num_rows + num_extra) / self._costs.step_s(num_rows + num_lookup_drafts)
        best_rate = MIN_GAIN * max(num_rows / step_s, lookup_rate)
        best: tuple[list[int], int] = [], 0
        for number in _doubled(len(able)):
            chosen = able[:number]
            room = int(max_rows - num_rows - num_lookup_drafts) // max(1, number)
            expected = [0.0]
            for chance_of_all in zip(*(_powers(known[index].chance) for index in chosen), strict=True):
                expected.append(expected[-1] + sum(chance_of_all))
            for num_drafts in range(1, min(MAX_DRAFTS, room) + 1):
                rows = num_rows + num_lookup_drafts + number * num_drafts
                # Reading a sequence that is new to the draft model was weighed above, and is done once.
                time_s = self._costs.step_s(rows) + num_drafts * self._read_s(number)
                if (rate := (num_rows + num_extra + expected[num_drafts]) / time_s) > best_rate:
                    best_rate, best = rate, (chosen, num_drafts)
        chosen, num_drafts = best
        self._num_steps += 1
        if chosen:
            self._gap = FIRST_GAP
        elif able and self._num_steps >= self._gap and num_rows < max_rows:
            self._gap = min(2 * self._gap, LONGEST_GAP)
            chosen, num_drafts = able[:NUM_TRIED], NUM_TRIAL_DRAFTS
        if not chosen:
            return [0] * num_rows
        self._num_steps = 0
        wanted = [0] * num_rows
        numbers = tokens_to_read([lags[index] for index in chosen])
        for index, num_read in zip(chosen, numbers, strict=True):
            wanted[index] = min(num_drafts, most[index])
            self._known[runs[index].seq_id] = known[index]
            known[index].num_read += num_read
        later = [sum(wanted[index] > each for index in chosen) for each in range(1, max(wanted))]
        self._asked_rows = [sum(numbers), *later]
        return wanted

    def take_proposals(self, run: Run, token_ids: Sequence[int]) -> None:
        if (known := self._known.get(run.seq_id)) is not None:
            known.proposal, known.length = tuple(token_ids), len(run.token_ids)

    def draft(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[tuple[int, ...]]:
        proposals = [self._proposal_of(run, limit) for run, limit in zip(runs, most, strict=True)]
        chances = [
            list(accumulate(repeat(self._known[run.seq_id].chance, len(proposal)), mul))
            if proposal
            else self._lookup.chances_of(run, limit)
            for run, proposal, limit in zip(runs, proposals, most, strict=True)
        ]
        numbers = worthwhile(chances, self._costs, max_rows)
        drafts = []
        for run, proposal, number in zip(runs, proposals, numbers, strict=True):
            if proposal:
                # One at least: it would not be known whether the draft model has become right again.
                drafts.append(proposal[: max(number, 1)])
            else:
                drafts.append(self._lookup.draft_of(run, number))
        room = max_rows - len(runs)
        for index, each in enumerate(drafts):
            drafts[index] = each[: max(0, room)]
            room -= len(drafts[index])
        return drafts

    def observe(self, run: Run) -> None:
        self._lookup.observe(run)

    def judge(self, run: Run, num_drafts: int, num_right: int) -> None:
        known = self._known.get(run.seq_id)
        if known is None or not known.proposal:  # they were looked up
            return
        known.proposal = ()
        known.num_read += num_right
        for was_right in [True] * num_right + [False] * (num_right < num_drafts):
            known.chance += WEIGHT_OF_LAST * (was_right - known.chance)
            self._chance += WEIGHT_IN_GROUP * (was_right - self._chance)

    def record_step(self, num_rows: int, step_s: float) -> None:
        self._costs.record(num_rows, step_s)

    def record_requests(self, requests: Sequence[DraftRequest], step_s: float) -> None:
        expected_s = sum(self._costs.step_s(num_rows) for num_rows in self._asked_rows)
        # One that waited for something else says nothing about the model.
        self._share += WEIGHT_OF_LAST_COST * (min(step_s / expected_s, 3 * self._share) - self._share)

    def forget(self, seq_id: int) -> None:
        self._lookup.forget(seq_id)
        self._known.pop(seq_id, None)

    def _read_s(self, num_tokens: int) -> float:
        """Of a pass of the draft model."""
        return self._share * self._costs.step_s(num_tokens)

    def _proposal_of(self, run: Run, limit: int) -> tuple[int, ...]:
        known = self._known.get(run.seq_id)
        if known is None or known.length != len(run.token_ids):
            return ()
        known.proposal = known.proposal[: max(0, limit)]
        return known.proposal


def tokens_to_read(lags: Sequence[int]) -> list[int]:
    """Of sequences that so many tokens are new of, in one pass."""
    numbers, room = [], MAX_TOKENS_AT_A_TIME
    for lag in lags:
        numbers.append(min(lag, MAX_DRAFTS + 1 + room))
        room -= max(0, numbers[-1] - MAX_DRAFTS - 1)
    return numbers


def _powers(chance: float) -> list[float]:
    """That the first 1, 2, … drafts are right."""
    return list(accumulate(repeat(chance, MAX_DRAFTS), mul))


def _doubled(number: int) -> list[int]:
    """1, 2, 4, … and `number` itself; nothing of 0."""
    doubled = [1 << power for power in range(max(0, number - 1).bit_length())]
    return [*doubled, number] if number else []
