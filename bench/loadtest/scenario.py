"""What a load test does, as plain validated data: tenants, their work, when it arrives, and the bounds of the whole."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bench.loadtest.targets import Target, parse_target
from model_parallel.errors import ConfigError
from serving.contracts.yaml_files import Section, explain_errors, read_mapping

MAX_DURATION_S = 7 * 24 * 3600.0
MAX_REQUESTS = 2_000_000
MAX_LENGTH = 1 << 20
MAX_PERIODS = 20_000
"""Bursts, or swings of a rate, within a run."""
MAX_SEED = 2**63 - 1
SHAREGPT_MEANS = {"input": 161.0, "output": 338.0}
"""Mean tokens of prompts and answers in ShareGPT (Kwon et al., PagedAttention, SOSP 2023, figure 11)."""

GRPC_APIS = ("generate-stream", "generate", "score")
HTTP_APIS = ("chat", "completions")


class Fixed(Section):
    """Always the same number."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1, le=MAX_LENGTH)


class Uniform(Section):
    """Every number from min to max is as likely as any other."""

    kind: Literal["uniform"]
    min: int = Field(ge=1, le=MAX_LENGTH)
    max: int = Field(ge=1, le=MAX_LENGTH)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and must not exceed max, {self.max}")
        return self


class LogNormal(Section):
    """exp of a normal distribution, with this mean; sigma is the deviation of the logarithm."""

    kind: Literal["lognormal"]
    mean: float = Field(gt=0, le=MAX_LENGTH)
    sigma: float = Field(1.0, ge=0, le=4)
    min: int = Field(1, ge=1, le=MAX_LENGTH)
    max: int = Field(MAX_LENGTH, ge=1, le=MAX_LENGTH)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and must not exceed max, {self.max}")
        return self


class ShareGptLike(Section):
    """Log-normal with the mean of ShareGPT's prompts (161) or answers (338), sigma 1."""

    kind: Literal["sharegpt"]
    max: int = Field(2048, ge=1, le=MAX_LENGTH)


def _number_is_fixed(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "tokens": value} if is_number else value


Lengths = Annotated[
    Annotated[Fixed | Uniform | LogNormal | ShareGptLike, Field(discriminator="kind")],
    BeforeValidator(_number_is_fixed),
]
"""How many tokens; a bare number is fixed."""


class Prefix(Section):
    """Beginnings that requests share: each request takes one of `count` prefixes of `tokens` tokens."""

    tokens: int = Field(ge=1, le=MAX_LENGTH)
    count: int = Field(1, ge=1, le=100_000)


class Turns(Section):
    """A session: each turn sends all that was said before, and waits for the answer and the think time in between."""

    count: Lengths = Fixed(tokens=1)
    think_s: float = Field(0.0, ge=0, le=3600, description="Mean of an exponential distribution.")


class Synthetic(Section):
    """Random prompts."""

    kind: Literal["synthetic"] = "synthetic"
    input_tokens: Lengths = Fixed(tokens=128)
    output_tokens: Lengths = Fixed(tokens=128)
    prefix: Prefix | None = None
    turns: Turns = Turns()


class JsonLines(Section):
    """One request a line: `prompt` (text or token ids) or `messages`, and optionally `output_tokens` (or `max_tokens`)."""

    kind: Literal["jsonl"]
    path: Path
    output_tokens: Lengths = Fixed(tokens=128)
    max_entries: int = Field(50_000, ge=1, le=MAX_REQUESTS)


class ShareGpt(Section):
    """Conversations in ShareGPT's format: a JSON list of {conversations: [{from, value}, …]}."""

    kind: Literal["sharegpt"]
    path: Path
    output_tokens: Lengths = Fixed(tokens=128)
    max_turns: int = Field(
        1, ge=1, le=100, description="Questions of each conversation that are sent; answers are the server's."
    )
    think_s: float = Field(0.0, ge=0, le=3600)
    max_entries: int = Field(50_000, ge=1, le=MAX_REQUESTS)


class TraceColumns(Section):
    """Names of a CSV's columns."""

    timestamp: str = "timestamp"
    input_tokens: str = "input_tokens"
    output_tokens: str = "output_tokens"


class Trace(Section):
    """Requests as a log has them: their times and lengths; the text is random."""

    kind: Literal["trace"]
    path: Path
    format: Literal["azure", "burstgpt", "mooncake", "csv"]
    columns: TraceColumns = Field(default=TraceColumns(), description="Of format csv.")
    speed: float = Field(1.0, gt=0, le=10_000, description="2 replays it in half the time.")
    max_tokens: int = Field(MAX_LENGTH, ge=2, le=MAX_LENGTH, description="Prompt and answer are cut to this together.")
    max_entries: int = Field(200_000, ge=1, le=MAX_REQUESTS)


Work = Annotated[Synthetic | JsonLines | ShareGpt | Trace, Field(discriminator="kind")]


def _is_no_fraction_of_nothing(rate: float) -> float:
    if 0 < rate < MIN_RATE:
        raise ValueError(f"a rate must be 0, or {MIN_RATE:g} at least")
    return rate


MIN_RATE = 1e-9
"""One request in thirty years. The square of a rate is computed with."""
Rate = Annotated[float, Field(ge=0, le=1e6), AfterValidator(_is_no_fraction_of_nothing)]


class Stage(Section):
    """A stretch of time in which the rate goes straight from one value to another."""

    duration_s: float = Field(gt=0, le=MAX_DURATION_S)
    start: Rate = Field(description="Requests a second, or users, when it begins.")
    end: Rate | None = Field(None, description="When it ends; unset, the same.")


class Bursts(Section):
    """Every `every_s` the rate is `times` as high, for `length_s`."""

    every_s: float = Field(gt=0, le=MAX_DURATION_S)
    length_s: float = Field(gt=0, le=MAX_DURATION_S)
    times: float = Field(gt=0, le=1000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length_s >= self.every_s:
            raise ValueError(f"length_s is {self.length_s:g} and must be below every_s, {self.every_s:g}")
        return self


class Diurnal(Section):
    """The rate swings as a sine: rate · (1 + amplitude · sin), highest at peak_at_s of each period."""

    period_s: float = Field(86_400.0, gt=0, le=MAX_DURATION_S)
    amplitude: float = Field(0.5, ge=0, le=1)
    peak_at_s: float = Field(0.0, ge=0, le=MAX_DURATION_S)


class OpenLoop(Section):
    """Requests arrive whatever becomes of those before."""

    process: Literal["constant", "poisson", "gamma"]
    rate: float = Field(1.0, ge=MIN_RATE, le=1e6, description="Requests (sessions, with turns) a second on average.")
    burstiness: float = Field(
        1.0, ge=0.01, le=1000, description="Of gamma: 1 is Poisson; below it come bursts, above it is more even."
    )
    stages: list[Stage] = Field(default=[], max_length=1000, description="Instead of rate; the last value stays.")
    bursts: Bursts | None = None
    diurnal: Diurnal | None = None

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.process != "gamma" and "burstiness" in self.model_fields_set:
            raise ValueError(f"burstiness is of process gamma, not of {self.process}")
        if self.stages and "rate" in self.model_fields_set:
            raise ValueError("rate and stages exclude each other")
        if self.stages and not any(max(stage.start, stage.end or 0.0) for stage in self.stages):
            raise ValueError("stages hold no rate above 0")
        return self

    def check_periods(self, tenant: str, duration_s: float) -> None:
        """Raises ValueError when there are too many within a run: the rate is made of straight pieces, some for each of them."""
        for name, period_s in (
            ("bursts.every_s", self.bursts and self.bursts.every_s),
            ("diurnal.period_s", self.diurnal and self.diurnal.period_s),
        ):
            if period_s and duration_s / period_s > MAX_PERIODS:
                raise ValueError(
                    f"tenants: {tenant!r} has arrivals.{name} {period_s:g}; of a run of {duration_s:g} s it must be at least "
                    f"{duration_s / MAX_PERIODS:g}"
                )


class AtOnce(Section):
    """All requests are due when the run begins; max_concurrency then decides the pace."""

    process: Literal["once"]


class Closed(Section):
    """Users, each with one request after another."""

    process: Literal["closed"]
    users: int = Field(1, ge=1, le=100_000)
    think_s: float = Field(0.0, ge=0, le=3600, description="Mean pause (exponential) of a user between two sessions.")
    stages: list[Stage] = Field(default=[], max_length=1000, description="Instead of users; the last value stays.")

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.stages and "users" in self.model_fields_set:
            raise ValueError("users and stages exclude each other")
        if self.stages and not self.most_users:
            raise ValueError("stages hold no number of users above 0")
        return self

    @property
    def most_users(self) -> int:
        """At any time."""
        return self.users if not self.stages else math.ceil(max(max(s.start, s.end or 0.0) for s in self.stages))


class TraceTimes(Section):
    """Each request arrives when the trace says; needs work of kind trace."""

    process: Literal["trace"]


Arrivals = Annotated[OpenLoop | AtOnce | Closed | TraceTimes, Field(discriminator="process")]


class Retries(Section):
    """What a refused client does: it waits as long as the server told, and asks again. Without being told, it gives up."""

    max_attempts: int = Field(1, ge=1, le=100, description="1: nothing is sent again.")
    max_wait_s: float = Field(60.0, gt=0, le=3600, description="A longer wait than this is not waited for.")


class Slo(Section):
    """Bounds that a request must keep to count as good, in milliseconds."""

    ttft_ms: float | None = Field(None, gt=0)
    tpot_ms: float | None = Field(None, gt=0)
    e2el_ms: float | None = Field(None, gt=0)

    @property
    def bounds_s(self) -> dict[str, float]:
        return {name.removesuffix("_ms"): bound / 1e3 for name, bound in self if bound is not None}


class Tenant(Section):
    """One source of requests, with a key, a work and a rate of its own."""

    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    target: str = Field("grpc://127.0.0.1:50051", description="grpc://, grpcs://, http:// or https://.")
    api: Literal["generate-stream", "generate", "score", "chat", "completions"] | None = Field(
        None, description="generate-stream of a gRPC target and chat of an HTTP one when unset."
    )
    stream: bool = Field(True, description="Of HTTP: ask for a stream.")
    model: str | None = Field(None, description="Served model; needed when there are several.")
    form: Literal["ids", "text", "chat"] | None = Field(
        None, description="Form of synthetic prompts; ids when unset, where the API takes them."
    )
    vocab_size: int | None = Field(
        None,
        ge=2,
        le=1 << 24,
        description="Random token ids are below it. Unset, what the server tells; over HTTP, 30,000.",
    )
    api_key_env: str | None = Field(None, min_length=1, description="Environment variable with the key.")
    api_key_file: Path | None = Field(None, description="File that holds the key alone.")
    weight: float = Field(1.0, gt=0, description="The share it is due, for Jain's index and the service gap.")
    work: Work = Synthetic()
    arrivals: Arrivals = OpenLoop(process="poisson", rate=1.0)
    max_requests: int | None = Field(
        None, ge=1, le=MAX_REQUESTS, description="In all; of work with several turns, sessions."
    )
    max_concurrency: int | None = Field(None, ge=1, le=100_000, description="Requests under way at a time.")
    connections: int = Field(
        1, ge=1, le=1024, description="Of each process, over gRPC; HTTP has one for each request under way."
    )
    retries: Retries = Retries()
    slo: Slo = Slo()
    temperature: float = Field(0.0, ge=0, le=2)
    ignore_eos: bool = Field(
        True, description="Answers have exactly the length asked for. Servers of others may refuse it."
    )
    extra_body: dict[str, Any] = Field(default={}, description="Of HTTP: further fields of every request.")

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        parse_target(value)
        return value

    @field_validator("extra_body")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"it must hold nothing but what JSON has: {error}") from None
        return value

    @property
    def parsed_target(self) -> Target:
        return parse_target(self.target)

    @property
    def chosen_api(self) -> str:
        return self.api or ("generate-stream" if self.parsed_target.is_grpc else "chat")

    @property
    def chosen_form(self) -> str:
        return self.form or ("chat" if self.chosen_api == "chat" else "ids")

    @property
    def is_streamed(self) -> bool:
        """Answers come token by token, so that there are times of them."""
        return self.chosen_api == "generate-stream" or (not self.parsed_target.is_grpc and self.stream)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        allowed = GRPC_APIS if self.parsed_target.is_grpc else HTTP_APIS
        if self.chosen_api not in allowed:
            raise ValueError(f"api is {self.api!r}; target {self.target} takes {', '.join(allowed)}")
        if self.api_key_env and self.api_key_file:
            raise ValueError("api_key_env and api_key_file exclude each other")
        if self.parsed_target.is_grpc and (self.extra_body or not self.stream):
            raise ValueError("extra_body and stream are of HTTP targets; over gRPC api says whether to stream")
        if self.chosen_api == "chat" and self.chosen_form != "chat":
            raise ValueError(f"form is {self.form!r}; api chat takes chat alone")
        if not self.parsed_target.is_grpc and "connections" in self.model_fields_set:
            raise ValueError("connections is of gRPC targets; over HTTP each request under way has one")
        if self.chosen_api == "score" and {"temperature", "ignore_eos"} & self.model_fields_set:
            raise ValueError("temperature and ignore_eos are not of api score")
        if self.chosen_api == "completions" and self.chosen_form == "chat":
            raise ValueError("form is 'chat'; api completions takes ids or text")
        if isinstance(self.arrivals, TraceTimes) != isinstance(self.work, Trace):
            raise ValueError("arrivals of process trace and work of kind trace go together")
        if self.chosen_api == "score" and self.chosen_form == "chat":
            raise ValueError("form is 'chat'; api score takes ids or text")
        if self.chosen_api == "score" and (not isinstance(self.work, Synthetic | Trace) or has_turns(self.work)):
            raise ValueError("api score takes synthetic work or a trace, of one turn")
        return self


def has_turns(work: Work) -> bool:
    """A request may be followed by another of the same session."""
    if isinstance(work, Synthetic):
        return work.turns.count != Fixed(tokens=1)
    return isinstance(work, ShareGpt) and work.max_turns > 1


class Scenario(Section):
    """A whole load test."""

    name: str = Field("load", max_length=128)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    duration_s: float = Field(60.0, gt=0, le=MAX_DURATION_S, description="After that nothing new is sent.")
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="How long what is under way may go on; then it is cancelled."
    )
    timeout_s: float = Field(600.0, gt=0, le=24 * 3600, description="Deadline of each attempt.")
    warmup_s: float = Field(0.0, ge=0, le=MAX_DURATION_S, description="Cut from the beginning of what is measured.")
    cooldown_s: float = Field(0.0, ge=0, le=MAX_DURATION_S, description="Cut from the end of the arrivals.")
    warmup_requests: int = Field(0, ge=0, le=1000, description="Of each tenant and process, before the clock starts.")
    max_requests: int = Field(1_000_000, ge=1, le=MAX_REQUESTS, description="Of the whole run: a bound, not a setting.")
    max_in_flight: int = Field(
        8192, ge=1, le=200_000, description="Of the whole run: a bound, not a setting of the load."
    )
    tenants: list[Tenant] = Field(default=[Tenant()], min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _sane(self) -> Self:
        names = [tenant.name for tenant in self.tenants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tenants: the name {name!r} stands {names.count(name)} times; each needs its own")
        if self.warmup_s + self.cooldown_s >= self.duration_s:
            raise ValueError(
                f"warmup_s and cooldown_s are {self.warmup_s + self.cooldown_s:g} together and must be below "
                f"duration_s, {self.duration_s:g}"
            )
        for tenant in self.tenants:
            if isinstance(tenant.arrivals, AtOnce) and tenant.max_requests is None:
                raise ValueError(f"tenants: {tenant.name!r} sends all at once and so needs max_requests")
            if isinstance(tenant.arrivals, OpenLoop):
                tenant.arrivals.check_periods(tenant.name, self.duration_s)
        return self

    @property
    def is_open_loop(self) -> bool:
        """Some tenant's requests arrive whatever becomes of those before."""
        return any(not isinstance(tenant.arrivals, Closed) for tenant in self.tenants)


def read_scenario(path: Path) -> dict[str, Any]:
    """A scenario file as plain data, with file names made relative to its directory. Raises ConfigError."""
    data = read_mapping(path, "tenants")
    for tenant in data.get("tenants") or ():
        work = tenant.get("work") if isinstance(tenant, dict) else None
        for section, key in ((work, "path"), (tenant, "api_key_file")):
            if isinstance(section, dict) and isinstance(section.get(key), str):
                section[key] = str(path.parent / section[key])
    return data


def parse_scenario(data: dict[str, Any], *, origin: str) -> Scenario:
    """Raises ConfigError that names each wrong field."""
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, Scenario, origin)) from error


def with_rate(scenario: Scenario, rate: float) -> Scenario:
    """The same load with `rate` requests a second in all: every tenant's rate times the same number. Raises ConfigError."""
    total = sum(_rate_of(tenant) for tenant in scenario.tenants)
    tenants = []
    for tenant in scenario.tenants:
        assert isinstance(tenant.arrivals, OpenLoop)
        tenants.append(_with_arrivals(tenant, rate=tenant.arrivals.rate * rate / total))
    return scenario.model_copy(update={"tenants": tenants})


def _rate_of(tenant: Tenant) -> float:
    if not isinstance(tenant.arrivals, OpenLoop) or tenant.arrivals.stages:
        raise ConfigError(
            f"tenants: {tenant.name!r} has arrivals without one rate; a search or a sweep needs constant, poisson or gamma "
            "arrivals without stages"
        )
    return tenant.arrivals.rate


def _with_arrivals(tenant: Tenant, **changes: float) -> Tenant:
    """Raises ConfigError for what no scenario file may say either."""
    kind = type(tenant.arrivals)
    try:
        arrivals = kind.model_validate(tenant.arrivals.model_dump(exclude_unset=True) | changes)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, kind, f"arrivals of tenant {tenant.name!r}")) from error
    return tenant.model_copy(update={"arrivals": arrivals})


def with_seed(scenario: Scenario, number: int) -> Scenario:
    """The same load with other draws, for the number-th run. After the largest seed comes 0."""
    return scenario.model_copy(update={"seed": (scenario.seed + number) % (MAX_SEED + 1)})


def with_users(scenario: Scenario, users: int) -> Scenario:
    """The same closed loop with `users` in all, shared out as before. Raises ConfigError."""
    closed = []
    for tenant in scenario.tenants:
        if not isinstance(tenant.arrivals, Closed) or tenant.arrivals.stages:
            raise ConfigError(f"tenants: {tenant.name!r} has no fixed number of users; a sweep of users needs one")
        closed.append(tenant.arrivals)
    total, tenants, given = sum(arrivals.users for arrivals in closed), [], 0
    cumulative = 0
    for tenant, arrivals in zip(scenario.tenants, closed, strict=True):
        cumulative += arrivals.users
        share = round(users * cumulative / total) - given
        given += share
        if share < 1:
            raise ConfigError(f"{users} users leave none for tenant {tenant.name!r}")
        tenants.append(_with_arrivals(tenant, users=share))
    return scenario.model_copy(update={"tenants": tenants})
