"""Reports hold everything in one file, and load nothing."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from io import StringIO

import numpy as np
from rich.console import Console

from bench.loadtest import svg
from bench.loadtest.html_report import curve_report, report
from bench.loadtest.leader import Run
from bench.loadtest.live import Board, print_result
from bench.loadtest.replies import Outcome
from bench.loadtest.scenario import parse_scenario
from bench.loadtest.summary import summarise
from bench.loadtest.wire import Progress
from tests.support.load import record, records_at

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "hr"}


class Checker(HTMLParser):
    """Tags that are open, and whatever would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == [] and checker.links == [] and "script" not in checker.seen
    return checker


def test_a_report_is_whole_and_loads_nothing() -> None:
    scenario = parse_scenario(
        {"name": EVIL, "tenants": [{"name": "a", "slo": {"ttft_ms": 150}}, {"name": "b"}]}, origin="x"
    )
    times = list(np.arange(0, 20, 0.2))
    refused = record(
        outcome=Outcome.REFUSED, code="RESOURCE_EXHAUSTED", reason=EVIL, first_s=None, last_s=None, output_tokens=0
    )
    records = sorted([*records_at(times), *records_at(times, tenant=1), refused], key=lambda r: r.intended_s)
    result = summarise(scenario, Run(records=records))
    text = report(scenario, result, records)
    assert "svg" in checked(text).seen and text.count("<svg") >= 11
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "Content-Security-Policy" in text
    print_result(result, Console(file=StringIO(), width=100))


def test_a_report_of_nothing_is_a_report() -> None:
    scenario = parse_scenario({}, origin="x")
    checked(report(scenario, summarise(scenario, Run()), []))


def test_a_curve_shows_each_rate() -> None:
    scenario = parse_scenario({}, origin="x")
    points = [(rate, summarise(scenario, Run(records=records_at([0.0, 1.0 / rate])))) for rate in (4.0, 1.0, 2.0)]
    text = curve_report("sweep", [EVIL], points, "requests/s")
    assert text.count("<circle") >= 12
    checked(text)


def test_plots_are_xml_and_stay_inside() -> None:
    draw = np.random.default_rng(0)
    plots = [
        svg.lines(
            "l & <l>", "x", "y", [svg.Series(name="<s>", points=[(0, 1), (1, 5), (2, 0)], has_marks=True)], limit=7
        ),
        svg.lines("one point", "x", "y", [svg.Series(name="s", points=[(3.0, 0.0)])]),
        svg.lines("none", "x", "y", []),
        svg.histogram("h", "ms", draw.exponential(10, 1000).tolist()),
        svg.histogram("same", "ms", [5.0, 5.0]),
        svg.histogram("none", "ms", []),
        svg.bars("b", "n", [("<a>", 3.0), ("b", 0.0)]),
        svg.bars("zero", "n", [("a", 0.0)]),
    ]
    for plot in plots:
        root = ET.fromstring(plot)
        for element in root.iter():
            for name, most in (("x", svg.WIDTH), ("y", svg.HEIGHT), ("cx", svg.WIDTH), ("cy", svg.HEIGHT)):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= most + 1


def test_the_board_adds_up_what_all_processes_tell() -> None:
    now = [0.0]
    board = Board(parse_scenario({}, origin="x"), clock=lambda: now[0])
    board.begin()
    for now[0], finished in ((1.0, 10), (2.0, 30)):
        for index in range(2):
            board.update(index, Progress([[finished + 2, finished, 1, 0, 0, 10 * finished]], [0.1], 0.0, 0.0))
    assert board.totals() == [[64, 60, 2, 0, 0, 600]]
    answers, tokens = board.rates()
    assert answers > 0 and tokens == 10 * answers
    console = Console(record=True, width=100)
    console.print(board)
    assert "TTFT p50 100 ms" in console.export_text()
