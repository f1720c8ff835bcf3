"""What a run of the real stack leaves behind: enough to simulate it again, on another day, without the stack."""

from pathlib import Path
from typing import Any

import msgspec

from model_parallel.errors import ConfigError
from serving.contracts.step_report import StepReport


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """One request. Times count from the beginning of its load."""

    at_s: float
    """When it was sent."""
    num_prompt_tokens: int
    num_output_tokens: int
    """That were asked for; an answer has as many."""
    code: str
    """OK, or the status it ended with."""
    first_s: float | None
    """When its first token came."""
    ended_s: float


class LoadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what became of it."""

    mix: str
    num_streams: int | None = None
    """Of a closed loop."""
    share: float | None = None
    """Of an open loop: the part of the capacity that it offers."""
    rate: float | None = None
    """Requests a second of that."""
    began_s: float
    """On the clock of the steps."""
    seconds: float
    """In which requests were sent."""
    late_s: float
    """The latest that a request was sent after it was due."""
    client_cpu_s: float
    gateway_cpu_s: float
    """Processor time of the processes, from before the load until after it."""
    num_preempted: int
    requests: list[Sent]
    """In the order in which they were sent."""
    steps: list[StepReport]
    """Of each group, those that ended after the load began."""


class ShapeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stack."""

    num_groups: int
    tp_size: int
    capacity: dict[str, float]
    """Requests a second of each mix that it finished in a closed loop."""
    calibration: list[LoadRecord]
    """Closed loops."""
    cells: list[LoadRecord]
    """Open loops; the same mix and share again is the same arrivals again."""


class Recording(msgspec.Struct, kw_only=True):
    """One run of the measurement."""

    machine: dict[str, Any]
    shapes: list[ShapeRecord]


def write_recording(path: Path, recording: Recording) -> None:
    """As JSON."""
    path.write_bytes(msgspec.json.encode(recording))


def read_recording(path: Path) -> Recording:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recording)
    except OSError as error:
        raise ConfigError(f"from: {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"from: {path} is no recording: {error}") from error
