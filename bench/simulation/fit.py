"""Fits the cost of a step to steps that were timed, of a file or of a running gateway's /steps."""

import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from bench.simulation.cost import StepCost
from bench.simulation.profiles import StepsFile
from cluster.policy.least_squares import nonnegative_least_squares
from model_parallel.engine.step_times import StepSample
from model_parallel.errors import ConfigError
from serving.contracts.step_report import GroupShape, StepReport

MAX_BYTES = 256 << 20
TIMEOUT_S = 30.0
MIN_STEPS = 50
_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
NUM_PASSES = 4
_OUTLIER = 4.0
"""A step that took so many times what the fit says was held up by something that is no step. It is left out, and counted."""


def read_samples(source: str) -> list[StepReport]:
    """From a file of JSON lines, or from an address (http://host:port/steps). Raises ConfigError."""
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=TIMEOUT_S) as answer:
                data = answer.read(MAX_BYTES + 1)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise ConfigError(f"from: {source} cannot be read: {error}") from error
    else:
        try:
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"from: {source}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"from: {source} has more than {MAX_BYTES} bytes")
    return _parse(data.splitlines(), source)


def _parse(lines: Iterable[bytes], source: str) -> list[StepReport]:
    found: list[tuple[GroupShape, list[StepSample]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if b'"seconds"' in line:
                if not found:
                    raise ConfigError(f"from: {source}, line {number}: a step comes before the shape of its group")
                found[-1][1].append(msgspec.json.decode(line, type=StepSample))
            elif line.strip():
                found.append((msgspec.json.decode(line, type=GroupShape), []))
        except msgspec.DecodeError as error:
            raise ConfigError(f"from: {source}, line {number}: {error}") from error
    return [StepReport(shape=shape, samples=tuple(samples)) for shape, samples in found]


def fit(reports: Sequence[StepReport], *, origin: str) -> StepsFile:
    """One profile of groups that are alike: least squares of relative errors. Raises ConfigError when they differ, or when there
    are too few steps."""
    shapes = {msgspec.structs.replace(report.shape, group="") for report in reports}
    if len(shapes) != 1:
        told = "; ".join(sorted(f"{s.model} TP={s.tensor_parallel_size} {s.quantization or s.dtype}" for s in shapes))
        raise ConfigError(f"from: the groups must all be alike; there are {told or 'none'}")
    samples = [sample for report in reports for sample in report.samples if sample.work.num_tokens]
    if len(samples) < MIN_STEPS:
        raise ConfigError(f"from: there are {len(samples)} steps; at least {MIN_STEPS} are needed")
    cost = fit_cost(samples)
    ratios = np.array([cost.seconds(sample.work) / sample.seconds for sample in samples])
    kept = [sample for sample, ratio in zip(samples, ratios, strict=True) if ratio > 1 / _OUTLIER]
    cost = fit_cost(kept)
    errors = np.abs(np.array([cost.seconds(sample.work) / sample.seconds for sample in kept]) - 1)
    shape = next(iter(shapes))
    return StepsFile(
        origin=f"{origin}; {len(samples) - len(kept)} of {len(samples)} steps were left out as held up",
        model=shape.model,
        tensor_parallel_size=shape.tensor_parallel_size,
        dtype=shape.dtype,
        quantization=shape.quantization,
        max_position=shape.max_position,
        knots=list(cost.knots),
        row_s=cost.row_s,
        context_s=cost.context_s,
        pair_s=cost.pair_s,
        empty_s=cost.empty_s,
        num_steps=len(kept),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
    )


def fit_cost(samples: Sequence[StepSample]) -> StepCost:
    """f's lines bend at powers of two among the tokens that were seen; every slope is at least 0."""
    tokens = np.array([sample.work.num_tokens for sample in samples], dtype=np.float64)
    seconds = np.array([sample.seconds for sample in samples])
    within = [float(knot) for knot in _KNOTS if tokens.min() <= knot <= tokens.max()]
    knots = sorted({float(tokens.min()), *within, float(tokens.max())})
    pieces = [np.clip(tokens, low, high) - low for low, high in pairwise(knots)]
    columns = [
        np.ones_like(tokens),
        *pieces,
        np.array([sample.work.num_decodes for sample in samples], dtype=np.float64),
        np.array([sample.work.num_context_tokens for sample in samples], dtype=np.float64),
        np.array([sample.work.num_pairs for sample in samples], dtype=np.float64),
    ]
    matrix, expected_s = np.stack(columns, axis=1), seconds
    for _ in range(NUM_PASSES):
        # Relative to what is expected, not to what was measured: that would believe fast steps more than slow ones.
        found = nonnegative_least_squares(matrix / expected_s[:, None], seconds / expected_s)
        expected_s = np.maximum(matrix @ found, 1e-9)
    base_s, slopes, (row_s, context_s, pair_s) = found[0], found[1:-3], found[-3:]
    if base_s <= 0:
        raise ConfigError("from: the steps tell no base; they must differ in their number of tokens")
    points = [(knots[0], float(base_s))]
    for (low, high), slope in zip(pairwise(knots), slopes, strict=True):
        points.append((high, points[-1][1] + float(slope) * (high - low)))
    return StepCost(
        knots=tuple(points),
        row_s=float(row_s),
        context_s=float(context_s),
        pair_s=float(pair_s),
        empty_s=min(float(base_s), 1e-4),
    )


def encode_profile(profile: StepsFile) -> bytes:
    """As the JSON file that `profiles.read_profile` takes."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
