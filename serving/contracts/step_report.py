"""The last steps of a replica group and how long they took: what `packtrain simulate fit` reads."""

from collections.abc import Iterable

import msgspec

from model_parallel.engine.step_times import StepSample


class GroupShape(msgspec.Struct, frozen=True, kw_only=True):
    """What was timed."""

    group: str
    """Id of the group, new with every incarnation."""
    model: str
    tensor_parallel_size: int
    dtype: str
    quantization: str
    max_position: int


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """One group's."""

    shape: GroupShape
    samples: tuple[StepSample, ...]


def to_lines(reports: Iterable[StepReport]) -> bytes:
    """JSON lines: the shape of each group, and then its steps."""
    lines: list[bytes] = []
    for report in reports:
        lines.append(msgspec.json.encode(report.shape))
        lines += [msgspec.json.encode(sample) for sample in report.samples]
    return b"".join(line + b"\n" for line in lines)
