"""Where a step's time goes, by operation, and the bytes and arithmetic that each operation cannot do without.

A profiled rank is another class (`ProfiledRank`), so that it costs nothing when it is off. Operations are timed one by one;
on the CPU inside the recorded programs that decode runs anyway. What is left of the step is Python, sampling and waiting.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives
from model_parallel.config import GroupConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.kernels.cpu.backend import PackedRows
from model_parallel.kernels.interface import AttentionPlan, GroupMatrix, Heads, Int8Matrix, LayerCache, Weight
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.recorded_steps import RecordedSteps

FILE_VARIABLE = "PACKTRAIN_PROFILE_FILE"
"""Of the environment: where rank 0 writes its profile when it ends."""
REST = "rest: Python, sampling, waiting"


class Cost(NamedTuple):
    """What an operation cannot do without: bytes moved, and multiplications and additions."""

    num_bytes: int = 0
    num_flops: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One operation, over a step on average."""

    operation: str
    num_calls: float
    seconds: float
    share: float
    """Of the step."""
    floor_s: float
    """What its bytes or its arithmetic take at the rates given, whichever is longer."""

    @property
    def ratio(self) -> float:
        """How many times longer than its floor it takes."""
        return self.seconds / self.floor_s if self.floor_s else float("nan")


@dataclass(slots=True)
class Total:
    """Of one operation over all steps."""

    num_calls: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    num_flops: int = 0

    def add(self, seconds: float, cost: Cost) -> None:
        self.num_calls += 1
        self.seconds += seconds
        self.num_bytes += cost.num_bytes
        self.num_flops += cost.num_flops


Call = tuple[str, Callable[[], Cost]]
"""An operation that was called, and what it costs at the time of asking."""


class StepProfile:
    """Times and costs of the operations of some steps."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.seconds = 0.0
        self.totals: defaultdict[str, Total] = defaultdict(Total)
        self._step: list[tuple[Call, float]] = []
        """Calls of the step and their seconds."""
        self._recorded: list[Call] | None = None
        self._has_recorded = False

    def timed(
        self, call: Callable[..., Any], describe: Callable[..., Call], device: torch.device
    ) -> Callable[..., Any]:
        """`call`, which then is part of every step's profile. describe(result, *arguments) names and prices it."""

        def run(*args: Any) -> Any:
            began_s = time.perf_counter()
            result = call(*args)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took_s = time.perf_counter() - began_s
            described = describe(result, *args)
            self._step.append((described, took_s))
            if self._recorded is not None:
                self._recorded.append(described)
            return result

        return run

    def record(self) -> list[Call]:
        """The calls from now on that become part of a program, until `end_step`. That step does not count."""
        self._recorded, self._has_recorded = [], True
        return self._recorded

    def add_program(self, calls: Iterable[Call], durations_ns: Iterable[int]) -> None:
        """A program was run again."""
        self._step += [(call, ns * 1e-9) for call, ns in zip(calls, durations_ns, strict=True)]

    def end_step(self, seconds: float, *, counts: bool) -> None:
        """Take in what was timed since the last step ended, or forget it."""
        if counts and not self._has_recorded:
            self.num_steps += 1
            self.seconds += seconds
            for (name, cost), took_s in self._step:
                self.totals[name].add(took_s, cost())
        self._step, self._recorded, self._has_recorded = [], None, False

    def as_data(self) -> dict[str, Any]:
        totals = {name: asdict(total) for name, total in self.totals.items()}
        return {"num_steps": self.num_steps, "seconds": self.seconds, "totals": totals}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "StepProfile":
        profile = cls()
        profile.num_steps, profile.seconds = data["num_steps"], data["seconds"]
        profile.totals.update({name: Total(**total) for name, total in data["totals"].items()})
        return profile

    def rows(self, *, bandwidth: float, rate: float) -> list[Row]:
        """An operation a row, in the order of a step, then what is left, then the whole step.

        bandwidth: bytes a second; rate: multiplications and additions a second.
        """
        steps, step_s = max(self.num_steps, 1), max(self.seconds, 1e-12)

        def row(name: str, total: Total) -> Row:
            floor_s = max(total.num_bytes / bandwidth, total.num_flops / rate)
            return Row(name, total.num_calls / steps, total.seconds / steps, total.seconds / step_s, floor_s / steps)

        rows = [row(name, total) for name, total in self.totals.items()]
        rest_s = self.seconds - sum(total.seconds for total in self.totals.values())
        whole_floor_s = sum(r.floor_s for r in rows)
        rows.append(row(REST, Total(seconds=rest_s)))
        return [*rows, Row("step", 1.0, self.seconds / steps, 1.0, whole_floor_s)]


class ProfiledRank(Rank):
    """A rank that times what it computes, and writes a profile of its full decode steps when it ends."""

    def __init__(
        self,
        config: GroupConfig,
        rank: int,
        collectives: Collectives,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(config, rank, collectives, progress)
        self.profile = StepProfile()
        self._largest = 0
        for name, describe in KERNEL_CALLS.items():
            setattr(self.kernels, name, self.profile.timed(getattr(self.kernels, name), describe, self.device))
        for name, describe in COLLECTIVE_CALLS.items() if collectives.size > 1 else ():
            setattr(collectives, name, self.profile.timed(getattr(collectives, name), describe, self.device))
        if isinstance(self.graphs, RecordedSteps):
            self.graphs.profile = self.profile
        else:
            self.graphs = None  # inside a CUDA graph nothing can be timed

    def execute(self, plan: StepPlan) -> StepResult:
        began_s = time.perf_counter()
        result = super().execute(plan)
        is_decode = all(row.num_tokens == 1 for row in plan.rows)
        # A step that is smaller than one before is the beginning or the end of the work.
        is_full = is_decode and len(plan.rows) >= self._largest
        if is_full:
            self._largest = len(plan.rows)
        self.profile.end_step(time.perf_counter() - began_s, counts=is_full and bool(plan.rows))
        return result

    def close(self) -> None:
        super().close()
        if self.collectives.rank == 0 and (path := os.environ.get(FILE_VARIABLE)):
            Path(path).write_text(json.dumps(self.profile.as_data()))


def _weight_cost(weight: Weight) -> tuple[int, int]:
    """Bytes and elements."""
    if isinstance(weight, PackedRows):
        linears = [part.linear for part in weight.weights]
        num_elements = sum(linear.num_inputs * linear.num_outputs * (2 if linear.gated else 1) for linear in linears)
        return sum(part.panels.nbytes for part in weight.weights), num_elements
    if isinstance(weight, tuple):
        costs = [_weight_cost(part) for part in weight]
        return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)
    if isinstance(weight, GroupMatrix):
        return weight.nbytes, weight.num_outputs * weight.num_inputs
    if isinstance(weight, Int8Matrix):
        return weight.values_OI.nbytes + weight.scales_O.nbytes, weight.values_OI.numel()
    return weight.nbytes, weight.numel()


def _product(name: str) -> Callable[..., Call]:
    def describe(out: Tensor, x: Tensor, weight: Weight, *_: Any) -> Call:
        weight_bytes, num_elements = _weight_cost(weight)
        cost = Cost(weight_bytes + x.nbytes + out.nbytes, 2 * x.shape[0] * num_elements)
        return f"{name} {x.shape[1]} → {out.shape[1]}", lambda: cost

    return describe


def _elementwise(name: str) -> Callable[..., Call]:
    """Of results and arguments as they lie in memory, each once."""

    def describe(out: Tensor | tuple[Tensor, ...], *args: Any) -> Call:
        results = out if isinstance(out, tuple) else (out,)
        cost = Cost(sum(x.nbytes for x in (*results, *args) if isinstance(x, Tensor)))
        return name, lambda: cost

    return describe


def _embed(out: Tensor, *_: Any) -> Call:
    cost = Cost(2 * out.nbytes)
    return "embed", lambda: cost


def _attention(out: Tensor, qkv: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads) -> Call:
    def cost() -> Cost:
        runs = plan.runs_S4.tolist()
        cached = sum(start + num_tokens for _, num_tokens, start, _ in runs)
        seen = sum(num_tokens * start + num_tokens * (num_tokens + 1) // 2 for _, num_tokens, start, _ in runs)
        kv_bytes = 2 * cached * heads.num_kv_heads * heads.head_dim * cache.keys.itemsize
        return Cost(kv_bytes + qkv.nbytes + out.nbytes, 4 * seen * heads.num_query_heads * heads.head_dim)

    return "attention", cost


def _collective(name: str) -> Callable[..., Call]:
    """Every rank's part is read once."""

    def describe(out: Tensor, x: Tensor) -> Call:
        cost = Cost(2 * max(out.nbytes, x.nbytes))
        return name, lambda: cost

    return describe


KERNEL_CALLS: dict[str, Callable[..., Call]] = {
    "embed": _embed,
    "linear": _product("linear"),
    "partial_sum": _product("partial_sum"),
    "gated_linear": _product("gated linear"),
    "logits": _product("logits"),
    "softmax_parts": _elementwise("softmax parts"),
    "rms_norm": _elementwise("norm"),
    "add_rms_norm": _elementwise("norm"),
    "attention": _attention,
}
COLLECTIVE_CALLS: dict[str, Callable[..., Call]] = {
    "all_reduce": _collective("all-reduce"),
    "all_gather": _collective("all-gather"),
}
