"""How long answers are, from those that have ended and those that go on.

The mean of those that have ended is too low while a group is new or its load grows: short answers end first. All tokens divided
by the number of answers that have ended is too high, four times in a group's first half minute. So an answer that goes on counts
as what is known of it: that it is at least so long (Kaplan and Meier 1958).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ENOUGH_ENDED = 100
"""Answers, whose mean length says what the next ones will be like."""
MAX_ANSWERS = 10_000
"""Where hardly any ends by itself."""


@dataclass(slots=True, eq=False)
class _Answer:
    seq_id: int
    num_tokens: Callable[[], int]
    """What it has by now."""
    is_whole: bool = False
    """It has ended, and would not have been longer in other circumstances."""


class AnswerLengths:
    """Of the answers that began last: as many as it takes for ENOUGH_ENDED of them to be whole, or of all there were.

    Which answers count depends on when they began alone, so long ones are not left out.
    """

    def __init__(self) -> None:
        self._answers: deque[_Answer] = deque()
        """Oldest first."""
        self._going_on: dict[int, _Answer] = {}
        """Of those, by seq_id."""
        self.num_ended = 0
        """Whole ones among them."""

    def begin(self, seq_id: int, num_tokens: Callable[[], int]) -> None:
        """A sequence begins its answer; `num_tokens` tells at any time how many tokens that has."""
        answer = self._going_on[seq_id] = _Answer(seq_id, num_tokens)
        self._answers.append(answer)
        if len(self._answers) > MAX_ANSWERS:
            self._forget_oldest()

    def end(self, seq_id: int, num_tokens: int, *, is_whole: bool) -> None:
        """It has ended with so many tokens. Does nothing for one that did not begin here, or that no longer counts."""
        answer = self._going_on.pop(seq_id, None)
        if answer is None:
            return
        answer.num_tokens, answer.is_whole = lambda: num_tokens, is_whole
        self.num_ended += is_whole
        while self.num_ended - self._answers[0].is_whole >= ENOUGH_ENDED:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = self._answers.popleft()
        self._going_on.pop(oldest.seq_id, None)
        self.num_ended -= oldest.is_whole

    def mean(self) -> float | None:
        """Tokens of a whole answer; None before one has ended. May be called from any thread."""
        answers = [(answer.num_tokens(), answer.is_whole) for answer in self._answers.copy()]
        return mean_length(answers) if any(is_whole for _, is_whole in answers) else None


def mean_length(lengths: Iterable[tuple[float, bool]]) -> float:
    """From (length, whether it is whole; if not, it is at least so long): the area below the estimated share of answers that are
    longer than each length. None is taken to be longer than the longest that was seen."""
    ordered = sorted(lengths, key=lambda length: (length[0], not length[1]))
    mean = shorter = 0.0
    share = 1.0
    for place, (length, is_whole) in enumerate(ordered):
        mean += share * (length - shorter)
        shorter = length
        if is_whole:
            share *= 1 - 1 / (len(ordered) - place)
    return mean
