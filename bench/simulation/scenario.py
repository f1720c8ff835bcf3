"""What is simulated, as plain validated data: the groups, who sends what and when, and what goes wrong. Work and arrivals are
written as in load tests (bench/loadtest/scenario.py)."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bench.loadtest.files import load_entries
from bench.loadtest.scenario import (
    MAX_DURATION_S,
    MAX_LENGTH,
    MAX_REQUESTS,
    OpenLoop,
    Synthetic,
    Tenant,
    Trace,
    TraceTimes,
)
from bench.simulation.clock import MAX_S
from model_parallel.errors import ConfigError
from serving.contracts.yaml_files import Section, explain_errors, read_mapping
from serving.tenants.records import MAX_LIMIT

MAX_GROUPS = 100_000
MAX_SIMULATED_S = min(MAX_DURATION_S, 0.9 * MAX_S)
MAX_LOSSES = 10_000
MAX_CACHE_TOKENS = 1 << 28
Seconds = Annotated[float, Field(ge=0, le=MAX_SIMULATED_S)]
SomeSeconds = Annotated[float, Field(gt=0, le=MAX_SIMULATED_S)]


class Groups(Section):
    """Replica groups, which are all alike."""

    model: str = Field(min_length=1, description="A known name (llama-2-70b-chat), or a checkpoint.")
    profile: str = Field(min_length=1, description="A shipped profile's name, or a file of `packtrain simulate fit`.")
    num_groups: int = Field(1, ge=1, le=MAX_GROUPS)
    tensor_parallel_size: int = Field(1, ge=1, le=1024)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["int8", "fp8", "packed"] | None = Field(
        None, description="packed: with a profile that is fitted to such weights."
    )
    max_model_len: int | None = Field(None, ge=1, le=MAX_LENGTH, description="The model's own when unset.")
    kv_cache_tokens: int | None = Field(
        None, ge=16, le=MAX_CACHE_TOKENS, description="What fits beside the weights when unset (GPUs alone)."
    )
    memory_utilization: float = Field(0.9, gt=0, le=1)
    block_size: int = Field(16, ge=1, le=256)
    prefix_caching: bool = True
    max_num_seqs: int | None = Field(None, ge=1, le=4096, description="As `packtrain serve` chooses when unset.")
    max_num_batched_tokens: int | None = Field(None, ge=1, le=1 << 20, description="Likewise.")
    max_prefill_tokens: int | None = Field(None, ge=1, le=1 << 20)
    max_waiting_requests: int = Field(256, ge=1, le=MAX_REQUESTS)
    start_s: Seconds | None = Field(None, description="From an order to a group that serves; the profile's when unset.")
    share_a_machine: bool = Field(
        False, description="All groups compute on one machine's processors; a fitted profile says what that costs."
    )


class Gateways(Section):
    """Front ends."""

    num_gateways: int = Field(1, ge=1, le=1000)
    request_s: float | None = Field(
        None, ge=0, le=10, description="From arrival to the group; the profile's when unset."
    )
    output_s: float | None = Field(
        None, ge=0, le=10, description="From a step to the client; the profile's when unset."
    )


class TenantLimits(Section):
    """As a plan has them (docs/tenancy.md)."""

    requests_per_minute: int | None = Field(None, ge=1, le=MAX_LIMIT)
    tokens_per_minute: int | None = Field(None, ge=1, le=MAX_LIMIT)
    max_concurrent_requests: int | None = Field(None, ge=1, le=MAX_LIMIT)
    token_budget: int | None = Field(None, ge=0, le=MAX_LIMIT)


class SimulatedTenant(Section):
    """One source of requests."""

    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    weight: float = Field(1.0, ge=0.001, le=1000)
    priority: int = Field(0, ge=-10, le=10)
    limits: TenantLimits | None = None
    deadline_s: SomeSeconds | None = None
    patience_s: SomeSeconds | None = Field(None, description="The client cancels when no token has come after so long.")
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_LENGTH, description="What requests ask for; unset, just what the answer has."
    )
    work: Annotated[Synthetic | Trace, Field(discriminator="kind")] = Synthetic()
    arrivals: Annotated[OpenLoop | TraceTimes, Field(discriminator="process")] = OpenLoop(process="poisson", rate=1.0)
    max_requests: int = Field(MAX_REQUESTS, ge=1, le=MAX_REQUESTS)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if isinstance(self.arrivals, TraceTimes) and not isinstance(self.work, Trace):
            raise ValueError("arrivals of process trace need work of kind trace")
        return self


class Failures(Section):
    """Groups that are lost."""

    every_s: float | None = Field(
        None, gt=0, description="Mean of an exponential distribution; one group of all each time."
    )
    at_s: list[Seconds] = Field(default=[], max_length=MAX_LOSSES)
    migration: bool = Field(True, description="What was lost goes on in another group.")
    detect_s: float = Field(1.0, ge=0, le=3600, description="Until gateways know of a loss.")


class Scaling(Section):
    """How many groups there are over time."""

    policy: Literal["packtrain", "ongoing"] = Field(
        "packtrain",
        description="packtrain: the autoscaler's own. ongoing: Ray Serve's, open requests / target_ongoing.",
    )
    min_groups: int = Field(1, ge=1, le=MAX_GROUPS)
    max_groups: int = Field(ge=1, le=MAX_GROUPS)
    ttft_p99_s: SomeSeconds = 2.0
    tpot_p99_s: SomeSeconds = 0.1
    period_s: float = Field(5.0, ge=0.1, le=600)
    target_ongoing: float = Field(16.0, gt=0, description="Of policy ongoing: open requests a group.")
    upscale_delay_s: Seconds = Field(30.0, description="Of policy ongoing.")
    downscale_delay_s: Seconds = Field(
        600.0, description="Of both: the past that fewer groups must have been enough for."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_groups > self.max_groups:
            raise ValueError(f"min_groups is {self.min_groups} and must not exceed max_groups, {self.max_groups}")
        if self.policy == "packtrain" and not self.downscale_delay_s:
            raise ValueError("downscale_delay_s is 0; of policy packtrain it must be above 0")
        return self


class SimulationScenario(Section):
    """A whole simulation."""

    name: str = Field("simulation", max_length=128)
    seed: int = Field(0, ge=0, lt=2**63)
    duration_s: float = Field(600.0, gt=0, le=MAX_SIMULATED_S, description="After that nothing new arrives.")
    drain_s: float = Field(
        600.0, ge=0, le=24 * 3600, description="How long what is open may go on; then it is cancelled."
    )
    warmup_s: float = Field(0.0, ge=0, le=MAX_SIMULATED_S, description="Cut from the beginning of what is reported.")
    groups: Groups
    gateways: Gateways = Gateways()
    tenants: list[SimulatedTenant] = Field(default=[SimulatedTenant()], min_length=1, max_length=1000)
    failures: Failures = Failures()
    scaling: Scaling | None = None

    @model_validator(mode="after")
    def _sane(self) -> Self:
        names = [tenant.name for tenant in self.tenants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tenants: the name {name!r} stands {names.count(name)} times; each needs its own")
        if self.warmup_s >= self.duration_s:
            raise ValueError(f"warmup_s is {self.warmup_s:g} and must be below duration_s, {self.duration_s:g}")
        for tenant in self.tenants:
            if isinstance(tenant.arrivals, OpenLoop):
                tenant.arrivals.check_periods(tenant.name, self.duration_s)
        num_groups, scaling = self.groups.num_groups, self.scaling
        if scaling is not None and not scaling.min_groups <= num_groups <= scaling.max_groups:
            raise ValueError(
                f"groups.num_groups is {num_groups}; it must lie between scaling.min_groups, {scaling.min_groups}, and "
                f"scaling.max_groups, {scaling.max_groups}"
            )
        if late_s := [at_s for at_s in self.failures.at_s if at_s > self.duration_s]:
            raise ValueError(f"failures.at_s has {late_s[0]:g}, which is after duration_s, {self.duration_s:g}")
        every_s = self.failures.every_s
        if every_s is not None and self.duration_s / every_s > MAX_LOSSES:
            raise ValueError(
                f"failures.every_s is {every_s:g}; of {self.duration_s:g} s it must be at least "
                f"{self.duration_s / MAX_LOSSES:g}, so that about {MAX_LOSSES} groups are lost at most"
            )
        return self


def load_scenario(path: Path) -> SimulationScenario:
    """Of a YAML file. Raises ConfigError that names each wrong field."""
    return parse_scenario(read_scenario(path), origin=str(path))


def read_scenario(path: Path) -> dict[str, Any]:
    """A YAML file as plain data, with names of files in it made relative to its directory. Raises ConfigError."""
    data = read_mapping(path, "groups")
    tenants = data.get("tenants")
    for tenant in tenants if isinstance(tenants, list) else ():
        work = tenant.get("work") if isinstance(tenant, dict) else None
        if isinstance(work, dict) and isinstance(work.get("path"), str):
            work["path"] = str(path.parent / work["path"])
    return data


def scenario_of_trace(path: Path, groups: dict[str, Any], *, speed: float = 1.0) -> SimulationScenario:
    """One tenant who sends what a trace has, to such groups. Raises ConfigError."""
    work = {
        "kind": "trace",
        "path": str(path),
        "format": trace_format(path),
        "speed": speed,
        "max_entries": MAX_REQUESTS,
    }
    tenant = {"name": "trace", "work": work, "arrivals": {"process": "trace"}}
    last_s = load_entries(Tenant.model_validate(tenant))[-1].at_s
    if last_s + 1 > MAX_SIMULATED_S:
        raise ConfigError(f"trace: {path} spans {last_s:.0f} s; at most {MAX_SIMULATED_S:.0f} s are simulated")
    data = {"name": path.name, "duration_s": last_s + 1, "drain_s": 3600.0, "tenants": [tenant]}
    return parse_scenario(data | {"groups": groups}, origin=str(path))


def trace_format(path: Path) -> str:
    """By its first line. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline(1 << 16)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace: {path} cannot be read: {error}") from error
    if first.lstrip().startswith("{"):
        return "mooncake"
    columns = {column.strip() for column in first.split(",")}
    if {"ContextTokens", "GeneratedTokens"} <= columns:
        return "azure"
    return "burstgpt" if {"Request tokens", "Response tokens"} <= columns else "csv"


def parse_scenario(data: dict[str, Any], *, origin: str) -> SimulationScenario:
    """Raises ConfigError that names each wrong field."""
    try:
        return SimulationScenario.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, SimulationScenario, origin)) from error
