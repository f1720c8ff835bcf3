"""How many groups a load needs within a service level: the fewest, for each shape of a group, and the curve around them."""

import math
import multiprocessing
import queue
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any, Literal

import numpy as np

from bench.simulation.report import Columns
from bench.simulation.requests import Requests, Status
from bench.simulation.run import Plan, resolve, simulate
from bench.simulation.scenario import MAX_GROUPS, SimulationScenario
from bench.simulation.workload import make_requests
from model_parallel.errors import ConfigError

STATISTICS = {"median": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BOUND = re.compile(r"(ttft|tpot|e2el)_(median|p50|p90|p95|p99)=([0-9]+(?:\.[0-9]+)?)(s|ms|us)")
CURVE = (0.8, 0.9, 1.0, 1.1, 1.25)
"""Numbers of groups around the best one, as parts of it."""
_WHATEVER_GROUPS_THERE_ARE = (Status.NOT_SENT, Status.REFUSED_QUOTA, Status.REFUSED_INVALID)
"""Requests of which this becomes say nothing of how many groups are enough: their tenant's limit or their own length decides."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A latency that a percentile of all requests must keep. One that was refused for lack of room, or failed, counts as endless;
    one that is over its tenant's quota, or can never fit, does not count."""

    metric: Literal["ttft", "tpot", "e2el"]
    statistic: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.metric}_{self.statistic}"


def parse_slo(text: str) -> tuple[Bound, ...]:
    """Of "ttft_p99=2s,tpot_p99=200ms". Raises ConfigError."""
    bounds = []
    for part in text.split(","):
        match = _BOUND.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"slo: {part.strip()!r} must be like ttft_p99=2s: one of ttft, tpot, e2el; one of "
                f"{', '.join(STATISTICS)}; a number; s, ms or us"
            )
        metric, statistic, number, unit = match.groups()
        bounds.append(Bound(metric, statistic, float(number) * _UNITS[unit]))  # type: ignore[arg-type]  # of the pattern
    return tuple(bounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One way to build a group."""

    profile: str
    tensor_parallel_size: int
    dtype: str
    quantization: str | None

    def __str__(self) -> str:
        return f"{self.profile} TP={self.tensor_parallel_size} {self.quantization or self.dtype}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of one shape."""

    scenario: SimulationScenario
    shape: Shape
    slo: tuple[Bound, ...]
    price_per_gpu_hour: float | None
    max_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the simulation of one number of groups has come."""

    shape: str
    num_groups: int
    share: float
    """Of the simulated time."""
    outcome: str = ""
    """What the bounds are about, when it has ended."""


Report = Callable[[Progress], None]


REPORT_PERIOD_S = 0.2


def _ignore(_: Progress) -> None:
    """Of who does not want to know."""


class _Trial:
    """One shape under the load, with any number of groups."""

    def __init__(self, question: Question, report: Report) -> None:
        self._question = question
        self._report = report
        groups = question.scenario.groups.model_copy(
            update={
                "profile": question.shape.profile,
                "tensor_parallel_size": question.shape.tensor_parallel_size,
                "dtype": question.shape.dtype,
                "quantization": question.shape.quantization,
            }
        )
        self.scenario = question.scenario.model_copy(update={"groups": groups, "scaling": None})
        self.plan: Plan = resolve(groups)
        self.requests: Requests = make_requests(self.scenario, max_model_len=self.plan.max_model_len)
        self.tried: dict[int, dict[str, Any]] = {}
        self._reached: dict[int, tuple[float, ...]] = {}
        """By groups: what the bounds are about, and requests that were lost."""

    def with_groups(self, num_groups: int) -> dict[str, Any]:
        """Figures, and whether they keep the service level."""
        if num_groups not in self.tried:
            groups = self.scenario.groups.model_copy(update={"num_groups": num_groups})
            scenario = self.scenario.model_copy(update={"groups": groups})
            until_s = scenario.duration_s + scenario.drain_s

            def show(at_s: float, _num_open: int) -> None:
                self._report(
                    Progress(shape=str(self._question.shape), num_groups=num_groups, share=min(1.0, at_s / until_s))
                )

            summary, fleet = simulate(scenario, plan=self.plan, requests=self.requests, on_progress=show)
            if not summary["sent"]:
                raise ConfigError(
                    f"the load is of no request from warmup_s, {scenario.warmup_s:g}, to duration_s, {scenario.duration_s:g}; "
                    "capacity needs at least 1"
                )
            columns = Columns(fleet)
            chosen = (columns.arrived_s >= scenario.warmup_s) & ~np.isin(columns.status, _WHATEVER_GROUPS_THERE_ARE)
            reached = {bound.name: reached_s(columns, chosen, bound) for bound in self._question.slo}
            num_lost = float((chosen & (columns.status != Status.FINISHED)).sum())
            self._reached[num_groups] = (*reached.values(), num_lost)
            row = self.tried[num_groups] = self._row(summary, reached, num_groups)
            outcome = f"{'holds' if row['holds'] else 'does not hold'}: {_told(row, self._question.slo)}"
            self._report(Progress(shape=str(self._question.shape), num_groups=num_groups, share=1.0, outcome=outcome))
        return self.tried[num_groups]

    def _row(self, summary: Mapping[str, Any], reached: Mapping[str, float], num_groups: int) -> dict[str, Any]:
        question, tp_size = self._question, self._question.shape.tensor_parallel_size
        tokens, price = summary["run_output_tokens"], question.price_per_gpu_hour
        return {
            "num_groups": num_groups,
            "num_gpus": num_groups * tp_size,
            "holds": all(reached[bound.name] <= bound.seconds for bound in question.slo),
            **{f"{name}_s": seconds for name, seconds in reached.items()},
            "sent": summary["sent"],
            "finished": summary["finished"],
            "refused": summary["refused"],
            "failed": summary["failed"] + summary["cancelled"],
            "output_tokens_per_s": summary["output_throughput"],
            "busy_share": summary["busy_share"],
            "preemptions": summary["num_preemptions"],
            "cost_per_million_output_tokens": (
                None if price is None or not tokens else price * summary["gpu_hours"] / tokens * 1e6
            ),
            "kwh_per_million_output_tokens": summary["energy_kwh"] / tokens * 1e6 if tokens else None,
        }

    def fewest(self) -> int | None:
        """By doubling and halving, since more groups never make it worse. None when max_groups do not suffice, or more do not
        help."""
        low, high = 0, min(self._least(), self._question.max_groups)  # low does not hold, high will
        while not self.with_groups(high)["holds"]:
            if high == self._question.max_groups or (low and not self._helps(low, high)):
                return None
            low, high = high, min(max(high + 1, math.ceil(high * 1.5)), self._question.max_groups)
        while high - low > 1 and not low:  # the first guess holds: look below it
            lower = max(1, math.floor(high / 1.5))
            low, high = (0, lower) if self.with_groups(lower)["holds"] else (lower, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.with_groups(middle)["holds"] else (middle, high)
        return high

    def _helps(self, few: int, many: int) -> bool:
        """Whether anything is better with many groups by more than a hundredth."""
        return any(
            after < before and not after >= 0.99 * before
            for before, after in zip(self._reached[few], self._reached[many], strict=True)
        )

    def _least(self) -> int:
        """Groups that are busy all the time with full batches, by the cost of prompts and of decoding alone."""
        cost, scheduler = self.plan.machine.cost, self.plan.shape.scheduler
        batch, chunk = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        prompt = sum(self.requests.prompt_tokens) * cost.tokens_s(chunk) / chunk
        answer = sum(self.requests.output_tokens) * (cost.tokens_s(batch) / batch + cost.row_s)
        return max(1, min(MAX_GROUPS, math.ceil((prompt + answer) / self.scenario.duration_s)))


def reached_s(columns: Columns, chosen: "np.ndarray[Any, np.dtype[np.bool_]]", bound: Bound) -> float:
    """The percentile over the requests that are chosen; inf when too many of them did not finish."""
    done = chosen & (columns.status == Status.FINISHED)
    num_lost = int(chosen.sum() - done.sum())
    match bound.metric:
        case "ttft":
            values = columns.ttft_s[done]
        case "e2el":
            values = columns.e2e_s[done]
        case _:
            values = columns.tpot_s(done)
    total = len(values) + num_lost
    if not total:
        return 0.0
    rank = math.ceil(STATISTICS[bound.statistic] / 100 * total) - 1
    return float(np.sort(values)[rank]) if rank < len(values) else math.inf


def _told(row: Mapping[str, Any], slo: Sequence[Bound]) -> str:
    """What the bounds are about, with that many groups."""
    return ", ".join(
        f"{bound.name} is {row[f'{bound.name}_s']:.3g} s"
        if math.isfinite(row[f"{bound.name}_s"])
        else f"too many requests are lost for {bound.name}"
        for bound in slo
    )


def answer(question: Question, report: Report = _ignore) -> dict[str, Any]:
    """For one shape: the fewest groups and the curve around them; what is in the way when there are none."""
    found: dict[str, Any] = {
        "shape": str(question.shape),
        "profile": question.shape.profile,
        "tensor_parallel_size": question.shape.tensor_parallel_size,
        "quantization": question.shape.quantization,
        "best": None,
        "curve": [],
        "problem": "",
        "notes": [],
    }
    try:
        trial = _Trial(question, report)
    except ConfigError as error:  # the weights do not fit, or TP is more than there are heads
        return found | {"problem": str(error)}
    found["notes"] = list(trial.requests.notes)
    fewest = trial.fewest()
    if fewest is None:
        last = trial.tried[max(trial.tried)]
        return found | {
            "curve": [trial.tried[num] for num in sorted(trial.tried)],
            "problem": f"with {last['num_groups']} groups the service level is still not kept: {_told(last, question.slo)}",
        }
    for num_groups in sorted({max(1, round(fewest * part)) for part in CURVE} | {fewest}):
        trial.with_groups(num_groups)
    return found | {
        "best": trial.with_groups(fewest),
        "curve": [trial.tried[num] for num in sorted(trial.tried)],
        "is_measured": trial.plan.machine.is_measured,
        "origin": trial.plan.machine.origin,
        "kv_cache_tokens": trial.plan.kv_cache_tokens,
        **trial.plan.step_sizes._asdict(),
    }


def answer_all(questions: Sequence[Question], num_processes: int, report: Report) -> list[dict[str, Any]]:
    """Several shapes, side by side in processes of their own. `report` is told how far each has come."""
    if num_processes == 1 or len(questions) == 1:
        return [answer(question, report) for question in questions]
    context = multiprocessing.get_context("spawn")
    news: Queue[Progress] = context.Queue()
    stop = context.Event()
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(news, stop)) as pool:
        try:
            answers = [pool.submit(_answer_elsewhere, question) for question in questions]
            while wait(answers, timeout=REPORT_PERIOD_S).not_done:
                _pass_on(news, report)
            _pass_on(news, report)
            return [found.result() for found in answers]
        finally:
            stop.set()  # after Ctrl-C; otherwise nobody is left who looks
            pool.shutdown(cancel_futures=True)


_news: "Queue[Progress] | None" = None
_stop: Event | None = None


def _begin(news: "Queue[Progress]", stop: Event) -> None:
    """In a process that answers: where its progress goes to, and what ends it. Ctrl-C reaches it from the terminal too."""
    global _news, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    news.cancel_join_thread()  # nobody may be reading any more
    _news, _stop = news, stop


def _answer_elsewhere(question: Question) -> dict[str, Any]:
    def tell(progress: Progress) -> None:
        assert _news is not None and _stop is not None
        if _stop.is_set():
            raise _StoppedError
        _news.put(progress)

    return answer(question, tell)


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


def _pass_on(news: "Queue[Progress]", report: Report) -> None:
    while True:
        try:
            report(news.get_nowait())
        except queue.Empty:
            return


def cheapest(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """With the fewest GPUs; among equals with less energy a token."""
    holding = [found for found in answers if found["best"]]
    return min(
        holding,
        key=lambda found: (found["best"]["num_gpus"], found["best"]["kwh_per_million_output_tokens"]),
        default=None,
    )
