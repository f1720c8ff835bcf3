"""From a scenario to its figures."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.simulation.cost import CostTable
from bench.simulation.fleet import Fleet
from bench.simulation.parts import FleetSpec, GroupShape
from bench.simulation.profiles import Machine, StepsFile, hardware, machine_for, read_profile
from bench.simulation.report import energy_kwh, summarise
from bench.simulation.requests import Requests
from bench.simulation.scaling import make_controller
from bench.simulation.scenario import Groups, SimulationScenario
from bench.simulation.workload import make_requests
from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.errors import ConfigError
from model_parallel.memory import Workload, kv_cache_tokens, plan_group
from serving.models.known_llama import config_of
from serving.models.sizes import StepSizes, step_sizes
from serving.tenants.records import LIMITS, Limits

OnProgress = Callable[[Fleet], None]
"""What it raises ends the simulation."""
DEFAULT_KV_TOKENS = 16384
"""Of a machine whose memory is not known; what `packtrain serve` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The groups of a scenario, resolved."""

    machine: Machine
    shape: GroupShape
    max_model_len: int
    kv_cache_tokens: int

    @property
    def step_sizes(self) -> StepSizes:
        """Chosen where the scenario does not say them."""
        scheduler = self.shape.scheduler
        return StepSizes(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)


def resolve(groups: Groups) -> Plan:
    """The cost of a step, and what of the KV cache fits. Raises ConfigError."""
    file, quantization = read_profile(groups.profile), groups.quantization or ""
    max_model_len = max_model_len_of(groups)
    workload: Workload | None = None
    if isinstance(file, StepsFile):
        machine = machine_for(
            groups.profile,
            groups.model,
            None,
            groups.tensor_parallel_size,
            dtype=groups.dtype,
            quantization=quantization,
        )
    else:
        model = config_of(groups.model)
        machine = machine_for(
            groups.profile,
            groups.model,
            model,
            groups.tensor_parallel_size,
            dtype=groups.dtype,
            quantization=quantization,
        )
    if groups.share_a_machine and not machine.sharing:
        raise ConfigError(
            f"groups.share_a_machine is true, and profile {groups.profile!r} does not tell what that costs; it must be fitted to "
            "several groups of one machine, of which sometimes one and sometimes several ran"
        )
    sizes = step_sizes_of(groups)
    if isinstance(file, StepsFile):
        num_tokens = groups.kv_cache_tokens or DEFAULT_KV_TOKENS
    else:
        workload = Workload(
            max_model_len=max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
        )
        memory = plan_group(
            model,
            groups.tensor_parallel_size,
            dtype=groups.dtype,
            quantization=quantization,
            device=hardware(groups.profile).device,
            workload=workload,
            utilisation=groups.memory_utilization,
        )
        num_tokens = kv_cache_tokens(memory, groups.kv_cache_tokens)
    shape = GroupShape(
        costs=CostTable(machine.cost),
        scheduler=SchedulerConfig(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_prefill_tokens=groups.max_prefill_tokens,
            max_model_len=max_model_len,
            max_waiting_requests=groups.max_waiting_requests,
        ),
        cache=CacheConfig(
            num_blocks=num_tokens // groups.block_size,
            block_size=groups.block_size,
            enable_prefix_caching=groups.prefix_caching,
        ),
        start_s=machine.start_s if groups.start_s is None else groups.start_s,
        sharing=machine.sharing if groups.share_a_machine else 0.0,
    )
    return Plan(machine=machine, shape=shape, max_model_len=max_model_len, kv_cache_tokens=num_tokens)


def max_model_len_of(groups: Groups) -> int:
    """Of groups with any tensor-parallel size: the model's own length, or what is wanted of it. Raises ConfigError."""
    file = read_profile(groups.profile)
    own = file.max_position if isinstance(file, StepsFile) else config_of(groups.model).max_position
    wanted = own if groups.max_model_len is None else groups.max_model_len
    if wanted > own:
        raise ConfigError(f"groups.max_model_len is {wanted}, and the model's own length is {own}")
    return wanted


def step_sizes_of(groups: Groups) -> StepSizes:
    """Of groups with any tensor-parallel size. Raises ConfigError."""
    file = read_profile(groups.profile)
    device = file.device if isinstance(file, StepsFile) else "cuda"
    return step_sizes(device, groups.max_num_seqs, groups.max_num_batched_tokens)


def build(
    scenario: SimulationScenario,
    *,
    plan: Plan | None = None,
    requests: Requests | None = None,
    jumps: bool = True,
    on_progress: OnProgress | None = None,
) -> Fleet:
    """A fleet that is ready to run. `plan` and `requests` are made of the scenario when not given. Raises ConfigError."""
    plan = plan or resolve(scenario.groups)
    requests = requests or make_requests(scenario, max_model_len=plan.max_model_len)
    gateways, failures = scenario.gateways, scenario.failures
    spec = FleetSpec(
        shape=plan.shape,
        num_groups=scenario.groups.num_groups,
        num_gateways=gateways.num_gateways,
        request_s=plan.machine.request_s if gateways.request_s is None else gateways.request_s,
        output_s=plan.machine.output_s if gateways.output_s is None else gateways.output_s,
        detect_s=failures.detect_s,
        failures_s=_failure_times(scenario),
        migration=failures.migration,
        jumps=jumps,
        sample_s=max(1.0, scenario.duration_s / 360),
    )
    limits = {
        tenant.name: Limits(**{name: getattr(tenant.limits, name) for name in LIMITS})
        for tenant in scenario.tenants
        if tenant.limits is not None
    }
    return Fleet(
        spec,
        requests,
        seed=scenario.seed,
        limits=limits,
        controller=make_controller(scenario.scaling),
        on_progress=on_progress,
    )


def simulate(
    scenario: SimulationScenario,
    *,
    plan: Plan | None = None,
    requests: Requests | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Any], Fleet]:
    """Run a scenario. Returns its figures as plain data, and the fleet as it is at the end. Raises ConfigError."""
    plan = plan or resolve(scenario.groups)
    fleet = build(scenario, plan=plan, requests=requests, on_progress=on_progress)
    fleet.run(scenario.duration_s + scenario.drain_s)
    machine, tp_size = plan.machine, scenario.groups.tensor_parallel_size
    summary = summarise(fleet, warmup_s=scenario.warmup_s, duration_s=scenario.duration_s, tp_size=tp_size)
    return {
        "name": scenario.name,
        "seed": scenario.seed,
        "groups": scenario.groups.model_dump(mode="json") | plan.step_sizes._asdict(),
        "profile": {"name": machine.name, "origin": machine.origin, "is_measured": machine.is_measured},
        "kv_cache_tokens": plan.kv_cache_tokens,
        **summary,
        "energy_kwh": energy_kwh(summary, idle_w=machine.idle_w, busy_w=machine.busy_w),
    }, fleet


def _failure_times(scenario: SimulationScenario) -> list[float]:
    failures = scenario.failures
    times = list(failures.at_s)
    if failures.every_s is not None:
        draw, at_s = random.Random(f"{scenario.seed}/failures"), 0.0
        while (at_s := at_s + draw.expovariate(1 / failures.every_s)) <= scenario.duration_s:
            times.append(at_s)
    return sorted(times)
