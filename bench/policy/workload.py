"""Traces: when requests arrive, and how long they are. All are drawn from a seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DURATION_S = 3 * 3600
SLOT_S = 1.0
"""Intensities are constant over so long."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    arrivals_s: NDArray[np.float64]
    num_prompt_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]
    intensity: NDArray[np.float64]
    """Requests a second that were to be expected in each slot: what an oracle knows."""

    @property
    def duration_s(self) -> float:
        return len(self.intensity) * SLOT_S


def diurnal(seed: int) -> Trace:
    """A day in three hours: the busiest time has eight times the requests of the quietest."""
    slots = np.arange(0, DURATION_S, SLOT_S)
    shape = (1 - np.cos(2 * math.pi * slots / (DURATION_S))) / 2
    return _drawn("diurnal", 1 + 7 * shape, seed)


def bursty(seed: int) -> Trace:
    """As BurstGPT reports for conversations: inter-arrival times are gamma-distributed with a coefficient of variation above 1,
    and the intensity itself wanders, here by a factor of 1.35 over five minutes."""
    rng = np.random.default_rng([seed, 1])
    num = int(DURATION_S / SLOT_S)
    correlation = math.exp(-SLOT_S / 300)
    noise = rng.normal(0, 0.3 * math.sqrt(1 - correlation**2), num)
    log_rate = np.empty(num)
    value = 0.0
    for slot in range(num):
        value = correlation * value + noise[slot]
        log_rate[slot] = value
    return _drawn("bursty", 4.5 * np.exp(log_rate - 0.3**2 / 2), seed, shape=0.5)


def step(seed: int) -> Trace:
    """Three times as much from one second to the next, and back after three quarters of an hour; twice."""
    slots = np.arange(0, DURATION_S, SLOT_S)
    return _drawn("step", np.where((slots // 2700) % 2 == 1, 7.5, 2.5), seed)


def flash_crowd(seed: int) -> Trace:
    """Five times as much within half a minute, for a quarter of an hour, gone again over five minutes."""
    slots = np.arange(0, DURATION_S, SLOT_S)
    intensity = np.full(len(slots), 2.0)
    rng = np.random.default_rng([seed, 2])
    for beginning_s in (1800, 6300):
        since = slots - (beginning_s + 600 * rng.random())
        rise = np.clip(since / 30, 0, 1)
        fall = np.clip(1 - (since - 900) / 300, 0, 1)
        intensity += 8 * np.minimum(rise, fall)
    return _drawn("flash crowd", intensity, seed)


TRACES: dict[str, Callable[[int], Trace]] = {
    "diurnal": diurnal,
    "bursty": bursty,
    "step": step,
    "flash crowd": flash_crowd,
}


def _drawn(name: str, intensity: NDArray[np.float64], seed: int, shape: float = 1.0) -> Trace:
    """A renewal process in operational time: gaps are gamma-distributed with that shape, exponential for 1."""
    rng = np.random.default_rng([seed, 3])
    operational = np.concatenate([[0.0], np.cumsum(intensity) * SLOT_S])
    gaps = rng.gamma(shape, 1 / shape, int(operational[-1] * 1.1) + 100)
    points = np.cumsum(gaps)
    points = points[points < operational[-1]]
    arrivals = np.interp(points, operational, np.arange(len(operational)) * SLOT_S)
    prompts = np.clip(rng.lognormal(math.log(1600), 0.7, len(arrivals)), 16, 8000).astype(np.int64)
    outputs = np.clip(rng.lognormal(math.log(500), 0.6, len(arrivals)), 8, 2500).astype(np.int64)
    return Trace(
        name=name, arrivals_s=arrivals, num_prompt_tokens=prompts, num_output_tokens=outputs, intensity=intensity
    )
