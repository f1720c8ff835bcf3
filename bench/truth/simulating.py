"""Gives the simulation what the real stack was given: a profile fitted to its calibration, and the same requests."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from bench.simulation.clock import to_ticks
from bench.simulation.cost import CostTable, StepCost
from bench.simulation.fit import fit
from bench.simulation.fleet import Fleet
from bench.simulation.parts import FleetSpec, GroupShape
from bench.simulation.profiles import StepsFile
from bench.simulation.report import Columns
from bench.simulation.requests import REFUSED, Requests, Status, TenantTraits
from bench.truth.measuring import KV_TOKENS, MAX_NUM_SEQS, MAX_STEP_TOKENS, MAX_WAITING
from bench.truth.recording import LoadRecord, Sent, ShapeRecord
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.step_times import StepWork

BLOCK_SIZE = 16


def profile_of(shape: ShapeRecord) -> StepsFile:
    """Fitted to the steps of the closed loops. What gateways and clients add to the time to the first token is the median of what
    the simulation leaves over where requests come one at a time."""
    profile = fit([report for record in shape.calibration for report in record.steps], origin="bench.simulation_truth")
    cost = step_cost(profile)
    extra_s: list[float] = []
    for record in shape.calibration:
        if record.num_streams == 1:
            extra_s += [
                sent.first_s - sent.at_s - cost.seconds(StepWork(n := sent.num_prompt_tokens, 0, 0, n * (n + 1) / 2))
                for sent in record.requests
                if sent.first_s is not None
            ]
    return msgspec.structs.replace(profile, request_s=max(0.0, float(np.median(extra_s))))


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


def run_fleet(profile: StepsFile, sent: Sequence[Sent], num_groups: int, seed: int) -> Fleet:
    """Returns it when all requests have ended."""
    requests = Requests(
        tenants=[TenantTraits(name="default")],
        ticks=array("q", [to_ticks(one.at_s) for one in sent]),
        tenant=array("H", [0] * len(sent)),
        prompt_tokens=array("i", [one.num_prompt_tokens for one in sent]),
        output_tokens=array("i", [one.num_output_tokens for one in sent]),
        max_tokens=array("i", [one.num_output_tokens for one in sent]),
    )
    shape = GroupShape(
        costs=CostTable(step_cost(profile)),
        scheduler=SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            max_waiting_requests=MAX_WAITING,
            max_model_len=profile.max_position,
        ),
        cache=CacheConfig(num_blocks=KV_TOKENS // BLOCK_SIZE, enable_prefix_caching=False),
        sharing=profile.sharing,
    )
    spec = FleetSpec(shape=shape, num_groups=num_groups, request_s=profile.request_s, output_s=profile.output_s)
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
