"""Whether two results differ by more than chance."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.loadtest.estimates import Difference, Values, bootstrap, effective_size, welch
from model_parallel.errors import ConfigError

MAX_FILE_BYTES = 512 << 20
_SEED = 1
MIN_EFFECTIVE = {"mean": 20, "median": 20, "p99": 100}
"""Independent values that are needed to judge a figure. With fewer, equal servers are called different more often than they may
be, since the tail that a p99 is of was hardly seen."""
MIN_REPEATS = 3
Figure = Callable[[Values], Any]

LATENCIES: Mapping[str, tuple[str, Figure]] = {
    f"{what}_{measure}_ms": (f"{measure}_s", figure)
    for measure in ("ttft", "tpot", "e2el")
    for what, figure in (
        ("mean", lambda values: values.mean(axis=-1)),
        ("median", lambda values: np.median(values, axis=-1)),
        ("p99", lambda values: np.percentile(values, 99, axis=-1)),
    )
}
RATES = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")


class _Columns(msgspec.Struct):
    ttft_s: list[float | None] = []
    tpot_s: list[float | None] = []
    e2el_s: list[float | None] = []
    outcome: list[str] = []

    @property
    def other_columns(self) -> list[list[Any]]:
        """Those that there are."""
        return [column for column in (self.tpot_s, self.e2el_s, self.outcome) if column]


class _Result(msgspec.Struct):
    """What of a result must have its form; of other figures those are compared that are numbers."""

    request_throughput: float
    runs: list[dict[str, Any]] = []
    requests: _Columns | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both."""

    name: str
    a: float
    b: float
    difference: Difference | None
    """None where there is nothing to judge it by."""
    how: str


def read_result(path: Path) -> dict[str, Any]:
    """A result of ours, or of `vllm bench serve`. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    try:
        requests = msgspec.convert(data, _Result).requests
        if requests is not None and any(len(column) != len(requests.ttft_s) for column in requests.other_columns):
            raise ValueError("the columns of requests are not of one length")
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is not the result of a load test: {error}") from error
    return dict(data)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """All figures that both have."""
    rows = []
    for name in (*RATES, *LATENCIES):
        first, second = _figure(a, name), _figure(b, name)
        if first is not None and second is not None:
            rows.append(Row(name, first, second, *_judge(name, a, b)))
    return rows


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What the figures of a result do not show."""
    found = []
    reasons = result.get("invalid_because")
    if result.get("valid") is False:
        why = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
        found.append("the run is invalid, so its figures may be the client's" + (f": {why}" if why else ""))
    lost, completed = result.get("failed"), result.get("completed")
    if type(lost) is int and type(completed) is int and lost > 0:
        found.append(f"{lost} of {lost + completed} requests were not answered, and are part of no latency")
    return found


def _figure(result: Mapping[str, Any], name: str) -> float | None:
    """None for what was not measured, which `vllm bench serve` writes as 0."""
    value = result.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    if name in LATENCIES and not value:
        measure = LATENCIES[name][0].removesuffix("_s")
        return float(value) if result.get(f"num_{measure}") else None
    return float(value)


def _judge(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference | None, str]:
    """Repeats are judged by Welch's test; single runs by their requests, where those are in the results."""
    runs = [[value for run in result.get("runs", ()) if (value := _figure(run, name)) is not None] for result in (a, b)]
    if min(map(len, runs)) >= MIN_REPEATS:
        return welch(*runs), f"Welch, {len(runs[0])} and {len(runs[1])} runs"
    if name not in LATENCIES:
        return None, f"needs {MIN_REPEATS} repeats of each"
    column, figure = LATENCIES[name]
    series = [_column(result, column) for result in (a, b)]
    if num_needed := max(_num_lacking(values, MIN_EFFECTIVE[name.partition("_")[0]]) for values in series):
        return None, f"needs about {num_needed} requests of each"
    return bootstrap(series[0], series[1], figure, _SEED), "bootstrap of the requests"


def _num_lacking(values: Values, effective: int) -> int:
    """How many requests would tell as much as so many independent ones; 0 when these do."""
    told = effective_size(values)
    return 0 if told >= effective else math.ceil(effective * max(1.0, len(values) / max(told, 1.0)))


def _column(result: Mapping[str, Any], name: str) -> Values:
    requests = result.get("requests")
    if not isinstance(requests, dict) or not isinstance(requests.get(name), list):
        return np.zeros(0)
    outcomes = requests.get("outcome") or ["finished"] * len(requests[name])
    kept = (
        value
        for value, outcome in zip(requests[name], outcomes, strict=True)
        if value is not None and math.isfinite(value) and outcome == "finished"
    )
    return np.array([float(value) for value in kept])
