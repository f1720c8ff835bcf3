"""What is seen at the terminal while a load test runs, and what it came to."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.loadtest.compare import Row
from bench.loadtest.scenario import Scenario
from bench.loadtest.wire import Progress

_COLUMNS = ("sent", "finished", "refused", "failed", "cancelled", "tokens")
_RECENT = 2000
_RATE_OVER_S = 5.0
MS = 1e3


class Board:
    """The numbers of a running test, from all that send."""

    def __init__(self, scenario: Scenario, clock: Callable[[], float] = time.monotonic) -> None:
        self._scenario, self._clock = scenario, clock
        self._of: dict[int, Progress] = {}
        self._ttfts: deque[float] = deque(maxlen=_RECENT)
        self._history: deque[tuple[float, int, int]] = deque(maxlen=64)
        self._began_s: float | None = None

    def begin(self) -> None:
        self._began_s = self._clock()

    def update(self, index: int, progress: Progress) -> None:
        """One sender tells how far it is."""
        self._of[index] = progress
        self._ttfts.extend(progress.ttfts_s)
        totals = self.totals()
        self._history.append((self._clock(), sum(row[1] for row in totals), sum(row[5] for row in totals)))

    def totals(self) -> list[list[int]]:
        """For each tenant, what _COLUMNS say."""
        count = len(self._scenario.tenants)
        parts = [progress.tenants for progress in self._of.values()]
        return [[sum(part[place][column] for part in parts) for column in range(6)] for place in range(count)]

    def rates(self) -> tuple[float, float]:
        """Answers and tokens a second over the last seconds."""
        recent = [entry for entry in self._history if entry[0] >= self._clock() - _RATE_OVER_S]
        if len(recent) < 2 or recent[-1][0] == recent[0][0]:
            return 0.0, 0.0
        (from_s, answers, tokens), (until_s, more_answers, more_tokens) = recent[0], recent[-1]
        return (more_answers - answers) / (until_s - from_s), (more_tokens - tokens) / (until_s - from_s)

    def __rich__(self) -> Group:
        table = Table("tenant", *_COLUMNS, "in flight", box=None, header_style="bold")
        for tenant, row in zip(self._scenario.tenants, self.totals(), strict=True):
            table.add_row(escape(tenant.name), *map(str, row), str(row[0] - sum(row[1:5])))
        answers, tokens = self.rates()
        elapsed_s = 0.0 if self._began_s is None else self._clock() - self._began_s
        lag_s = max((progress.max_lag_s for progress in self._of.values()), default=0.0)
        line = f"{elapsed_s:5.0f} of {self._scenario.duration_s:g} s · {answers:.1f} answers/s · {tokens:.0f} tokens/s"
        if self._ttfts:
            median, p99 = np.percentile(self._ttfts, (50, 99)) * MS
            line += f" · TTFT p50 {median:.0f} ms, p99 {p99:.0f} ms"
        return Group(
            Text(line),
            table,
            Text(f"the client was late by {lag_s * MS:.1f} ms at most; Ctrl-C keeps what was measured"),
        )


def watched(board: Board, console: Console) -> Live:
    """A view that keeps itself fresh, where the console is a terminal."""
    return Live(board, console=console, refresh_per_second=4, transient=True)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """A run's figures."""
    table = Table(
        "",
        "mean",
        "median",
        "p90",
        "p99",
        title=f"{escape(result['name'])}: latency in ms, from the moment each was due",
    )
    for measure, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "whole answer")):
        cells = (result.get(f"{what}_{measure}_ms") for what in ("mean", "median", "p90", "p99"))
        table.add_row(title, *map(_ms, cells))
    console.print(table)
    goodput = "" if result["request_goodput"] is None else f", goodput {result['request_goodput']:.2f} requests/s"
    console.print(
        f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} output tokens/s over "
        f"{result['duration']:.1f} s{goodput}"
    )
    console.print(
        f"{result['sent']} sent: {result['completed']} finished, {result['refused']} refused, {result['errors']} failed, "
        f"{result['cancelled']} cancelled"
    )
    for kind, title in (("rejects_by_reason", "refused"), ("errors_by_code", "failed")):
        for label, count in result[kind].items():
            console.print(f"  {title}: {count} × {label}", markup=False)
    if (stages := result["server_stages"]) is not None:
        parts = (f"{name} {figures['median_ms']:.1f}" for name, figures in stages.items())
        console.print(f"the server's own account, medians in ms: {', '.join(parts)}")
    if len(result["tenants"]) > 1:
        _print_tenants(result, console)
    for note in result["notes"]:
        console.print(f"[yellow]note:[/] {escape(note)}")
    for reason in result["invalid_because"]:
        console.print(f"[bold red]invalid:[/] {escape(reason)}")


def _print_tenants(result: Mapping[str, Any], console: Console) -> None:
    table = Table(
        "tenant", "sent", "finished", "refused", "failed", "cancelled", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50"
    )
    for name, of in result["tenants"].items():
        table.add_row(
            escape(name), *(str(of[key]) for key in ("sent", "completed", "refused", "errors", "cancelled")),
            f"{of['output_throughput']:.1f}", *(_ms(of[key]) for key in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")),
        )  # fmt: skip
    console.print(table)
    jain, gap = result["jain_index"], result["max_service_gap"]
    if jain is not None and gap is not None:
        console.print(
            f"Jain's index {jain:.3f}; services were at most {gap:.0f} weighted tokens apart while both were busy"
        )


def _ms(value: float | None) -> str:
    """Nothing for what was not measured."""
    return "" if value is None else f"{value:.2f}"


def print_comparison(rows: list[Row], names: tuple[str, str], notes: Sequence[str], console: Console) -> None:
    """Two results side by side, and what their figures do not show."""
    table = Table("", *map(escape, names), "change", "95 % interval", "p", "")
    for row in rows:
        if row.difference is None:
            change = f"{row.b / row.a - 1:+.1%}" if row.a else ""
            table.add_row(row.name, f"{row.a:.3f}", f"{row.b:.3f}", change, "", "", row.how)
            continue
        found = row.difference
        style = "bold" if found.is_significant else "dim"
        table.add_row(
            row.name, f"{row.a:.3f}", f"{row.b:.3f}", f"{found.relative:+.1%}", f"{found.low:+.1%} to {found.high:+.1%}",
            f"{found.p_value:.3f}", row.how, style=style,
        )  # fmt: skip
    console.print(table)
    console.print("bold: significant at 5 %, each figure by itself")
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
