"""Assertions, searches and comparisons."""

import contextlib
import io
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.loadtest.assertions import check_measured, parse_assertion, percentiles_needed
from bench.loadtest.campaign import Campaign, Exit, Search, Wanted, found_lines, probed, run_campaign
from bench.loadtest.compare import compare, read_result, warnings
from bench.loadtest.leader import Interrupt, Run, Senders
from bench.loadtest.live import print_comparison
from bench.loadtest.records import Health
from bench.loadtest.runner import Resolved
from bench.loadtest.scenario import Scenario, parse_scenario
from bench.loadtest.search import NothingKnownError, Probe, search
from model_parallel.errors import ConfigError
from tests.support.effort import rest_by_night
from tests.support.load import FACTS, records_at

RESULT: dict[str, Any] = {
    "sent": 200, "completed": 198, "refused": 2, "errors": 0, "request_goodput": None, "request_throughput": 10.0,
    "num_ttft": 198, "p99_ttft_ms": 480.0, "num_tpot": 0, "median_tpot_ms": 0.0, "jain_index": 0.9,
    "steady_state": {"is_steady": True},
    "tenants": {"small": {"num_ttft": 3, "p99_ttft_ms": 900.0, "sent": 0, "errors": 0}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("ttft_p99<500ms", True),
        ("ttft_p99<0.4s", False),
        ("ttft_p99 <= 480", True),
        ("small:ttft_p99<1s", True),
        ("small:ttft_p99<500ms", False),
        ("errors==0", True),
        ("refusal_rate<=1%", True),
        ("refusal_rate<0.5%", False),
        ("request_throughput>9.5", True),
        ("refusal_rate<1", True),
        ("refusal_rate<=100%", True),
        ("jain_index>0.95", False),
        # What was not measured keeps no bound, however the zeros of a result look.
        ("tpot_median<50ms", False),
        ("request_goodput>0", False),
        ("small:error_rate<1%", False),
    ],
)
def test_assertions(text: str, holds: bool) -> None:
    assert parse_assertion(text).check(RESULT).holds is holds


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft_p99", "ttft_p99<", "ttft_p99<5kg", "speed<5", "errors<5ms", "small:jain_index>0.5", "ttft_p0<1",
             "ttft_p101<1", "ttft_p99!=3", "errors<1%", "request_throughput>5s", "ttft_p99<5%",
             # A share above all of it would hold whatever happens; so would a bound that is no number.
             "error_rate<50", "refusal_rate<=1.5", "goodput_share>99", "error_rate<101%", "ttft_p99<1e999s", "errors<1e999"],
)  # fmt: skip
def test_assertions_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--assert"):
        parse_assertion(text)


def test_assertions_bring_their_percentiles_and_name_unknown_tenants() -> None:
    assert percentiles_needed([parse_assertion("itl_p97.5<5"), parse_assertion("errors==0")]) == [97.5]
    with pytest.raises(ConfigError, match="there are small"):
        parse_assertion("large:ttft_p99<5s").check(RESULT)


async def test_an_assertion_of_an_unknown_tenant_is_refused_before_anything_is_sent() -> None:
    console = Console(file=io.StringIO())
    senders = Senders(
        num_processes=1, num_joined=0, listen_host="127.0.0.1", listen_port=0, secret="", owns_targets=False
    )
    nobody = parse_assertion("nobody:errors==0")
    for wanted in (Wanted(assertions=[nobody]), Wanted(search=Search(slo=[nobody]))):
        with pytest.raises(ConfigError, match=r"'nobody:errors==0': there is no tenant 'nobody'; there are default"):
            await run_campaign(Scenario(), senders, None, wanted, console)


@pytest.mark.parametrize(
    ("bound", "tenants", "told"),
    [
        ("request_goodput>0.1", [{}], "there is no SLO"),
        ("goodput_share>=90%", [{}], "there is no SLO"),
        ("b:request_goodput>0.1", [{"name": "a", "slo": {"ttft_ms": 500}}, {"name": "b"}], "there is no SLO"),
        ("request_goodput>0.1", [{"name": "a", "slo": {"ttft_ms": 500}}, {"name": "b"}], None),
        ("max_service_gap<5", [{}], "between tenants"),
        ("max_service_gap<5", [{"name": "a"}, {"name": "b"}], None),
        ("ttft_p99<1s", [{"api": "generate"}], "none is streamed"),
        ("tpot_mean<1s", [{"api": "score"}], "none is streamed"),
        ("itl_p99<1s", [{"target": "http://127.0.0.1:8000", "stream": False}], "none is streamed"),
        ("b:ttft_p99<1s", [{"name": "a"}, {"name": "b", "api": "generate"}], "none is streamed"),
        ("ttft_p99<1s", [{"name": "a"}, {"name": "b", "api": "generate"}], None),
        ("e2el_p99<1s", [{"api": "generate"}], None),
        ("ttft_p99<1s", [{"target": "http://127.0.0.1:8000"}], None),
    ],
)
def test_a_bound_that_nothing_can_measure_is_refused(
    bound: str, tenants: list[dict[str, Any]], told: str | None
) -> None:
    refusal = contextlib.nullcontext() if told is None else pytest.raises(ConfigError, match=f"{bound}.*{told}")
    with refusal:
        check_measured([parse_assertion(bound)], parse_scenario({"tenants": tenants}, origin="x"))


@given(st.floats(0.1, 900), st.floats(0.2, 50), st.floats(0.01, 0.3), st.integers(1, 5))
async def test_a_search_ends_at_the_capacity(capacity: float, start: float, precision: float, repeats: int) -> None:
    async def measure(rate: float) -> Probe:
        return Probe(rate, rate <= capacity, "", {})

    found = await search(measure, start=start, lowest=0.05, highest=1000, precision=precision, repeats=repeats)
    assert found.rate is not None and found.failed_at is not None
    assert found.rate <= capacity < found.failed_at <= found.rate * (1 + precision) * (1 + 1e-9)
    # A verdict needs a majority, and doubling and halving are logarithmic.
    assert len(found.probes) <= 64


@pytest.mark.parametrize(
    ("repeats", "outcomes"),
    [(1, "y"), (2, "yy"), (2, "yn"), (2, "n"), (3, "yny"), (3, "nn"), (4, "yyy"), (4, "nn"), (4, "ynyn")],
)
async def test_a_rate_is_measured_no_more_often_than_it_says(repeats: int, outcomes: str) -> None:
    """Also with an even number, where as many may pass as fail: then the rate does not pass."""
    left = iter(outcomes)

    async def measure(rate: float) -> Probe:
        return Probe(rate, next(left) == "y", "", {})

    found = await search(measure, start=1, lowest=1, highest=1, precision=0.05, repeats=repeats)
    assert len(found.probes) == len(outcomes)
    assert (found.rate is not None) is (2 * outcomes.count("y") > repeats)


async def test_a_search_with_noise_is_near_the_capacity() -> None:
    """Each run errs by 10 %; with one run a rate a single error sends it to the wrong half for good."""
    draw = random.Random(0)
    ends = []
    for _ in range(50):

        async def measure(rate: float) -> Probe:
            return Probe(rate, rate * draw.gauss(1, 0.1) <= 20, "", {})

        found = await search(measure, start=1, lowest=0.05, highest=1000, precision=0.05, repeats=5)
        ends.append(found.rate or 0.0)
    assert np.median(ends) == pytest.approx(20, rel=0.1)
    assert min(ends) > 12 and max(ends) < 28


async def test_a_search_ends_at_its_bounds_and_where_the_client_ends() -> None:
    async def always(rate: float) -> Probe:
        return Probe(rate, True, "", {})

    async def never(rate: float) -> Probe:
        return Probe(rate, False, "", {})

    async def weak(rate: float) -> Probe:
        if rate > 5:
            raise NothingKnownError("the client was the bottleneck")
        return Probe(rate, True, "", {})

    bounds: dict[str, Any] = {"start": 1.0, "lowest": 0.5, "highest": 64.0, "precision": 0.05, "repeats": 1}
    assert (await search(always, **bounds)).rate == 64
    nothing = await search(never, **bounds)
    assert nothing.rate is None and "no rate" in found_lines(nothing, [], "requests/s sent")[0]
    limited = await search(weak, **bounds)
    assert limited.rate == 4 and "bottleneck" in limited.ended_because and limited.is_cut_short
    assert not nothing.is_cut_short


class ShortLived:
    """A crew whose third run ends otherwise than it should."""

    def __init__(self, interrupt: Interrupt | None) -> None:
        self._interrupt, self._num_runs = interrupt, 0

    async def run(self, *_: Any, **__: Any) -> Run:
        self._num_runs += 1
        is_last = self._num_runs == 3
        if is_last and self._interrupt is None:
            raise ConnectionError("the server cannot be reached")
        if is_last and self._interrupt is not None:
            self._interrupt.stop.set()
        healthy = Health(
            process=0, wall_s=1.0, cpu_s=0.1, lags_s=[0.0], max_lag_s=0.0, loop_delays_s=[0.0], max_loop_delay_s=0.0,
            num_held_back=0, num_held_back_by_bound=0, num_unsent=0, num_gaps_dropped=0,
        )  # fmt: skip
        return Run(records=records_at(list(np.arange(0, 10, 0.1))), healths=[healthy], was_interrupted=is_last)


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize(
    ("wanted", "begin"),
    [
        ({"repeats": 5}, lambda campaign, wanted: campaign.repeat()),
        ({"sweep": [1.0, 2.0, 4.0, 8.0]}, lambda campaign, wanted: campaign.sweep()),
        (
            {"search": Search(slo=[parse_assertion("ttft_p99<1s")], repeats=1)},
            lambda campaign, wanted: campaign.search(wanted.search),
        ),
    ],
)
async def test_what_was_measured_is_written_when_a_later_run_comes_to_nothing(
    wanted: dict[str, Any], begin: Callable[[Campaign, Wanted], Awaitable[Exit]], is_interrupted: bool, tmp_path: Path
) -> None:
    asked = Wanted(**wanted, json_file=tmp_path / "r.json", html_file=tmp_path / "r.html")
    interrupt, console = Interrupt(), Console(file=io.StringIO())
    team: Any = ShortLived(interrupt if is_interrupted else None)
    campaign = Campaign(
        parse_scenario({}, origin="x"), [Resolved(facts=FACTS, entries=[])], team, asked, console, interrupt
    )
    if is_interrupted:
        assert await begin(campaign, asked) is Exit.INTERRUPTED
    else:
        with pytest.raises(ConnectionError, match="the server cannot be reached"):
            await begin(campaign, asked)
    written = json.loads((tmp_path / "r.json").read_text())
    assert len(written["points"] if "points" in written else written["runs"]) >= 2
    assert (tmp_path / "r.html").read_text().count("<svg")


async def test_a_search_that_the_client_ended_says_nothing_of_the_server() -> None:
    class Idle:
        async def run(self, *_: Any, **__: Any) -> Run:
            return Run()

    bounds = Search(slo=[parse_assertion("ttft_p99<500ms")])
    text, team = io.StringIO(), cast("Any", Idle())
    scenario, known = parse_scenario({}, origin="x"), [Resolved(facts=FACTS, entries=[])]
    campaign = Campaign(scenario, known, team, Wanted(search=bounds), Console(file=text, width=500), Interrupt())
    assert await campaign.search(bounds) is Exit.INVALID
    assert "whether any rate keeps ttft_p99<500ms is not known: at 1/s the client was the bottleneck" in text.getvalue()


def test_a_run_passes_only_when_it_could_have_gone_on() -> None:
    slo = [parse_assertion("ttft_p99<500ms")]
    assert probed(1.0, RESULT, slo).passed
    growing = RESULT | {"steady_state": {"is_steady": False}}
    assert not probed(1.0, growing, slo).passed
    assert "does not hold" in probed(1.0, RESULT, [parse_assertion("ttft_p99<5ms")]).why


def test_a_rate_at_which_requests_are_lost_does_not_pass_unless_a_bound_says_how_many_may_be() -> None:
    slo = [parse_assertion("ttft_p99<500ms")]
    losing = RESULT | {"completed": 100, "refused": 100}
    probe = probed(1.0, losing, slo)
    assert not probe.passed and probe.why == "100 of 200 requests were refused, failed or cancelled"
    assert probed(1.0, losing, [*slo, parse_assertion("refusal_rate<=50%")]).passed
    assert not probed(1.0, losing, [*slo, parse_assertion("refusal_rate<50%")]).passed


def result_of(ttfts_s: list[float], **fields: Any) -> dict[str, Any]:
    values = np.array(ttfts_s) * 1e3
    return {
        "request_throughput": 5.0, "mean_ttft_ms": values.mean(), "median_ttft_ms": np.median(values),
        "p99_ttft_ms": np.percentile(values, 99), "requests": {"ttft_s": ttfts_s},
    } | fields  # fmt: skip


def test_a_difference_is_judged_by_requests_or_by_repeats() -> None:
    draw = np.random.default_rng(0)
    a, b = (result_of(draw.exponential(mean, 400).tolist()) for mean in (0.1, 0.15))
    rows = {row.name: row for row in compare(a, b)}
    median = rows["median_ttft_ms"].difference
    assert median is not None and median.is_significant and median.relative == pytest.approx(0.5, abs=0.3)
    assert rows["request_throughput"].difference is None  # one run has one throughput
    runs = {"runs": [{"request_throughput": value} for value in (5.0, 5.1, 4.9)]}
    faster = {"runs": [{"request_throughput": value} for value in (6.0, 6.1, 5.9)]}
    judged = {row.name: row for row in compare(a | runs, b | faster)}["request_throughput"].difference
    assert judged is not None and judged.is_significant


def latencies(count: int, memory: float, draw: np.random.Generator) -> list[float]:
    """Log-normal; each remembers that part of the one before."""
    noise = draw.standard_normal(count + 100)
    values = np.zeros(count + 100)
    for index in range(1, len(values)):
        values[index] = memory * values[index - 1] + math.sqrt(1 - memory**2) * noise[index]
    return (0.1 * np.exp(0.5 * values[100:])).tolist()


@pytest.mark.parametrize(
    ("count", "memory"),
    rest_by_night(
        [(20, 0.0), (30, 0.0), (60, 0.0), (150, 0.0), (60, 0.5), (100, 0.9), (600, 0.9)],
        by_day=[(20, 0.0), (30, 0.0), (150, 0.0), (100, 0.9)],
        has_names=True,
    ),
)
def test_equal_servers_are_seldom_called_different(count: int, memory: float) -> None:
    """In one comparison of twenty, whether or not it comes to a judgement; resampled in short blocks it was up to 40 %."""
    draw, num_judged, num_different = np.random.default_rng(count), Counter[str](), Counter[str]()
    for _ in range(60):
        for row in compare(*(result_of(latencies(count, memory, draw)) for _ in range(2))):
            if row.difference is not None:
                num_judged[row.name] += 1
                num_different[row.name] += row.difference.is_significant
            elif row.name != "request_throughput":
                needed = re.fullmatch(r"needs about (\d+) requests of each", row.how)
                assert needed and int(needed[1]) > count
    # Three standard deviations of a binomial of 60 are 5; the effective size is only estimated.
    assert max(num_different.values(), default=0) <= 9
    effective = count * (1 - memory) / (1 + memory)
    assert (num_judged["mean_ttft_ms"] > 45) == (num_judged["median_ttft_ms"] > 45) == (effective >= 29)
    assert (num_judged["p99_ttft_ms"] > 45) == (effective >= 150)


def test_results_of_vllm_bench_serve_can_be_compared(tmp_path: Path) -> None:
    theirs = tmp_path / "vllm.json"
    result = {"request_throughput": 4.0, "median_ttft_ms": 30.0, "completed": 5}
    theirs.write_text(json.dumps(result), encoding="utf-8-sig")  # as some editors save it
    rows = compare(read_result(theirs), result_of([0.1] * 30))
    assert {row.name for row in rows} == {"request_throughput", "median_ttft_ms"}
    assert all(row.difference is None for row in rows)


def test_a_zero_is_a_latency_only_where_one_was_measured() -> None:
    nothing = {"request_throughput": 0.0, "mean_tpot_ms": 0.0, "median_tpot_ms": 0.0}  # as vLLM writes it
    assert {row.name for row in compare(nothing, nothing)} == {"request_throughput"}
    all_at_once = nothing | {"num_tpot": 5}
    assert {row.name for row in compare(all_at_once, all_at_once)} == {*nothing}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"request_throughput": "fast"}', "null", '{"request_throughput": true}',
        '{"request_throughput": 1, "runs": 5}', '{"request_throughput": 1, "runs": [1, 2, 3]}',
        '{"request_throughput": 1, "requests": {"ttft_s": ["a"]}}', '{"request_throughput": 1, "requests": {"ttft_s": 5}}',
        '{"request_throughput": 1, "requests": {"ttft_s": [[1]], "outcome": ["finished"]}}',
        '{"request_throughput": 1, "requests": {"ttft_s": [1, 2], "outcome": ["finished"]}}',
        '{"request_throughput": 1, "requests": {"ttft_s": [1], "outcome": [1]}}',
        '{"request_throughput": 1, "requests": []}',
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        read_result(tmp_path / "r.json")


def test_a_comparison_tells_what_its_figures_do_not_show() -> None:
    assert warnings({"valid": True, "completed": 5, "failed": 0}) == []
    assert warnings(
        {"valid": False, "invalid_because": ["requests were sent late"], "completed": 90, "failed": 10}
    ) == [
        "the run is invalid, so its figures may be the client's: requests were sent late",
        "10 of 100 requests were not answered, and are part of no latency",
    ]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.sampled_from(["", "finished", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ttft_s", "tpot_s", "outcome"]), inner)
    ),
)
COMPARED = (
    "runs", "requests", "mean_ttft_ms", "median_tpot_ms", "num_tpot", "valid", "invalid_because", "completed", "failed"
)  # fmt: skip
RESULTS = st.fixed_dictionaries(
    {"request_throughput": st.floats(0, 10) | JSON_VALUES},
    optional={name: JSON_VALUES for name in COMPARED},
)


@given(RESULTS, RESULTS)
def test_whatever_a_file_holds_is_compared_or_refused(first: dict[str, Any], second: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        results = []
        for name, data in (("a.json", first), ("b.json", second)):
            path = Path(directory, name)
            path.write_text(json.dumps(data))
            try:
                results.append(read_result(path))
            except ConfigError:
                return
        notes = [warning for result in results for warning in warnings(result)]
        print_comparison(compare(*results), ("a", "b"), notes, Console(file=io.StringIO()))


def test_wishes_that_contradict_are_refused(tmp_path: Path) -> None:
    for option in ("json", "csv", "html"):
        with pytest.raises(ConfigError, match=f"--{option} is .*; there is no directory .*nowhere"):
            Wanted(**{f"{option}_file": tmp_path / "nowhere" / "r"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"--{option} is .*, a directory; it must be a file"):
            Wanted(**{f"{option}_file": tmp_path})  # type: ignore[arg-type]
    one = {"json_file": tmp_path / "r", "html_file": tmp_path / "x" / ".." / "r", "csv_file": tmp_path / "c"}
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match=r"--html is .*, and so is --json; each needs a file of its own"):
        Wanted(**one)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--assert"):
        Wanted(sweep=[1.0], assertions=[parse_assertion("errors==0")])
