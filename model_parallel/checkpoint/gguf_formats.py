"""Which of GGUF's quantised types are kept as they are, and in which form. No torch.

Q4_0, Q4_1 and Q4_K keep their four bits a weight; Q5_0, Q5_1, Q5_K, Q6_K and Q8_0 are kept in eight. Other types are dequantised.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from gguf.constants import GGMLQuantizationType as Type

from model_parallel.weight_format import GroupFormat


def _form(
    name: str,
    bits: Literal[4, 8],
    kind: Literal["fixed_zero", "minimums", "scale_codes", "minimum_codes"],
    size: int = 32,
    **more: Any,
) -> GroupFormat:
    return GroupFormat(name=name, bits=bits, kind=kind, group_size=size, **more)


FORMATS: Mapping[Type, GroupFormat] = MappingProxyType(
    {
        Type.Q4_0: _form("Q4_0", 4, "fixed_zero", zero=8),
        Type.Q4_1: _form("Q4_1", 4, "minimums"),
        Type.Q5_0: _form("Q5_0", 8, "fixed_zero"),
        Type.Q5_1: _form("Q5_1", 8, "minimums"),
        Type.Q8_0: _form("Q8_0", 8, "fixed_zero"),
        Type.Q4_K: _form("Q4_K", 4, "minimum_codes", groups_per_span=8),
        Type.Q5_K: _form("Q5_K", 8, "minimum_codes", groups_per_span=8),
        Type.Q6_K: _form("Q6_K", 8, "scale_codes", 16, groups_per_span=16),
    }
)
