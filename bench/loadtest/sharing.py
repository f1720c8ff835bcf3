"""How a run's service was shared out over time and between tenants."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from bench.loadtest.estimates import Values
from bench.loadtest.records import Record

INPUT_PRICE, OUTPUT_PRICE = 1, 2
"""Of a token, as the fair queue counts service (Sheng et al., OSDI 2024)."""
_NUM_SLICES = 2000


def token_times(record: Record) -> Values:
    """When each chunk came, from the run's start; evenly between first and last where that was not kept.

    As many as were seen: how many tokens an answer has is the server's word.
    """
    if record.first_s is None or record.last_s is None:
        return np.array([record.ended_s])
    gaps = np.frombuffer(record.gaps, np.float32).astype(np.float64)
    if not len(gaps):
        return np.linspace(record.first_s, record.last_s, max(1, record.seen_chunks))
    # The gaps are rounded, so their sum may lie beyond the last chunk.
    return np.minimum(record.first_s + np.concatenate(([0.0], np.cumsum(gaps))), record.last_s)


def in_flight(records: Sequence[Record], times: Values) -> Values:
    """Requests that were under way at each time."""
    begun = np.sort([record.sent_s for record in records])
    ended = np.sort([record.ended_s for record in records])
    return (np.searchsorted(begun, times, "right") - np.searchsorted(ended, times, "right")).astype(float)


def service(records: Sequence[Record]) -> float:
    """What some requests got, as the fair queue counts it."""
    return float(
        sum(
            INPUT_PRICE * record.prompt_tokens + OUTPUT_PRICE * record.output_tokens
            for record in records
            if record.output_tokens
        )
    )


def jain(shares: Sequence[float]) -> float | None:
    """(Σx)² / (n Σx²): 1 when all get the same, 1/n when one gets all."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def service_gap(records: Sequence[Record], weights: Sequence[float], from_s: float) -> float | None:
    """The most by which two tenants' services drifted apart over any interval in which both had requests under way.

    Service is prompt tokens when the first token comes and twice each output token when it comes, over the tenant's weight.
    """
    if len(weights) < 2 or not records:
        return None
    until_s = max(record.ended_s for record in records)
    times = np.linspace(from_s, until_s, _NUM_SLICES)
    served, busy = [], []
    for place, weight in enumerate(weights):
        own = [record for record in records if record.tenant == place]
        served.append(cumulative_service(own, times) / weight)
        busy.append(in_flight(own, times) > 0)
    return max(
        _drift(served[a] - served[b], busy[a] & busy[b]) for a, b in combinations(range(len(weights)), 2)
    )  # fmt: skip


def cumulative_service(records: Sequence[Record], times: Values) -> Values:
    """Up to each time."""
    steps = np.zeros(len(times) + 1)
    for record in records:
        arrivals = token_times(record)
        if not record.output_tokens:
            continue
        np.add.at(steps, np.searchsorted(times, arrivals), OUTPUT_PRICE * record.output_tokens / len(arrivals))
        steps[np.searchsorted(times, arrivals[0])] += INPUT_PRICE * record.prompt_tokens
    return np.cumsum(steps[:-1])


def _drift(difference: Values, both_busy: "np.ndarray[Any, np.dtype[np.bool_]]") -> float:
    """The largest range of the difference within one stretch."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], both_busy.astype(int), [0]))))
    stretches = [difference[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    return max((float(stretch.max() - stretch.min()) for stretch in stretches), default=0.0)
