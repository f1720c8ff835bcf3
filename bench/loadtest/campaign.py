"""One or many runs of a scenario: repeats, a sweep over rates, a search; and what is written of them."""

import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.json_files import check_all_can_be_written, write_json, write_text
from bench.loadtest.assertions import OF_LOST, Assertion, check_measured, check_tenants, percentiles_needed
from bench.loadtest.discover import resolve
from bench.loadtest.files import left_out
from bench.loadtest.html_report import curve_report, report
from bench.loadtest.leader import Crew, Interrupt, Run, Senders, crew
from bench.loadtest.live import Board, print_result, watched
from bench.loadtest.outputs import of_repeats, write_csv
from bench.loadtest.runner import Resolved
from bench.loadtest.scenario import Closed, OpenLoop, Scenario, Trace, has_turns, with_rate, with_seed, with_users
from bench.loadtest.search import Found, NothingKnownError, Probe, search
from bench.loadtest.summary import PERCENTILES, summarise
from bench.loadtest.targets import check_allowed
from model_parallel.errors import ConfigError
from model_parallel.transport.frames import LinkError
from serving.client.tls import ClientTls


class Exit(IntEnum):
    """Status of the command."""

    DONE = 0
    DOES_NOT_HOLD = 1
    """An assertion."""
    INVALID = 3
    """Assertions were to be checked, or a rate to be found, and the client was the bottleneck: it says nothing of the server."""
    INTERRUPTED = 130


_LOST = (ConnectionError, LinkError)
"""The server or all senders are gone. What was measured before is written."""
MAX_LOST_SHARE = 0.01
"""Of the requests of a run that passes in a search."""
LOWEST_RATE = 0.05
"""Of a search that begins above it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Bounds of a search for the highest rate."""

    slo: Sequence[Assertion]
    start: float = 1.0
    highest: float = 10_000.0
    precision: float = 0.05
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.start > self.highest:
            raise ConfigError(f"--search-from is {self.start:g} and must not exceed --search-to, {self.highest:g}")

    @property
    def lowest(self) -> float:
        """It is given up where not even this rate passes."""
        return min(LOWEST_RATE, self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be done and written."""

    repeats: int = 1
    percentiles: Sequence[float] = PERCENTILES
    assertions: Sequence[Assertion] = ()
    sweep: Sequence[float] = ()
    search: Search | None = None
    json_file: Path | None = None
    csv_file: Path | None = None
    html_file: Path | None = None

    def __post_init__(self) -> None:
        if self.sweep and self.search:
            raise ConfigError("--sweep and --search exclude each other")
        if (self.sweep or self.search) and (self.csv_file or self.assertions):
            raise ConfigError("--csv and --assert are of runs at one rate, not of a sweep or a search")
        check_all_can_be_written({"--json": self.json_file, "--csv": self.csv_file, "--html": self.html_file})

    @property
    def all_percentiles(self) -> list[float]:
        return sorted({*self.percentiles, *percentiles_needed(self.bounds)})

    @property
    def bounds(self) -> list[Assertion]:
        """Of assertions and of a search."""
        return [*self.assertions, *(self.search.slo if self.search else ())]


class Campaign:
    """Runs of one scenario by one crew."""

    def __init__(
        self,
        scenario: Scenario,
        resolved: Sequence[Resolved],
        team: Crew,
        wanted: Wanted,
        console: Console,
        interrupt: Interrupt,
    ) -> None:
        self._scenario, self._resolved, self._team, self._wanted = scenario, resolved, team, wanted
        self._console, self._interrupt, self._stop = console, interrupt, interrupt.stop

    async def repeat(self) -> Exit:
        """The scenario as it is, several times over with seeds of their own."""
        runs: list[Run] = []
        results: list[dict[str, Any]] = []
        try:
            for number in range(self._wanted.repeats):
                if self._stop.is_set():
                    break
                run, result = await self._once(with_seed(self._scenario, number))
                runs.append(run)
                results.append(result)
        except _LOST:
            if results:  # the load may be what took the server down
                self._write_runs(of_repeats(results), runs)
            raise
        if not results:
            return Exit.INTERRUPTED
        result = of_repeats(results)
        self._write_runs(result, runs)
        return self._judge(result)

    def _write_runs(self, result: dict[str, Any], runs: Sequence[Run]) -> None:
        print_result(result, self._console)
        if self._wanted.json_file:
            write_json(result, self._wanted.json_file)
        if self._wanted.csv_file:
            write_csv(self._scenario, [run.records for run in runs], self._wanted.csv_file)
        if self._wanted.html_file:
            write_text(report(self._scenario, result, runs[0].records), self._wanted.html_file)

    def _judge(self, result: dict[str, Any]) -> Exit:
        checked = [assertion.check(result) for assertion in self._wanted.assertions]
        for each in checked:
            self._console.print(f"[{'green' if each.holds else 'bold red'}]{each}[/]")
        if self._stop.is_set():
            return Exit.INTERRUPTED
        if checked and not result["valid"]:
            return Exit.INVALID
        return Exit.DONE if all(each.holds for each in checked) else Exit.DOES_NOT_HOLD

    async def sweep(self) -> Exit:
        """One point for each rate, or number of users where the load is a closed loop."""
        scenarios = _swept(self._scenario, self._wanted.sweep)
        unit = _unit(self._scenario)
        points: list[tuple[float, dict[str, Any]]] = []
        try:
            for at, scenario in zip(self._wanted.sweep, scenarios, strict=True):
                results = []
                for number in range(self._wanted.repeats):
                    if self._stop.is_set():
                        break
                    _, result = await self._once(with_seed(scenario, number))
                    results.append(result)
                if results:
                    points.append((at, of_repeats(results)))
                    self._console.print(f"{at:g} {unit}: {_line(points[-1][1])}", highlight=False)
        except _LOST:
            if points:
                self._write_points("sweep", {"unit": unit}, points, [])
            raise
        self._write_points("sweep", {"unit": unit}, points, [])
        return Exit.INTERRUPTED if self._stop.is_set() else Exit.DONE

    async def search(self, bounds: Search) -> Exit:
        """The highest rate that keeps the SLO."""
        number, unit = 0, _unit(self._scenario)
        lost: Exception | None = None

        async def measure(rate: float) -> Probe:
            nonlocal number, lost
            number += 1
            scenario = with_rate(self._scenario, rate)
            try:
                run, result = await self._once(with_seed(scenario, number))
            except _LOST as error:
                lost = error
                raise NothingKnownError(str(error)) from error
            probe = probed(rate, result, bounds.slo)
            verdict = "keeps" if probe.passed else f"does not keep ({probe.why})"
            self._console.print(f"{rate:g} {unit} {verdict} the SLO: {_line(result)}", highlight=False)
            if run.was_interrupted:
                raise NothingKnownError("the search was interrupted")
            if not result["valid"]:
                raise NothingKnownError(f"the client was the bottleneck: {result['invalid_because'][0]}")
            return probe

        found = await search(
            measure,
            start=bounds.start,
            lowest=bounds.lowest,
            highest=bounds.highest,
            precision=bounds.precision,
            repeats=bounds.repeats,
        )
        lines = found_lines(found, bounds.slo, unit)
        for line in lines:
            self._console.print(line, style="bold", markup=False, highlight=False)
        facts = {
            "unit": unit, "rate": found.rate, "failed_at": found.failed_at, "ended_because": found.ended_because, "lines": lines,
        }  # fmt: skip
        self._write_points("search", facts, [(probe.rate, probe.result) for probe in found.probes], lines)
        if lost is not None:
            raise lost
        if self._stop.is_set():
            return Exit.INTERRUPTED
        if found.rate is not None:
            return Exit.DONE
        return Exit.INVALID if found.is_cut_short else Exit.DOES_NOT_HOLD

    def _write_points(
        self, kind: str, facts: dict[str, Any], points: Sequence[tuple[float, dict[str, Any]]], lines: Sequence[str]
    ) -> None:
        if self._wanted.json_file:
            rows = [
                {"at": at, **{key: value for key, value in result.items() if key != "requests"}}
                for at, result in points
            ]
            write_json({"kind": kind, "name": self._scenario.name, **facts, "points": rows}, self._wanted.json_file)
        if self._wanted.html_file:
            page = curve_report(f"{self._scenario.name}: {kind}", lines, points, facts["unit"])
            write_text(page, self._wanted.html_file)

    async def _once(self, scenario: Scenario) -> tuple[Run, dict[str, Any]]:
        board = Board(scenario)
        view = watched(board, self._console) if self._console.is_terminal else contextlib.nullcontext()
        self._interrupt.is_running = True
        try:
            with view:
                run = await self._team.run(
                    scenario, self._resolved, self._stop, on_begin=board.begin, on_progress=board.update
                )
        finally:
            self._interrupt.is_running = False
        result = summarise(scenario, run, self._wanted.all_percentiles)
        return run, result | {"notes": [*self._left_out(), *result["notes"]]}

    def _left_out(self) -> list[str]:
        return [
            note
            for tenant, known in zip(self._scenario.tenants, self._resolved, strict=True)
            if isinstance(tenant.work, Trace)
            for note in left_out(
                tenant.name,
                tenant.work,
                known.entries,
                len(known.entries) if tenant.max_requests is None else tenant.max_requests,
                self._scenario.duration_s,
                num_unanswered=known.num_unanswered,
            )
        ]


def probed(rate: float, result: dict[str, Any], slo: Sequence[Assertion]) -> Probe:
    """A run passes when it keeps every bound, when what was under way did not grow, since then a longer run would not pass, and
    when nearly all requests were answered, since latencies are of those alone. How many may be lost can be a bound itself."""
    broken = [str(checked) for checked in (bound.check(result) for bound in slo) if not checked.holds]
    num_lost = result["sent"] - result["completed"]
    if num_lost > MAX_LOST_SHARE * result["sent"] and not any(bound.name in OF_LOST for bound in slo):
        broken.append(f"{num_lost} of {result['sent']} requests were refused, failed or cancelled")
    if result["steady_state"]["is_steady"] is False:
        broken.append("what is under way grows")
    return Probe(rate, not broken, "; ".join(broken), result)


def found_lines(found: Found, slo: Sequence[Assertion], unit: str) -> list[str]:
    """What a search came to, in words."""
    bounds = ", ".join(bound.text for bound in slo)
    if found.rate is None and found.failed_at is None:
        return [f"whether any rate keeps {bounds} is not known: {found.ended_because}"]
    if found.rate is None:
        return [f"no rate that was tried keeps {bounds}: {found.ended_because}"]
    beyond = "" if found.failed_at is None else f"; {found.failed_at:.4g} does not"
    return [f"{found.rate:.4g} {unit} keep {bounds}{beyond} ({found.ended_because}; {len(found.probes)} runs)"]


def _line(result: dict[str, Any]) -> str:
    latencies = ("TTFT p50", "median_ttft_ms"), ("TTFT p99", "p99_ttft_ms"), ("TPOT p50", "median_tpot_ms")
    shown = (f"{title} {'-' if result[key] is None else f'{result[key]:.1f} ms'}" for title, key in latencies)
    return (
        f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.0f} tokens/s, {', '.join(shown)}, "
        f"{result['refused']} refused, {result['errors']} failed" + ("" if result["valid"] else ", NOT VALID")
    )


def _unit(scenario: Scenario) -> str:
    """What the numbers of a sweep or a search are."""
    if _is_closed(scenario):
        return "users"
    unit = "sessions/s begun" if any(has_turns(tenant.work) for tenant in scenario.tenants) else "requests/s sent"
    loops = (tenant.arrivals for tenant in scenario.tenants)
    has_bursts = any(isinstance(loop, OpenLoop) and loop.bursts is not None for loop in loops)
    return f"{unit} between bursts" if has_bursts else unit


def _is_closed(scenario: Scenario) -> bool:
    return all(isinstance(tenant.arrivals, Closed) for tenant in scenario.tenants)


def _swept(scenario: Scenario, points: Sequence[float]) -> list[Scenario]:
    """At each rate, or number of users. Raises ConfigError."""
    if _is_closed(scenario):
        return [with_users(scenario, _whole(at)) for at in points]
    return [with_rate(scenario, at) for at in points]


def _whole(number: float) -> int:
    if number < 1 or number != math.floor(number):
        raise ConfigError(f"--sweep holds {number:g}; of a closed loop it must hold whole numbers of users")
    return int(number)


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[Interrupt]:
    """Ctrl-C and SIGTERM ask for an end."""
    loop, interrupt = asyncio.get_running_loop(), Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield interrupt
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def run_campaign(
    scenario: Scenario, senders: Senders, tls: ClientTls | None, wanted: Wanted, console: Console
) -> Exit:
    """Everything that `packtrain load` does. Raises ConfigError, ConnectionError."""
    check_allowed([tenant.parsed_target for tenant in scenario.tenants], senders.owns_targets)
    check_tenants(wanted.bounds, [tenant.name for tenant in scenario.tenants])
    check_measured(wanted.bounds, scenario)
    _swept(scenario, wanted.sweep)
    for rate in (wanted.search.start, wanted.search.highest) if wanted.search else ():
        with_rate(scenario, rate)
    async with _signals() as interrupt:
        try:
            resolved = await resolve(scenario, tls)
            async with crew(senders, tls, lambda line: console.print(line, highlight=False)) as team:
                campaign = Campaign(scenario, resolved, team, wanted, console, interrupt)
                if wanted.sweep:
                    return await campaign.sweep()
                if wanted.search:
                    return await campaign.search(wanted.search)
                return await campaign.repeat()
        except LinkError as error:
            raise ConnectionError(str(error)) from error
        except asyncio.CancelledError:
            if not interrupt.stop.is_set():
                raise
            return Exit.INTERRUPTED
