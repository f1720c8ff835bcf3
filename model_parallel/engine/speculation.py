"""Drafts of the tokens that a sequence may draw next, and when they are worth a step's time. No draft changes an answer.

A sequence that speculates brings its last token and k drafts into a step, one row each, and every row draws. A draft is right
when it is what the row before it drew: then the row after it has drawn the next token too. Draws depend on seed, choice, position
and logits alone, and a row's logits not on the rows beside it, so the tokens are those of k + 1 steps of one row.

They come from the sequence itself (`PromptLookup`), or from a draft model as well (model_drafter.py).

Drafts need to know the last token, and plans are otherwise made before it is known. So waiting for a step's results is a part of
the price, and is done only where drafts have been right before.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Protocol

from model_parallel.config import SchedulerConfig
from model_parallel.engine.messages import DraftRequest
from model_parallel.engine.sequence import Sequence as Run

LONGEST_MATCH = 4
"""Tokens that are looked up, at most. A match that is found goes on by itself, one comparison a token."""
SHORTEST_MATCH = 2
MAX_INDEXED_TOKENS = 1 << 14
"""Of one sequence; what lies further back is forgotten."""
MAX_TOKENS_AT_A_TIME = 2048
"""Indexed between two steps: a long prompt is taken in over several."""
MIN_TOKENS_AT_ONCE = 4
"""Fewer are taken in one by one."""
MAX_DRAFTS = 15
"""Of one sequence in one step."""
WEIGHT_OF_LAST = 1 / 8
"""Of the last token in what is remembered about a sequence's drafts."""
FIRST_CHANCES = (0.25, 0.5, 0.7, 0.8)
"""That a draft is right, before anything was measured, after a match of less than 4, 8, 16 and more tokens."""
ROWS_OF_A_STEP = 16
"""Before anything was measured, a step without rows is taken to cost as much as so many rows. More is learned quickly."""
WEIGHT_OF_FIRST_COSTS = 4.0
"""Of that assumption, as the variance in the number of rows that outweighs it."""
STEPS_REMEMBERED = 64
"""What was measured so many steps ago counts for 1/e."""
SEQUENCES_PER_LOOK = 4
"""Sequences of which nothing was foretold wait until they have one token for so many of them, and then all their new tokens are
looked up at once. A token costs the leader about half of what it costs alone, and drafts begin a few tokens later."""
MIN_GAIN = 1.05
"""Waiting for results begins when tokens a second are expected to become so many times as many."""


class PromptLookup:
    """Where the last tokens of a sequence stood before in it: what followed there is the draft (Saxena 2023, prompt lookup).

    The longest match of `LONGEST_MATCH` … `SHORTEST_MATCH` tokens wins, the latest among equals. A token costs constant time.
    """

    __slots__ = ("_chances", "_heat", "_last_of", "_matched", "_next", "_num_indexed_longer", "num_indexed")

    def __init__(self) -> None:
        self._last_of: dict[tuple[int, ...], int] = {}
        """Position of the last token of an n-gram's latest occurrence."""
        self.num_indexed = 0
        """Tokens that were taken in."""
        self._num_indexed_longer = 0
        """The same, but with all grams; see `_index_longer`."""
        self._next: int | None = None
        """Position of the token that would come next if the sequence repeated itself."""
        self._matched = 0
        """So many tokens before that position are the last ones."""
        self._chances = list(FIRST_CHANCES)
        self._heat = 0.0

    @property
    def heat(self) -> float:
        """Share of the last tokens that lookup foretold, 0 to 1; the tokens of the prompt do not count."""
        return self._heat

    def take(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Index the tokens that are new, and judge what was foretold of those that were drawn."""
        begin = self.num_indexed
        end = min(len(token_ids), begin + MAX_TOKENS_AT_A_TIME)
        if begin >= num_prompt_tokens and self._take_without_match(token_ids, begin, end):
            return
        self._index_longer(token_ids)
        for position in range(begin, end):
            expected = self._next
            is_right = expected is not None and token_ids[expected] == token_ids[position]
            if position >= num_prompt_tokens:
                self._heat += WEIGHT_OF_LAST * (is_right - self._heat)
                if expected is not None:
                    bucket = _bucket(self._matched)
                    self._chances[bucket] += WEIGHT_OF_LAST * (is_right - self._chances[bucket])
            self._next, self._matched = (
                (expected + 1, self._matched + 1) if expected is not None and is_right else (None, 0)
            )
            self._index(token_ids, position)
        self.num_indexed = self._num_indexed_longer = end

    def _take_without_match(self, token_ids: Sequence[int], begin: int, end: int) -> bool:
        """The same at once for several tokens that were drawn, if none of them ends a match. Says whether that is so."""
        if (
            self._next is not None
            or end - begin < MIN_TOKENS_AT_ONCE
            or begin < SHORTEST_MATCH
            or end > MAX_INDEXED_TOKENS
        ):
            return False
        last_of, shortest = self._last_of, _grams(token_ids, SHORTEST_MATCH, begin, end)
        if len({*shortest}) < len(shortest) or not last_of.keys().isdisjoint(shortest):
            return False
        last_of.update(zip(shortest, range(begin, end), strict=True))
        self._heat *= (1 - WEIGHT_OF_LAST) ** (end - begin)
        self.num_indexed = end
        return True

    def _index_longer(self, token_ids: Sequence[int]) -> None:
        """What was taken in without a match is indexed by its shortest grams; add the longer ones, now that there is a match."""
        begin, end = self._num_indexed_longer, self.num_indexed
        for length in range(SHORTEST_MATCH + 1, LONGEST_MATCH + 1):
            first = max(begin, length - 1)
            if first < end:
                self._last_of.update(zip(_grams(token_ids, length, first, end), range(first, end), strict=True))

    def draft(self, token_ids: Sequence[int], num_drafts: int) -> tuple[int, ...]:
        """What may come next. Past the end of what is known, what repeats is taken to go on repeating itself."""
        if self._next is None or self.num_indexed != len(token_ids):
            return ()
        drafts = list(token_ids[self._next : self._next + num_drafts])
        period = len(token_ids) - self._next
        while len(drafts) < num_drafts:
            drafts.append(drafts[len(drafts) - period])
        return tuple(drafts)

    def chances(self, num_drafts: int) -> list[float]:
        """For each of the next drafts: that it is right, and those before it too."""
        if self._next is None:
            return []
        return list(accumulate((self._chances[_bucket(self._matched + i)] for i in range(num_drafts)), mul))

    def _index(self, token_ids: Sequence[int], position: int) -> None:
        """Find the longest match that ends with this token, unless one goes on, and remember where the token stands."""
        last_of, longest = self._last_of, tuple(token_ids[max(0, position + 1 - LONGEST_MATCH) : position + 1])
        for length in range(len(longest), SHORTEST_MATCH - 1, -1):
            gram = longest[-length:]
            if self._matched < length and (found := last_of.get(gram)) is not None:
                self._next, self._matched = found + 1, length
            last_of[gram] = position
        if (forgotten := position - MAX_INDEXED_TOKENS) >= 0:
            longest = tuple(token_ids[max(0, forgotten + 1 - LONGEST_MATCH) : forgotten + 1])
            for length in range(SHORTEST_MATCH, len(longest) + 1):
                if last_of.get(longest[-length:]) == forgotten:
                    del last_of[longest[-length:]]


def _grams(token_ids: Sequence[int], length: int, begin: int, end: int) -> list[tuple[int, ...]]:
    """So many tokens each, of which the last stands at begin … end - 1."""
    return list(zip(*(token_ids[begin + 1 - length + i : end + 1 - length + i] for i in range(length)), strict=True))


def _bucket(num_matched: int) -> int:
    """Index into FIRST_CHANCES."""
    return min(max(0, num_matched.bit_length() - 2), len(FIRST_CHANCES) - 1)


class RowCosts:
    """What a row costs beside the step that it is in: a straight line through the times of steps over their rows."""

    def __init__(self) -> None:
        self._num = self._rows = self._time_s = self._rows_squared = self._rows_time_s = 0.0

    def record(self, num_rows: int, step_s: float) -> None:
        """A step with so many rows took so long."""
        if self._num:  # one that waited for something else says nothing about rows
            step_s = min(step_s, 3 * self.step_s(num_rows))
        decay = 1 - 1 / STEPS_REMEMBERED
        self._num = self._num * decay + 1
        self._rows = self._rows * decay + num_rows
        self._time_s = self._time_s * decay + step_s
        self._rows_squared = self._rows_squared * decay + num_rows * num_rows
        self._rows_time_s = self._rows_time_s * decay + num_rows * step_s

    def step_s(self, num_rows: float) -> float:
        """Of a step with so many rows. In units of its own before anything was measured."""
        if not self._num:
            return ROWS_OF_A_STEP + num_rows
        mean_rows, mean_s = self._rows / self._num, self._time_s / self._num
        return mean_s + self.row_s * (num_rows - mean_rows)

    @property
    def row_s(self) -> float:
        """Of one row more; between nothing and its part of the mean step."""
        if not self._num:
            return 1.0
        mean_rows, mean_s = self._rows / self._num, self._time_s / self._num
        variance = self._rows_squared - self._rows * mean_rows
        covariance = self._rows_time_s - self._rows * mean_s
        assumed = mean_s / (mean_rows + ROWS_OF_A_STEP)
        slope = (covariance + WEIGHT_OF_FIRST_COSTS * assumed) / (variance + WEIGHT_OF_FIRST_COSTS)
        return min(max(slope, 0.0), mean_s / mean_rows)


class Drafter(Protocol):
    """What proposes drafts. Whatever it says, answers stay the same; how fast they come does not.

    The scheduler calls it with running sequences alone, and tells it of every step.
    """

    @property
    def has_prospects(self) -> bool:
        """False: `is_worth_waiting` is false too, whatever runs. Saves the time of asking."""
        ...

    def is_worth_waiting(self, runs: Sequence[Run], max_rows: int) -> bool:
        """Whether the next step had better be planned when the results of the one in flight are known. A step has `max_rows`
        rows at most."""
        ...

    def draft(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[tuple[int, ...]]:
        """Drafts of each sequence, all of whose tokens are known: `most[i]` at most, and all together so many that with one
        row for each sequence there are `max_rows`."""
        ...

    def observe(self, run: Run) -> None:
        """It runs, and has new tokens."""
        ...

    def judge(self, run: Run, num_drafts: int, num_right: int) -> None:
        """So many of its drafts were computed, and so many of them were right."""
        ...

    def record_step(self, num_rows: int, step_s: float) -> None:
        """A step of decode, drafts counted, took so long."""
        ...

    @property
    def has_model(self) -> bool:
        """The ranks have a draft model. Otherwise the next three are never called."""
        ...

    def ask(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[int]:
        """How many drafts of each sequence the draft model is to make in a step of its own: `most[i]` at most. All 0: no step."""
        ...

    def take_proposals(self, run: Run, token_ids: Sequence[int]) -> None:
        """What it says, now that all tokens of the sequence are known."""
        ...

    def record_requests(self, requests: Sequence[DraftRequest], step_s: float) -> None:
        """It took so long for that."""
        ...

    def forget(self, seq_id: int) -> None:
        """It has ended, or lost its blocks."""
        ...


def worthwhile(chances: Sequence[Sequence[float]], costs: RowCosts, max_rows: int) -> list[int]:
    """How many drafts of each sequence bring tokens faster than the step without them. `chances[i][j]`: that the first j + 1
    drafts of sequence i are right. There is one row of each sequence besides, and `max_rows` in all."""
    ranked = sorted(((chance, index) for index, of in enumerate(chances) for chance in of), reverse=True)
    numbers = [0] * len(chances)
    num_tokens, num_rows = float(len(chances)), len(chances)
    for chance, index in ranked[: max_rows - len(chances)]:
        if chance * costs.step_s(num_rows) <= num_tokens * costs.row_s:
            break
        numbers[index] += 1
        num_tokens += chance
        num_rows += 1
    return numbers


class PromptLookupDrafter:
    """Drafts by `PromptLookup`, as many as measured times of steps and measured chances say are worth it."""

    def __init__(self) -> None:
        self._lookups: dict[int, PromptLookup] = {}
        """By seq_id."""
        self._warm: set[int] = set()
        """Sequences of whose last tokens some were foretold."""
        self.costs = RowCosts()

    @property
    def has_prospects(self) -> bool:
        return bool(self._warm)

    def expect(self, runs: Sequence[Run], max_rows: int) -> tuple[float, float]:
        """(tokens that drafts would bring beside one of each sequence, drafts), in a step of `max_rows` rows at most."""
        num_extra = num_drafts = 0.0
        for run in runs:
            if run.seq_id in self._warm:
                # Of tokens of which a share h is foretold, 1 / (1 - h) come until one is not.
                heat = self._lookups[run.seq_id].heat
                expected = min(heat / (1 - heat), MAX_DRAFTS) if heat < 1 else MAX_DRAFTS
                num_extra += expected
                num_drafts += min(2 * expected, MAX_DRAFTS)
        room = max_rows - len(runs)
        if not num_drafts or room <= 0:
            return 0.0, 0.0
        return num_extra * min(1.0, room / num_drafts), min(num_drafts, room)

    def is_worth_waiting(self, runs: Sequence[Run], max_rows: int) -> bool:
        num_extra, num_drafts = self.expect(runs, max_rows)
        before = len(runs) / self.costs.step_s(len(runs))
        return (len(runs) + num_extra) / self.costs.step_s(len(runs) + num_drafts) > MIN_GAIN * before

    def draft(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[tuple[int, ...]]:
        chances = [self.chances_of(run, limit) for run, limit in zip(runs, most, strict=True)]
        numbers = worthwhile(chances, self.costs, max_rows)
        return [self.draft_of(run, number) for run, number in zip(runs, numbers, strict=True)]

    def heat_of(self, seq_id: int) -> float:
        """See PromptLookup.heat."""
        return self._lookups[seq_id].heat if seq_id in self._warm else 0.0

    def chances_of(self, run: Run, limit: int) -> list[float]:
        """See PromptLookup.chances. None while the last tokens of the sequence are not looked up."""
        lookup = self._lookups.get(run.seq_id)
        if lookup is None or lookup.num_indexed != len(run.token_ids):
            return []
        return lookup.chances(min(limit, MAX_DRAFTS))

    def draft_of(self, run: Run, number: int) -> tuple[int, ...]:
        """So many drafts of one sequence."""
        return self._lookups[run.seq_id].draft(run.token_ids, number) if number else ()

    def observe(self, run: Run) -> None:
        lookup = self._lookups.get(run.seq_id)
        if lookup is None:
            lookup = self._lookups[run.seq_id] = PromptLookup()
        elif run.seq_id not in self._warm:
            num_new = len(run.token_ids) - lookup.num_indexed
            if num_new * SEQUENCES_PER_LOOK < len(self._lookups):
                return
        lookup.take(run.token_ids, run.num_prompt_tokens)
        if lookup.heat > WEIGHT_OF_LAST:
            self._warm.add(run.seq_id)
        else:
            self._warm.discard(run.seq_id)

    def judge(self, run: Run, num_drafts: int, num_right: int) -> None:
        """Whether lookup is right is known without drafts."""

    def record_step(self, num_rows: int, step_s: float) -> None:
        self.costs.record(num_rows, step_s)

    has_model = False

    def ask(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[int]:
        return [0] * len(runs)

    def take_proposals(self, run: Run, token_ids: Sequence[int]) -> None: ...

    def record_requests(self, requests: Sequence[DraftRequest], step_s: float) -> None: ...

    def forget(self, seq_id: int) -> None:
        self._lookups.pop(seq_id, None)
        self._warm.discard(seq_id)


def settle_speculation(config: SchedulerConfig, *, is_deterministic: bool) -> SchedulerConfig:
    """With "auto" replaced, now that the ranks are known: off where a row's bits depend on the rows beside it."""
    if config.speculation != "auto":
        return config
    return replace(config, speculation="prompt_lookup" if is_deterministic else "off")
