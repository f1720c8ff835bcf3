"""Which reports can be believed. One that cannot is treated as missing, and its reason is told."""

import math

from cluster.policy.observation import GatewayLoad, GatewayObservation, GroupLoad, GroupObservation, Phase, StepLine

CLOCK_TOLERANCE_S = 1.0
"""Clocks of two nodes may differ by so much."""


def group_problem(group: GroupObservation, now_s: float, stale_after_s: float) -> str:
    """Why nothing is known of a running group; "" when its report is good."""
    load = group.load
    if load is None:
        return f"group {group.group} does not answer"
    if problem := _time_problem(load.measured_s, now_s, stale_after_s):
        return f"group {group.group}: {problem}"
    counts = (load.num_running, load.num_waiting, load.num_waiting_tokens)
    if min(counts) < 0 or load.num_running > load.max_num_seqs or load.kv_cache_tokens < 1 or load.max_num_seqs < 1:
        return (
            f"group {group.group} contradicts itself: {load.num_running} of {load.max_num_seqs} sequences, {counts[1:]}"
        )
    shares = {"kv_usage": load.kv_usage, "cached_share": load.cached_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            return f"group {group.group}: {name} is {share}"
    if load.num_ended_answers < 0:
        return f"group {group.group}: num_ended_answers is {load.num_ended_answers}"
    if load.mean_output_tokens is not None and not 0 <= load.mean_output_tokens < math.inf:
        return f"group {group.group}: mean_output_tokens is {load.mean_output_tokens}"
    if load.line is not None and not is_line(load.line):
        return f"group {group.group}: its step times are no line that can be"
    return ""


def gateway_problem(gateway: GatewayObservation, now_s: float, stale_after_s: float) -> str:
    """Why nothing is known of a gateway; "" when its report is good."""
    load = gateway.load
    if load is None:
        return f"gateway {gateway.gateway} does not answer"
    if problem := _time_problem(load.measured_s, now_s, stale_after_s):
        return f"gateway {gateway.gateway}: {problem}"
    if min(load.num_sequences, load.num_prompt_tokens, load.num_held, load.num_held_tokens) < 0:
        return f"gateway {gateway.gateway} has counted less than nothing"
    return ""


def is_line(line: StepLine) -> bool:
    """Steps take time, and more of them for more work."""
    terms = (line.base_s, line.sequence_s, line.prompt_token_s)
    return all(0 <= term < math.inf for term in terms) and line.step_s(1) > 0


def fresh_groups(
    groups: tuple[GroupObservation, ...], now_s: float, stale_after_s: float
) -> tuple[list[GroupLoad], list[str]]:
    """(reports of running groups that can be believed, what is wrong with the others)."""
    loads, problems = [], []
    for group in groups:
        if group.phase is not Phase.RUNNING:
            continue
        problem = group_problem(group, now_s, stale_after_s)
        if problem:
            problems.append(problem)
        elif group.load is not None:
            loads.append(group.load)
    return loads, problems


def fresh_gateways(
    gateways: tuple[GatewayObservation, ...], now_s: float, stale_after_s: float
) -> tuple[dict[str, GatewayLoad], list[str]]:
    """(reports that can be believed by gateway, what is wrong with the others)."""
    loads, problems = {}, []
    for gateway in gateways:
        problem = gateway_problem(gateway, now_s, stale_after_s)
        if problem:
            problems.append(problem)
        elif gateway.load is not None:
            loads[gateway.gateway] = gateway.load
    return loads, problems if gateways else ["no gateway is known"]


def _time_problem(measured_s: float, now_s: float, stale_after_s: float) -> str:
    if not measured_s >= now_s - stale_after_s:  # also when it is not a number
        return f"its report is {now_s - measured_s:.0f} s old"
    if measured_s > now_s + CLOCK_TOLERANCE_S:
        return f"its report is from {measured_s - now_s:.0f} s ahead"
    return ""
