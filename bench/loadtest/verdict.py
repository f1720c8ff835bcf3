"""Whether a run measured the server, or the client that loaded it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.loadtest.leader import Run
from bench.loadtest.records import Health

MAX_CPU = 0.9
"""Of a core, for a sending process."""
MIN_LATE_S = 0.005
"""Lateness up to this is what timers and schedulers of any machine do."""
LATE_SHARE = 0.1
"""Of the median latency that the run measured."""
MAX_LOST_SHARE = 0.01
"""Of requests that were due and were not sent, or were held back by a bound that is no part of the load."""


@dataclass(slots=True)
class Verdict:
    """Reasons why figures must not be taken for the server's, and what a reader should know besides."""

    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        return not self.invalid


def client_facts(healths: Sequence[Health]) -> dict[str, Any]:
    """How the sending processes fared, the worst of each."""
    lags = np.array([lag for health in healths for lag in health.lags_s] or [0.0])
    reached = [health.bound_reached_s for health in healths if health.bound_reached_s is not None]
    delays = np.array([delay for health in healths for delay in health.loop_delays_s] or [0.0])
    return {
        "num_processes": len(healths),
        "max_cpu": max((health.cpu_s / health.wall_s for health in healths if health.wall_s), default=0.0),
        "median_send_lag_ms": float(np.median(lags)) * 1e3,
        "p99_send_lag_ms": float(np.percentile(lags, 99)) * 1e3,
        "max_send_lag_ms": max((health.max_lag_s for health in healths), default=0.0) * 1e3,
        "p99_loop_delay_ms": float(np.percentile(delays, 99)) * 1e3,
        "max_loop_delay_ms": max((health.max_loop_delay_s for health in healths), default=0.0) * 1e3,
        "held_back": sum(health.num_held_back for health in healths),
        "held_back_by_bound": sum(health.num_held_back_by_bound for health in healths),
        "bound_reached_s": min(reached, default=None),
        "unsent": sum(health.num_unsent for health in healths),
        "connections": sum(health.num_connections for health in healths),
        "itls_dropped": sum(health.num_gaps_dropped for health in healths),
    }


def judge(
    run: Run, client: dict[str, Any], median_latency_s: float, *, duration_s: float, has_own_limit: bool
) -> Verdict:
    """`median_latency_s`: to the first token, or of whole answers; 0 when nothing finished. `has_own_limit`: max_concurrency is
    part of the load."""
    verdict = Verdict()
    num_due = len(run.records) + client["unsent"]
    if num_due:
        _judge_client(verdict, client, num_due, median_latency_s, has_own_limit=has_own_limit)
    else:
        verdict.invalid.append("nothing was sent: no request was due before the run ended")
    if (reached_s := client["bound_reached_s"]) is not None:
        text = (
            f"max_requests, which bounds the client, ended the load after {reached_s:.1f} of {duration_s:g} s; raise it"
        )
        (verdict.notes if reached_s >= (1 - MAX_LOST_SHARE) * duration_s else verdict.invalid).append(text)
    verdict.invalid += [f"a sending process was lost: {lost}" for lost in run.lost]
    if run.was_interrupted:
        verdict.notes.append("the run was interrupted; what was under way then counts as cancelled")
    if client["itls_dropped"]:
        verdict.notes.append(f"{client['itls_dropped']} inter-token latencies were not kept, for the sake of memory")
    return verdict


def _judge_client(
    verdict: Verdict, client: dict[str, Any], num_due: int, median_latency_s: float, *, has_own_limit: bool
) -> None:
    allowed_ms = 1e3 * max(MIN_LATE_S, LATE_SHARE * median_latency_s)
    of_what = (
        f"for a median latency of {median_latency_s * 1e3:.1f} ms" if median_latency_s else "where nothing finished"
    )
    for name, what in (
        ("p99_send_lag_ms", "requests were sent late"),
        ("p99_loop_delay_ms", "the client's event loop was late"),
    ):
        if client[name] > allowed_ms:
            verdict.invalid.append(
                f"{what}: p99 {client[name]:.1f} ms, and {allowed_ms:.1f} ms are allowed {of_what}; use more --processes, or a "
                "machine of its own"
            )
    if client["max_cpu"] > MAX_CPU:
        verdict.invalid.append(f"a sending process kept {client['max_cpu']:.0%} of a core busy; use more --processes")
    if client["held_back_by_bound"] > MAX_LOST_SHARE * num_due:
        verdict.invalid.append(
            f"{client['held_back_by_bound']} requests waited for max_in_flight, which bounds the client; raise it"
        )
    if client["unsent"] > MAX_LOST_SHARE * num_due:
        text = f"{client['unsent']} of {num_due} requests were due and not sent before the run ended"
        (verdict.notes if has_own_limit else verdict.invalid).append(text)
