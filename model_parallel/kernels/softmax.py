"""What a rank tells of its part of a softmax, in torch operations on any device.

How torch adds the terms of a row depends on how many rows there are.

Shape suffixes: R rows · V local vocabulary
"""

import math

import torch
from torch import Tensor


def softmax_parts(logits_RV: Tensor) -> Tensor:
    """See Kernels.softmax_parts."""
    maximum_R1, index_R1 = logits_RV.max(dim=1, keepdim=True)
    sum_R1 = (logits_RV - maximum_R1).exp().sum(dim=1, keepdim=True)
    return torch.cat([maximum_R1.double(), sum_R1.double(), index_R1.double()], dim=1)


def normalisers(values_RV: Tensor) -> Tensor:
    """See Kernels.normalisers."""
    # A rank may hold no token that a row's grammar allows; its sum is then zero.
    maximum_R1 = values_RV.amax(dim=1, keepdim=True)
    is_empty_R1 = maximum_R1 == -math.inf
    shifted_RV = values_RV - maximum_R1.masked_fill(is_empty_R1, 0.0)
    return torch.cat([maximum_R1, shifted_RV.exp().sum(dim=1, keepdim=True)], dim=1).double()
