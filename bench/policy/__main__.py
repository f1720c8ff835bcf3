"""One table: every policy on every trace. `python -m bench.policy [--seeds 3] [--traces step] [--json FILE]`."""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from bench.policy.baselines import DynamoPlanner, HorizontalPodAutoscaler, KedaOnQueue, RayServe
from bench.policy.fleet import GroupModel
from bench.policy.scalers import Oracle, Packtrain, group_capacity, margins
from bench.policy.simulator import TPOT_S, Outcome, Scaler, simulate
from bench.policy.workload import TRACES, Trace

HELD_OUT_SEED = 8000
"""Seeds from here on were not looked at while the policy was made."""
ENOUGH = 0.99
"""What the service level asks for, and so the oracle is given the least margin with which it reaches it when it sees ahead."""


def outcomes(trace_name: str, seed: int) -> list[Outcome]:
    """All policies on one trace."""
    trace, model = TRACES[trace_name](seed), GroupModel()
    seeing = blind = None
    for margin in margins():
        seeing = simulate(trace, Oracle(trace, model, sees_ahead=True, margin=margin), model)
        if seeing.attainment >= ENOUGH or margin == margins()[-1]:
            blind = simulate(trace, Oracle(trace, model, sees_ahead=False, margin=margin), model)
            break
    oracles = [outcome for outcome in (blind, seeing) if outcome is not None]
    return oracles + [simulate(trace, scaler, model) for scaler in _scalers(trace, model)]


def _scalers(trace: Trace, model: GroupModel) -> Iterator[Scaler]:
    rate = group_capacity(trace, model)
    num_in_service = rate * float(trace.num_output_tokens.mean()) * TPOT_S
    yield Packtrain()
    yield RayServe(num_in_service)
    yield DynamoPlanner(model, rate)
    yield KedaOnQueue()
    yield HorizontalPodAutoscaler(num_in_service / model.max_num_seqs)


def _mean(results: Sequence[Outcome]) -> Outcome:
    number = len(results)
    return replace(
        results[0],
        attainment=sum(result.attainment for result in results) / number,
        group_hours=sum(result.group_hours for result in results) / number,
        num_reversals=round(sum(result.num_reversals for result in results) / number),
        num_aborted=round(sum(result.num_aborted for result in results) / number),
        num_refused=round(sum(result.num_refused for result in results) / number),
        most_groups=max(result.most_groups for result in results),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --first-seed on; their means are printed")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every outcome here")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [(trace, seed) for trace in arguments.traces for seed in seeds]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = dict(zip(jobs, pool.map(outcomes, *zip(*jobs, strict=True)), strict=True))
    header = ("policy", "in time", "of oracle", "group-hours", "of oracle", "reversals", "aborted", "refused", "most")
    for trace in arguments.traces:
        print(f"\n### {trace}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        columns = zip(*(results[trace, seed] for seed in seeds), strict=True)
        means = [_mean(column) for column in columns]
        for mean in means:
            print(
                f"| {mean.policy} | {mean.attainment:.1%} | {mean.attainment / means[0].attainment:.3f} "
                f"| {mean.group_hours:.1f} | {mean.group_hours / means[0].group_hours:.2f} "
                f"| {mean.num_reversals} | {mean.num_aborted} | {mean.num_refused} | {mean.most_groups} |"
            )
    if arguments.json:
        every = [asdict(outcome) | {"seed": seed} for (_, seed), found in results.items() for outcome in found]
        arguments.json.write_text(json.dumps(every))


if __name__ == "__main__":
    main()
