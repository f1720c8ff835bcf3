"""Counter-based randomness: a draw is a pure function of (seed, choice, position, token id); there is no generator state.

The noise of a token is the token-id-th output of SplitMix64 (Steele, Lea & Flood 2014) started at a key that is mixed from
(seed, choice, position) by the same function. So it can be computed anywhere, for any part of the vocabulary.

Shape suffixes: R rows · V vocabulary
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK
    return z ^ (z >> 31)


def draw_key(seed: int, choice: int, position: int) -> int:
    """The 64-bit key of one draw, as a signed number, the way torch's int64 holds it."""
    key = 0
    for part in (seed, choice, position):
        key = _mix((key + _GAMMA + part) & _MASK)
    return _signed(key)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """float64, standard Gumbel noise of int64 `token_ids` under int64 `keys`; the two are broadcast together.

    argmax(log p + noise) is a draw from p (Gumbel 1954; the "Gumbel-max trick").
    """
    z = keys + (token_ids + 1) * _signed(_GAMMA)
    z = (z ^ _shifted_right(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shifted_right(z, 27)) * _signed(_MULTIPLIER_2)
    z = z ^ _shifted_right(z, 31)
    # 52 bits and a half: never 0 and never 1, so both logarithms are finite.
    uniform = (_shifted_right(z, 12).to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def best_draws(
    values_RV: Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    keys: Sequence[int],
    first_id: int,
    forbidden: Sequence[Tensor | None],
) -> Tensor:
    """See Kernels.best_draws."""
    device = values_RV.device
    temperature_R1 = torch.tensor(temperatures, dtype=torch.float64, device=device).unsqueeze(1)
    score_RV = values_RV[list(rows)].double() / temperature_R1
    for score_V, forbidden_V in zip(score_RV, forbidden, strict=True):
        if forbidden_V is not None:
            score_V.masked_fill_(forbidden_V.to(device, non_blocking=True), -math.inf)
    ids_V = torch.arange(first_id, first_id + values_RV.shape[1], device=device)
    return (score_RV + gumbel_noise(torch.tensor(keys, device=device).unsqueeze(1), ids_V)).argmax(dim=1)
