"""How a weight that is quantised in groups of its inputs lies in memory. Plain numbers, so that plans need no torch."""

from dataclasses import dataclass
from typing import Literal

SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFormat:
    """A matrix whose neighbouring inputs share a scale: weight = scale · q − minimum, q a whole number.

    Groups with codes share a span's scale: theirs is code · the span's. Without codes a span is one group.
    """

    name: str
    """As its makers call it: "AWQ", "GPTQ", "Q4_K", …"""
    bits: Literal[4, 8]
    """4: q is 0 … 15. 8: −128 … 127; numbers of 5 and 6 bits are kept so, too."""
    kind: Literal["fixed_zero", "zeros", "minimums", "scale_codes", "minimum_codes"]
    """Where the minimum comes from: scale · zero; scale · (zero + the group's own); stored. With codes: scale · zero after a
    signed code of the scale; or a code · the span's minimum, both codes unsigned."""
    scale_type: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of scales and minimums."""
    zero: int = 0
    group_size: int
    """Inputs; a multiple of 8."""
    groups_per_span: int = 1

    @property
    def span_size(self) -> int:
        """Inputs of a span. A rank holds whole spans: where its cut falls inside one, it holds the rest of it unused."""
        return self.group_size * self.groups_per_span

    @property
    def span_bytes(self) -> int:
        """Of one output: scale, minimum and zero, and each group's codes and numbers."""
        has_minimum = self.kind in ("minimums", "minimum_codes")
        header = SCALE_BYTES[self.scale_type] * (2 if has_minimum else 1) + (self.kind == "zeros")
        codes = {"scale_codes": 1, "minimum_codes": 2}.get(self.kind, 0)
        return header + self.groups_per_span * (codes + self.group_size * self.bits // 8)

    def spans(self, start: int, stop: int) -> range:
        """The spans that inputs start … stop − 1 lie in."""
        return range(start // self.span_size, -(-stop // self.span_size))

    def matrix_bytes(self, num_outputs: int, start: int, stop: int) -> int:
        """Bytes of so many outputs over the spans of inputs start … stop − 1."""
        return num_outputs * len(self.spans(start, stop)) * self.span_bytes
