"""How much work arrives, and how much will when a group that is started now can serve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from cluster.policy.capacity import Capacity
from cluster.policy.config import ModelPolicy
from cluster.policy.observation import GatewayLoad, GroupLoad
from cluster.policy.state import Block, GroupTraits, ModelState, Sample, Seen

MAX_SAMPLES = 240
MAX_START_TIMES = 5
ENOUGH_ANSWERS = 100
"""Whose mean length is as good as any."""
SHRINK_AFTER_STARTS = 0.5
"""Times a start."""
LEAST_SHRINK_AFTER_S = 30.0
PROOF = 2.5
"""Standard errors by which something must stand out before it counts. It is looked for at every tick, in several windows, and by
chance it should not be found every few minutes."""
CHANGE = 3.0
"""Standard errors by which two windows differ when the demand has changed between them."""
MEASURABLE = 50
"""Requests in a window that make its mean a measure: its standard error is a seventh then."""
FEWEST_FOR_A_LINE = 8
"""Samples. A line through fewer proves nothing."""
MAX_DISPERSION = 25.0
NUM_BLOCKS = 9
"""That differences are averaged in before the median of the averages is taken."""
SHORTEST_WINDOW_S = 5.0
BLOCKS_A_START = 2
SHORTEST_BLOCK_S = 15.0
MAX_BLOCKS = 96
"""So many that a flash crowd is in a small part of them."""
LAG = 3
"""Blocks between two that are compared: the time that a start takes, and the age of what is known of the demand."""
FEWEST_DIFFERENCES = 16
"""With fewer, one step would be in too large a part of them."""
UNKNOWN_WANDER = 0.15
"""Taken until there are so many: nobody knows yet whether the demand is steady."""
FARTHER = 1.15
"""Times what the blocks differ by. A started group is needed until the requests of then have ended, which is later than LAG."""
MAX_WANDER = 1.0
MEDIAN_OF_SQUARE = 0.4549
"""Of the square of a standard normal variable (chi-squared of one degree of freedom)."""


def take_sample(
    state: ModelState, gateways: dict[str, GatewayLoad], groups: Sequence[GroupLoad], now_s: float
) -> tuple[dict[str, Seen], Sample | None]:
    """What arrived since the last look. None when no gateway was there at both.

    A gateway that is new counts from its first look on. A report that is no newer than the last one says nothing; totals that
    have fallen contradict the last ones, and so say nothing either until the next look.
    """
    num_sequences = num_prompt_tokens = longest_s = 0.0
    seen = dict(state.seen)
    for gateway, load in gateways.items():
        last = seen.get(gateway)
        if last is None or load.measured_s > last.measured_s:
            seen[gateway] = Seen(load.measured_s, load.num_sequences, load.num_prompt_tokens)
        if last is None or load.measured_s <= last.measured_s:
            continue
        new_sequences, new_tokens = (
            load.num_sequences - last.num_sequences,
            load.num_prompt_tokens - last.num_prompt_tokens,
        )
        if new_sequences < 0 or new_tokens < 0:
            continue
        # As a rate, for gateways are not all looked at at the same times.
        length_s = load.measured_s - last.measured_s
        num_sequences += new_sequences / length_s
        num_prompt_tokens += new_tokens / length_s
        longest_s = max(longest_s, length_s)
    if not longest_s:
        return seen, None
    num_open = sum(load.num_open for load in groups) + sum(load.num_held for load in gateways.values())
    kv_tokens = math.fsum(load.kv_usage * load.kv_cache_tokens for load in groups)
    sample = Sample(now_s, longest_s, num_sequences * longest_s, num_prompt_tokens * longest_s, num_open, kv_tokens)
    return seen, sample


def remember(samples: tuple[Sample, ...], new: Sample | None, now_s: float, window_s: float) -> tuple[Sample, ...]:
    """The samples of the window, bounded in number: the older half is kept at half the resolution when there are too many."""
    kept = [sample for sample in samples if sample.at_s > now_s - window_s]
    if new is not None:
        kept.append(new)
    if len(kept) > MAX_SAMPLES:
        half = MAX_SAMPLES // 2
        old = kept[:half]
        kept[:half] = [_merged(one, other) for one, other in zip(old[::2], old[1::2], strict=True)]
    return tuple(kept)


def _merged(one: Sample, other: Sample) -> Sample:
    return Sample(
        other.at_s,
        one.length_s + other.length_s,
        one.num_sequences + other.num_sequences,
        one.num_prompt_tokens + other.num_prompt_tokens,
        max(one.num_open, other.num_open),
        max(one.num_kv_tokens, other.num_kv_tokens),
    )


def traits_of(groups: Sequence[GroupLoad], before: GroupTraits | None) -> GroupTraits | None:
    """The median group of those that have measured something; what was known before when none has."""
    measured = [
        load
        for load in groups
        if load.line is not None and load.mean_output_tokens is not None and load.num_ended_answers > 0
    ]
    if not measured:
        return before
    middle = sorted(measured, key=_nominal_step_s)[len(measured) // 2]
    if middle.line is None:
        raise AssertionError("only measured groups were chosen")
    mean_output, num_ended = _mean_answer(measured, before)
    return GroupTraits(
        line=middle.line,
        mean_output_tokens=mean_output,
        num_ended_answers=num_ended,
        cached_share=math.fsum(load.cached_share for load in measured) / len(measured),
        max_num_seqs=middle.max_num_seqs,
        kv_cache_tokens=middle.kv_cache_tokens,
    )


def _mean_answer(measured: Sequence[GroupLoad], before: GroupTraits | None) -> tuple[float, int]:
    """(tokens, the number of answers that this is known from). Each group counts by what it has seen. While that is little, as
    when the first group has just started again, what was known before makes up the rest."""
    num_seen = sum(load.num_ended_answers for load in measured)
    num_tokens = math.fsum((load.mean_output_tokens or 0.0) * load.num_ended_answers for load in measured)
    num_before = 0 if before is None else max(0, min(before.num_ended_answers, ENOUGH_ANSWERS) - num_seen)
    if before is not None:
        num_tokens += num_before * before.mean_output_tokens
    return num_tokens / (num_seen + num_before), num_seen + num_before


def _nominal_step_s(load: GroupLoad) -> float:
    return load.line.step_s(load.max_num_seqs / 2) if load.line is not None else 0.0


def mean_prompt_tokens(samples: Sequence[Sample], held_sequences: int, held_tokens: int) -> float:
    """Of a sequence, over all samples and what is held; 1 while nothing came."""
    num_sequences = held_sequences + math.fsum(sample.num_sequences for sample in samples)
    num_tokens = held_tokens + math.fsum(sample.num_prompt_tokens for sample in samples)
    return num_tokens / num_sequences if num_sequences else 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Seconds of service that arrive a second."""

    now: float
    """The most that the samples prove for the present."""
    at_ready: float
    """The same for the time when a group that is started now can serve."""
    dispersion: float
    """Index of dispersion of the arrivals: 1 for a Poisson process, more for bursts."""
    wander: float
    """Standard deviation of what the demand changes by until then, as a part of it."""


def remember_block(blocks: tuple[Block, ...], new: Sample | None, start_s: float) -> tuple[Block, ...]:
    """The blocks with a further sample, bounded in number. A block is as long as a part of a start."""
    if new is None:
        return blocks
    *before, last = blocks or (Block(new.at_s, 0.0, 0.0, 0.0),)
    full_s = max(start_s / BLOCKS_A_START, SHORTEST_BLOCK_S)
    if last.length_s and last.length_s + new.length_s / 2 > full_s:
        before, last = [*before, last], Block(new.at_s, 0.0, 0.0, 0.0)
    last = Block(
        new.at_s,
        last.length_s + new.length_s,
        last.num_sequences + new.num_sequences,
        last.num_prompt_tokens + new.num_prompt_tokens,
    )
    return (*before, last)[-MAX_BLOCKS:]


def _wander(blocks: Sequence[Block], capacity: Capacity, dispersion: float) -> float:
    """From the median of the squared relative changes between blocks that are a start apart, which a few steps do not change,
    less what chance adds to each block."""
    squares, noises = [], []
    works = [capacity.price_s(block.num_sequences, block.num_prompt_tokens) for block in blocks]
    for first in range(len(blocks) - LAG):
        one, other = blocks[first], blocks[first + LAG]
        level = (works[first] + works[first + LAG]) / (one.length_s + other.length_s)
        if level <= 0:
            continue
        change = (works[first + LAG] / other.length_s - works[first] / one.length_s) / level
        squares.append(change**2)
        noises.append(dispersion * capacity.service_s / level * (1 / one.length_s + 1 / other.length_s))
    if len(blocks) - LAG < FEWEST_DIFFERENCES:
        return UNKNOWN_WANDER
    if len(squares) < FEWEST_DIFFERENCES:  # nothing was asked for in most
        return 0.0
    variance = median(squares) / MEDIAN_OF_SQUARE - median(noises)
    return min(FARTHER * math.sqrt(max(0.0, variance)), MAX_WANDER)


def forecast(
    samples: Sequence[Sample], blocks: Sequence[Block], ahead_s: float, capacity: Capacity, now_s: float
) -> Demand:
    """From the arrivals so far.

    What the demand will have risen by then is added to its present level, if a rise is proven.
    """
    if not samples:
        return Demand(0.0, 0.0, 1.0, 0.0)
    works = [capacity.price_s(sample.num_sequences, sample.num_prompt_tokens) for sample in samples]
    dispersion = _dispersion(samples, works, capacity.service_s)
    level = _level(samples, works, dispersion * capacity.service_s, now_s)
    wander = _wander(blocks, capacity, dispersion)
    return Demand(level, level + ahead_s * _proven_rise(samples, works), dispersion, wander)


def _dispersion(samples: Sequence[Sample], works: Sequence[float], service_s: float) -> float:
    """From the squared differences of neighbours (von Neumann), which a trend changes little, and the median of their means
    over blocks, which a step does not change: it is in one block.

    A Poisson process of jobs that cost w each has, in a sample of length l, a rate of the variance mean · w / l.
    """
    mean = math.fsum(works) / math.fsum(sample.length_s for sample in samples)
    if len(samples) < FEWEST_FOR_A_LINE or mean <= 0:
        return 1.0
    rates = [work_s / sample.length_s for sample, work_s in zip(samples, works, strict=True)]
    squares = [
        (rate - rate_before) ** 2 / (1 / sample.length_s + 1 / before.length_s)
        for (before, rate_before), (sample, rate) in pairwise(zip(samples, rates, strict=True))
    ]
    blocks = [squares[first::NUM_BLOCKS] for first in range(min(NUM_BLOCKS, len(squares)))]
    middle = median(math.fsum(block) / len(block) for block in blocks)
    # A mean of m squares of normal variables has its median below the variance (chi-squared; Wilson and Hilferty 1931).
    below = (1 - 2 / (9 * len(squares) / len(blocks))) ** 3
    return min(max(1.0, middle / below / (mean * service_s)), MAX_DISPERSION)


def _level(samples: Sequence[Sample], works: Sequence[float], noise_s: float, now_s: float) -> float:
    """Of what arrives at present. A mean over `span_s` seconds has the variance noise_s · rate / span_s.

    It is the mean over the longest window in which nothing has changed: none of the shorter ones
    differs from it by more than CHANGE standard errors (Lepski 1991). A window with too few requests is no measure. What a
    shorter one proves to be higher, less PROOF standard errors, counts nevertheless: so a step shows within seconds, and then
    ever more of it. A longer one says what was before a change. While none can be measured, all count.
    """
    windows = _windows(samples, works, now_s)
    proven = [max(0.0, work - PROOF * math.sqrt(noise_s * work)) / span_s for span_s, work in windows]
    for place in range(len(windows) - 1, -1, -1):
        span_s, work = windows[place]
        if work < MEASURABLE * noise_s:
            break
        rate = work / span_s
        if all(abs(w / s - rate) <= CHANGE * math.sqrt(noise_s * rate / s) for s, w in windows[:place]):
            return max(rate, *proven[: place + 1])
    return max(proven)


def _windows(samples: Sequence[Sample], works: Sequence[float], now_s: float) -> list[tuple[float, float]]:
    """(seconds, seconds of service that arrived in them) of windows up to now, each about twice as long as the one before."""
    windows, work, length_s, next_s = [], 0.0, 0.0, SHORTEST_WINDOW_S
    for sample, work_s in zip(reversed(samples), reversed(works), strict=True):
        work += work_s
        length_s += sample.length_s
        # From the beginning of this sample until now, also where samples are missing.
        span_s = max(length_s, now_s - sample.at_s + sample.length_s)
        if span_s >= next_s or sample is samples[0]:
            windows.append((span_s, work))
            next_s = 2 * span_s
    return windows


def _proven_rise(samples: Sequence[Sample], works: Sequence[float]) -> float:
    """By how much the rate rises a second, as far as both halves of the samples prove it; 0 where nothing does.

    A step or a flash crowd rises in one half only. It is in the level as soon as it stands out, and says nothing of what follows.
    """
    half = len(samples) // 2
    return max(0.0, min(_proven_slope(samples[:half], works[:half]), _proven_slope(samples[half:], works[half:])))


def _proven_slope(samples: Sequence[Sample], works: Sequence[float]) -> float:
    """Of the line of least squares through the rates, weighted by length, less PROOF standard errors."""
    num = len(samples)
    if num < FEWEST_FOR_A_LINE:
        return 0.0
    total = sum_x = sum_y = sum_xx = sum_xy = sum_yy = 0.0
    origin_s = samples[-1].at_s
    for sample, work_s in zip(samples, works, strict=True):
        weight = sample.length_s
        x, y = sample.at_s - weight / 2 - origin_s, work_s / weight
        total += weight
        sum_x += weight * x
        sum_y += weight * y
        sum_xx += weight * x * x
        sum_xy += weight * x * y
        sum_yy += weight * y * y
    mean_x, mean_y = sum_x / total, sum_y / total
    spread = sum_xx / total - mean_x**2
    if spread <= 0:
        return 0.0
    slope = (sum_xy / total - mean_x * mean_y) / spread
    residual = max(0.0, sum_yy / total - mean_y**2 - slope**2 * spread) * num / (num - 2)
    return slope - PROOF * math.sqrt(residual / (num * spread))


def backlog_s(groups: Sequence[GroupLoad], gateways: dict[str, GatewayLoad], capacity: Capacity) -> float:
    """Seconds of service that wait, in groups and, when there are none, in gateways."""
    num_sequences = sum(load.num_waiting for load in groups) + sum(load.num_held for load in gateways.values())
    num_tokens = sum(load.num_waiting_tokens for load in groups) + sum(
        load.num_held_tokens for load in gateways.values()
    )
    return capacity.price_s(num_sequences, num_tokens)


def start_time_s(state: ModelState, policy: ModelPolicy) -> float:
    """How long a start takes: the longest of the last few, or what is expected until one was measured."""
    return max(state.start_times_s, default=policy.expected_start_s)


def shrink_after_s(state: ModelState, policy: ModelPolicy) -> float:
    """How long fewer groups must have been enough before some are stopped.

    Keeping a group that is not needed for as long as a start takes costs what starting it again would, so who knows nothing of
    what comes waits that long (the ski-rental problem). Here the demand has fallen beyond chance, and half of that is
    best on the traces of bench.policy.
    """
    return policy.shrink_after_s or max(SHRINK_AFTER_STARTS * start_time_s(state, policy), LEAST_SHRINK_AFTER_S)
