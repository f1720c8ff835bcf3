"""Runs the suites one after the other and tells at the end what ran: `python -m tests.run`, or with the names of some.

A suite is a pytest of its own, or one for each file, or one that shares its tests among workers. All run, whatever the one before
came to. It fails when a test fails, and when a suite has no test.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / ".test-reports"
NUM_CORES = len(os.sched_getaffinity(0))
MAX_CORES = 8
NOTHING_COLLECTED = 5
"""pytest's exit status."""
MAX_REASON = 400
"""Characters of a failure's reason in the summary."""
STOP_TIMEOUT_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tests that run alike."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    shares: str = ""
    """How xdist shares the tests among workers; all in one process when empty."""
    workers_per_core: float = 1.0
    """More than one where a core is idle for much of a test's time."""
    file_by_file: bool = False
    """Each file in a process and session of its own, two at a time: Ray's head is forked, which a process full of
    another file's gRPC threads can break, and tests look for the processes of their session."""

    @property
    def num_at_once(self) -> int:
        """Workers or files."""
        return int(min(NUM_CORES, 2 if self.file_by_file else MAX_CORES) * self.workers_per_core)


KERNELS = "tests/unit/kernels"
SUITES = (
    Suite(name="unit", arguments=("tests/unit",), shares="worksteal", workers_per_core=2.0),
    # Whether Triton interprets or compiles is settled when it is imported.
    Suite(
        name="triton-interpreted",
        arguments=(f"{KERNELS}/interpreted_cuda.py",),
        environment={"TRITON_INTERPRET": "1"},
        shares="worksteal",
    ),
    Suite(
        name="triton-compiled",
        arguments=(f"{KERNELS}/compiled_cuda.py",),
        environment={"TRITON_INTERPRET": "0"},
        shares="worksteal",
    ),
    Suite(name="numerics", arguments=("tests/numerics",), shares="worksteal"),
    Suite(name="distributed", arguments=("tests/distributed",), shares="loadfile", workers_per_core=1.5),
    Suite(name="chaos", arguments=("tests/chaos",), shares="worksteal"),
    Suite(name="integration", arguments=("tests/integration",), file_by_file=True),
    Suite(name="helm", arguments=("tests/helm",), shares="loadfile"),
    Suite(name="packaging", arguments=("tests/packaging",), shares="loadfile"),
)
WITHOUT_AVX512 = {"PACKTRAIN_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Of our kernels, torch's and oneDNN's. Tests that name an instruction set still get it."""
NIGHT = ("--hypothesis-profile=night", "--timeout=7200")
NIGHTLY_SUITES = (
    *(
        replace(each, arguments=(*NIGHT, *each.arguments))
        for each in SUITES
        if each.name in ("unit", "triton-interpreted", "numerics")
    ),
    # Some of these measure time, so one after the other.
    Suite(
        name="nightly cases",
        arguments=(
            *NIGHT,
            *("-m", "nightly", "tests/unit", "tests/numerics", "tests/distributed", "tests/chaos", "tests/packaging"),
        ),
    ),
    Suite(name="faults", arguments=(*NIGHT, "-m", "nightly", "tests/integration/test_serving_faults.py")),
    Suite(name="nightly", arguments=(*NIGHT, "-m", "nightly", "tests/nightly")),
)


@dataclass(kw_only=True)
class Outcome:
    """What a suite came to."""

    num_passed: int = 0
    failures: list[str] = field(default_factory=list)
    """Where and why, one line each."""
    skips: Counter[str] = field(default_factory=Counter)
    """By their reason."""
    duration_s: float = 0.0
    exit_status: int = 0

    @property
    def num_failed(self) -> int:
        return len(self.failures)

    @property
    def num_tests(self) -> int:
        return self.num_passed + self.num_failed + self.skips.total()

    @property
    def has_failed(self) -> bool:
        only_skips = self.exit_status == NOTHING_COLLECTED and self.skips
        return bool(self.num_failed or not self.num_tests or (self.exit_status and not only_skips))

    def add_report(self, path: Path) -> None:
        """Count the cases of a JUnit report; a run that ended before it wrote one has none."""
        if not path.exists():
            return
        for case in ElementTree.parse(path).iter("testcase"):
            skip = case.find("skipped")
            failed = [found for found in (case.find("failure"), case.find("error")) if found is not None]
            if skip is not None:
                self.skips[(skip.get("message") or "no reason").removeprefix("Skipped: ")] += 1
            elif failed:
                reason = " ".join((failed[0].get("message") or "no reason").split())
                self.failures.append(f"{case.get('classname')}::{case.get('name')}: {reason[:MAX_REASON]}")
            else:
                self.num_passed += 1


@dataclass(kw_only=True)
class Part:
    """A run of pytest: a suite, or a file of one."""

    process: subprocess.Popen[bytes]
    log: Path | None
    """What it says, when others run beside it."""

    def end(self) -> None:
        """As if by Ctrl-C, so that it takes down what it has started."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(suite: Suite, arguments: Sequence[str], report: Path) -> Part:
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
    environment = {**os.environ, **suite.environment}
    if suite.shares and suite.num_at_once > 1:
        command += ["-n", str(suite.num_at_once), "--dist", suite.shares]
        # Otherwise each worker's torch has as many threads as there are cores, which wait for each other.
        environment |= {"OMP_NUM_THREADS": str(max(1, NUM_CORES // suite.num_at_once))}
    report.unlink(missing_ok=True)
    if not suite.file_by_file:
        return Part(process=subprocess.Popen(command, cwd=ROOT, env=environment), log=None)
    log = report.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    return Part(process=process, log=log)


def run_suite(suite: Suite, options: Sequence[str]) -> Outcome:
    began_s = time.monotonic()
    outcome = Outcome()
    waiting: list[tuple[str, ...]] = [suite.arguments]
    if suite.file_by_file:
        waiting = [(str(file),) for file in sorted((ROOT / suite.arguments[0]).glob("test_*.py"))]
    reports = [REPORTS / f"{suite.name.replace(' ', '-')}-{number}.xml" for number in range(len(waiting))]
    unused, running = list(reports), list[Part]()
    try:
        while waiting or running:
            while waiting and len(running) < suite.num_at_once:
                running.append(start(suite, [*options, *waiting.pop(0)], unused.pop(0)))
            for part in [part for part in running if part.process.poll() is not None]:
                running.remove(part)
                outcome.exit_status = outcome.exit_status or part.process.returncode
                if part.log is not None:
                    print(part.log.read_text(errors="replace"), flush=True)
            time.sleep(POLL_S)
    finally:
        for part in running:
            part.end()
    for report in reports:
        outcome.add_report(report)
    outcome.duration_s = time.monotonic() - began_s
    return outcome


def summary(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Lines: a table, and the reasons of what was skipped and of what failed."""
    width = max(len(name) for name in [*outcomes, "suite"])
    yield f"{'suite':{width}}  tests  passed  skipped  failed  seconds"
    for name, each in outcomes.items():
        counts = f"{each.num_tests:5}  {each.num_passed:6}  {each.skips.total():7}  {each.num_failed:6}"
        decision = ""
        if each.has_failed:
            decision = "  FAILED" if each.num_tests else "  FAILED: no test was collected"
        yield f"{name:{width}}  {counts}  {each.duration_s:7.0f}{decision}"
    for name, each in outcomes.items():
        for reason, number in each.skips.most_common():
            yield f"skipped in {name}: {number} × {reason}"
        yield from (f"failed in {name}: {failure}" for failure in each.failures)


@contextmanager
def load_on_every_core(is_wanted: bool) -> Iterator[None]:
    """A process on each core that does nothing but keep it busy, until the end of the body."""
    busy = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    processes = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(NUM_CORES if is_wanted else 0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell's background job ignores it, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="all unless given")
    parser.add_argument(
        "--nightly", action="store_true", help="the long cases of the suites, and load on the served stack"
    )
    parser.add_argument(
        "--loaded", type=int, default=0, metavar="TIMES", help="so often, beside a busy process on each core"
    )
    parser.add_argument("--without-avx512", action="store_true", help="as on a machine that lacks it")
    parser.add_argument("--coverage", action="store_true", help="of the unit tests, with the floor of pyproject.toml")
    arguments = parser.parse_args()
    known = {suite.name: suite for suite in (NIGHTLY_SUITES if arguments.nightly else SUITES)}
    if unknown := set(arguments.suites) - known.keys():
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    if arguments.without_avx512:
        os.environ.update(WITHOUT_AVX512)
    REPORTS.mkdir(exist_ok=True)
    has_failed = False
    with load_on_every_core(bool(arguments.loaded)):
        for _ in range(arguments.loaded or 1):
            outcomes = {}
            for name in arguments.suites or known:
                options = ["--cov"] if arguments.coverage and name == "unit" else []
                print(f"\n{name}: {' '.join(known[name].arguments)}", flush=True)
                outcomes[name] = run_suite(known[name], options)
            print("", *summary(outcomes), sep="\n", flush=True)
            has_failed |= any(outcome.has_failed for outcome in outcomes.values())
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
