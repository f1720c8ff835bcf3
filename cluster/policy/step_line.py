"""The line that a group's step times lie on: base + sequence · decoding sequences + prompt_token · prompt tokens."""

from collections.abc import Sequence

import numpy as np

from cluster.policy.least_squares import nonnegative_least_squares
from cluster.policy.observation import StepLine

FEWEST_STEPS = 16
OUTLIER = 5.0
"""Times the median distance from the line. Steps beyond, in which the machine did something else, do not turn it."""
LONGEST = 5.0
"""Times what the line says. A step counts for no more, however long something has held it up."""


def fit_step_line(steps: Sequence[tuple[float, float, float]]) -> StepLine | None:
    """Of least squares with no negative term, through steps of (decoding sequences, prompt tokens, seconds). Its height is such
    that all steps together take as long as they did, those that were held up included: that much a group cannot do.

    None for too few steps, or when they take no time.
    """
    if len(steps) < FEWEST_STEPS:
        return None
    table = np.array(steps, dtype=np.float64)
    matrix, seconds = np.column_stack([np.ones(len(table)), table[:, :2]]), table[:, 2]
    terms = nonnegative_least_squares(matrix, seconds)
    distances = np.abs(matrix @ terms - seconds)
    kept = distances <= OUTLIER * np.median(distances)
    if FEWEST_STEPS <= int(kept.sum()) < len(table):
        terms = nonnegative_least_squares(matrix[kept], seconds[kept])
    expected = matrix @ terms
    if expected.sum() > 0:
        terms = terms * (np.minimum(seconds, LONGEST * expected).sum() / expected.sum())
    base_s, sequence_s, prompt_token_s = (float(term) for term in terms)
    line = StepLine(base_s=base_s, sequence_s=sequence_s, prompt_token_s=prompt_token_s)
    return line if line.step_s(1) > 0 else None
