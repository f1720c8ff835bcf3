"""What a simulation says: figures by the names of `vllm bench serve`, by tenant, and over time."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.simulation.clock import TICKS_PER_S
from bench.simulation.fleet import Fleet
from bench.simulation.requests import CANCELLED, FAILED, FINISHED, REFUSED, Requests, Status

Array = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 99)


def counts(status: npt.NDArray[np.uint8]) -> dict[str, int]:
    """How requests ended. sent = finished + refused + failed + cancelled."""
    by_status = np.bincount(status, minlength=len(Status))

    def number(of: frozenset[Status]) -> int:
        return int(sum(by_status[one] for one in of))

    found = {
        "sent": int(len(status) - by_status[Status.NOT_SENT]),
        "finished": number(FINISHED),
        "refused": number(REFUSED),
        "failed": number(FAILED),
        "cancelled": number(CANCELLED),
    }
    if found["sent"] != sum(found[name] for name in ("finished", "refused", "failed", "cancelled")):
        raise RuntimeError(f"requests were lost or counted twice: {found}")
    return found


def latencies(values_s: Array, name: str) -> dict[str, float]:
    """In milliseconds, by vLLM's names. Empty when there are none."""
    if not len(values_s):
        return {}
    values = values_s * 1e3
    found = {f"mean_{name}_ms": float(values.mean()), f"std_{name}_ms": float(values.std())}
    for percentile in PERCENTILES:
        key = f"median_{name}_ms" if percentile == 50 else f"p{percentile}_{name}_ms"
        found[key] = float(np.percentile(values, percentile))
    return found


class Columns:
    """Outcomes as numpy arrays."""

    def __init__(self, fleet: Fleet) -> None:
        requests, outcomes = fleet.requests, fleet.outcomes
        self.status = np.frombuffer(outcomes.status, dtype=np.uint8)
        self.tenant = np.array(requests.tenant)
        self.prompt = np.array(requests.prompt_tokens, dtype=np.float64)
        self.arrived_s, self.ttft_s, self.e2e_s = (
            np.array(column) for column in (outcomes.arrived_s, outcomes.ttft_s, outcomes.e2e_s)
        )
        self.num_output = np.array(outcomes.num_output, dtype=np.float64)
        self.num_cached = np.array(outcomes.num_cached, dtype=np.float64)
        self.num_migrations = np.array(outcomes.num_migrations, dtype=np.float64)

    def tpot_s(self, chosen: npt.NDArray[np.bool_]) -> Array:
        """Time per output token after the first, of answers of two tokens or more."""
        several = chosen & (self.num_output > 1)
        times_s: Array = (self.e2e_s[several] - self.ttft_s[several]) / (self.num_output[several] - 1)
        return times_s


def figures(columns: Columns, chosen: npt.NDArray[np.bool_], duration_s: float) -> dict[str, Any]:
    """Of the chosen requests; rates are over `duration_s`."""
    done = chosen & (columns.status == Status.FINISHED)
    num_tokens = float(columns.num_output[chosen].sum())
    return {
        **counts(columns.status[chosen]),
        "completed": int(done.sum()),
        "total_input_tokens": int(columns.prompt[done].sum()),
        "total_output_tokens": int(num_tokens),
        "request_throughput": float(done.sum() / duration_s),
        "output_throughput": num_tokens / duration_s,
        **latencies(columns.ttft_s[done], "ttft"),
        **latencies(columns.tpot_s(done), "tpot"),
        **latencies(columns.e2e_s[done], "e2el"),
    }


def summarise(fleet: Fleet, *, warmup_s: float, duration_s: float, tp_size: int) -> dict[str, Any]:
    """Of a simulation that has run. What arrived before `warmup_s` is left out of the figures of requests."""
    columns = Columns(fleet)
    chosen = (columns.arrived_s >= warmup_s) & (columns.status != Status.NOT_SENT)
    requests: Requests = fleet.requests
    by_tenant = {
        traits.name: figures(columns, chosen & (columns.tenant == number), duration_s - warmup_s)
        for number, traits in enumerate(requests.tenants)
    }
    group_s = fleet.group_ticks / TICKS_PER_S
    busy_s = fleet.busy_ticks / TICKS_PER_S
    names = {status: status.name.lower() for status in Status}
    by_status = np.bincount(columns.status[chosen], minlength=len(Status))
    return {
        "duration": duration_s - warmup_s,
        **figures(columns, chosen, duration_s - warmup_s),
        "by_status": {names[s]: int(by_status[s]) for s in Status if by_status[s]},
        "tenants": by_tenant,
        "jain_index": jain_index([by_tenant[t.name]["total_output_tokens"] / t.weight for t in requests.tenants]),
        "num_migrations": int(columns.num_migrations.sum()),
        "num_failures": fleet.num_failures,
        "num_preemptions": fleet.num_preemptions,
        "num_steps": fleet.num_steps,
        "num_steps_jumped": fleet.num_jumped,
        "group_seconds": group_s,
        "gpu_hours": group_s * tp_size / 3600,
        "busy_share": busy_s / group_s if group_s else 0.0,
        "prefix_hit_share": float(columns.num_cached[chosen].sum() / max(1.0, columns.prompt[chosen].sum())),
        "over_time": {
            "at_s": list(fleet.samples.at_s),
            "num_groups": list(fleet.samples.num_groups),
            "num_serving": list(fleet.samples.num_serving),
            "num_running": list(fleet.samples.num_running),
            "num_waiting": list(fleet.samples.num_waiting),
        },
    }


def jain_index(values: list[float]) -> float:
    """1 when all are equal, 1/n when one has everything (Jain, Chiu, Hawe 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def energy_kwh(summary: Mapping[str, Any], *, idle_w: float, busy_w: float) -> float:
    """Of all GPUs, by a straight line between a GPU that waits and one that computes."""
    mean_w = idle_w + (busy_w - idle_w) * summary["busy_share"]
    return float(summary["gpu_hours"] * mean_w / 1e3)


def goodput(fleet: Fleet, bounds_s: Mapping[str, float], warmup_s: float) -> float:
    """Share of the requests sent that finished within all bounds: of "ttft", "tpot" and "e2el"."""
    columns = Columns(fleet)
    chosen = (columns.arrived_s >= warmup_s) & (columns.status != Status.NOT_SENT)
    good = chosen & (columns.status == Status.FINISHED)
    values: dict[str, Callable[[], Array]] = {
        "ttft": lambda: columns.ttft_s,
        "e2el": lambda: columns.e2e_s,
        "tpot": lambda: (columns.e2e_s - columns.ttft_s) / np.maximum(columns.num_output - 1, 1),
    }
    for name, bound_s in bounds_s.items():
        good &= values[name]() <= bound_s
    return float(good.sum() / max(1, chosen.sum()))
