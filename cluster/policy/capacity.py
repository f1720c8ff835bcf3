"""What one group can do within its service level, and how long users would wait: in seconds of service.

A step of n decoding sequences and p prompt tokens takes a + b·n + c·p (`StepLine`). A sequence with P prompt and D output tokens
is in D steps, so it costs w = c·P + b·D seconds of service beyond the base. At r sequences a second a step carries r·P·t prompt
tokens, and by Little's law n = r·D·t sequences decode. Put into the line, t = a + b·r·D·t + c·r·P·t, so

    t = a / (1 − r·w):    the step time, which is the time per output token, at the utilisation r·w.

A group serves a rate r while

    t ≤ tpot_p99_s           r ≤ (1 − a / tpot) / w
    n ≤ max_num_seqs         r ≤ N / (a·D + N·w)
    n·(P + D/2) ≤ KV tokens  r ≤ N' / (a·D + N'·w)   with N' = KV tokens / (P + D/2)

The last is why the share of the KV cache in use says little about a rate: at short contexts a group is at its limit with most of
its cache free. The last two also bound a group that many wait for, whatever the service level: the smaller r·w of the two is its
`saturation`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.policy.config import ModelPolicy
from cluster.policy.state import GroupTraits, Sample

CONFIDENCE = 2.33
"""Standard deviations that 99 of 100 draws of a normal distribution stay below."""
LEAST_SEQUENCE_SHARE = 1e-3
"""A further sequence is never taken to cost less than this part of the base: a line through noise may be flat."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a group of a model does for the present mix of requests."""

    traits: GroupTraits
    num_prompt_tokens: float
    """Of a mean sequence, without those that the prefix cache holds (P)."""
    service_s: float
    """Price of a mean sequence (w)."""
    rate: float
    """Mean sequences a second that a group serves within the service level (r)."""
    limit: str
    """What bounds the rate, by the name of its setting."""
    saturation: float
    """Seconds of service that a group gives a second while it holds all that it can: at most 1, the base of a step is none."""
    unreachable: str
    """Why no number of groups keeps the service level; "" when some number does."""

    @property
    def utilisation(self) -> float:
        """Seconds of service that a group gives a second within the service level."""
        return self.rate * self.service_s

    @property
    def num_in_service(self) -> float:
        """Sequences that a group has at that rate (Little's law)."""
        num_output = max(self.traits.mean_output_tokens, 1.0)
        return self.rate * num_output * self.tpot_s(self.utilisation)

    def price_s(self, num_sequences: float, num_prompt_tokens: float) -> float:
        """Seconds of service that these cost; prompt tokens as they arrive."""
        line = self.traits.line
        uncached = num_prompt_tokens * (1 - self.traits.cached_share)
        return (
            num_sequences * self.traits.mean_output_tokens * _sequence_s(self.traits) + uncached * line.prompt_token_s
        )

    def tpot_s(self, utilisation: float) -> float:
        """Time per output token of a group that gives so many seconds of service a second; infinite from 1 on."""
        return self.traits.line.base_s / (1 - utilisation) if utilisation < 1 else math.inf

    def ttft_s(self, utilisation: float, backlog_s: float = 0.0) -> float:
        """Time to the first token of a mean request: what is before it, half the step under way, its prompt, its step."""
        own_s = self.num_prompt_tokens * self.traits.line.prompt_token_s
        return backlog_s + own_s + 1.5 * self.tpot_s(utilisation)


def capacity_of(traits: GroupTraits, num_prompt_tokens: float, policy: ModelPolicy) -> Capacity:
    """For sequences with so many prompt tokens on average, as they arrive."""
    line, num_output = traits.line, max(traits.mean_output_tokens, 1.0)
    uncached = num_prompt_tokens * (1 - traits.cached_share)
    service_s = uncached * line.prompt_token_s + num_output * _sequence_s(traits)
    held_tokens = num_prompt_tokens + num_output / 2
    steps_s = line.base_s * num_output
    num_in_cache = policy.max_kv_usage * traits.kv_cache_tokens / held_tokens
    limits = {
        "max_num_seqs": traits.max_num_seqs / (steps_s + traits.max_num_seqs * service_s),
        "kv_cache_tokens": num_in_cache / (steps_s + num_in_cache * service_s),
    }
    saturation = min(limits.values()) * service_s
    alone_s = line.step_s(1)
    first_s = 1.5 * alone_s + uncached * line.prompt_token_s
    unreachable = ""
    if alone_s > policy.tpot_p99_s:
        unreachable = f"tpot_p99_s is {policy.tpot_p99_s:g} and a step of one sequence takes {alone_s:.3g} s"
    else:
        limits["tpot_p99_s"] = (1 - line.base_s / policy.tpot_p99_s) / service_s
        if first_s > policy.ttft_p99_s:
            unreachable = (
                f"ttft_p99_s is {policy.ttft_p99_s:g} and a mean prompt alone in a group takes {first_s:.3g} s"
            )
    limit = min(limits, key=lambda name: limits[name])
    return Capacity(traits, uncached, service_s, max(limits[limit], 1e-12), limit, saturation, unreachable)


def margin_for_bursts(rate: float, dispersion: float, wander: float, capacity: Capacity, policy: ModelPolicy) -> float:
    """By how much more than the mean to provide, as a part of it (square-root staffing; Halfin and Whitt 1981).

    n = rate · D · tpot sequences are in service, over all groups. Their number varies with a variance of I·n, where I is the
    index of dispersion of the arrivals: 1 for a Poisson process. A request feels the mean over its own duration. The number is
    correlated over just that time, and such a mean has 2/e of the variance (for an exponential correlation).
    The mean itself changes until a group that is started now can serve: by `wander`, a standard deviation and a part of the mean.
    """
    num_in_service = rate * max(capacity.traits.mean_output_tokens, 1.0) * policy.tpot_p99_s
    if num_in_service <= 0:
        return 0.0
    return CONFIDENCE * math.sqrt(2 / math.e * dispersion / num_in_service + wander**2)


@dataclass(frozen=True, slots=True)
class Replay:
    """What the past would have been like on some number of groups."""

    share_within: float
    """Part of the sequences that would have been within the service level, 0 to 1."""
    worst_ttft_s: float
    worst_tpot_s: float


def replay(
    samples: Sequence[Sample], since_s: float, num_groups: int, capacity: Capacity, policy: ModelPolicy
) -> Replay:
    """Serve the samples since then again, as a fluid: work that exceeds what the groups can do queues up.

    The number of sequences in a step follows the arrivals of a request's duration, so the utilisation is smoothed by it. Open
    sequences and the KV cache that they use are stocks: fewer groups have to hold as many.
    """
    if num_groups == 0:
        return Replay(0.0 if any(s.num_sequences for s in samples if s.at_s > since_s) else 1.0, math.inf, math.inf)
    traits = capacity.traits
    duration_s = max(traits.mean_output_tokens, 1.0) * policy.tpot_p99_s
    kv_tokens = policy.max_kv_usage * traits.kv_cache_tokens * num_groups
    num_in_service = capacity.num_in_service * num_groups
    max_open = num_in_service + CONFIDENCE * math.sqrt(num_in_service)
    backlog_s = smoothed = num_all = num_within = worst_ttft_s = worst_tpot_s = 0.0
    for sample in samples:
        work_s = capacity.price_s(sample.num_sequences, sample.num_prompt_tokens)
        smoothed += (work_s / sample.length_s - smoothed) * -math.expm1(-sample.length_s / duration_s)
        if sample.at_s <= since_s:
            continue
        backlog_s = max(0.0, backlog_s + work_s - num_groups * sample.length_s)
        utilisation = smoothed / num_groups
        ttft_s = capacity.ttft_s(utilisation, backlog_s / num_groups)
        worst_ttft_s, worst_tpot_s = max(worst_ttft_s, ttft_s), max(worst_tpot_s, capacity.tpot_s(utilisation))
        fits = sample.num_kv_tokens <= kv_tokens and sample.num_open <= max_open
        is_in_time = ttft_s <= policy.ttft_p99_s or bool(capacity.unreachable)
        # What is there counts beside what arrives: a stock that does not fit concerns everybody, also when nobody arrives.
        weight = sample.num_sequences + sample.num_open
        num_all += weight
        num_within += weight * (utilisation <= capacity.utilisation and is_in_time and fits)
    return Replay(num_within / num_all if num_all else 1.0, worst_ttft_s, worst_tpot_s)


def _sequence_s(traits: GroupTraits) -> float:
    return max(traits.line.sequence_s, LEAST_SEQUENCE_SHARE * traits.line.base_s)
