"""How long a step of a group takes: the cost model that stands for the ranks."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.simulation.clock import to_ticks
from model_parallel.engine.messages import StepPlan
from model_parallel.engine.step_times import StepWork
from model_parallel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step: f(tokens) + row_s · decodes + context_s · context tokens + pair_s · pairs.

    f goes in straight lines through `knots`, which hold what a step costs by itself, the matrices (bound by memory for few tokens
    and by arithmetic for many) and the exchanges between ranks. For a fixed number of rows the cost is a straight line over the
    context, which is what lets a simulator jump over steps of pure decode.
    """

    knots: tuple[tuple[float, float], ...]
    """(tokens of a step, seconds), by tokens; the last line goes on for ever."""
    row_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    empty_s: float = 0.0
    """Of a step that only tells the ranks which sequences have ended."""

    def __post_init__(self) -> None:
        if not self.knots or self.knots[0][1] <= 0:
            raise ConfigError("cost.knots must hold at least one (tokens, seconds) with seconds greater than 0")
        for (few, few_s), (many, many_s) in pairwise(self.knots):
            if few >= many or few_s > many_s:
                raise ConfigError(f"cost.knots must grow in tokens and not fall in seconds; {few} is before {many}")
        for name in ("row_s", "context_s", "pair_s", "empty_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cost.{name} is {getattr(self, name)}; it must not be negative")

    def tokens_s(self, num_tokens: float) -> float:
        """f."""
        if len(self.knots) == 1:
            return self.knots[0][1]
        index = min(max(bisect_left(self.knots, num_tokens, key=lambda knot: knot[0]), 1), len(self.knots) - 1)
        (few, few_s), (many, many_s) = self.knots[index - 1], self.knots[index]
        return max(self.knots[0][1], few_s + (num_tokens - few) * (many_s - few_s) / (many - few))

    def seconds(self, work: StepWork) -> float:
        """Of one step."""
        if not work.num_tokens:
            return self.empty_s
        return (
            self.tokens_s(work.num_tokens)
            + self.row_s * work.num_decodes
            + self.context_s * work.num_context_tokens
            + self.pair_s * work.num_pairs
        )


def slower(cost: StepCost, factor: float) -> StepCost:
    """Where everything takes so many times as long."""
    return StepCost(
        knots=tuple((tokens, seconds * factor) for tokens, seconds in cost.knots),
        row_s=cost.row_s * factor,
        context_s=cost.context_s * factor,
        pair_s=cost.pair_s * factor,
        empty_s=cost.empty_s * factor,
    )


class CostTable:
    """A StepCost in ticks, remembered by number of tokens. Groups that are alike share one."""

    def __init__(self, cost: StepCost, *, prompts_factor: float = 1.0) -> None:
        """Steps with prompt tokens take `prompts_factor` times as long as `cost` says."""
        self.cost = cost
        self._prompts_factor = prompts_factor
        self.context_ticks = to_ticks(cost.context_s)
        self._empty_ticks = max(1, to_ticks(cost.empty_s))
        self._decode_ticks: dict[int, int] = {}
        self._tokens_s: dict[int, float] = {}

    def slower(self, factor: float) -> "CostTable":
        """Where everything takes so many times as long."""
        return CostTable(slower(self.cost, factor), prompts_factor=self._prompts_factor)

    def decode_ticks(self, num_rows: int) -> int:
        """Of a step of pure decode, without context_ticks · context tokens."""
        ticks = self._decode_ticks.get(num_rows)
        if ticks is None:
            ticks = max(1, to_ticks(self.cost.tokens_s(num_rows) + self.cost.row_s * num_rows))
            self._decode_ticks[num_rows] = ticks
        return ticks

    def ticks(self, plan: StepPlan) -> int:
        """Of any step. Steps of pure decode cost exactly what `decode_ticks` says."""
        work = StepWork.of(plan)
        if not work.num_tokens:
            return self._empty_ticks
        if work.num_tokens == work.num_decodes:
            return self.decode_ticks(work.num_decodes) + self.context_ticks * work.num_context_tokens
        tokens_s = self._tokens_s.get(work.num_tokens)
        if tokens_s is None:
            tokens_s = self._tokens_s[work.num_tokens] = self.cost.tokens_s(work.num_tokens)
        rest_s = self.cost.row_s * work.num_decodes + self.cost.pair_s * work.num_pairs
        rest_s += self.cost.context_s * work.num_context_tokens
        return to_ticks(self._prompts_factor * (tokens_s + rest_s))


def knots_from(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points made fit for StepCost: by tokens, and never falling."""
    made: list[tuple[float, float]] = []
    for tokens, seconds in sorted(points):
        made.append((tokens, max(seconds, made[-1][1]) if made else seconds))
    return tuple(made)
