"""Several runs as one result, and requests as CSV with a line each."""

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.loadtest.estimates import mean_interval
from bench.loadtest.records import Record
from bench.loadtest.scenario import Scenario
from model_parallel.errors import ConfigError

_SUMMED = frozenset({
    "duration", "completed", "failed", "sent", "finished", "refused", "cancelled", "errors", "total_input_tokens",
    "total_output_tokens", "short_answers", "retries", "num_ttft", "num_tpot", "num_itl", "num_e2el",
})  # fmt: skip
_OF_ONE_RUN = ("window", "coordinated_omission", "steady_state", "little")
COLUMNS = (
    "run", "tenant", "session", "turn", "outcome", "code", "reason", "attempts", "intended_s", "sent_s", "first_token_s",
    "last_token_s", "ended_s", "ttft_s", "tpot_s", "e2el_s", "prompt_tokens", "output_tokens", "gateway_s", "queue_s",
    "prefill_s", "decode_s", "server_total_s",
)  # fmt: skip


def of_repeats(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs as one: counts are summed, the largest and smallest kept, and other figures averaged.

    `runs` keeps each run, `between_runs` their spread, which `confidence` is of then; `client` is the worst of each figure. What
    a run did not measure is None and no part of an average. None as well is what is of one run alone.
    """
    first = dict(results[0])
    if len(results) == 1:
        return first
    merged = first | _merged(results)
    merged["tenants"] = {
        name: dict(tenant) | _merged([result["tenants"][name] for result in results])
        for name, tenant in first["tenants"].items()
    }
    merged["valid"] = all(result["valid"] for result in results)
    for name in ("invalid_because", "notes"):
        merged[name] = [f"run {number}: {text}" for number, result in enumerate(results, 1) for text in result[name]]
    between, intervals = {}, {}
    for name in first:
        values = [result[name] for result in results if isinstance(result[name], float)]
        if len(values) > 1:
            # Runs have draws of their own, so none repeats what another one tells.
            interval = intervals[name] = mean_interval(np.array(values), effective=len(values))
            between[name] = {"std": statistics.stdev(values), "low": interval.low, "high": interval.high}
    merged["between_runs"] = between
    merged["confidence"] = {
        name: {"low": interval.low, "high": interval.high, "effective_samples": interval.effective}
        for name, interval in intervals.items()
        if any(name in result["confidence"] for result in results)
    }
    merged["client"] = _worst([result["client"] for result in results])
    merged["server_stages"] = _stages([result["server_stages"] for result in results])
    merged |= dict.fromkeys(_OF_ONE_RUN)
    merged["requests"] = {
        name: [value for result in results for value in result["requests"][name]]
        if isinstance(column, list)
        else column
        for name, column in first["requests"].items()
    }
    merged["runs"] = [{key: value for key, value in result.items() if key != "requests"} for result in results]
    return merged


def _worst(clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each figure the one that says most against the client."""
    columns = {name: [client[name] for client in clients if client[name] is not None] for name in clients[0]}
    return {
        name: (min if name == "bound_reached_s" else max)(values) if values else None
        for name, values in columns.items()
    }


def _stages(accounts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The averages of those that there are."""
    told = [account for account in accounts if account is not None]
    return {name: _merged([account[name] for account in told]) for name in told[0]} if told else None


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts if part[name] is not None]
        if name in ("rejects_by_reason", "errors_by_code"):
            labels = {label for each in values for label in each}
            merged[name] = {label: sum(each.get(label, 0) for each in values) for label in sorted(labels)}
        elif values and name != "seed" and all(type(each) in (int, float) for each in values):
            merged[name] = _way_of(name)(values)
    return merged


def _way_of(name: str) -> Callable[[Sequence[float]], float]:
    """How a figure of several runs is made of theirs."""
    if name in _SUMMED:
        return sum
    if name.startswith("max_"):
        return max
    return min if name.startswith("min_") else statistics.fmean


def write_csv(scenario: Scenario, runs: Sequence[Sequence[Record]], path: Path) -> None:
    """Every request. Raises ConfigError."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number, records in enumerate(runs, 1):
                for record in records:
                    writer.writerow([number, *(_cell(value) for value in _row(scenario, record))])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _row(scenario: Scenario, record: Record) -> list[Any]:
    told = record.stages
    stages = [None] * 5 if told is None else [told.gateway_s, told.queue_s, told.prefill_s, told.decode_s, told.total_s]
    return [
        scenario.tenants[record.tenant].name, record.session, record.turn, record.outcome.value, record.code, record.reason,
        record.attempts, record.intended_s, record.sent_s, record.first_s, record.last_s, record.ended_s, record.ttft_s,
        record.tpot_s, record.e2el_s, record.prompt_tokens, record.output_tokens, *stages,
    ]  # fmt: skip


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return "'" + value  # a server's words must not become a formula in somebody's spreadsheet
    return f"{value:.6f}" if isinstance(value, float) else value
