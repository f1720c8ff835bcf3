"""Fits the cost of a step to steps that were timed, of a file or of a running gateway's /steps."""

import urllib.request
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

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
Array = npt.NDArray[np.float64]
_MIN_SPREAD = 0.5
"""Steps beside nobody and steps beside somebody must be among those that tell what that costs."""
_NUM_TURNS = 8
OUTLIER = 4.0
"""A step that took so many times what the others say was held up by something that is no step. It is left out, and counted."""
_MAX_FITS = 10
"""Each to the steps that the one before did not leave out."""


def read_samples(source: str) -> list[StepReport]:
    """From a file of JSON lines, or from an address (http://host:port/steps). Raises ConfigError."""
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=TIMEOUT_S) as answer:
                data = answer.read(MAX_BYTES + 1)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no address
            what = f"{type(error).__name__}: {error}" if isinstance(error, HTTPException) else error
            raise ConfigError(f"from: {source} cannot be read: {what}") from error
    else:
        try:
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"from: {source}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"from: {source} has more than {MAX_BYTES} bytes")
    return _parse(data.removeprefix(BOM_UTF8).splitlines(), source)


def _parse(lines: Iterable[bytes], source: str) -> list[StepReport]:
    found: list[tuple[GroupShape, list[StepSample]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if b'"seconds"' in line:
                if not found:
                    raise ConfigError(f"from: {source}, line {number}: a step comes before the shape of its group")
                found[-1][1].append(_checked(msgspec.json.decode(line, type=StepSample)))
            elif line.strip():
                found.append((msgspec.json.decode(line, type=GroupShape), []))
        except ValueError as error:
            raise ConfigError(f"from: {source}, line {number}: {error}") from error
    return [StepReport(shape=shape, samples=tuple(samples)) for shape, samples in found]


def _checked(sample: StepSample) -> StepSample:
    """Raises ValueError for what no step can be, and nothing could be fitted to."""
    for field, value, lowest, highest in (
        ("seconds", sample.seconds, 1e-9, 1e6),
        ("ended_s", sample.ended_s, 0.0, 1e12),
        *((f"work.{name}", getattr(sample.work, name), 0, 1e15) for name in sample.work.__struct_fields__),
    ):
        if not lowest <= value <= highest:
            raise ValueError(f"{field} is {value}; it must be from {lowest:g} to {highest:g}")
    return sample


def fit(reports: Sequence[StepReport], *, origin: str) -> StepsFile:
    """One profile of groups that are alike: least squares of relative errors. Raises ConfigError when they differ, or when there
    are too few steps."""
    if not reports:
        raise ConfigError("from: there is no group in it; a group tells its steps once it serves, so try again then")
    shapes = {msgspec.structs.replace(report.shape, group="") for report in reports}
    if len(shapes) != 1:
        told = "; ".join(sorted(f"{s.model} TP={s.tensor_parallel_size} {s.quantization or s.dtype}" for s in shapes))
        raise ConfigError(f"from: the groups must all be alike; there are {told}")
    shares = overlaps(reports)
    timed = [
        (sample, share)
        for report, of_report in zip(reports, shares, strict=True)
        for sample, share in zip(report.samples, of_report, strict=True)
        if sample.work.num_tokens
    ]
    if len(timed) < MIN_STEPS:
        raise ConfigError(f"from: there are {len(timed)} steps; at least {MIN_STEPS} are needed")
    for kind, num in (
        ("prompt tokens", sum(sample.work.num_tokens > sample.work.num_decodes for sample, _ in timed)),
        ("a sequence that decodes", sum(sample.work.num_decodes > 0 for sample, _ in timed)),
    ):
        if not num:
            raise ConfigError(f"from: none of the {len(timed)} steps has {kind}, so nothing tells what that costs")
    samples, beside = [sample for sample, _ in timed], np.array([share for _, share in timed])
    cost, sharing, is_kept = _fit_without_outliers(samples, beside)
    kept = [sample for sample, keep in zip(samples, is_kept, strict=True) if keep]
    errors = np.abs(_ratios(cost, sharing, kept, beside[is_kept]) - 1)
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
        sharing=sharing,
        num_steps=len(kept),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
    )


def overlaps(reports: Sequence[StepReport]) -> list[Array]:
    """For each step of each report: how many steps of other groups ran beside it, on the mean over its time. 0 where nobody noted
    when steps ended."""
    by_group: dict[str, list[StepSample]] = {}
    for report in reports:
        by_group.setdefault(report.shape.group, []).extend(report.samples)
    busy = {
        group: _busy_time(samples) for group, samples in by_group.items() if any(sample.ended_s for sample in samples)
    }
    found = []
    for report in reports:
        seconds = np.array([sample.seconds for sample in report.samples])
        ends = np.array([sample.ended_s for sample in report.samples])
        share = np.zeros_like(ends)
        for group, (edges, totals) in busy.items():
            if group != report.shape.group and len(ends):
                share += (np.interp(ends, edges, totals) - np.interp(ends - seconds, edges, totals)) / seconds
        found.append(share)
    return found


def _busy_time(samples: Sequence[StepSample]) -> tuple[Array, Array]:
    """Beginnings and ends of a group's steps, and how long it had computed until then."""
    ordered = sorted(samples, key=lambda sample: sample.ended_s)
    edges = np.array([edge for sample in ordered for edge in (sample.ended_s - sample.seconds, sample.ended_s)])
    spent = np.array([spent for sample in ordered for spent in (0.0, sample.seconds)])
    return np.maximum.accumulate(edges), np.cumsum(spent)


def _ratios(cost: StepCost, sharing: float, samples: Sequence[StepSample], beside: Array) -> Array:
    """Expected over measured."""
    alone = np.array([cost.seconds(sample.work) / sample.seconds for sample in samples])
    ratios: Array = alone * (1 + sharing * beside)
    return ratios


def _fit_without_outliers(
    samples: Sequence[StepSample], beside: Array
) -> tuple[StepCost, float, npt.NDArray[np.bool_]]:
    """Cost and sharing, and which steps they are fitted to. Steps that were held up lift the first fit, by which none of them may
    stand out: so each step is held against the median one, and fits are made until they leave out the same steps."""
    is_kept = np.ones(len(samples), dtype=bool)
    for fits_left in reversed(range(_MAX_FITS)):
        kept = [sample for sample, keep in zip(samples, is_kept, strict=True) if keep]
        cost, sharing = _fit_sharing(kept, beside[is_kept])
        ratios = _ratios(cost, sharing, samples, beside)
        keeps = ratios > np.median(ratios) / OUTLIER
        if not fits_left or (keeps == is_kept).all():
            break
        is_kept = keeps
    return cost, sharing, is_kept


def _fit_sharing(samples: Sequence[StepSample], beside: Array) -> tuple[StepCost, float]:
    """The cost of a step beside nobody, and how much longer it takes for each group that computes beside it: in turn the best
    of each with the other one as it is."""
    sharing = 0.0
    if float(np.ptp(beside)) < _MIN_SPREAD:  # one group, or all of them all the time: that is in the cost then
        return fit_cost(samples), sharing
    for _ in range(_NUM_TURNS):
        cost = fit_cost(samples, factors=1 + sharing * beside)
        ratios = _ratios(cost, 0.0, samples, beside)
        sharing = max(0.0, float(np.sum(beside * (1 / ratios - 1)) / np.sum(beside**2)))
    return cost, sharing


def fit_cost(samples: Sequence[StepSample], factors: Array | float = 1.0) -> StepCost:
    """f's lines bend at powers of two among the tokens that were seen; every slope is at least 0. `factors` is how many times
    longer than by itself each step took because of others."""
    tokens = np.array([sample.work.num_tokens for sample in samples], dtype=np.float64)
    seconds = np.array([sample.seconds for sample in samples]) / factors
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
