"""The one reader of YAML and environment. Everything else is handed the frozen objects made here."""

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_parallel.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitsConfig(_Section):
    """Bounds on one client request. A request outside them is refused with INVALID_ARGUMENT."""

    max_choices: int = Field(8, ge=1, le=64, description="Most choices (n) of one request.")
    max_stop_strings: int = Field(4, ge=0, le=64)
    max_stop_string_bytes: int = Field(64, ge=1, le=4096)
    max_stop_token_ids: int = Field(16, ge=0, le=1024)
    max_logit_bias: int = Field(300, ge=0, le=4096)
    max_logprobs: int = Field(5, ge=0, le=20, description="Most alternatives for logprobs and prompt_logprobs.")
    max_chat_messages: int = Field(1024, ge=1, le=16384)
    max_continuations: int = Field(16, ge=1, le=256, description="Most continuations of one Score request.")
    max_prompts: int = Field(16, ge=1, le=256, description="Most prompts of one HTTP completion request.")
    max_message_bytes: int = Field(
        4 << 20, ge=1024, description="Largest gRPC message taken or sent, and largest HTTP body taken."
    )
    max_header_bytes: int = Field(32 << 10, ge=1024, description="Of one HTTP request, its first line included.")


class TlsConfig(_Section):
    """Certificates of both front ends (PEM files)."""

    certificate: Path = Field(description="Chain of the server's certificate, its own first.")
    private_key: Path
    client_ca: Path | None = Field(
        None, description="Clients must show a certificate that one of these has signed (mutual TLS)."
    )


class GatewayConfig(_Section):
    """The two front ends: gRPC, and HTTP in OpenAI's form."""

    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback only with keys, or insecure.")
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="Of gRPC. 0 picks a free port and reports it (for trials: every start of a gateway picks).",
    )
    http_port: int | None = Field(
        8000, ge=0, le=65535, description="Of HTTP. 0 picks a free port and reports it; null turns HTTP off."
    )
    insecure: bool = Field(False, description="Allow listening beyond loopback without keys.")
    tls: TlsConfig | None = Field(None, description="Serve both front ends over TLS.")
    reflection: bool = Field(True, description="Serve gRPC reflection.")
    max_concurrent_requests: int = Field(1024, ge=1, description="Requests that one gateway has open at a time.")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="How long running requests may go on after a stop is asked for."
    )
    retry_delay_s: float = Field(1.0, gt=0, description="When an overloaded or unavailable answer says to try again.")
    max_connections: int = Field(2048, ge=1, description="HTTP connections that one gateway has open at a time.")
    max_connections_per_address: int = Field(
        1024, ge=1, description="HTTP connections from one address; a proxy in front is one address."
    )
    max_grpc_connections: int = Field(1024, ge=1, description="gRPC connections that one gateway has open at a time.")
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        description="How long an HTTP request's headers, or a gRPC connection's first frame, may take to arrive.",
    )
    body_timeout_s: float = Field(30.0, gt=0, description="How long an HTTP request's body may take to arrive.")
    slow_reader_timeout_s: float = Field(
        30.0, gt=0, description="How long a client may leave its answer unread before the request is ended."
    )


class TenancyConfig(_Section):
    """Keys, quotas and metering. Without this section everybody is the tenant "default" and has no limits."""

    database: str = Field(
        "", description="SQLAlchemy URL; empty is a SQLite file beside the fetched models. PostgreSQL by its URL."
    )
    refresh_s: float = Field(
        1.0, gt=0, le=5, description="How often a gateway asks for changes of keys and of its leases."
    )


class AdminConfig(_Section):
    """What operators reach: packtrain.v1.Admin and /metrics, on ports of their own."""

    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback only with keys, or insecure.")
    port: int | None = Field(
        50052, ge=0, le=65535, description="Of packtrain.v1.Admin; needs tenancy. null turns it off."
    )
    metrics_port: int | None = Field(9464, ge=0, le=65535, description="Of Prometheus metrics. null turns them off.")


class ChatConfig(_Section):
    """How chat messages become tokens."""

    format: Literal["llama-2", "chatml"]
    default_system: str = Field("", description="System message used when a conversation brings none.")


class ModelEntry(_Section):
    """One served model and its replica groups."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    source: str = Field(min_length=1, description="A name that `packtrain fetch` knows, a directory, or a GGUF file.")
    tensor_parallel_size: int = Field(1, ge=1)
    num_groups: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["int8"] | None = Field(None, description="Keep weight matrices in eight bits a weight.")
    threads_per_rank: int = Field(1, ge=1, description="Threads of a CPU rank.")
    cpus_per_rank: float = Field(1.0, ge=0, description="CPUs that Ray sets aside for a rank.")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus answer; the model's own when unset.")
    kv_cache_tokens: int = Field(16384, ge=16, description="Tokens that a group's KV cache holds.")
    block_size: int = Field(16, ge=1, le=256)
    prefix_caching: bool = True
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(512, ge=1)
    max_prefill_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens of a step, but for tenants below their share; all that fit when unset.",
    )
    max_waiting_requests: int = Field(256, ge=1)
    max_waiting_tokens: int = Field(1 << 20, ge=1, description="Prompt tokens that may wait in a group.")
    start_timeout_s: float = Field(300.0, gt=0)
    step_timeout_s: float = Field(60.0, gt=0)
    chat: ChatConfig | None = Field(None, description="Recognised from the checkpoint when unset.")


class RayConfig(_Section):
    """The Ray cluster to run on."""

    address: str | None = Field(
        None, description='Unset starts a private one-node cluster; "auto" joins a running one.'
    )
    num_cpus: int | None = Field(
        None, ge=1, description="CPUs of the private cluster; what the groups need when unset."
    )


class ServingConfig(_Section):
    """One `packtrain serve`."""

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    tenancy: TenancyConfig | None = None
    admin: AdminConfig = AdminConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "ServingConfig":
        names = [m.name for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"models: the name {name!r} stands {names.count(name)} times; each model needs its own"
                )
        return self


def load_config(path: Path) -> ServingConfig:
    """Read a YAML file. Raises ConfigError naming each wrong field; an unknown key comes with the nearest known one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping with `models:`, not {type(data).__name__}")
    return parse_config(data, origin=str(path))


def parse_config(data: dict[str, Any], *, origin: str) -> ServingConfig:
    """Validate a configuration given as plain data; `origin` names it in errors. Raises ConfigError."""
    try:
        return ServingConfig.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        # A list with a wrong item is also said to be too short; the item is what matters.
        inner = [p for p in problems if not any(q["loc"][: len(p["loc"])] == p["loc"] != q["loc"] for q in problems)]
        lines = [_explain(problem["loc"], problem["type"], problem["msg"], problem["input"]) for problem in inner]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    where = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{where}: {message}" + ("" if kind == "missing" else f" (got {value!r:.80})")
    known = _fields_at(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


_SECTIONS: dict[str, type[_Section]] = {
    "": ServingConfig,
    "models": ModelEntry,
    "models.chat": ChatConfig,
    "gateway": GatewayConfig,
    "gateway.tls": TlsConfig,
    "limits": LimitsConfig,
    "tenancy": TenancyConfig,
    "admin": AdminConfig,
    "ray": RayConfig,
}


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    section = _SECTIONS.get(".".join(part for part in location if isinstance(part, str)))
    return sorted(section.model_fields) if section else []


def cache_directory() -> Path:
    """Where fetched models are kept: $PACKTRAIN_CACHE, else $XDG_CACHE_HOME/packtrain, else ~/.cache/packtrain."""
    if own := os.environ.get("PACKTRAIN_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "packtrain"


_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def api_key() -> str:
    """$PACKTRAIN_API_KEY, which the client commands send; "" when unset. Not a flag: process lists show those."""
    return os.environ.get("PACKTRAIN_API_KEY", "")


def log_level() -> str:
    """$PACKTRAIN_LOG_LEVEL, INFO when unset. Raises ConfigError."""
    level = os.environ.get("PACKTRAIN_LOG_LEVEL", "INFO").upper()
    if level not in _LOG_LEVELS:
        raise ConfigError(f"PACKTRAIN_LOG_LEVEL is {level!r} and must be one of {', '.join(_LOG_LEVELS)}")
    return level


def log_format() -> str:
    """$PACKTRAIN_LOG_FORMAT, "text" when unset. Raises ConfigError."""
    form = os.environ.get("PACKTRAIN_LOG_FORMAT", "text").lower()
    if form not in ("json", "text"):
        raise ConfigError(f"PACKTRAIN_LOG_FORMAT is {form!r} and must be json or text")
    return form


def tracing_is_on() -> bool:
    """An OTLP endpoint is set; OpenTelemetry's SDK reads it and the other OTEL_ variables by itself. Raises ConfigError."""
    if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in ("TRACES_", "")):
        return False
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name, "grpc")
        if protocol != "grpc":
            raise ConfigError(f"{name} is {protocol!r}; traces are sent by grpc alone")
    return True


def prepare_environment() -> None:
    """Set Ray's switches for this process and all that it starts; must run before ray is imported.

    Handles carry values instead of object references (ray.serve reads it at import). No usage reports are sent.
    """
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray forks its head from this process; gRPC's own fork handlers can leave the child hanging.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # A call that comes after the end must fail. Without this it starts a new cluster, which nobody would ever stop.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Serve's own log goes to its files; the terminal belongs to the command line.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
