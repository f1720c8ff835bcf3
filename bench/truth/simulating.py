"""Gives the simulation what the real stack was given: a profile fitted to its steps, the pace of the machine in each load, and
the same requests.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from bench.simulation.clock import to_ticks
from bench.simulation.cost import CostTable, StepCost, slower
from bench.simulation.fit import OUTLIER, fit, overlaps
from bench.simulation.fleet import Fleet
from bench.simulation.parts import FleetSpec, GroupShape
from bench.simulation.profiles import StepsFile
from bench.simulation.report import Columns
from bench.simulation.requests import REFUSED, Requests, Status, TenantTraits
from bench.truth.measuring import KV_TOKENS, MAX_NUM_SEQS, MAX_STEP_TOKENS, MAX_WAITING
from bench.truth.recording import LoadRecord, Sent, ShapeRecord
from model_parallel.config import CacheConfig, SchedulerConfig

BLOCK_SIZE = 16


def profile_of(shape: ShapeRecord) -> StepsFile:
    """Fitted to the steps of all loads, so that it is of a machine at its mean pace. What gateways and clients add to the time
    to the first token is the median of what is left over, where requests come one at a time, when the steps until then are
    taken off."""
    records = [*shape.calibration, *shape.cells]
    profile = fit([report for record in records for report in record.steps], origin="bench.simulation_truth")
    extra_s = [s for record in shape.calibration if record.num_streams == 1 for s in _beside_steps_s(record)]
    return msgspec.structs.replace(profile, request_s=float(np.median(extra_s)))


def _beside_steps_s(record: LoadRecord) -> Iterator[float]:
    """Of each request of one that comes after another: its time to the first token, without the steps in it."""
    steps = [sample for report in record.steps for sample in report.samples if sample.work.num_tokens]
    for sent in record.requests:
        if sent.first_s is not None:
            begin_s, end_s = record.began_s + sent.at_s, record.began_s + sent.first_s
            within = [
                step.seconds for step in steps if begin_s <= step.ended_s - step.seconds and step.ended_s <= end_s
            ]
            if within:  # otherwise the leader has forgotten them
                yield sent.first_s - sent.at_s - sum(within)


class Pace(NamedTuple):
    """How many times as long as the profile says steps took, all together: those that only decode, which wait for memory, and
    those with prompts, which wait for arithmetic. A machine that others share may be a quarter slower or faster within
    minutes, in the one or in the other: that is no property of what is simulated."""

    decodes: float
    prompts: float


Paces = Sequence[tuple[float, Pace]]
"""(when it begins, the pace) in order; the first begins at 0."""
MEAN_PACE = Pace(1.0, 1.0)
STEADY: Paces = ((0.0, MEAN_PACE),)
PACE_WINDOW_S = 5.0
PACE_PRIOR_S = 1.0
"""A window's pace is drawn to that of its whole load as if so many seconds of steps had been at that."""


class _Timed(NamedTuple):
    began_s: float
    """From the beginning of the load."""
    has_prompts: bool
    took_s: float
    expected_s: float


def pace_of(profile: StepsFile, record: LoadRecord) -> Pace:
    """Of one load. A kind of step that it did not have has the mean pace."""
    return _pace(_timed(profile, record), MEAN_PACE, 1e-9)


def paces_of(profile: StepsFile, record: LoadRecord) -> Paces:
    """Of each PACE_WINDOW_S of a load."""
    timed = _timed(profile, record)
    whole = _pace(timed, MEAN_PACE, 1e-9)
    windows: dict[int, list[_Timed]] = {0: []}
    for step in timed:
        windows.setdefault(max(0, int(step.began_s / PACE_WINDOW_S)), []).append(step)
    return [(number * PACE_WINDOW_S, _pace(windows[number], whole, PACE_PRIOR_S)) for number in sorted(windows)]


def _pace(timed: Sequence[_Timed], prior: Pace, prior_s: float) -> Pace:
    took_s, expected_s = [prior_s * pace for pace in prior], [prior_s, prior_s]
    for step in timed:
        took_s[step.has_prompts] += step.took_s
        expected_s[step.has_prompts] += step.expected_s
    return Pace(took_s[0] / expected_s[0], took_s[1] / expected_s[1])


def _timed(profile: StepsFile, record: LoadRecord) -> list[_Timed]:
    """Its steps, but for those that were held up."""
    cost, found = step_cost(profile), list[_Timed]()
    for report, shares in zip(record.steps, overlaps(record.steps), strict=True):
        for sample, share in zip(report.samples, shares, strict=True):
            if sample.work.num_tokens:
                expected_s = cost.seconds(sample.work) * (1 + profile.sharing * float(share))
                has_prompts = sample.work.num_tokens > sample.work.num_decodes
                began_s = sample.ended_s - sample.seconds - record.began_s
                found.append(_Timed(began_s, has_prompts, sample.seconds, expected_s))
    return [step for step in found if step.took_s < OUTLIER * step.expected_s]


def step_cost(profile: StepsFile) -> StepCost:
    return StepCost(
        knots=tuple(profile.knots), row_s=profile.row_s, context_s=profile.context_s,
        pair_s=profile.pair_s, empty_s=profile.empty_s,
    )  # fmt: skip


def figures(
    ttft_s: Sequence[float], tpot_s: Sequence[float], num_tokens: float, seconds: float, refused: int, preempted: int
) -> dict[str, float]:
    """What is compared."""
    nothing = [math.nan]
    return {
        "ttft_median_s": float(np.median(ttft_s or nothing)),
        "ttft_p99_s": float(np.percentile(ttft_s or nothing, 99)),
        "tpot_median_s": float(np.median(tpot_s or nothing)),
        "tpot_p99_s": float(np.percentile(tpot_s or nothing, 99)),
        "tokens_per_s": num_tokens / seconds,
        "refused": refused,
        "preempted": preempted,
    }


def measured(record: LoadRecord) -> dict[str, float]:
    """Of the real stack."""
    requests = record.requests
    done = [sent for sent in requests if sent.code == "OK" and sent.first_s is not None]
    codes = Counter(sent.code for sent in requests)
    first_s, last_s = min(sent.at_s for sent in requests), max(sent.ended_s for sent in done)
    return figures(
        [sent.first_s - sent.at_s for sent in done if sent.first_s is not None],
        [
            (sent.ended_s - sent.first_s) / (sent.num_output_tokens - 1)
            for sent in done
            if sent.first_s is not None and sent.num_output_tokens > 1
        ],
        sum(sent.num_output_tokens for sent in done),
        last_s - first_s,
        codes["RESOURCE_EXHAUSTED"],
        record.num_preempted,
    )


def run_fleet(
    profile: StepsFile,
    sent: Sequence[Sent],
    num_groups: int,
    seed: int,
    paces: Paces = STEADY,
) -> Fleet:
    """Returns it when all requests have ended."""
    requests = Requests(
        tenants=[TenantTraits(name="default")],
        ticks=array("q", [to_ticks(one.at_s) for one in sent]),
        tenant=array("H", [0] * len(sent)),
        prompt_tokens=array("i", [one.num_prompt_tokens for one in sent]),
        output_tokens=array("i", [one.num_output_tokens for one in sent]),
        max_tokens=array("i", [one.num_output_tokens for one in sent]),
    )
    tables = [
        (at_s, CostTable(slower(step_cost(profile), pace.decodes), prompts_factor=pace.prompts / pace.decodes))
        for at_s, pace in paces
    ]
    shape = GroupShape(
        costs=tables[0][1],
        scheduler=SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            max_waiting_requests=MAX_WAITING,
            max_model_len=profile.max_position,
        ),
        cache=CacheConfig(num_blocks=KV_TOKENS // BLOCK_SIZE, enable_prefix_caching=False),
        sharing=profile.sharing,
    )
    spec = FleetSpec(
        shape=shape,
        num_groups=num_groups,
        request_s=profile.request_s,
        output_s=profile.output_s,
        later_costs=tables[1:],
    )
    fleet = Fleet(spec, requests, seed=seed)
    fleet.run()
    return fleet


def simulated(fleet: Fleet) -> dict[str, float]:
    """The same figures of a simulation."""
    columns = Columns(fleet)
    done = columns.status == Status.FINISHED
    return figures(
        list(columns.ttft_s[done]),
        list(columns.tpot_s(done)),
        float(columns.num_output[done].sum()),
        float((columns.arrived_s + columns.e2e_s)[done].max() - columns.arrived_s.min()),
        int(sum((columns.status == status).sum() for status in REFUSED)),
        fleet.num_preemptions,
    )
