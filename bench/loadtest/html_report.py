"""One HTML file that holds all of a report, plots included, and loads nothing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from bench.loadtest import svg
from bench.loadtest.records import Record
from bench.loadtest.replies import Outcome
from bench.loadtest.scenario import Scenario
from bench.loadtest.sharing import cumulative_service, in_flight, token_times
from bench.loadtest.summary import samples

MS = 1e3
_NUM_SLICES = 60
_STYLE = """
body{font:14px/1.45 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}h2{margin-top:1.6em;border-bottom:2px solid #eee}
.bad{background:#fdd;padding:.5em 1em;border-left:4px solid #c00}
.note{background:#ffd;padding:.5em 1em;border-left:4px solid #cc0}
.good{background:#dfd;padding:.5em 1em;border-left:4px solid #090}figure{display:inline-block;margin:.4em}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report(scenario: Scenario, result: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Of one run, or of the first of several beside what all came to."""
    of_first = ", run 1" if result.get("runs") else ""
    sections = [
        _verdict(result),
        _figures(result),
        *(_plots(title + of_first, plots) for title, plots in _measured(scenario, result, records)),
        _tenants(result),
        _client(result),
    ]
    return _page(str(result["name"]), sections)


def curve_report(
    title: str, summary: Sequence[str], points: Sequence[tuple[float, Mapping[str, Any]]], unit: str
) -> str:
    """Of runs at several rates (or numbers of users): what each brought."""
    ordered = sorted(points, key=lambda point: point[0])
    over_rate = [
        svg.lines(
            f"{label} over {unit}", unit, y_label,
            [svg.Series(name=key, points=_points(ordered, key), has_marks=True) for key in keys],
        )
        for label, y_label, keys in (
            ("Throughput", "requests/s", ("request_throughput", "request_goodput")),
            ("Output", "tokens/s", ("output_throughput",)),
            ("Time to first token", "ms", ("median_ttft_ms", "p99_ttft_ms")),
            ("Time per output token", "ms", ("median_tpot_ms", "p99_tpot_ms")),
        )
    ]  # fmt: skip
    against = [
        svg.lines(
            f"Throughput and latency: {key}", "output tokens/s", "ms",
            [svg.Series(name="", points=_points([(run["output_throughput"], run) for _, run in ordered], key), has_marks=True)],
        )
        for key in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_e2el_ms")
    ]  # fmt: skip
    head = f"<tr><th>{escape(unit)}</th><th>requests/s</th><th>goodput</th><th>tokens/s</th><th>TTFT p50</th><th>TTFT p99</th>"
    head += "<th>TPOT p50</th><th>refused</th><th>failed</th><th>valid</th></tr>"
    cells = ([f"{at:.4g}", *(run[key] for key in _CURVE_KEYS), "yes" if run["valid"] else "no"] for at, run in ordered)
    rows = "".join(f"<tr>{_cells(*row)}</tr>" for row in cells)
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary)
    return _page(title, [lines, f"<table>{head}{rows}</table>", _plots("Curves", against + over_rate)])


def _points(runs: Iterable[tuple[float, Mapping[str, Any]]], key: str) -> list[tuple[float, float]]:
    """Without those that did not measure it."""
    return [(at, run[key]) for at, run in runs if run[key] is not None]


_CURVE_KEYS = (
    "request_throughput", "request_goodput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "refused",
    "errors",
)  # fmt: skip


def _page(title: str, sections: Sequence[str]) -> str:
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = f"<h1>{escape(title)}</h1>{''.join(sections)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _verdict(result: Mapping[str, Any]) -> str:
    parts = [f'<p class="bad">Not valid: {escape(reason)}</p>' for reason in result["invalid_because"]]
    if result["valid"]:
        parts.append('<p class="good">Valid: the client was not the bottleneck.</p>')
    return "".join([*parts, *(f'<p class="note">{escape(note)}</p>' for note in result["notes"])])


_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "whole answer",
}
_COUNTS = (
    "duration", "sent", "completed", "refused", "errors", "cancelled", "retries", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "total_input_tokens", "total_output_tokens", "jain_index",
    "max_service_gap",
)  # fmt: skip


def _figures(result: Mapping[str, Any]) -> str:
    columns = ("mean", "median", "p90", "p99", "max")
    rows = (
        _cells(f"{title}, ms", *(result.get(f"{what}_{measure}_ms") for what in columns))
        for measure, title in _TITLES.items()
    )
    latencies = _table(("", *columns), rows)
    counts = _table((), (_cells(name, result[name]) for name in _COUNTS if result[name] is not None))
    return f"<h2>Figures</h2>{latencies}{counts}{_intervals(result)}{_stages(result)}"


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    first = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    return f"<table>{first}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _intervals(result: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr>{_cells(name, result.get(name), of['low'], of['high'], of['effective_samples'])}</tr>"
        for name, of in result["confidence"].items()
    )
    head = "<tr><th>95 % interval</th><th>value</th><th>from</th><th>to</th><th>effective samples</th></tr>"
    return f"<table>{head}{rows}</table>" if rows else ""


def _stages(result: Mapping[str, Any]) -> str:
    if result["server_stages"] is None:
        return ""
    rows = "".join(
        f"<tr>{_cells(name, of['mean_ms'], of['median_ms'], of['p99_ms'])}</tr>"
        for name, of in result["server_stages"].items()
    )
    return (
        f"<table><tr><th>the server's own account, ms</th><th>mean</th><th>median</th><th>p99</th></tr>{rows}</table>"
    )


def _measured(scenario: Scenario, result: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    latencies = [
        svg.histogram(f"{title} of all requests", "ms", list(_thin(samples(finished, measure)) * MS))
        for measure, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"))
    ]
    until_s = max((record.ended_s for record in records), default=1.0)
    over_time = [
        _quantiles_over_time("TTFT over time", [(r.intended_s, r.ttft_s) for r in finished], until_s),
        _quantiles_over_time("TPOT over time", [(r.intended_s, r.tpot_s) for r in finished], until_s),
        _quantiles_over_time("ITL over time", _gaps_over_time(finished), until_s),
        _in_flight_over_time(scenario, records, until_s),
        _tokens_over_time(scenario, finished, until_s),
    ]
    groups = [("Latency", latencies), ("Over time", over_time)]
    if len(scenario.tenants) > 1:
        groups.append(("Between tenants", _between(scenario, records, until_s)))
    labels = [*result["rejects_by_reason"].items()], [*result["errors_by_code"].items()]
    plots = [
        svg.bars(title, "requests", counts)
        for title, counts in zip(("Refused", "Failed"), labels, strict=True)
        if counts
    ]
    if any(tenant.slo.bounds_s for tenant in scenario.tenants):
        plots.append(svg.bars("Requests/s, and those within the SLO", "requests/s", _goodput(result)))
    return [*groups, ("Refusals, failures and goodput", plots)] if plots else groups


def _thin(values: Any) -> Any:
    return values[:: max(1, math.ceil(len(values) / 50_000))]


def _quantiles_over_time(title: str, points: Sequence[tuple[float, float | None]], until_s: float) -> str:
    slices: list[list[float]] = [[] for _ in range(_NUM_SLICES)]
    for at_s, value in points:
        if value is not None:
            slices[min(_NUM_SLICES - 1, max(0, int(at_s / until_s * _NUM_SLICES)))].append(value * MS)
    series = [
        svg.Series(
            name=f"p{percent}",
            points=[
                ((index + 0.5) * until_s / _NUM_SLICES, float(np.percentile(values, percent)))
                for index, values in enumerate(slices)
                if values
            ],
        )
        for percent in (50, 90, 99)
    ]
    return svg.lines(title, "s since the start", "ms", series)


def _gaps_over_time(finished: Sequence[Record]) -> list[tuple[float, float | None]]:
    points: list[tuple[float, float | None]] = []
    for record in finished[:: max(1, len(finished) // 2000)]:
        times = token_times(record)
        points += [(float(at_s), float(gap)) for at_s, gap in zip(times[1:], np.diff(times), strict=True)]
    return points


def _in_flight_over_time(scenario: Scenario, records: Sequence[Record], until_s: float) -> str:
    times = np.linspace(0, until_s, 200)
    series = [
        svg.Series(
            name=tenant.name,
            points=list(
                zip(times.tolist(), in_flight([r for r in records if r.tenant == place], times).tolist(), strict=True)
            ),
        )
        for place, tenant in enumerate(scenario.tenants)
    ]
    return svg.lines("Requests under way", "s since the start", "requests", series)


def _tokens_over_time(scenario: Scenario, finished: Sequence[Record], until_s: float) -> str:
    edges = np.linspace(0, until_s, _NUM_SLICES + 1)
    series = []
    for place, tenant in enumerate(scenario.tenants):
        counts = np.zeros(_NUM_SLICES)
        for record in finished:
            if record.tenant == place and record.output_tokens:
                times = token_times(record)
                counts += np.histogram(times, edges)[0] * (record.output_tokens / len(times))
        rates = counts / (edges[1] - edges[0])
        series.append(svg.Series(name=tenant.name, points=list(zip(edges[:-1].tolist(), rates.tolist(), strict=True))))
    return svg.lines("Output", "s since the start", "tokens/s", series)


def _between(scenario: Scenario, records: Sequence[Record], until_s: float) -> list[str]:
    times = np.linspace(0, until_s, 200)
    service, spread = [], []
    for place, tenant in enumerate(scenario.tenants):
        own = [record for record in records if record.tenant == place]
        got = cumulative_service(own, times) / tenant.weight
        service.append(svg.Series(name=tenant.name, points=list(zip(times.tolist(), got.tolist(), strict=True))))
        ordered = np.sort(samples([r for r in own if r.outcome is Outcome.FINISHED], "ttft")) * MS
        shares = np.linspace(0, 1, len(ordered)) if len(ordered) else ordered
        spread.append(svg.Series(name=tenant.name, points=list(zip(ordered.tolist(), shares.tolist(), strict=True))))
    return [
        svg.lines("TTFT by tenant: share of requests up to", "ms", "share", spread),
        svg.lines("Service by tenant, over its weight", "s since the start", "weighted tokens", service),
    ]


def _goodput(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    rows = [("all", result["request_throughput"]), ("all within", result["request_goodput"] or 0.0)]
    for name, of in result["tenants"].items():
        if of["request_goodput"] is not None:
            rows += [(name, of["request_throughput"]), (f"{name} within", of["request_goodput"])]
    return rows


def _tenants(result: Mapping[str, Any]) -> str:
    keys = (
        "sent", "completed", "refused", "errors", "cancelled", "output_throughput", "median_ttft_ms", "p99_ttft_ms",
        "median_tpot_ms", "p99_tpot_ms", "request_goodput",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in ("tenant", *keys))
    rows = "".join(f"<tr>{_cells(name, *(of[key] for key in keys))}</tr>" for name, of in result["tenants"].items())
    return f"<h2>Tenants</h2><table><tr>{head}</tr>{rows}</table>"


def _client(result: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {**result["client"], **(result["coordinated_omission"] or {}), **(result["little"] or {})}
    rows = "".join(f"<tr>{_cells(name, value)}</tr>" for name, value in facts.items())
    return f"<h2>The client, and checks</h2><table>{rows}</table>"


def _cells(*values: Any) -> str:
    return "".join(f"<td>{escape(_shown(value))}</td>" for value in values)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _plots(title: str, plots: Sequence[str]) -> str:
    return f"<h2>{escape(title)}</h2>{''.join(f'<figure>{plot}</figure>' for plot in plots)}"
