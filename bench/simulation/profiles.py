"""What is known of machines: GPUs by their roofline, and machines whose engine was timed. One JSON file each, shipped or not.

Three kinds of file, told by the key `kind`:

- `hardware`: a GPU's peak figures, and single steps that were timed on it; the coefficients are fitted to them when it is read;
- `derived`: another GPU's coefficients on this one's peak figures. Nothing was timed on it, and whatever is made of it says so;
- `steps`: coefficients fitted to the steps of one engine: one model, one tensor-parallel size, one dtype.
"""

from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from bench.simulation.cost import StepCost
from bench.simulation.hardware import (
    COEFFICIENTS,
    Coefficients,
    Hardware,
    MeasuredStep,
    fit_coefficients,
    share_of,
    step_cost,
)
from model_parallel.config import ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.memory import DEVICES
from serving.models.known_llama import known_config

DIRECTORY = Path(__file__).parent / "profiles"
MAX_FILE_BYTES = 16 << 20


class TimedStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step on one GPU."""

    model: str
    """A known name."""
    work: Literal["decode", "prefill"]
    tokens: int
    """Context of each sequence, or length of the prompt."""
    seconds: float
    sequences: int = 1
    layers: int | None = None
    """Of a model that was cut to so many."""


class HardwareFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hardware", tag_field="kind"):
    """A GPU that was timed."""

    origin: str
    """Where the figures are from."""
    device: str
    """Of model_parallel.memory.DEVICES."""
    rate: float
    meeting_s: float
    link_bytes_per_s: float
    idle_w: float
    busy_w: float
    start_s: float
    steps: dict[str, list[TimedStep]]
    """By dtype or quantisation."""
    inherit: dict[str, dict[str, list[str]]] = {}
    """Coefficients that a kind's steps do not tell, taken from another kind: {"int8": {"bfloat16": ["cache_c"]}}."""


class DerivedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="derived", tag_field="kind"):
    """A GPU that nothing was timed on."""

    origin: str
    device: str
    coefficients_of: str
    """Name of the profile."""
    factor: float
    """That those are multiplied by."""
    rate: float
    meeting_s: float
    link_bytes_per_s: float
    idle_w: float
    busy_w: float
    start_s: float


class StepsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="steps", tag_field="kind"):
    """An engine whose steps were timed; `packtrain simulate fit` writes it."""

    origin: str
    model: str
    tensor_parallel_size: int
    dtype: str
    quantization: str
    max_position: int
    """Longest sequence of the model."""
    knots: list[tuple[float, float]]
    row_s: float
    context_s: float
    pair_s: float
    empty_s: float
    num_steps: int
    """That it was fitted to."""
    median_error: float
    """Relative, without its sign."""
    p90_error: float
    request_s: float = 0.0
    """From a request's arrival at a gateway until the engine has it."""
    output_s: float = 0.0
    """From the end of a step until a client has its token."""
    sharing: float = 0.0
    """A step takes so much longer, as a part of its time, for each other group that computes on the same machine."""
    device: Literal["cpu", "cuda"] = "cpu"
    """That its groups ran on; `packtrain serve` chooses the size of their steps by it."""
    start_s: float = 0.0
    idle_w: float = 0.0
    busy_w: float = 0.0


ProfileFile = HardwareFile | DerivedFile | StepsFile


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile makes of one group."""

    name: str
    origin: str
    is_measured: bool
    """False: derived from another machine's figures."""
    cost: StepCost
    request_s: float
    output_s: float
    start_s: float
    idle_w: float
    """Of each rank's GPU."""
    busy_w: float
    sharing: float = 0.0
    """As in StepsFile."""


def shipped_profiles() -> tuple[str, ...]:
    """Names."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.json")))


def read_profile(name: str) -> ProfileFile:
    """A shipped one by name, or a file. Raises ConfigError."""
    short = name.lower()
    path = DIRECTORY / f"{short}.json" if short in shipped_profiles() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"profile is {name!r}, which is neither a file nor shipped; shipped: {', '.join(shipped_profiles())}"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_FILE_BYTES}")
    try:
        file: ProfileFile = msgspec.json.decode(path.read_bytes().removeprefix(BOM_UTF8), type=ProfileFile)
        return file
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a profile: {error}") from error


@lru_cache(maxsize=16)
def hardware(name: str) -> Hardware:
    """A GPU, with coefficients fitted to its steps. Raises ConfigError."""
    file = read_profile(name)
    if isinstance(file, StepsFile):
        raise ConfigError(f"profile {name!r} is of one model; a GPU's is needed")
    if file.device not in DEVICES:
        raise ConfigError(f"profile {name!r}: device is {file.device!r}; known: {', '.join(DEVICES)}")
    device = DEVICES[file.device]
    coefficients: dict[str, Coefficients] = {}
    if isinstance(file, DerivedFile):
        coefficients = {
            kind: Coefficients(**{name: file.factor * getattr(found, name) for name in COEFFICIENTS})
            for kind, found in hardware(file.coefficients_of).coefficients.items()
        }
    else:
        for kind, steps in file.steps.items():
            known = {
                coefficient: getattr(coefficients[other], coefficient)
                for other, names in file.inherit.get(kind, {}).items()
                for coefficient in names
            }
            quantization = kind if kind == "int8" else ""
            coefficients[kind], _ = fit_coefficients(
                [_measured(step, quantization) for step in steps],
                bandwidth=device.bandwidth_bytes_per_s,
                rate=file.rate,
                converts=bool(quantization),
                known=known,
            )
    return Hardware(
        device=device,
        rate=file.rate,
        meeting_s=file.meeting_s,
        link_bytes_per_s=file.link_bytes_per_s,
        coefficients=coefficients,
        idle_w=file.idle_w,
        busy_w=file.busy_w,
        start_s=file.start_s,
    )


def fit_errors(name: str) -> Mapping[str, list[tuple[TimedStep, float]]]:
    """Of a timed GPU: each step with predicted / measured. Raises ConfigError."""
    file, machine = read_profile(name), hardware(name)
    if not isinstance(file, HardwareFile):
        raise ConfigError(f"nothing was timed on {name!r}")
    found: dict[str, list[tuple[TimedStep, float]]] = {}
    for kind, steps in file.steps.items():
        quantization = kind if kind == "int8" else ""
        for step in steps:
            measured = _measured(step, quantization)
            cost = step_cost(machine, measured.share, 1, dtype="bfloat16", quantization=quantization)
            n = step.tokens
            seconds = (
                cost.tokens_s(n) + cost.pair_s * n * (n + 1) / 2
                if measured.is_prefill
                else cost.tokens_s(step.sequences) + step.sequences * (cost.row_s + cost.context_s * n)
            )
            found.setdefault(kind, []).append((step, seconds / step.seconds))
    return found


def machine_for(
    profile: str, model_name: str, model: ModelConfig | None, tp_size: int, *, dtype: str, quantization: str
) -> Machine:
    """One group's cost model. `model` is needed of a GPU. Raises ConfigError when the profile is of something else."""
    file = read_profile(profile)
    if isinstance(file, StepsFile):
        asked = (model_name, tp_size, dtype, quantization)
        known = (file.model, file.tensor_parallel_size, file.dtype, file.quantization)
        if asked != known:
            raise ConfigError(
                f"profile {profile!r} was fitted to {_shape(*known)}, and {_shape(*asked)} is to be simulated"
            )
        cost = StepCost(
            knots=tuple((tokens, seconds) for tokens, seconds in file.knots),
            row_s=file.row_s,
            context_s=file.context_s,
            pair_s=file.pair_s,
            empty_s=file.empty_s,
        )
        return Machine(
            name=profile, origin=file.origin, is_measured=True, cost=cost, request_s=file.request_s,
            output_s=file.output_s, start_s=file.start_s, idle_w=file.idle_w, busy_w=file.busy_w, sharing=file.sharing,
        )  # fmt: skip
    gpu = hardware(profile)
    if model is None:
        raise ConfigError(f"profile {profile!r} is of a GPU, and needs the sizes of a model")
    share = share_of(model, tp_size, dtype=dtype, quantization=quantization)
    return Machine(
        name=profile,
        origin=file.origin,
        is_measured=isinstance(file, HardwareFile),
        cost=step_cost(gpu, share, tp_size, dtype=dtype, quantization=quantization),
        request_s=GATEWAY_REQUEST_S,
        output_s=GATEWAY_OUTPUT_S,
        start_s=gpu.start_s,
        idle_w=gpu.idle_w,
        busy_w=gpu.busy_w,
    )


GATEWAY_REQUEST_S = 0.003
GATEWAY_OUTPUT_S = 0.001
"""Of gateways on hosts of GPUs, which were not timed: about what they take on the reference machine when it is not loaded."""


def _measured(step: TimedStep, quantization: str) -> MeasuredStep:
    config = known_config(step.model)
    if step.layers is not None:
        config = replace(config, num_layers=step.layers)
    return MeasuredStep(
        share=share_of(config, 1, dtype="bfloat16", quantization=quantization),
        num_sequences=step.sequences,
        num_tokens=step.tokens,
        is_prefill=step.work == "prefill",
        seconds=step.seconds,
    )


def _shape(model: str, tp_size: int, dtype: str, quantization: str) -> str:
    return f"{model}, TP={tp_size}, {quantization or dtype}"
