"""The server's settings, and the one reader of its YAML file and of the environment. Everything else is handed the frozen
objects made here."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from model_parallel.directories import expand_home
from model_parallel.errors import ConfigError
from serving.contracts.addresses import is_loopback
from serving.contracts.yaml_files import Section, explain_errors, read_mapping

AUTO: Literal["auto"] = "auto"
"""Of settings that Packtrain chooses by itself: see serving/models/sizes.py."""


def _none_if_auto(value: object) -> object:
    return None if value == AUTO else value


def _host(value: object) -> object:
    """`[::1]`, as addresses are printed, is taken as `::1`."""
    is_bracketed = isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")
    return value.strip()[1:-1] if isinstance(value, str) and is_bracketed else value


Host = Annotated[str, Field(min_length=1), BeforeValidator(_host)]


FilePath = Annotated[Path, AfterValidator(expand_home)]
MAX_SECONDS = 24 * 24 * 3600.0
"""Of every length of time: gRPC and the system take them in milliseconds of 32 bits, which end after 24.8 days."""
Seconds = Annotated[float, Field(le=MAX_SECONDS)]


def _off_or_on(value: object) -> object:
    """YAML reads off and on, where they are not quoted, as false and true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class LimitsConfig(Section):
    """Bounds on one client request. A request outside them is refused with INVALID_ARGUMENT."""

    max_choices: int = Field(8, ge=1, le=64, description="Most choices (n) of one request.")
    max_stop_strings: int = Field(
        32, ge=0, le=64, description="OpenAI allows 4; code completion in editors sends a dozen."
    )
    max_stop_string_bytes: int = Field(64, ge=1, le=4096)
    max_stop_token_ids: int = Field(16, ge=0, le=1024)
    max_logit_bias: int = Field(300, ge=0, le=4096)
    max_logprobs: int = Field(5, ge=0, le=20, description="Most alternatives for logprobs and prompt_logprobs.")
    max_chat_messages: int = Field(1024, ge=1, le=16384)
    max_continuations: int = Field(16, ge=1, le=256, description="Most continuations of one Score request.")
    max_prompts: int = Field(16, ge=1, le=256, description="Most prompts of one HTTP completion request.")
    max_grammar_bytes: int = Field(
        64 << 10, ge=256, le=1 << 20, description="Largest JSON schema, regular expression, list of choices or grammar."
    )
    max_grammar_compile_s: float = Field(
        2.0, gt=0, le=60, description="Seconds of processor that compiling one may take in the gateway, rounded up."
    )
    max_tools: int = Field(128, ge=0, le=1024, description="Most functions (tools) of one request.")
    clamp_max_tokens: bool = Field(
        False,
        description="Answer with as many tokens as there is room for where max_tokens asks for more; else refuse.",
    )
    max_message_bytes: int = Field(
        4 << 20,
        ge=1024,
        le=(1 << 31) - 1,
        description="Largest gRPC message taken or sent, and largest HTTP body taken.",
    )
    max_header_bytes: int = Field(32 << 10, ge=1024, description="Of one HTTP request, its first line included.")


class TlsConfig(Section):
    """Certificates of both front ends (PEM files)."""

    certificate: FilePath = Field(description="Chain of the server's certificate, its own first.")
    private_key: FilePath
    client_ca: FilePath | None = Field(
        None, description="Clients must show a certificate that one of these has signed (mutual TLS)."
    )


class GatewayConfig(Section):
    """The two front ends: gRPC, and HTTP in OpenAI's form."""

    host: Host = Field("127.0.0.1", description="Address to listen on. Beyond loopback only with keys, or insecure.")
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
    max_concurrent_requests: int = Field(
        1024, ge=1, le=1_000_000, description="Requests that one gateway has open at a time."
    )
    drain_timeout_s: Seconds = Field(
        30.0, ge=0, description="How long running requests may go on after a stop is asked for."
    )
    retry_delay_s: Seconds = Field(1.0, gt=0, description="When an overloaded or unavailable answer says to try again.")
    max_connections: int = Field(2048, ge=1, description="HTTP connections that one gateway has open at a time.")
    max_connections_per_address: int = Field(
        1024, ge=1, description="HTTP connections from one address; a proxy in front is one address."
    )
    max_grpc_connections: int = Field(1024, ge=1, description="gRPC connections that one gateway has open at a time.")
    header_timeout_s: Seconds = Field(
        10.0,
        gt=0,
        description="How long an HTTP request's headers, or a gRPC connection's first frame, may take to arrive.",
    )
    body_timeout_s: Seconds = Field(30.0, gt=0, description="How long an HTTP request's body may take to arrive.")
    stream_keep_alive_s: float | None = Field(
        None,
        ge=1,
        le=300,
        description="After how long a silence an HTTP stream gets a comment. The first sends the status line, and what goes "
        "wrong from then on is an event. Unset is never, unless the client asks (x-packtrain-keep-alive-s).",
    )
    cors_allow_origins: tuple[str, ...] = Field(
        (),
        description='Web pages\' origins, such as "https://chat.example", that may use HTTP from browsers; "*" is all.',
    )
    slow_reader_timeout_s: Seconds = Field(
        30.0, gt=0, description="How long a client may leave its answer unread before the request is ended."
    )

    resume_key_file: FilePath | None = Field(
        None,
        description="File with at least 32 random bytes, the same on every node: the key of resume tokens. Unset, one is drawn "
        "that lives as long as the Ray cluster.",
    )

    @field_validator("cors_allow_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise ValueError(f"{origin!r} is no origin: scheme, host and port, as browsers send it, without a path")
        return origins


class TenancyConfig(Section):
    """Keys, quotas and metering. Without this section everybody is the tenant "default" and has no limits."""

    database: str = Field(
        "", description="SQLAlchemy URL; empty is a SQLite file beside the fetched models. PostgreSQL by its URL."
    )
    refresh_s: float = Field(
        1.0, gt=0, le=5, description="How often a gateway asks for changes of keys and of its leases."
    )


class AdminConfig(Section):
    """What operators reach: packtrain.v1.Admin and /metrics, on ports of their own."""

    host: Host = Field("127.0.0.1", description="Address to listen on. Beyond loopback only with keys, or insecure.")
    port: int | None = Field(50052, ge=0, le=65535, description="Of packtrain.v1.Admin. null turns it off.")
    metrics_port: int | None = Field(9464, ge=0, le=65535, description="Of Prometheus metrics. null turns them off.")


class ChatConfig(Section):
    """How chat messages become tokens."""

    format: Literal[
        "llama-2", "llama-3", "chatml", "zephyr", "phi-3", "vicuna", "mistral-v0.1", "mistral-v0.2", "mistral-v0.3",
        "custom", "none",
    ] = Field(description="custom: as the strings below say. none: the model has no chat.")  # fmt: skip
    default_system: str = Field("", description="System message used when a conversation brings none.")
    begin: str = Field(
        "", max_length=4096, description='Before everything. "{bos}" and "{eos}" stand for these tokens.'
    )
    system: str = Field("", max_length=4096, description='Around a system message, "{content}". Empty: there are none.')
    user: str = Field("", max_length=4096, description='Around a user message: "USER: {content}\\n".')
    assistant: str = Field("", max_length=4096, description="Around an answer that was given.")
    answer: str = Field("", max_length=4096, description="Opens the answer.")
    trim: bool = Field(False, description="Drop spaces around messages.")

    @model_validator(mode="after")
    def _strings_are_custom(self) -> "ChatConfig":
        strings = {name: getattr(self, name) for name in ("begin", "system", "user", "assistant", "answer", "trim")}
        if self.format != "custom":
            if given := [name for name, value in strings.items() if value]:
                raise ValueError(f"{', '.join(given)} can be set with format: custom alone, not {self.format}")
            return self
        for name in ("system", "user", "assistant"):
            text = strings[name]
            if (text or name != "system") and text.count("{content}") != 1:
                raise ValueError(f'{name} is {text!r:.80}; it must hold "{{content}}" once')
        return self


MAX_GROUPS = 4096
"""Of a model. A number with a digit too many is told at once, and not by what has no room for it."""


class AutoscalingConfig(Section):
    """How the number of a model's groups follows what is asked of it."""

    mode: Annotated[
        Literal["off", "advise", "on"],
        BeforeValidator(_off_or_on, json_schema_input_type=Literal["off", "advise", "on", False, True]),
    ] = Field("on", description="on: groups are started and stopped. advise: what would be done is told. off: neither.")
    min_groups: int = Field(1, ge=0, description="0: a model that nobody asks for has no group until somebody does.")
    max_groups: int = Field(ge=1, le=MAX_GROUPS)
    ttft_p99_s: Seconds = Field(2.0, gt=0, description="99 of 100 requests have their first token within this.")
    tpot_p99_s: Seconds = Field(
        0.1, gt=0, description="99 of 100 requests have each further token within this, on average over the request."
    )
    priority: int = Field(
        0, ge=-1000, le=1000, description="When autoscaler.max_ranks is reached, models of higher priority go first."
    )
    shrink_after_s: Seconds | None = Field(
        None,
        gt=0,
        description="How long fewer groups must have been enough before some are stopped; half of the measured start time, and "
        "30 s at least, when unset.",
    )
    cooldown_s: Seconds = Field(30.0, gt=0, description="The number changes its direction at most once in this time.")
    idle_s: Seconds = Field(
        600.0, gt=0, description="With min_groups 0: after how long without a request the last group is stopped."
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "AutoscalingConfig":
        if self.min_groups > self.max_groups:
            raise ValueError(f"min_groups is {self.min_groups} and max_groups {self.max_groups}")
        return self


MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
"""Of models and adapters."""
MAX_MODEL_NAME_LENGTH = 128
TENANT_ID = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
"""Of tenants, and of plans."""
MAX_TENANT_ID_LENGTH = 64


def repeated(names: Sequence[str]) -> str | None:
    """The first that stands there more than once."""
    return next((name for name in names if names.count(name) > 1), None)


class AdapterEntry(Section):
    """One LoRA adapter, which is served under a name of its own."""

    name: str = Field(min_length=1, max_length=MAX_MODEL_NAME_LENGTH, pattern=MODEL_NAME)
    source: FilePath = Field(description="A directory in PEFT's format, readable on every node that hosts a rank.")
    tenants: tuple[Annotated[str, Field(max_length=MAX_TENANT_ID_LENGTH, pattern=TENANT_ID)], ...] | None = Field(
        None, min_length=1, description="Ids of the tenants to whom it exists. Unset: all."
    )

    @field_validator("tenants")
    @classmethod
    def _are_different(cls, tenants: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tenants is not None and (twice := repeated(tenants)) is not None:
            raise ValueError(f"{twice!r} stands in it more than once")
        return tenants


class LoraConfig(Section):
    """LoRA adapters of one model. With this section they can also be added and removed while the server runs."""

    adapters: tuple[AdapterEntry, ...] = Field((), description="Served from the start.")
    max_loaded: int = Field(
        16, ge=1, le=1024, description="Adapters that the ranks hold at a time; the others wait on the disk."
    )
    max_bytes: int = Field(512 << 20, ge=1, description="Memory of each rank for these, set aside from the start.")
    host_cache_bytes: int = Field(
        0,
        ge=0,
        description="More memory of each rank's host for adapters that were dropped, so that they come back sooner.",
    )


MODEL_SOURCES = ("source", "draft_model")
"""Fields of an entry of `models` that name a model: one that `packtrain fetch` knows, a directory, or a GGUF file."""
_LEAST_SHARE = 0.0001
"""Of a CPU, that Ray counts."""


class ModelEntry(Section):
    """One served model and its replica groups."""

    name: str = Field(min_length=1, max_length=MAX_MODEL_NAME_LENGTH, pattern=MODEL_NAME)
    source: str = Field(min_length=1, description="A name that `packtrain fetch` knows, a directory, or a GGUF file.")
    tensor_parallel_size: int = Field(1, ge=1)
    num_groups: int = Field(1, ge=1, le=MAX_GROUPS, description="With autoscaling: to begin with.")
    autoscaling: AutoscalingConfig | None = Field(None, description="Unset: there are num_groups.")
    device: Literal["auto", "cpu", "cuda"] = Field(AUTO, description="auto: cuda where there is a GPU for every rank.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        AUTO, description="auto: the checkpoint's own; bfloat16 where the device cannot compute in that."
    )
    quantization: Annotated[Literal["int8", "fp8", "packed", "none"] | None, BeforeValidator(_none_if_auto)] = Field(
        None,
        description="int8: keep weight matrices in eight bits a weight; fp8: the layers' in e4m3, and multiply in it, on GPUs of "
        "compute capability 8.9 or newer; packed: as the checkpoint has quantised them; none: "
        "dequantised, in dtype. auto, or unset: packed on CPUs where the checkpoint is quantised, and else none.",
    )
    deterministic: bool = Field(
        False,
        description="true: an answer has the same bits whatever else is computed, on GPUs too, where that is slower; refused "
        "where it cannot be. CPUs always compute so.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        AUTO, description="auto: that of dtype; fp8: e4m3, half of 16 bits, on GPUs of compute capability 8.9 or newer."
    )
    threads_per_rank: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None,
        ge=1,
        le=1024,
        description="Threads of a CPU rank. auto, or unset: this machine's CPUs, shared by all ranks.",
    )
    cpus_per_rank: float = Field(
        1.0,
        ge=0,
        description="CPUs that Ray sets aside for a rank: 0, or at least 0.0001, which is the least that Ray counts.",
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus answer; the model's own when unset.")
    kv_cache_tokens: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=16, description="Tokens that a group's KV cache holds. auto, or unset: what free memory has room for."
    )
    memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Part of a GPU's free memory that weights, a step and an automatic KV cache may take.",
    )
    block_size: int = Field(16, ge=1, le=256)
    prefix_caching: bool = True
    max_num_seqs: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=1, description="Sequences that run at a time. auto, or unset: 64 on a CPU, 256 on a GPU."
    )
    max_num_batched_tokens: Annotated[int | None, BeforeValidator(_none_if_auto)] = Field(
        None, ge=1, description="Tokens of one step. auto, or unset: 512 on a CPU, 2048 on a GPU."
    )
    max_prefill_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens of a step, but for tenants below their share; all that fit when unset.",
    )
    speculation: Annotated[
        Literal["auto", "off", "prompt_lookup"],
        BeforeValidator(_off_or_on, json_schema_input_type=Literal["auto", "off", "prompt_lookup", False]),
    ] = Field(
        "auto",
        description="Tokens that a sequence has had before are computed together with its last one, where that pays. auto: "
        "where no bit of an answer depends on it.",
    )
    draft_model: str | None = Field(
        None,
        min_length=1,
        description="A smaller model with the same vocabulary, which guesses the next tokens: a known name, a directory, or a "
        "GGUF file. Rank 0 holds it. On CPUs, with speculation auto.",
    )
    max_waiting_requests: int = Field(256, ge=1, le=1_000_000)
    max_waiting_tokens: int = Field(1 << 20, ge=1, le=1 << 40, description="Prompt tokens that may wait in a group.")
    start_timeout_s: Seconds = Field(300.0, gt=0)
    step_timeout_s: Seconds = Field(60.0, gt=0)
    lora: LoraConfig | None = Field(None, description="Serve LoRA adapters of the model. Unset: it takes none.")
    allow_parse_special: bool = Field(
        False,
        description="Let requests that set parse_special have control tokens read in their text. Whoever may send text to "
        "such a caller can then forge roles and ends of turns.",
    )
    structured_output: bool = Field(
        True, description="Let requests say what form an answer must have: JSON schemas, tools, grammars."
    )
    max_grammars: int = Field(
        64, ge=1, le=4096, description="Compiled grammars that each rank keeps, with structured_output."
    )
    chat: ChatConfig | None = Field(None, description="Read out of the checkpoint's own template when unset.")
    generation_config: Literal["auto", "vllm-like", "none"] = Field(
        "auto",
        description="What requests that leave sampling fields unset get. auto: temperature, top_p, top_k and min_p of the "
        "checkpoint's generation_config.json where it says do_sample: true, and repetition_penalty; vllm-like: all of them "
        "whatever do_sample says, and max_new_tokens; none: neutral values.",
    )

    @field_validator("cpus_per_rank")
    @classmethod
    def _can_be_counted(cls, num_cpus: float) -> float:
        if 0 < num_cpus < _LEAST_SHARE:
            raise ValueError(f"must be 0, or at least {_LEAST_SHARE:g}, which is the least that Ray counts")
        return num_cpus

    @model_validator(mode="after")
    def _begins_within_bounds(self) -> "ModelEntry":
        scaling = self.autoscaling
        if scaling and scaling.mode != "off" and not scaling.min_groups <= self.num_groups <= scaling.max_groups:
            raise ValueError(
                f"num_groups is {self.num_groups}; it must lie between autoscaling's min_groups {scaling.min_groups} and "
                f"max_groups {scaling.max_groups}"
            )
        return self

    @model_validator(mode="after")
    def _a_step_holds_every_sequence(self) -> "ModelEntry":
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        if num_seqs is not None and num_tokens is not None and num_tokens < num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {num_tokens} and max_num_seqs {num_seqs}; a step must have room for a token of each "
                "sequence that runs"
            )
        return self

    @model_validator(mode="after")
    def _draft_model_is_used(self) -> "ModelEntry":
        if self.draft_model is not None and self.speculation != "auto":
            raise ValueError(f"speculation is {self.speculation}, and draft_model needs auto")
        if self.draft_model is not None and self.device == "cuda":
            raise ValueError("device is cuda, and draft_model works on CPUs alone")
        return self

    @model_validator(mode="after")
    def _products_can_be_deterministic(self) -> "ModelEntry":
        if self.deterministic and self.quantization == "fp8":
            raise ValueError(
                "deterministic is true, and quantization fp8, whose products depend on what else is in a step"
            )
        return self

    @property
    def kept_quantization(self) -> Literal["int8", "fp8", "packed", ""]:
        """As ParallelConfig wants it."""
        return "" if self.quantization is None or self.quantization == "none" else self.quantization

    @property
    def kept_kv_cache_dtype(self) -> Literal["fp8", ""]:
        """As ParallelConfig wants it."""
        return "fp8" if self.kv_cache_dtype == "fp8" else ""

    @property
    def is_scaled(self) -> bool:
        """The autoscaler looks after it, if only to advise."""
        return self.autoscaling is not None and self.autoscaling.mode != "off"

    @property
    def most_groups(self) -> int:
        """That there can be."""
        scales = self.autoscaling is not None and self.autoscaling.mode == "on"
        return self.autoscaling.max_groups if self.autoscaling and scales else self.num_groups


class RayConfig(Section):
    """The Ray cluster to run on."""

    address: str | None = Field(
        None, min_length=1, description='Unset starts a private one-node cluster; "auto" joins a running one.'
    )
    num_cpus: int | None = Field(
        None, ge=1, description="CPUs of the private cluster; what the groups need when unset."
    )
    detached: bool = Field(
        False,
        description="Of a joined cluster: what was deployed goes on when the command ends, and the next one takes it over.",
    )
    wait_for_nodes_s: Seconds = Field(
        0.0,
        ge=0,
        description="Of a cluster that is joined: how long to wait for the nodes that the groups need; one that scales itself is "
        "asked for them.",
    )

    spare_processes: bool = Field(
        True,
        description="Of a private cluster: keep idle processes that have imported what a group needs, as many as the largest "
        "group has: a lost group is back sooner, for some 0.4 GB each.",
    )
    num_gateways: int | None = Field(
        None,
        ge=1,
        description="Of a joined cluster: so many gateways, on nodes with the resource packtrain_gateway. Unset: on every node.",
    )

    @model_validator(mode="after")
    def _belongs_to_a_joined_cluster(self) -> "RayConfig":
        if self.address is None and (self.detached or self.wait_for_nodes_s or self.num_gateways):
            raise ValueError(
                "detached, wait_for_nodes_s and num_gateways need ray.address; a private cluster has one node"
            )
        of_a_private_one = ("num_cpus", "spare_processes")
        if self.address is not None and (given := [name for name in of_a_private_one if name in self.model_fields_set]):
            raise ValueError(f"{' and '.join(given)} cannot be set with ray.address: it is of a private cluster")
        return self


class AutoscalerConfig(Section):
    """Of all models that have autoscaling."""

    period_s: float = Field(5.0, ge=1, le=60, description="How often groups and gateways are looked at.")
    max_ranks: int | None = Field(
        None,
        ge=1,
        description="Ranks that the groups of these models may have together: GPUs, or on CPUs processes. Those to begin with "
        "must fit. Unset: the sum of what max_groups allows.",
    )


class ServingConfig(Section):
    """One `packtrain serve`."""

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    tenancy: TenancyConfig | None = None
    admin: AdminConfig = AdminConfig()
    ray: RayConfig = RayConfig()
    autoscaler: AutoscalerConfig = AutoscalerConfig()

    @property
    def serves_admin(self) -> bool:
        """Whether there is a packtrain.v1.Admin. Without tenancy it serves this machine alone."""
        return self.admin.port is not None and (self.tenancy is not None or is_loopback(self.admin.host))

    @model_validator(mode="after")
    def _groups_fit_into_max_ranks(self) -> "ServingConfig":
        begun = {
            m.name: m.num_groups * m.tensor_parallel_size
            for m in self.models
            if m.autoscaling is not None and m.autoscaling.mode != "off"
        }
        max_ranks = self.autoscaler.max_ranks
        if max_ranks is not None and sum(begun.values()) > max_ranks:
            each = ", ".join(f"{num_ranks} of {name!r}" for name, num_ranks in begun.items())
            raise ValueError(
                f"autoscaler.max_ranks is {max_ranks}, and the groups to begin with have {sum(begun.values())} ranks ({each}); "
                "raise it, or lower num_groups"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> "ServingConfig":
        names = [m.name for m in self.models]
        names += [adapter.name for m in self.models if m.lora for adapter in m.lora.adapters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"models: the name {name!r} stands {names.count(name)} times; each model and adapter needs its own"
                )
        return self


def load_config(path: Path) -> ServingConfig:
    """Read a YAML file. Raises ConfigError naming each wrong field; an unknown key comes with the nearest known one."""
    return parse_config(read_mapping(path, "models"), origin=str(path))


def parse_config(data: dict[str, Any], *, origin: str) -> ServingConfig:
    """Validate a configuration given as plain data; `origin` names it in errors. Raises ConfigError."""
    try:
        return ServingConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, ServingConfig, origin)) from error


_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def api_key() -> str:
    """$PACKTRAIN_API_KEY, which the client commands send; "" when unset. Not a flag: process lists show those. Raises
    ConfigError."""
    return plain_key(os.environ.get("PACKTRAIN_API_KEY", ""), "PACKTRAIN_API_KEY")


def plain_key(text: str, field: str) -> str:
    """An API key without the line break that files and secrets often end with. Raises ConfigError, without the key in it."""
    key = text.strip()
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{field} holds a space, or a character that is not ASCII; no key has one")
    return key


def environment_key(variable: str, field: str) -> str:
    """The API key in an environment variable that `field` names. Raises ConfigError when it is not set."""
    if not (key := plain_key(os.environ.get(variable, ""), variable)):
        raise ConfigError(f"{field} is {variable!r}, which is not set in the environment")
    return key


LOAD_SECRET_VARIABLE = "PACKTRAIN_LOAD_SECRET"


def load_test_secret() -> str:
    """$PACKTRAIN_LOAD_SECRET, which the machines of one load test share; "" when unset."""
    return os.environ.get(LOAD_SECRET_VARIABLE, "")


def ray_address() -> str | None:
    """$RAY_ADDRESS, which KubeRay sets in its pods; None when unset. For commands about the node that they run on."""
    return os.environ.get("RAY_ADDRESS") or None


def log_level() -> str:
    """$PACKTRAIN_LOG_LEVEL, INFO when unset or empty. Raises ConfigError."""
    level = (os.environ.get("PACKTRAIN_LOG_LEVEL") or "INFO").upper()
    if level not in _LOG_LEVELS:
        raise ConfigError(f"PACKTRAIN_LOG_LEVEL is {level!r} and must be one of {', '.join(_LOG_LEVELS)}")
    return level


def log_format() -> str:
    """$PACKTRAIN_LOG_FORMAT, "text" when unset or empty. Raises ConfigError."""
    form = (os.environ.get("PACKTRAIN_LOG_FORMAT") or "text").lower()
    if form not in ("json", "text"):
        raise ConfigError(f"PACKTRAIN_LOG_FORMAT is {form!r} and must be json or text")
    return form


def tracing_is_on() -> bool:
    """An OTLP endpoint is set; OpenTelemetry's SDK reads it and the other OTEL_ variables by itself. Raises ConfigError."""
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in ("TRACES_", "")):
        return False
    # What is set for traces counts before what is set for all signals, and what is empty is not set.
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next(filter(os.environ.get, names), None)
    if name is not None and os.environ[name] != "grpc":
        raise ConfigError(f"{name} is {os.environ[name]!r}; traces are sent by grpc alone")
    return True
