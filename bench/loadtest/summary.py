"""What a run comes to, under the names of `vllm bench serve` and, for what that does not have, ours.

Latencies count from the moment at which a request was due. Rates are what happened in the window that warm-up and cool-down
leave, latencies those of the requests that were due in it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.loadtest.estimates import Values, mean_interval, quantile_interval, settled_from, trend
from bench.loadtest.leader import Run
from bench.loadtest.records import Record
from bench.loadtest.replies import Outcome
from bench.loadtest.scenario import Scenario, Slo
from bench.loadtest.sharing import in_flight, jain, service, service_gap, token_times
from bench.loadtest.verdict import client_facts, judge

MEASURES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
MAX_DETAILED = 20_000
"""Requests whose figures are kept in the result, for comparisons."""
MS = 1e3
_NUM_SLICES = 200
MAX_LITTLE = 0.1
MAX_GROWTH = 0.25
MIN_SETTLED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured: arrivals in [begin, end), and events until closed."""

    begin_s: float
    end_s: float
    closed_s: float

    @property
    def length_s(self) -> float:
        return self.closed_s - self.begin_s

    def has(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


def window_of(scenario: Scenario, records: Sequence[Record]) -> Window:
    """Without cool-down it closes when the last answer has ended, as others measure."""
    last_due_s = max((record.intended_s for record in records), default=0.0)
    last_end_s = max((record.closed_s for record in records), default=0.0)
    if scenario.cooldown_s:
        end_s = min(scenario.duration_s, max(last_due_s, scenario.warmup_s)) - scenario.cooldown_s
        end_s = max(end_s, scenario.warmup_s + 1e-9)
        return Window(scenario.warmup_s, end_s, end_s)
    return Window(scenario.warmup_s, math.inf, max(last_end_s, scenario.warmup_s + 1e-9))


def summarise(scenario: Scenario, run: Run, percentiles: Sequence[float] = PERCENTILES) -> dict[str, Any]:
    """Everything that a report shows of one run. Plain data, ready for JSON; what is not known is None."""
    window = window_of(scenario, run.records)
    slos = {place: tenant.slo for place, tenant in enumerate(scenario.tenants)}
    client = client_facts(run.healths)
    result = figures(run.records, window, slos, percentiles)
    measured = [record for record in run.records if window.has(record.intended_s)]
    latency_ms = result["median_ttft_ms"] or result["median_e2el_ms"] or 0.0
    has_limit = any(tenant.max_concurrency is not None for tenant in scenario.tenants)
    verdict = judge(run, client, latency_ms / MS, duration_s=scenario.duration_s, has_own_limit=has_limit)
    steadiness = _steadiness(measured, window)
    little = _little(run.records, window)
    verdict.notes += [*_remarks(steadiness, little), *_unseen(measured)]
    tenants = {
        tenant.name: figures([r for r in run.records if r.tenant == place], window, slos, percentiles)
        for place, tenant in enumerate(scenario.tenants)
    }
    weights = [tenant.weight for tenant in scenario.tenants]
    served = [service([r for r in measured if r.tenant == place]) for place in range(len(weights))]
    return {
        "name": scenario.name,
        "seed": scenario.seed,
        **result,
        "valid": verdict.is_valid,
        "invalid_because": verdict.invalid,
        "notes": verdict.notes,
        "client": client,
        "window": {"begin_s": window.begin_s, "end_s": window.closed_s},
        "coordinated_omission": _omission(measured) if scenario.is_open_loop else None,
        "steady_state": steadiness,
        "little": little,
        "confidence": confidence(measured),
        "server_stages": _stages(measured),
        "tenants": tenants,
        "jain_index": jain([got / weight for got, weight in zip(served, weights, strict=True)]),
        "max_service_gap": service_gap(measured, weights, window.begin_s),
        "requests": _details(measured, scenario),
    }


def figures(
    records: Sequence[Record], window: Window, slos: Mapping[int, Slo], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """Counts, rates and latencies of some of the requests."""
    measured = [record for record in records if window.has(record.intended_s)]
    finished = [record for record in measured if record.outcome is Outcome.FINISHED]
    outcomes = Counter(record.outcome for record in measured)
    num_ended, num_tokens = _in_window([r for r in records if r.outcome is Outcome.FINISHED], window)
    num_input = sum(record.prompt_tokens for record in finished)
    rate = 1 / window.length_s
    has_slo = any(slos[record.tenant].bounds_s for record in measured)
    good = sum(keeps(record, slos[record.tenant]) for record in finished)
    found: dict[str, Any] = {
        "duration": window.length_s,
        "completed": len(finished),
        "failed": len(measured) - len(finished),
        "sent": len(measured),
        **{outcome.value: outcomes[outcome] for outcome in Outcome if outcome is not Outcome.FAILED},
        "errors": outcomes[Outcome.FAILED],
        "total_input_tokens": num_input,
        "total_output_tokens": sum(record.output_tokens for record in finished),
        "request_throughput": num_ended * rate,
        "request_goodput": good * rate if has_slo else None,
        "goodput_share": good / len(measured) if has_slo and measured else None,
        "output_throughput": num_tokens * rate,
        "total_token_throughput": (num_tokens + num_input) * rate,
        "max_concurrent_requests": _most_in_flight(measured),
        "short_answers": sum(record.output_tokens < record.asked_tokens for record in finished),
        "retries": sum(record.attempts - 1 for record in measured),
        "rejects_by_reason": _labels(measured, Outcome.REFUSED),
        "errors_by_code": _labels(measured, Outcome.FAILED),
    }
    for name in MEASURES:
        values = samples(finished, name)
        found |= {f"num_{name}": len(values), **distribution(name, values, percentiles)}
    return found


def samples(records: Sequence[Record], measure: str) -> Values:
    """Seconds, in the order of the requests."""
    if measure == "itl":
        parts = [np.frombuffer(record.gaps, np.float32) for record in records]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
    values = (getattr(record, f"{measure}_s") for record in records)
    return np.array([value for value in values if value is not None], float)


def distribution(name: str, seconds: Values, percentiles: Sequence[float]) -> dict[str, float | None]:
    """None where nothing was measured: the zeros of `vllm bench serve` would pass for very short times."""
    figures: dict[str, Callable[[Values], Any]] = {
        "mean": np.mean, "median": np.median, "std": np.std, "min": np.min, "max": np.max
    }  # fmt: skip
    for percent in sorted({*percentiles, 99.0}):
        figures[f"p{percent:g}"] = partial(np.percentile, q=percent)
    values = seconds * MS
    return {f"{what}_{name}_ms": float(of(values)) if len(values) else None for what, of in figures.items()}


def keeps(record: Record, slo: Slo) -> bool:
    """A finished request that is within its bounds. What has no time per token keeps any bound on it."""
    measured = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all((value := measured[name]) is not None and value <= bound for name, bound in slo.bounds_s.items())


def _in_window(finished: Sequence[Record], window: Window) -> tuple[int, float]:
    """Answers that ended, and tokens that came, while the window was open."""
    if not window.begin_s and math.isinf(window.end_s):
        return len(finished), float(sum(record.output_tokens for record in finished))
    num_ended, num_tokens = 0, 0.0
    for record in finished:
        times = token_times(record)
        inside = np.count_nonzero((times >= window.begin_s) & (times <= window.closed_s))
        num_tokens += record.output_tokens * inside / len(times)
        num_ended += window.begin_s <= record.closed_s <= window.closed_s
    return num_ended, num_tokens


def _labels(records: Sequence[Record], outcome: Outcome) -> dict[str, int]:
    labels = (
        f"{record.code}: {record.reason}" if record.reason else record.code
        for record in records
        if record.outcome is outcome
    )
    return dict(Counter(labels).most_common())


def _most_in_flight(records: Sequence[Record]) -> int:
    edges = sorted([(r.sent_s, 1) for r in records] + [(r.ended_s, -1) for r in records])
    most = now = 0
    for _, step in edges:
        now += step
        most = max(most, now)
    return most


def _omission(measured: Sequence[Record]) -> dict[str, float | None]:
    """What a client that counts from the send would have said, and what it would have hidden."""
    of_send = np.array([record.first_s - record.sent_s for record in measured if record.first_s is not None])
    waits = np.array([record.sent_s - record.intended_s for record in measured])
    from_send, from_due, waited = (
        distribution(name, values, (99.0,))
        for name, values in (("from_send", of_send), ("from_due", samples(measured, "ttft")), ("wait", waits))
    )
    return {
        "p99_ttft_from_send_ms": from_send["p99_from_send_ms"],
        "p99_ttft_from_due_ms": from_due["p99_from_due_ms"],
        "mean_wait_before_send_ms": waited["mean_wait_ms"],
        "p99_wait_before_send_ms": waited["p99_wait_ms"],
    }


def _steadiness(measured: Sequence[Record], window: Window) -> dict[str, Any]:
    """Whether latency had settled, and whether more was under way with time: a queue that grows never ends."""
    if len(measured) < 20:
        return {"is_steady": None, "settled_after_s": None, "in_flight_growth": None}
    until_s = max(record.intended_s for record in measured)
    values = np.array([record.e2el_s for record in measured])
    settled = measured[min(settled_from(values), len(measured) - 1)].intended_s - window.begin_s
    times = np.linspace(window.begin_s, until_s, _NUM_SLICES + 1)[1:]
    open_counts = in_flight(measured, times)
    line = trend(times[_NUM_SLICES // 5 :], open_counts[_NUM_SLICES // 5 :])  # the first fifth fills up in any case
    growth = line.slope * (until_s - window.begin_s) / max(1.0, float(open_counts.mean()))
    is_growing = growth > MAX_GROWTH and line.p_value < 0.01
    return {
        "is_steady": not is_growing,
        "settled_after_s": float(settled),
        "in_flight_growth": float(growth),
        "p_value": line.p_value,
        "share_settled": 1 - settled / max(until_s - window.begin_s, 1e-9),
    }


def _little(records: Sequence[Record], window: Window) -> dict[str, float] | None:
    """L = λ W (Little, 1961): an error of the client's own clockwork, or a run that is all edge, shows as a ratio off 1."""
    until_s = min(window.closed_s, max((record.sent_s for record in records), default=0.0))
    length_s = until_s - window.begin_s
    sent = [record for record in records if window.begin_s <= record.sent_s < until_s]
    if length_s <= 0 or len(sent) < 20:
        return None
    overlaps = (min(r.ended_s, until_s) - max(r.sent_s, window.begin_s) for r in records)
    mean_in_flight = sum(overlap for overlap in overlaps if overlap > 0) / length_s
    rate, took_s = len(sent) / length_s, float(np.mean([r.ended_s - r.sent_s for r in sent]))
    return {
        "mean_in_flight": mean_in_flight,
        "arrivals_per_s": rate,
        "mean_time_s": took_s,
        "ratio": rate * took_s / mean_in_flight if mean_in_flight else 1.0,
    }


def _remarks(steadiness: Mapping[str, Any], little: Mapping[str, float] | None) -> list[str]:
    notes = []
    if steadiness["is_steady"] is False:
        notes.append(
            f"not steady: what is under way grew by {steadiness['in_flight_growth']:.0%} of its mean over the run, so latencies "
            "depend on how long it lasted"
        )
    elif (steadiness.get("share_settled") or 1) < 1 - MIN_SETTLED_SHARE:
        notes.append(f"latency settled after {steadiness['settled_after_s']:.1f} s (MSER-5); --warmup can cut that")
    if little is not None and abs(little["ratio"] - 1) > MAX_LITTLE:
        notes.append(
            f"Little's law is off by {little['ratio'] - 1:+.0%}: much of the run is its beginning and end; run longer"
        )
    return notes


def _unseen(measured: Sequence[Record]) -> list[str]:
    """Notes on answers with more tokens than a client could see coming, and on those of which nobody counted the tokens."""
    finished = [record for record in measured if record.outcome is Outcome.FINISHED]
    streamed = [record for record in finished if record.seen_chunks]
    notes = []
    if num_uncounted := sum(not record.prompt_tokens for record in finished):
        notes.append(
            f"{num_uncounted} answers came without usage: their prompt tokens count as 0, and their output tokens are the chunks "
            "that came"
        )
    if num_whole := sum(record.seen_chunks == 1 and record.output_tokens > 1 for record in streamed):
        notes.append(f"{num_whole} answers of several tokens came in one piece; they have no time per output token")
    several = [record for record in streamed if record.seen_chunks > 1]
    if num_fewer := sum(record.seen_tokens < record.output_tokens - record.hidden_tokens for record in several):
        notes.append(
            f"{num_fewer} answers have more tokens, as the server counts, than their chunks told of: inter-token latencies are "
            "between chunks, and the time per output token counts also those that came with the first chunk or with none, and so "
            "is too short"
        )
    return notes


def confidence(measured: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """95 % intervals of what is most often quoted, in ms."""
    found: dict[str, dict[str, float | None]] = {}
    finished = [record for record in measured if record.outcome is Outcome.FINISHED]
    for name in ("ttft", "tpot", "e2el"):
        values = samples(finished, name) * MS
        if not len(values):
            continue
        for label, interval in (
            (f"mean_{name}_ms", mean_interval(values)),
            (f"median_{name}_ms", quantile_interval(values, 0.5)),
            (f"p99_{name}_ms", quantile_interval(values, 0.99)),
        ):
            low, high = (edge if math.isfinite(edge) else None for edge in interval[:2])
            found[label] = {"low": low, "high": high, "effective_samples": interval.effective}
    return found


def _stages(measured: Sequence[Record]) -> dict[str, Any] | None:
    """The server's own account, in ms, and what is between it and the client's."""
    told = [(record, record.stages) for record in measured if record.stages is not None]
    if not told:
        return None
    columns = {
        name.removesuffix("_s"): np.array([getattr(stages, name) for _, stages in told])
        for name in ("gateway_s", "queue_s", "prefill_s", "decode_s", "total_s")
    }
    columns["outside"] = np.array([record.ended_s - record.sent_s - stages.total_s for record, stages in told])
    return {
        name: {
            "mean_ms": float(values.mean()) * MS,
            "median_ms": float(np.median(values)) * MS,
            "p99_ms": float(np.percentile(values, 99)) * MS,
        }
        for name, values in columns.items()
    }


def _details(measured: Sequence[Record], scenario: Scenario) -> dict[str, Any]:
    """Columns, of every k-th request when there are too many."""
    every = max(1, math.ceil(len(measured) / MAX_DETAILED))
    kept = measured[::every]
    return {
        "every": every,
        "tenant": [scenario.tenants[record.tenant].name for record in kept],
        "intended_s": [round(record.intended_s, 6) for record in kept],
        "outcome": [record.outcome.value for record in kept],
        "ttft_s": [_rounded(record.ttft_s) for record in kept],
        "tpot_s": [_rounded(record.tpot_s) for record in kept],
        "e2el_s": [_rounded(record.e2el_s) for record in kept],
        "prompt_tokens": [record.prompt_tokens for record in kept],
        "output_tokens": [record.output_tokens for record in kept],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
