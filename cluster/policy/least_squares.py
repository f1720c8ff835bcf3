"""Least squares with coefficients that are not negative (Lawson and Hanson 1974, algorithm NNLS)."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_TOLERANCE = 1e-10


def nonnegative_least_squares(matrix: Array, values: Array) -> Array:
    """The x ≥ 0 for which |matrix · x − values| is least."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    num = scaled.shape[1]
    x, passive = np.zeros(num), np.zeros(num, dtype=bool)
    for _ in range(10 * num):
        gradient = scaled.T @ (values - scaled @ x)
        gradient[passive] = -np.inf
        best = int(np.argmax(gradient))
        if passive.all() or gradient[best] <= _TOLERANCE * max(1.0, float(np.linalg.norm(values))):
            break
        passive[best] = True
        while True:
            trial = np.zeros(num)
            trial[passive] = np.linalg.lstsq(scaled[:, passive], values, rcond=None)[0]
            negative = passive & (trial <= 0)
            if not negative.any():
                break
            step = float(np.min(x[negative] / np.maximum(x[negative] - trial[negative], 1e-300)))
            x = x + step * (trial - x)
            passive &= x > 1e-12 * max(1.0, float(np.abs(x).max()))
            x[~passive] = 0.0
        x = trial
    result: Array = x / scale
    return result
