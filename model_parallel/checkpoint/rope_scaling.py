"""What a checkpoint's scaling of the rotary embedding does, as one divisor for each frequency: no torch.

RoPE (Su et al. 2021) turns pair i of a head by position · theta^(−2i/D). A model that was stretched to a longer context
divides these frequencies: by one number ("linear", Chen et al. 2023), or by one that depends on the wavelength ("llama3", as in
Meta's `apply_scaling`). GGUF files of Llama 3 carry the same numbers as the tensor `rope_freqs.weight`.
"""

import math
from collections.abc import Sequence

from model_parallel.config import MOST_HEAD_DIM
from model_parallel.errors import ConfigError


def linear_divisors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Every frequency by `factor`; () when that is 1. Raises ConfigError."""
    if not 0 < factor < math.inf:
        raise ConfigError(f"the factor of linear RoPE scaling is {factor}; it must be greater than 0")
    _check_head_dim(head_dim)
    return plain_if_ones((float(factor),) * (head_dim // 2))


def llama3_divisors(
    head_dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_max: float
) -> tuple[float, ...]:
    """Llama 3.1's: wavelengths over original_max / low_freq_factor are divided by `factor`, those below original_max /
    high_freq_factor stay, and between them the frequency is mixed of both. Raises ConfigError.
    """
    if not (factor > 0 and original_max > 0 and theta > 0 and 0 < low_freq_factor < high_freq_factor):
        raise ConfigError(
            f"llama3 RoPE scaling has factor {factor}, low_freq_factor {low_freq_factor}, high_freq_factor "
            f"{high_freq_factor} and original_max_position_embeddings {original_max}; all must be greater than 0, and "
            "low_freq_factor less than high_freq_factor"
        )
    _check_head_dim(head_dim)
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = (original_max / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smooth = min(1.0, max(0.0, smooth))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return plain_if_ones(divisors)


def _check_head_dim(head_dim: int) -> None:
    """Before as many numbers are made."""
    if head_dim > MOST_HEAD_DIM:
        raise ConfigError(f"head_dim is {head_dim}; the most is {MOST_HEAD_DIM}")


def plain_if_ones(divisors: Sequence[float]) -> tuple[float, ...]:
    """() for divisors that change nothing, so that configurations with equal arithmetic are equal."""
    return () if all(divisor == 1 for divisor in divisors) else tuple(divisors)
