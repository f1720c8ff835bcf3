"""What a simulation says: figures by the names of `vllm bench serve`, by tenant, and over time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.loadtest.sharing import INPUT_PRICE, OUTPUT_PRICE
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
        self.num_prompt = np.array(outcomes.num_prompt, dtype=np.float64)
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


@dataclass(frozen=True, slots=True)
class Window:
    """What rates are over, as `packtrain load` has it: from the end of the warm-up until the last request has ended."""

    begin_s: float
    closed_s: float

    @property
    def length_s(self) -> float:
        return self.closed_s - self.begin_s


def window_of(columns: Columns, warmup_s: float, duration_s: float) -> Window:
    """It closes at the end of the arrivals where no request ended after the warm-up."""
    sent = columns.status != Status.NOT_SENT
    last_s = float((columns.arrived_s + columns.e2e_s)[sent].max(initial=0.0))
    return Window(warmup_s, last_s if last_s > warmup_s else duration_s)


def tokens_since(columns: Columns, chosen: npt.NDArray[np.bool_], begin_s: float) -> float:
    """Tokens of the chosen requests that came after a moment; those after the first come evenly until the end."""
    first_s = (columns.arrived_s + columns.ttft_s)[chosen]
    ended_s = (columns.arrived_s + columns.e2e_s)[chosen]
    num_later = np.maximum(columns.num_output[chosen] - 1, 0)
    took_s = np.maximum(ended_s - first_s, 1e-9)
    later = num_later * np.clip((ended_s - begin_s) / took_s, 0, 1)
    first = (columns.num_output[chosen] > 0) & (first_s >= begin_s)
    return float(first.sum() + later.sum())


def figures(columns: Columns, own: npt.NDArray[np.bool_], window: Window) -> dict[str, Any]:
    """Of some of the requests: counts and latencies of those that arrived in the window, rates of what came in it."""
    chosen = own & (columns.arrived_s >= window.begin_s) & (columns.status != Status.NOT_SENT)
    finished = own & (columns.status == Status.FINISHED)
    done = chosen & finished
    num_ended = (finished & (columns.arrived_s + columns.e2e_s >= window.begin_s)).sum()
    return {
        **counts(columns.status[chosen]),
        "completed": int(done.sum()),
        "total_input_tokens": int(columns.num_prompt[done].sum()),
        "total_output_tokens": int(columns.num_output[done].sum()),
        "request_throughput": float(num_ended / window.length_s),
        "output_throughput": tokens_since(columns, finished, window.begin_s) / window.length_s,
        **latencies(columns.ttft_s[done], "ttft"),
        **latencies(columns.tpot_s(done), "tpot"),
        **latencies(columns.e2e_s[done], "e2el"),
    }


def summarise(fleet: Fleet, *, warmup_s: float, duration_s: float, tp_size: int) -> dict[str, Any]:
    """Of a simulation that has run. What came before `warmup_s` is left out of the figures of requests; what groups did and cost
    is of the whole run, and so is `run_output_tokens`, by which costs are divided."""
    columns = Columns(fleet)
    window = window_of(columns, warmup_s, duration_s)
    everybody = columns.status != Status.NOT_SENT
    chosen = everybody & (columns.arrived_s >= warmup_s)
    requests: Requests = fleet.requests
    owners = [columns.tenant == number for number in range(len(requests.tenants))]
    group_s = fleet.group_ticks / TICKS_PER_S
    busy_s = fleet.busy_ticks / TICKS_PER_S
    names = {status: status.name.lower() for status in Status}
    by_status = np.bincount(columns.status[chosen], minlength=len(Status))
    return {
        "duration": window.length_s,
        **figures(columns, everybody, window),
        "by_status": {names[s]: int(by_status[s]) for s in Status if by_status[s]},
        "tenants": {
            traits.name: figures(columns, own, window) for traits, own in zip(requests.tenants, owners, strict=True)
        },
        "jain_index": jain_index(
            [
                service(columns, chosen & own) / traits.weight
                for traits, own in zip(requests.tenants, owners, strict=True)
            ]
        ),
        "num_migrations": int(columns.num_migrations.sum()),
        "num_failures": fleet.num_failures,
        "num_preemptions": fleet.num_preemptions,
        "num_steps": fleet.num_steps,
        "num_steps_jumped": fleet.num_jumped,
        "group_seconds": group_s,
        "gpu_hours": group_s * tp_size / 3600,
        "run_output_tokens": int(columns.num_output[columns.status == Status.FINISHED].sum()),
        "busy_share": busy_s / group_s if group_s else 0.0,
        "prefix_hit_share": float(columns.num_cached[chosen].sum() / max(1.0, columns.num_prompt[chosen].sum())),
        "num_cut": requests.num_cut,
        "notes": list(requests.notes),
        "over_time": {
            "at_s": list(fleet.samples.at_s),
            "num_groups": list(fleet.samples.num_groups),
            "num_serving": list(fleet.samples.num_serving),
            "num_running": list(fleet.samples.num_running),
            "num_waiting": list(fleet.samples.num_waiting),
        },
    }


def service(columns: Columns, chosen: npt.NDArray[np.bool_]) -> float:
    """What some requests got, as the fair queue and `packtrain load` count it."""
    served = chosen & (columns.num_output > 0)
    return float(INPUT_PRICE * columns.num_prompt[served].sum() + OUTPUT_PRICE * columns.num_output[served].sum())


def jain_index(values: list[float]) -> float:
    """1 when all are equal, 1/n when one has everything (Jain, Chiu, Hawe 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def energy_kwh(summary: Mapping[str, Any], *, idle_w: float, busy_w: float) -> float | None:
    """Of all GPUs, by a straight line between a GPU that waits and one that computes. None where the profile tells no power."""
    if not busy_w:
        return None
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
