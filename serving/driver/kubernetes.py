"""What a configuration takes on Kubernetes: machines, GPUs, memory and time, by the arithmetic of model_parallel/memory.py.

Pure: from a configuration and a kind of machine to values of the chart helm/packtrain, and from values to what is wrong there.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.placement import GroupRequest, NodeResources, plan_groups
from model_parallel.checkpoint.detect import describe
from model_parallel.config import ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.gpus import check_multiplies_fp8
from model_parallel.memory import (
    DEVICE_RESERVE_BYTES,
    DEVICES,
    GIB,
    Device,
    DraftMemory,
    GroupMemory,
    Workload,
    draft_memory,
    kv_cache_tokens,
    plan_group,
)
from serving.config import AUTO, MODEL_SOURCES, ModelEntry, ServingConfig, parse_config
from serving.driver.chart_values import chart_defaults, charts_own, schema_problems, with_defaults
from serving.models.fetch import KNOWN_MODELS
from serving.models.known_llama import KNOWN_CONFIGS, known_config
from serving.models.sizes import LEADER_BYTES, RANK_BYTES, STACK_BYTES, with_step_sizes, workload_of

STOP_MARGIN_S = 45
"""Between the end of the drain and the end of the pod: leaders end (30 s at most), and Ray (15 s)."""
_MARGIN = 1.25
_NODE_BYTES = STACK_BYTES
"""Of Ray itself on a node."""
_GPU_RANK_HOST_BYTES = 4 * GIB
"""Host memory of a rank on a GPU: CUDA's context, pinned buffers, a file's pages while it loads."""
_CPUS_PER_GPU = 8
_SHM_PER_GPU_BYTES = 8 * GIB
_CPU_CACHE_TOKENS = 16384
"""Planned for a group on CPUs whose cache is left to be chosen."""
IMAGE_MODELS = "/opt/packtrain/models"
"""Where the image has the models that `packtrain fetch` knows."""
MOUNTED_MODELS = "/models"
"""Where the chart mounts weights."""
# As helm/packtrain/templates/_validate.tpl has it.
_LLAMA_2 = re.compile(r"llama[-_ ]?2(\.?[^0-9.]|\.?$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One node. What is None is worked out."""

    num_gpus: int
    gpu: Device | None
    num_cpus: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """One model's groups on such machines."""

    entry: ModelEntry
    memory: GroupMemory

    @property
    def cache_tokens(self) -> int:
        """What was asked for; else all that fits on a GPU, and a moderate number on CPUs."""
        if self.entry.kv_cache_tokens is not None:
            return self.entry.kv_cache_tokens
        if self.entry.device == "cuda":
            return self.memory.kv_tokens
        return max(_CPU_CACHE_TOKENS, self.memory.workload.max_model_len)

    @property
    def rank_bytes(self) -> int:
        """What the fullest rank needs: weights, one step, and the cache."""
        return max(
            rank.weight_bytes + rank.activation_bytes + rank.kv_bytes_per_token * self.cache_tokens
            for rank in self.memory.ranks
        )

    @property
    def group_bytes(self) -> int:
        return self.rank_bytes * len(self.memory.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterPlan:
    """All groups on machines of one kind."""

    machine: Machine
    """With nothing left to be worked out."""
    models: tuple[ModelPlan, ...]
    num_hosts: int
    """Machines of one replica of the worker group."""
    num_replicas: int
    shm_bytes: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether values can work, with the numbers."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


def model_configs(config: ServingConfig, same_as: Mapping[str, str]) -> dict[str, ModelConfig]:
    """By name of each served model: of its files, of the known model that it is said to be, or of its source's name.

    Raises ConfigError for a model of which nothing is known here.
    """
    if unknown := sorted(set(same_as) - {entry.name for entry in config.models}):
        raise ConfigError(f"--same-as names {', '.join(unknown)}, which the configuration does not serve")
    found = {}
    for entry in config.models:
        known = _model_config(entry, same_as.get(entry.name))
        if known is None:
            raise ConfigError(
                f"models.{entry.name}: {entry.source} is not here; say which known model has its sizes: "
                f"--same-as {entry.name}=llama-2-7b-chat"
            )
        found[entry.name] = known
    return found


def _model_config(entry: ModelEntry, same_as: str | None) -> ModelConfig | None:
    if same_as is not None:
        return known_config(same_as)
    source = Path(entry.source)
    in_image = source.parent.name if source.is_relative_to(IMAGE_MODELS) else entry.source
    path = KNOWN_MODELS[in_image].path if in_image in KNOWN_MODELS else source
    if path.exists():
        return describe(path).config
    return KNOWN_CONFIGS.get(Path(entry.source).name.lower())


def plan(config: ServingConfig, machine: Machine, models: Mapping[str, ModelConfig]) -> ClusterPlan:
    """How many machines all groups take, and what each must have."""
    entries = [_decided(entry, has_gpus=machine.num_gpus > 0) for entry in config.models]
    plans = tuple(_plan_model(entry, models[entry.name], machine.gpu) for entry in entries)
    problems = [problem for entry in entries for problem in _fp8_problems(entry, machine.gpu)]
    problems += [problem for model in plans for problem in _memory_problems(model, machine.gpu)]
    on_gpu = [model for model in plans if model.entry.device == "cuda"]
    if on_gpu and not machine.num_gpus:
        names = ", ".join(model.entry.name for model in on_gpu)
        problems.append(f"{names}: device is cuda; say with --gpu and --gpus-per-node what machines there are")
        return ClusterPlan(
            machine=machine, models=plans, num_hosts=1, num_replicas=0, shm_bytes=GIB, problems=tuple(problems)
        )
    spans = [math.ceil(model.entry.tensor_parallel_size / machine.num_gpus) for model in on_gpu]
    num_hosts = max(spans, default=1)
    mixes = list(_mixes(entries, config.autoscaler.max_ranks))
    cpus = machine.num_cpus or max(_cpus_needed(plans, machine, mix) for mix in mixes)
    whole = replace(machine, num_cpus=cpus)
    needs = [_machines_needed(plans, whole, mix) for mix in mixes]
    problems += needs[0][1]  # each is of one group alone
    num_machines = max(number for number, _ in needs)
    shm_bytes = max(GIB, _SHM_PER_GPU_BYTES * machine.num_gpus)
    needed = max(_host_bytes(plans, machine, mix) for mix in mixes) + shm_bytes
    memory_bytes = machine.memory_bytes or math.ceil(needed / GIB) * GIB
    if memory_bytes < needed:
        problems.append(
            f"a machine has {memory_bytes / GIB:.0f} GiB of memory, and {needed / GIB:.1f} GiB are needed: ranks, Ray, /dev/shm"
        )
    return ClusterPlan(
        machine=replace(whole, memory_bytes=memory_bytes),
        models=plans,
        num_hosts=num_hosts,
        num_replicas=math.ceil(num_machines / num_hosts),
        shm_bytes=shm_bytes,
        problems=tuple(problems),
    )


def _decided(entry: ModelEntry, *, has_gpus: bool) -> ModelEntry:
    """With what is left to be chosen as it will be on such machines. Most checkpoints have 16 bits a weight."""
    changes: dict[str, str] = {}
    if entry.device == AUTO:
        changes["device"] = "cuda" if has_gpus else "cpu"
    if entry.dtype == AUTO:
        changes["dtype"] = "bfloat16"
    return with_step_sizes(entry.model_copy(update=changes))


def _plan_model(entry: ModelEntry, model: ModelConfig, gpu: Device | None) -> ModelPlan:
    host = Device(name="host", memory_bytes=1 << 62, bandwidth_bytes_per_s=math.inf)
    longest = min(model.max_position, entry.kv_cache_tokens or model.max_position)
    workload = replace(workload_of(entry, model), max_model_len=entry.max_model_len or longest)
    memory = plan_group(
        model,
        entry.tensor_parallel_size,
        dtype=entry.dtype,
        quantization=entry.kept_quantization,
        kv_cache_dtype=entry.kept_kv_cache_dtype,
        device=gpu if gpu is not None and entry.device == "cuda" else host,
        workload=workload,
        utilisation=entry.memory_utilization,
        draft=_draft_memory(entry, workload),
    )
    return ModelPlan(entry=entry, memory=memory)


def _draft_memory(entry: ModelEntry, workload: Workload) -> DraftMemory | None:
    """Raises ConfigError for a draft model of which nothing is known here."""
    if entry.draft_model is None:
        return None
    draft = _model_config(entry.model_copy(update={"source": entry.draft_model}), None)
    if draft is None:
        raise ConfigError(
            f"models.{entry.name}.draft_model: {entry.draft_model} is not here, so its memory is not known"
        )
    return draft_memory(draft, dtype=entry.dtype, max_num_seqs=workload.max_num_seqs)


def _fp8_problems(entry: ModelEntry, gpu: Device | None) -> Iterator[str]:
    settings = {"quantization": (entry.quantization, "int8"), "kv_cache_dtype": (entry.kv_cache_dtype, AUTO)}
    device = gpu if entry.device == "cuda" else Device(name="cpu", memory_bytes=0, bandwidth_bytes_per_s=math.inf)
    if device is None:
        return  # a lack of GPUs is told for all models at once
    for name, (value, instead) in settings.items():
        if value == "fp8":
            try:
                check_multiplies_fp8(f"models.{entry.name}.{name}", device.name, device.capability, instead=instead)
            except ConfigError as error:
                yield str(error)


def _memory_problems(model: ModelPlan, gpu: Device | None) -> Iterator[str]:
    if model.entry.device != "cuda" or gpu is None:
        return
    try:
        kv_cache_tokens(model.memory, model.entry.kv_cache_tokens)
    except ConfigError as error:
        yield f"{model.entry.name} does not fit {gpu.name}: {error}"
        return
    if model.entry.kv_cache_tokens is not None and model.rank_bytes + DEVICE_RESERVE_BYTES > gpu.memory_bytes:
        yield (
            f"{model.entry.name}: a rank needs {model.rank_bytes / GIB:.2f} GiB and "
            f"{DEVICE_RESERVE_BYTES / GIB:.2f} GiB of reserve, and {gpu.name} has {gpu.memory_bytes / GIB:.2f} GiB"
        )


Mix = Mapping[str, int]
"""How many groups there are of each model at a time."""


def _mixes(entries: Sequence[ModelEntry], max_ranks: int | None) -> Iterator[Mix]:
    """All that there may be of each; where models share autoscaler.max_ranks, one for each model that grows first."""
    most = {entry.name: entry.most_groups for entry in entries}
    scaled = [entry for entry in entries if entry.autoscaling is not None and entry.autoscaling.mode == "on"]
    if max_ranks is None or sum(most[e.name] * e.tensor_parallel_size for e in scaled) <= max_ranks:
        yield most
        return
    begun = {entry.name: entry.num_groups for entry in scaled}
    rest = max_ranks - sum(begun[entry.name] * entry.tensor_parallel_size for entry in scaled)
    for first in scaled:
        mix, free = most | begun, rest
        for entry in (first, *(other for other in scaled if other is not first)):
            more = max(0, min(most[entry.name] - begun[entry.name], free // entry.tensor_parallel_size))
            mix[entry.name] += more
            free -= more * entry.tensor_parallel_size
        yield mix


def _cpus_needed(plans: Iterable[ModelPlan], machine: Machine, mix: Mix) -> int:
    if machine.num_gpus:
        return _CPUS_PER_GPU * machine.num_gpus
    return math.ceil(sum(m.entry.cpus_per_rank * m.entry.tensor_parallel_size * mix[m.entry.name] for m in plans))


def _machines_needed(plans: Iterable[ModelPlan], machine: Machine, mix: Mix) -> tuple[int, list[str]]:
    """And groups that no machine holds. First fit, largest groups first. A group that spans machines takes whole ones."""
    problems = []
    free: list[tuple[float, float]] = []  # GPUs and CPUs
    size = (float(machine.num_gpus), float(machine.num_cpus or 0))
    whole = 0
    for model in sorted(plans, key=lambda m: -m.entry.tensor_parallel_size):
        entry = model.entry
        tp = entry.tensor_parallel_size
        takes = (float(tp), tp * entry.cpus_per_rank) if entry.device == "cuda" else (0.0, tp * entry.cpus_per_rank)
        if entry.device == "cuda" and tp > machine.num_gpus:
            whole += mix[entry.name] * math.ceil(tp / machine.num_gpus)
            continue
        if any(need > has for need, has in zip(takes, size, strict=True)):
            problems.append(
                f"{entry.name}: a group needs {takes[0]:g} GPUs and {takes[1]:g} CPUs, "
                f"and a machine has {size[0]:g} and {size[1]:g}"
            )
            continue
        for _ in range(mix[entry.name]):
            place = next((i for i, has in enumerate(free) if has[0] >= takes[0] and has[1] >= takes[1]), None)
            if place is None:
                free.append(size)
                place = len(free) - 1
            free[place] = (free[place][0] - takes[0], free[place][1] - takes[1])
    return whole + len(free), problems


def _host_bytes(plans: Iterable[ModelPlan], machine: Machine, mix: Mix) -> int:
    """Memory of a machine that is full: of ranks on CPUs all they hold, of ranks on GPUs what is left on the host."""
    on_cpu = [m for m in plans if m.entry.device == "cpu"]
    ranks = sum(mix[m.entry.name] * (m.group_bytes + len(m.memory.ranks) * RANK_BYTES + LEADER_BYTES) for m in on_cpu)
    gpus = machine.num_gpus * (_GPU_RANK_HOST_BYTES + RANK_BYTES)
    return math.ceil(_MARGIN * ranks) + gpus + _NODE_BYTES


def values(
    config: ServingConfig,
    plan: ClusterPlan,
    *,
    claim: str | None,
    accepts_licence: bool,
    tls_secret: str | None = None,
    database_secret: str | None = None,
) -> dict[str, Any]:
    """Values of the chart. `claim` is the volume claim with the weights; sources that are not in the image must lie in it.
    The Secrets hold what the configuration has in files and URLs. Raises ConfigError for what the chart has no place for."""
    machine = plan.machine
    drain_s = config.gateway.drain_timeout_s
    is_llama_2 = any(_LLAMA_2.search(f"{entry.name} {entry.source}") for entry in config.models)
    gpus = {"nvidia.com/gpu": machine.num_gpus} if machine.num_gpus else {}
    resources = {"cpu": str(machine.num_cpus), "memory": f"{(machine.memory_bytes or 0) // GIB}Gi"} | gpus
    made: dict[str, Any] = {
        "config": _chart_config(config),
        "terminationGracePeriodSeconds": max(
            chart_defaults()["terminationGracePeriodSeconds"], math.ceil(drain_s) + STOP_MARGIN_S
        ),
        "worker": {
            "groupName": "gpu" if machine.num_gpus else "cpu",
            "replicas": plan.num_replicas,
            "minReplicas": plan.num_replicas,
            "maxReplicas": plan.num_replicas,
            "numOfHosts": plan.num_hosts,
            "resources": {"requests": resources, "limits": dict(resources)},
            "shmSize": f"{plan.shm_bytes // GIB}Gi",
        },
    }
    if config.tenancy is not None and config.tenancy.database.startswith("postgresql"):
        made["gateway"] = {"replicas": 2}
        if database_secret is not None:
            made["database"] = {"passwordSecret": {"name": database_secret}}
        made["config"]["tenancy"]["database"] = _url_without_password(config.tenancy.database, database_secret)
    if config.tenancy is None and config.gateway.insecure:
        made["insecure"] = True
    if config.ray.num_gateways is not None:
        made["gateway"] = {"replicas": config.ray.num_gateways}
    if config.ray.wait_for_nodes_s:
        made["driver"] = {"waitForNodesSeconds": math.ceil(config.ray.wait_for_nodes_s)}
    if config.gateway.tls is not None:
        if tls_secret is None:
            raise ConfigError(
                "gateway.tls: the chart takes certificates from a Secret with tls.crt and tls.key; name it with --tls-secret"
            )
        made["tls"] = {
            "existingSecret": tls_secret,
            "requireClientCertificate": config.gateway.tls.client_ca is not None,
        }
    if is_llama_2:
        made["license"] = {"accept": accepts_licence}
    if claim is not None:
        made["weights"] = {"source": "pvc", "pvc": {"existingClaim": claim}}
    return made


def _chart_config(config: ServingConfig) -> dict[str, Any]:
    """The configuration without what is as usual and without what the chart decides. Raises ConfigError."""
    if config.gateway.resume_key_file is not None:
        raise ConfigError(
            f"gateway.resume_key_file is {config.gateway.resume_key_file}, and no file of this machine is in the pods; leave it "
            "out: a key is drawn that lives as long as the Ray cluster"
        )
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for section, key in charts_own():
        (data.get(section, {}) if section else data).pop(key, None)
    for section in ("gateway", "admin"):
        settings = data.get(section, {})
        if settings.get("host") != "::":  # the chart's is 0.0.0.0
            settings.pop("host", None)
        for key in _PORTS_THAT_MAY_BE_OFF & settings.keys():
            if settings[key] is None:
                settings[key] = False
        if not data.get(section, True):
            del data[section]
    for entry in data["models"]:
        if known := KNOWN_MODELS.get(entry["source"]):
            chat = {"format": known.chat_format, "default_system": known.chat_default_system}
            entry.setdefault("chat", chat)
        for key in MODEL_SOURCES:
            if known := KNOWN_MODELS.get(entry.get(key) or ""):
                # Pods fetch nothing: the NetworkPolicy would not let them, and the image has it.
                entry[key] = f"{IMAGE_MODELS}/{known.name}/{known.path.name}"
    if config.tenancy is None and config.gateway.insecure:
        data["tenancy"] = None  # else the chart keeps keys in SQLite
    return data


_PORTS_THAT_MAY_BE_OFF = frozenset(("http_port", "port", "metrics_port"))


def _url_without_password(url: str, secret: str | None) -> str:
    from serving.tenants.store.url import secrets_of, without_secrets  # noqa: PLC0415  # brings sqlalchemy

    if not (secrets := secrets_of(url)):
        return url
    if secrets != ("password",):
        raise ConfigError(
            f"tenancy.database has {', '.join(secrets)} in it, and the chart gives pods a password alone; use a client key "
            "without a passphrase, or leave the parameter out"
        )
    if secret is None:
        raise ConfigError(
            "tenancy.database has a password in it, which everybody who reads the ConfigMap would see; name a Secret that has it "
            "under the key `password` with --database-secret"
        )
    return without_secrets(url)


def explained(config: ServingConfig, plan: ClusterPlan) -> Iterator[str]:
    """The numbers that the plan was made of, a line each, and what the chart adds of its own."""
    if config.tenancy is None and not config.gateway.insecure:
        yield "the configuration has no tenancy, and the chart keeps keys in SQLite: requests need one"
    for model in plan.models:
        yield from _elsewhere(model.entry)
    for model in plan.models:
        entry, ranks = model.entry, model.memory.ranks
        weights = max(rank.weight_bytes for rank in ranks)
        cache = max(rank.kv_bytes_per_token for rank in ranks) * model.cache_tokens
        yield (
            f"{entry.name}: {entry.most_groups} groups of {len(ranks)} ranks; a rank holds {weights / GIB:.2f} GiB of weights "
            f"and {cache / GIB:.2f} GiB of KV cache for {model.cache_tokens} tokens"
        )
        if entry.device == "cuda" and model.memory.fits:
            yield f"{entry.name}: {model.memory.kv_tokens} tokens of KV cache would fit"
    machine = plan.machine
    kind = f"{machine.num_gpus} {machine.gpu.name}" if machine.gpu else "no GPU"
    yield (
        f"{plan.num_replicas * plan.num_hosts} machines with {kind}, {machine.num_cpus} CPUs and "
        f"{(machine.memory_bytes or 0) / GIB:.0f} GiB of memory"
    )


def worker_groups(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chart's groups of nodes, each whole: what one leaves out is as in `worker`, what it gives replaces that. `whole` has
    the chart's own values too."""
    first = whole["worker"]
    more = whole.get("additionalWorkerGroups") or {}
    return [first, *(first | {"groupName": name} | own for name, own in sorted(more.items()))]


_PRODUCTS = (
    (re.compile(r"A100.*80GB"), "a100-80g"),
    (re.compile(r"A100.*40GB"), "a100-40g"),
    (re.compile(r"H100"), "h100"),
    (re.compile(r"H200"), "h200"),
)


def group_device(group: Mapping[str, Any]) -> Device | None:
    """The GPU that a group's node selector names, as the GPU operator labels nodes."""
    product = (group.get("nodeSelector") or {}).get("nvidia.com/gpu.product", "")
    name = next((name for pattern, name in _PRODUCTS if pattern.search(product)), None)
    return DEVICES[name] if name else None


def check(given: Mapping[str, Any], gpu: Device | None, same_as: Mapping[str, str]) -> Verdict:
    """Whether these values can work, over the chart's own. `gpu` where node selectors do not tell. Raises ConfigError for a wrong
    configuration."""
    whole = with_defaults(given)
    told = schema_problems(whole)
    if problems := [f"{path}: {text}" for path, text in told if not path.startswith("config.")]:
        return Verdict(lines=(), problems=tuple(problems))
    config = _config_of(whole["config"])
    groups = worker_groups(whole)
    lines: list[str] = []
    problems = [*_timing_problems(whole, config), *_rule_problems(whole, config)]
    # Of what the server takes and the chart does not, in the schema's words where there are no better ones.
    problems = problems or [f"{path}: {text}" for path, text in told]
    for group in groups:
        lines.append(_group_line(group))
        problems += _count_problems(group)
        problems += _resource_problems(group)
    has_gpus = any(_gpus_of(group) for group in groups)
    entries = [_decided(entry, has_gpus=has_gpus) for entry in config.models]
    problems += _placement_problems(
        entries, groups, whole["ray"]["autoscaling"]["enabled"], config.autoscaler.max_ranks
    )
    for entry in entries:
        lines += _elsewhere(entry)
        known = _model_config(entry, same_as.get(entry.name))
        if known is None:
            lines.append(
                f"{entry.name}: memory not checked, {entry.source} is not here; --same-as {entry.name}=… names its like"
            )
            continue
        fitting = [group for group in groups if _ranks_of(group, entry) >= 1]
        devices = {device.name: device for group in fitting if (device := group_device(group) or gpu)}
        if entry.device == "cuda" and not devices:
            lines.append(f"{entry.name}: memory not checked, no node selector names a GPU; --gpu does")
        for device in devices.values() if entry.device == "cuda" else (None,):
            model = _plan_model(entry, known, device)
            problems += _memory_problems(model, device)
            lines.append(_model_line(model, device))
            if entry.device == "cpu":
                problems += _host_problems(model, fitting)
    return Verdict(lines=tuple(lines), problems=tuple(problems))


def _config_of(data: Mapping[str, Any]) -> ServingConfig:
    """What the server reads of the chart's `config`. Raises ConfigError."""
    read = dict(data)
    for section, key in charts_own():
        settings = data.get(section) if section else data
        if isinstance(settings, dict) and key in settings:
            raise ConfigError(f"config.{section + '.' if section else ''}{key} is the chart's to set; leave it out")
    for section in ("gateway", "admin"):
        if isinstance(settings := data.get(section), dict):
            off = {key: None for key in _PORTS_THAT_MAY_BE_OFF & settings.keys() if settings[key] is False}
            read[section] = settings | off
    return parse_config(read, origin="config")


def _timing_problems(whole: Mapping[str, Any], config: ServingConfig) -> Iterator[str]:
    grace_s = whole["terminationGracePeriodSeconds"]
    needed_s = math.ceil(config.gateway.drain_timeout_s) + STOP_MARGIN_S
    if grace_s < needed_s:
        yield f"terminationGracePeriodSeconds is {grace_s}, and draining needs {needed_s}"


def _rule_problems(whole: Mapping[str, Any], config: ServingConfig) -> Iterator[str]:
    if config.tenancy is None and not whole["insecure"]:
        yield "config.tenancy is null, so there are no keys, and insecure is not true"
    gateways = whole["gateway"]["replicas"]
    if config.tenancy is not None and gateways > 1 and not config.tenancy.database.startswith("postgresql"):
        yield f"gateway.replicas is {gateways}, and SQLite serves one machine: config.tenancy.database must be PostgreSQL"
    fields: dict[int, str] = {}
    for section, key in (("gateway", "port"), ("gateway", "http_port"), ("admin", "port"), ("admin", "metrics_port")):
        name, port = f"config.{section}.{key}", getattr(getattr(config, section), key)
        if port == 0:
            yield f"{name} is 0; the ports of pods must be known, from 1 to 65535"
        elif port is not None and fields.setdefault(port, name) != name:
            yield f"{fields[port]} and {name} are both {port}; each needs a port of its own"
    for entry in config.models:
        if _LLAMA_2.search(f"{entry.name} {entry.source}") and not whole["license"]["accept"]:
            yield (
                f"{entry.name} is Llama 2, and license.accept is not true: read its licence, and say so "
                "(`packtrain k8s render --accept-license`)"
            )
        for what, source in _sources(entry):
            if whole["weights"]["source"] == "none" and _is_below(source, MOUNTED_MODELS):
                yield (
                    f"{entry.name}: {what} is {source}, and weights.source is none: nothing is mounted at {MOUNTED_MODELS} "
                    "(`packtrain k8s render --claim` names the claim with it)"
                )


def _sources(entry: ModelEntry) -> Iterator[tuple[str, str]]:
    for field in MODEL_SOURCES:
        if (source := getattr(entry, field)) is not None:
            yield field, source
    for adapter in entry.lora.adapters if entry.lora else ():
        yield f"the source of the adapter {adapter.name}", str(adapter.source)


def _elsewhere(entry: ModelEntry) -> Iterator[str]:
    """Sources that neither the image nor the chart's volume has."""
    for what, source in _sources(entry):
        if not (_is_below(source, IMAGE_MODELS) or _is_below(source, MOUNTED_MODELS)):
            yield f"{entry.name}: {what}, {source}, must be in the pods"


def _is_below(source: str, directory: str) -> bool:
    return Path(source).is_relative_to(directory)


def _count_problems(group: Mapping[str, Any]) -> Iterator[str]:
    fewest, number, most = (group[key] for key in ("minReplicas", "replicas", "maxReplicas"))
    if not fewest <= number <= most:
        yield f"{group['groupName']}: replicas is {number}, and must be from minReplicas, {fewest}, to maxReplicas, {most}"


def _placement_problems(
    entries: Sequence[ModelEntry], groups: list[dict[str, Any]], autoscaling: bool, max_ranks: int | None
) -> list[str]:
    """Groups that have no place each, else what the driver would say of all of them together."""
    count = "maxReplicas" if autoscaling else "replicas"
    mixes = list(_mixes(entries, max_ranks))
    most = {entry.name: max(mix[entry.name] for mix in mixes) for entry in entries}
    if problems := [
        problem for entry in entries for problem in _group_problems(entry, most[entry.name], groups, count)
    ]:
        return problems
    return list(dict.fromkeys(problem for mix in mixes for problem in _mix_problems(entries, mix, groups, count)))


def _mix_problems(entries: Sequence[ModelEntry], mix: Mix, groups: list[dict[str, Any]], count: str) -> list[str]:
    requests = [
        GroupRequest(
            name=entry.name,
            tp_size=entry.tensor_parallel_size,
            device=entry.device,
            cpus_per_rank=entry.cpus_per_rank,
        )
        for entry in entries
        for _ in range(mix[entry.name])
    ]
    nodes = [
        NodeResources(node_id="", ip="", num_cpus=_cpus_of(group), num_gpus=_gpus_of(group))
        for group in groups
        for _ in range(int(group[count] * group["numOfHosts"]))
    ]
    try:
        plan_groups(requests, nodes)
    except ConfigError as error:
        return [str(error)]
    return []


def _resource_problems(group: Mapping[str, Any]) -> Iterator[str]:
    """What Kubernetes takes no pod with."""
    requests, limits = (group["resources"].get(kind) or {} for kind in ("requests", "limits"))
    for name, amount in requests.items():
        limit = limits.get(name)
        if amount is None or (limit is None and "/" not in name):
            continue
        differs = limit is None or quantity(str(amount)) != quantity(str(limit))
        if differs and ("/" in name or quantity(str(amount)) > quantity(str(limit))):
            wanted = "the same" if "/" in name else "at least as much, or null"
            yield (
                f"{group['groupName']}: resources.requests.{name} is {amount} and limits.{name} is {limit or 'missing'}; "
                f"Kubernetes wants {wanted} there"
            )


def _group_problems(entry: ModelEntry, num_groups: int, groups: list[dict[str, Any]], count: str) -> Iterator[str]:
    """`num_groups` is how many there may be of it."""
    tp = entry.tensor_parallel_size
    each = f"{'1 GPU and ' if entry.device == 'cuda' else ''}{entry.cpus_per_rank:g} CPU"
    sizes = [(group[count], group["numOfHosts"], _ranks_of(group, entry)) for group in groups]
    widest = max(ranks * hosts for _, hosts, ranks in sizes)
    if tp <= max(ranks for *_, ranks in sizes):
        places = sum(replicas * hosts * (ranks // tp) for replicas, hosts, ranks in sizes)
    else:
        places = sum(replicas * (hosts * ranks // tp) for replicas, hosts, ranks in sizes)
    bound = "num_groups" if entry.most_groups == entry.num_groups else "autoscaling.max_groups"
    if tp > widest:
        yield (
            f"{entry.name}: tensor_parallel_size is {tp}, and the largest worker group has room for {widest} "
            f"ranks of {each} each"
        )
    elif num_groups > places:
        if num_groups < entry.most_groups:
            bound += " within autoscaler.max_ranks"
        yield (
            f"{entry.name}: {bound} is {num_groups}, and the worker groups have room for {places} "
            f"of {tp} ranks of {each} each"
        )


def _ranks_of(group: Mapping[str, Any], entry: ModelEntry) -> int:
    """Ranks of this model that one machine of the group holds."""
    by_cpus = int(_cpus_of(group) / entry.cpus_per_rank + 1e-9) if entry.cpus_per_rank else None
    if entry.device == "cuda":
        return _gpus_of(group) if by_cpus is None else min(_gpus_of(group), by_cpus)
    return by_cpus or 0


def _gpus_of(group: Mapping[str, Any]) -> int:
    """What Ray counts on a machine: `num-gpus`, else the limit."""
    if given := (group.get("rayStartParams") or {}).get("num-gpus"):
        return int(given)
    return int(quantity(str((group["resources"].get("limits") or {}).get("nvidia.com/gpu") or 0)))


def _cpus_of(group: Mapping[str, Any]) -> float:
    """What Ray counts on a machine: `num-cpus`, else the limit, else the request, rounded up."""
    if given := (group.get("rayStartParams") or {}).get("num-cpus"):
        return float(given)
    cpus = [(group["resources"].get(kind) or {}).get("cpu") for kind in ("limits", "requests")]
    return math.ceil(quantity(str(next((amount for amount in cpus if amount is not None), 0))))


def _host_problems(model: ModelPlan, groups: list[dict[str, Any]]) -> Iterator[str]:
    for group in groups:
        limit = (group["resources"].get("limits") or {}).get("memory")
        if limit is None:
            continue
        has = quantity(str(limit))
        needs = _MARGIN * (model.group_bytes + len(model.memory.ranks) * RANK_BYTES + LEADER_BYTES) + _NODE_BYTES
        needs += quantity(str(group["shmSize"]))
        if needs > has:
            yield (
                f"{model.entry.name}: a group needs {needs / GIB:.1f} GiB (ranks, Ray, /dev/shm) on a machine of "
                f"{group['groupName']}, whose memory limit is {has / GIB:.1f} GiB"
            )


def _group_line(group: Mapping[str, Any]) -> str:
    machines = group["replicas"] * group["numOfHosts"]
    memory = (group["resources"].get("limits") or {}).get("memory")
    has = f"{_gpus_of(group)} GPUs, {_cpus_of(group):g} CPUs, {memory or 'no limit of memory'}"
    return f"{group['groupName']}: {machines} machines with {has}"


def _model_line(model: ModelPlan, device: Device | None) -> str:
    weights = max(rank.weight_bytes for rank in model.memory.ranks)
    where = f" of {device.memory_bytes / GIB:.1f} GiB on {device.name}" if device else ""
    room = f"; {model.memory.kv_tokens} tokens of KV cache would fit" if device else ""
    return (
        f"{model.entry.name}: a rank needs {model.rank_bytes / GIB:.2f} GiB{where}, "
        f"{weights / GIB:.2f} GiB of them weights, with "
        f"{model.cache_tokens} tokens of KV cache{room}"
    )


_UNITS = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_UNITS |= {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGTPE", 1)}


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number. Raises ConfigError."""
    found = re.fullmatch(r"(\+?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a quantity such as 8, 500m or 64Gi")
    return float(found[1]) * _UNITS[found[2]]


def bytes_below(directory: Path) -> int:
    """Size of all files below a directory; those that come or go meanwhile count or do not."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
