"""What the engine must reach beside its peers, and whether one run shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.markdown import table
from bench.peers.contenders import LLAMA_BF16, LLAMA_Q8_0, VLLM
from bench.timing import WORKLOADS, Timing, Workload

LIMIT_BF16 = "limit, bfloat16 weights"
ONE, EIGHT, MANY, PREFILL = WORKLOADS
SPEED_OF_TP_2 = 0.85
"""Of TP=1 on the same cores."""


@dataclass(frozen=True, slots=True)
class Target:
    """Our speed is to be at least `ratio` times that of `other` on a workload, in the better of our shapes."""

    workload: Workload
    weights: str
    other: str
    ratio: float


TARGETS = (
    Target(ONE, "bfloat16", LLAMA_BF16, 1.2),
    Target(ONE, "bfloat16", VLLM, 3.0),
    Target(ONE, "bfloat16", LIMIT_BF16, 0.75),
    Target(EIGHT, "bfloat16", VLLM, 2.0),
    Target(MANY, "bfloat16", VLLM, 1.3),
    Target(PREFILL, "bfloat16", VLLM, 1.0),
    Target(PREFILL, "bfloat16", LLAMA_BF16, 2.0),
    Target(ONE, "int8", LLAMA_Q8_0, 1.2),
)


def decisions(result: Mapping[str, Any]) -> str:
    """A table of all targets: speeds as multiples of the other's, at TP=1 and at TP=2."""
    timings = [Timing.from_data(row) for row in result["timings"]]
    seconds = {(timing.contender, timing.workload): timing.median_s for timing in timings}
    ours = {(row["weights"], row["tp_size"]): row["name"] for row in result["contenders"] if "tp_size" in row}
    rows = []
    for target in TARGETS:
        other_s = seconds.get((target.other, target.workload))
        ratios = [
            _ratio(other_s, seconds.get((ours.get((target.weights, tp_size), ""), target.workload)))
            for tp_size in (1, 2)
        ]
        what = f"{target.workload}, {target.weights}: times {target.other}"
        rows.append([what, f"≥ {target.ratio:g}", *map(_shown, ratios), _holds(ratios, target.ratio)])
    for weights in dict.fromkeys(weights for weights, _ in ours):
        for workload in WORKLOADS:
            one, two = (seconds.get((ours.get((weights, tp_size), ""), workload)) for tp_size in (1, 2))
            ratio = _ratio(one, two)
            what = f"{workload}, {weights}: TP=2 times TP=1"
            rows.append([what, f"≥ {SPEED_OF_TP_2:g}", "-", _shown(ratio), _holds([ratio], SPEED_OF_TP_2)])
    return table(["speed", "must be", "TP=1", "TP=2", "holds"], rows)


def _ratio(other_s: float | None, our_s: float | None) -> float | None:
    return None if other_s is None or our_s is None else other_s / our_s


def _shown(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}"


def _holds(ratios: Sequence[float | None], wanted: float) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "not measured"
    return "yes" if max(known) >= wanted else "**no**"
