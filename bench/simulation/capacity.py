"""How many groups a load needs within a service level: the fewest, for each shape of a group, and the curve around them."""

import math
import multiprocessing
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bench.simulation.clock import TICKS_PER_S
from bench.simulation.fleet import Fleet
from bench.simulation.report import Array, Columns
from bench.simulation.requests import Requests, Status
from bench.simulation.run import Plan, max_model_len_of, resolve, simulate
from bench.simulation.scenario import MAX_GROUPS, Groups, SimulationScenario
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

    def __post_init__(self) -> None:
        if self.scenario.scaling is not None:
            raise ConfigError(
                "the scenario has scaling; capacity finds a number of groups that stays the same, so leave scaling out"
            )

    @property
    def groups(self) -> Groups:
        """Of this shape."""
        return self.scenario.groups.model_copy(
            update={
                "profile": self.shape.profile,
                "tensor_parallel_size": self.shape.tensor_parallel_size,
                "dtype": self.shape.dtype,
                "quantization": self.shape.quantization,
            }
        )


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


Chosen = npt.NDArray[np.bool_]
REPORT_PERIOD_S = 0.2
SAMPLES_A_LOOK = 4
"""How often it is looked whether a trial can still hold."""
NUM_PARTS = 20
"""Of the load's time; the first guess is what the busiest of them needs."""


def _ignore(_: Progress) -> None:
    """Of who does not want to know."""


class _MissedError(Exception):
    """A bound that cannot be kept any more."""

    def __init__(self, bound: Bound, num_missed: int, at_s: float) -> None:
        super().__init__(f"{num_missed:,} requests have missed {bound.name} after {at_s:,.0f} s, which are too many")
        self.at_s = at_s


class _NothingServedError(Exception):
    """No request says how many groups are enough."""


class _Trial:
    """One shape under the load, with any number of groups."""

    def __init__(self, question: Question, plan: Plan, report: Report) -> None:
        """`plan` is of the question's groups. Raises ConfigError for a load that cannot be read."""
        self._question = question
        self._report = report
        self.scenario = question.scenario.model_copy(update={"groups": question.groups})
        self.plan = plan
        self.requests: Requests = make_requests(self.scenario, max_model_len=self.plan.max_model_len)
        self.not_counted: dict[int, str] = {}
        """By groups: which requests count for nothing, in words; empty when there are none."""
        self.tried: dict[int, dict[str, Any]] = {}
        self._reached: dict[int, tuple[float, ...]] = {}
        """By groups: what the bounds are about, and requests that were lost."""
        self._given_up_s: dict[int, float] = {}
        """By groups: when so many requests had missed a bound that it could not be kept any more."""

    def holds(self, num_groups: int) -> bool:
        """Whether they keep the service level. Overload takes long to simulate, so it ends as soon as the answer is known."""
        if num_groups not in self.tried and num_groups not in self._given_up_s:
            try:
                self.with_groups(num_groups, until_known=True)
            except _MissedError as missed:
                self._given_up_s[num_groups] = missed.at_s
                self._tell(num_groups, 1.0, f"does not hold: {missed}")
        return num_groups in self.tried and bool(self.tried[num_groups]["holds"])

    def with_groups(self, num_groups: int, *, until_known: bool = False) -> dict[str, Any]:
        """Figures, and whether they keep the service level. Raises _NothingServedError; _MissedError with `until_known`."""
        if num_groups not in self.tried:
            groups = self.scenario.groups.model_copy(update={"num_groups": num_groups})
            scenario = self.scenario.model_copy(update={"groups": groups})
            until_s = scenario.duration_s + scenario.drain_s

            def look(fleet: Fleet) -> None:
                self._tell(num_groups, min(1.0, fleet.clock.now_s / until_s))
                if until_known and not len(fleet.samples.at_s) % SAMPLES_A_LOOK:
                    self._check_missed(fleet)

            summary, fleet = simulate(scenario, plan=self.plan, requests=self.requests, on_progress=look)
            if not summary["sent"]:
                raise ConfigError(
                    f"the load is of no request from warmup_s, {scenario.warmup_s:g}, to duration_s, {scenario.duration_s:g}; "
                    "capacity needs at least 1"
                )
            columns = Columns(fleet)
            measured = columns.arrived_s >= scenario.warmup_s
            chosen = measured & ~np.isin(columns.status, _WHATEVER_GROUPS_THERE_ARE)
            self.not_counted[num_groups] = _not_counted(columns.status[measured], int(summary["sent"]))
            if not chosen.any():
                raise _NothingServedError(f"nothing of this load can be served: {self.not_counted[num_groups]}")
            reached = {bound.name: reached_s(columns, chosen, bound) for bound in self._question.slo}
            num_lost = float((chosen & (columns.status != Status.FINISHED)).sum())
            self._reached[num_groups] = (*reached.values(), num_lost)
            row = self.tried[num_groups] = self._row(summary, reached, num_groups)
            outcome = f"{'holds' if row['holds'] else 'does not hold'}: {_told(row, self._question.slo)}"
            self._tell(num_groups, 1.0, outcome)
        return self.tried[num_groups]

    def _tell(self, num_groups: int, share: float, outcome: str = "") -> None:
        self._report(Progress(shape=str(self._question.shape), num_groups=num_groups, share=share, outcome=outcome))

    def _check_missed(self, fleet: Fleet) -> None:
        """Raises _MissedError when more requests have missed a bound than its percentile leaves out, whatever comes after."""
        columns = Columns(fleet)
        not_counted = np.isin(columns.status, _WHATEVER_GROUPS_THERE_ARE)
        sent = (columns.arrived_s >= self.scenario.warmup_s) & ~not_counted
        num_lost = int((sent & ~np.isin(columns.status, (Status.OPEN, Status.FINISHED))).sum())
        most = len(columns.status) - int((not_counted & (columns.status != Status.NOT_SENT)).sum())
        for bound in self._question.slo:
            num_late = int((values_s(columns, sent & (columns.status == Status.FINISHED), bound) > bound.seconds).sum())
            if num_late + num_lost > most - rank_of(bound, most):
                raise _MissedError(bound, num_late + num_lost, fleet.clock.now_s)

    def _row(self, summary: Mapping[str, Any], reached: Mapping[str, float], num_groups: int) -> dict[str, Any]:
        question, tp_size = self._question, self._question.shape.tensor_parallel_size
        tokens, price = summary["run_output_tokens"], question.price_per_gpu_hour
        energy_kwh = summary["energy_kwh"]
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
            "kwh_per_million_output_tokens": energy_kwh / tokens * 1e6 if tokens and energy_kwh is not None else None,
        }

    @property
    def most_tried(self) -> int:
        return max(*self.tried, *self._given_up_s, 0)

    def fewest(self) -> int | None:
        """By doubling and halving, since more groups never make it worse. None when max_groups do not suffice, or more do not
        help."""
        low, high = 0, min(self._guess(), self._question.max_groups)  # low does not hold, high will
        while not self.holds(high):
            if high == self._question.max_groups or (low and not self._helps(low, high)):
                return None
            low, high = high, min(max(high + 1, math.ceil(high * 1.5)), self._question.max_groups)
        while high - low > 1 and not low:  # the first guess holds: look below it
            lower = max(1, math.floor(high / 1.5))
            low, high = (0, lower) if self.holds(lower) else (lower, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(middle) else (middle, high)
        return high

    def _helps(self, few: int, many: int) -> bool:
        """Whether anything is better with many groups by more than a hundredth."""
        if few in self._given_up_s and self._given_up_s.get(many, math.inf) > 1.01 * self._given_up_s[few]:
            return True
        for num_groups in (few, many):  # their figures, if they were given up at once
            self.with_groups(num_groups)
        return any(
            after < before and not after >= 0.99 * before
            for before, after in zip(self._reached[few], self._reached[many], strict=True)
        )

    def _guess(self) -> int:
        """Groups that are busy all the time with full batches while most is asked of them, by the cost of prompts and of decoding
        alone."""
        cost, scheduler, requests = self.plan.machine.cost, self.plan.shape.scheduler, self.requests
        batch, chunk = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        prompt_s = np.array(requests.prompt_tokens) * (cost.tokens_s(chunk) / chunk)
        answer_s = np.array(requests.output_tokens) * (cost.tokens_s(batch) / batch + cost.row_s)
        parts = np.minimum(np.array(self._arrivals_s()) / self.scenario.duration_s * NUM_PARTS, NUM_PARTS - 1)
        asked_s = np.bincount(parts.astype(int), weights=prompt_s + answer_s)
        return max(
            1, min(MAX_GROUPS, math.ceil(float(asked_s.max(initial=0.0)) / self.scenario.duration_s * NUM_PARTS))
        )

    def _arrivals_s(self) -> list[float]:
        """As if answers took no time."""
        requests = self.requests
        at = list(requests.ticks)
        for index in range(len(requests)):
            if (then := requests.next_turn.get(index)) is not None:
                at[then] += at[index]
        return [tick / TICKS_PER_S for tick in at]


def _not_counted(status: npt.NDArray[np.uint8], num_sent: int) -> str:
    """Requests that count for nothing, in words; empty when all that were sent count."""
    reasons = (Status.REFUSED_QUOTA, "are over the quotas of their tenants"), (Status.REFUSED_INVALID, "can never fit")
    found = [
        f"{num:,} of {num_sent:,} requests {what}" for which, what in reasons if (num := int((status == which).sum()))
    ]
    return " and ".join(found)


def reached_s(columns: Columns, chosen: Chosen, bound: Bound) -> float:
    """The percentile over the requests that are chosen; inf when too many of them did not finish."""
    done = chosen & (columns.status == Status.FINISHED)
    values = values_s(columns, done, bound)
    total = len(values) + int(chosen.sum() - done.sum())
    if not total:
        return 0.0
    rank = rank_of(bound, total)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def values_s(columns: Columns, done: Chosen, bound: Bound) -> Array:
    """What the bound is about, of finished requests."""
    match bound.metric:
        case "ttft":
            return columns.ttft_s[done]
        case "e2el":
            return columns.e2e_s[done]
        case _:
            return columns.tpot_s(done)


def rank_of(bound: Bound, total: int) -> int:
    """Which of so many, the smallest being 1, is the percentile."""
    return math.ceil(STATISTICS[bound.statistic] / 100 * total)


def _told(row: Mapping[str, Any], slo: Sequence[Bound]) -> str:
    """What the bounds are about, with that many groups."""
    return ", ".join(
        f"{bound.name} is {row[f'{bound.name}_s']:.3g} s"
        if math.isfinite(row[f"{bound.name}_s"])
        else f"too many requests are lost for {bound.name}"
        for bound in slo
    )


def answer(question: Question, report: Report = _ignore) -> dict[str, Any]:
    """For one shape: the fewest groups and the curve around them; what is in the way when there are none. Raises ConfigError for
    what is in the way of any shape."""
    max_model_len_of(question.groups)
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
        plan = resolve(question.groups)
    except ConfigError as error:  # the weights do not fit, or TP is more than there are heads
        return found | {"problem": str(error)}
    trial = _Trial(question, plan, report)
    found["notes"] = list(trial.requests.notes)
    try:
        fewest = trial.fewest()
    except _NothingServedError as error:
        return found | {"problem": str(error)}
    if fewest is None:
        last = trial.with_groups(trial.most_tried)
        return found | {
            "curve": [trial.tried[num] for num in sorted(trial.tried)],
            "problem": f"with {last['num_groups']} groups the service level is still not kept: {_told(last, question.slo)}"
            + ("" if last["num_groups"] == question.max_groups else "; more groups do not help"),
        }
    for num_groups in sorted({max(1, num) for num in (fewest - 1, *(round(fewest * part) for part in CURVE))}):
        trial.with_groups(num_groups)
    best = trial.with_groups(fewest)
    if not_counted := trial.not_counted[fewest]:
        found["notes"].append(f"{question.shape}: {not_counted}; the answer is for the others")
    return found | {
        "best": best,
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
    news: SimpleQueue[Progress] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(news, stop)) as pool:
        answers = [pool.submit(_answer_elsewhere, question) for question in questions]
        try:
            while wait(answers, timeout=REPORT_PERIOD_S).not_done:
                _pass_on(news, report)
            _pass_on(news, report)
            return [each.result() for each in answers]
        finally:  # after Ctrl-C some are at it still, and end where they tell of their progress next
            stop.set()
            for each in answers:
                each.cancel()
            while wait(answers, timeout=REPORT_PERIOD_S).not_done:
                _pass_on(news, _ignore)


_news: "SimpleQueue[Progress] | None" = None
_stop: Event | None = None


def _begin(news: "SimpleQueue[Progress]", stop: Event) -> None:
    """In a process that answers: where its progress goes to, and what ends it. Ctrl-C reaches it from the terminal too."""
    global _news, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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


def _pass_on(news: "SimpleQueue[Progress]", report: Report) -> None:
    while not news.empty():
        report(news.get())


def cheapest(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """With the fewest GPUs; among equals with less energy a token."""
    holding = [found for found in answers if found["best"]]
    return min(
        holding,
        key=lambda found: (found["best"]["num_gpus"], found["best"]["kwh_per_million_output_tokens"] or 0.0),
        default=None,
    )
