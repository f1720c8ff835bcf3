"""From the flags of `packtrain load` to the data of a scenario, which the same validator then reads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.loadtest.scenario import Scenario, parse_scenario, read_scenario
from model_parallel.errors import ConfigError

UNTIL_ALL_SENT_S = 3600.0
"""Duration when a number of requests is what ends the run."""
GOODPUT_MEASURES = ("ttft", "tpot", "e2el")
TRACES = ("azure", "burstgpt", "mooncake", "csv")
DATASETS = ("random", "jsonl", "sharegpt", *TRACES)

OF_RANDOM = ("input_len", "prefix_len", "num_prefixes")
OF_TENANT = (
    "target", "api", "model", "dataset_name", "dataset_path", *OF_RANDOM, "output_len", "turns", "request_rate", "burstiness",
    "users", "think_time", "num_prompts", "max_concurrency", "retries", "goodput",
)  # fmt: skip
"""Flags that a scenario file says for each tenant."""
OF_RUN = {
    "duration": "duration_s", "drain": "drain_s", "timeout": "timeout_s", "seed": "seed", "warmup": "warmup_s",
    "cooldown": "cooldown_s", "warmup_requests": "warmup_requests",
}  # fmt: skip
"""Flags of the run as a whole, over what the file says."""
Flags = Mapping[str, Any]
"""Those that were given, by name."""


def scenario_from(flags: Flags) -> Scenario:
    """Raises ConfigError."""
    of_run = {key: flags[flag] for flag, key in OF_RUN.items() if flag in flags}
    if "scenario" in flags:
        twice = [_spelled(flag) for flag in OF_TENANT if flag in flags]
        if twice:
            raise ConfigError(f"{', '.join(twice)}: with --scenario its file says that, for each tenant")
        path = flags["scenario"]
        return parse_scenario(read_scenario(path) | of_run, origin=str(path))
    tenant = _tenant(flags)
    if "num_prompts" in flags:
        of_run.setdefault("duration_s", UNTIL_ALL_SENT_S)
    return parse_scenario({"tenants": [tenant]} | of_run, origin="the flags")


def _tenant(flags: Flags) -> dict[str, Any]:
    names = {
        "target": "target", "api": "api", "model": "model", "num_prompts": "max_requests", "max_concurrency": "max_concurrency",
    }  # fmt: skip
    tenant: dict[str, Any] = {key: flags[flag] for flag, key in names.items() if flag in flags}
    tenant["work"] = _work(flags)
    tenant["arrivals"] = _arrivals(flags)
    if "retries" in flags:
        tenant["retries"] = {"max_attempts": flags["retries"]}
    if "goodput" in flags:
        tenant["slo"] = {f"{name}_ms": bound for name, bound in parse_goodput(flags["goodput"]).items()}
    return tenant


def _work(flags: Flags) -> dict[str, Any]:
    name = flags.get("dataset_name", "random")
    if name not in DATASETS:
        raise ConfigError(f"--dataset-name is {name!r}; it must be one of {', '.join(DATASETS)}")
    if name != "random":
        if "dataset_path" not in flags:
            raise ConfigError(f"--dataset-name {name} needs --dataset-path")
        _refuse(flags, OF_RANDOM, f"is of --dataset-name random, not of {name}")
    if name in TRACES:
        _refuse(flags, ("output_len", "turns"), f"is not of {name}, where the trace says it")
        return {"kind": "trace", "format": name, "path": flags["dataset_path"]}
    output = {"output_tokens": flags["output_len"]} if "output_len" in flags else {}
    if name == "jsonl":
        _refuse(flags, ("turns",), "is not of jsonl")
        return {"kind": name, "path": flags["dataset_path"], **output}
    think = {"think_s": flags["think_time"]} if "think_time" in flags else {}
    if name == "sharegpt":
        return {"kind": name, "path": flags["dataset_path"], "max_turns": flags.get("turns", 1), **output, **think}
    _refuse(flags, ("dataset_path",), "needs a --dataset-name")
    work: dict[str, Any] = {"kind": "synthetic", **output}
    if "input_len" in flags:
        work["input_tokens"] = flags["input_len"]
    if "prefix_len" in flags:
        work["prefix"] = {"tokens": flags["prefix_len"], "count": flags.get("num_prefixes", 1)}
    else:
        _refuse(flags, ("num_prefixes",), "needs --prefix-len")
    if "turns" in flags:
        work["turns"] = {"count": flags["turns"], **think}
    return work


def _arrivals(flags: Flags) -> dict[str, Any]:
    if flags.get("dataset_name") in TRACES:
        _refuse(
            flags, ("request_rate", "burstiness", "users", "think_time"), "is not of a trace, which has its own times"
        )
        return {"process": "trace"}
    if "users" in flags:
        _refuse(flags, ("request_rate", "burstiness"), "is of an open loop, and --users make a closed one")
        think = {"think_s": flags["think_time"]} if "think_time" in flags else {}
        return {"process": "closed", "users": flags["users"], **think}
    if "turns" not in flags:
        _refuse(flags, ("think_time",), "needs --users or --turns")
    rate = flags.get("request_rate", math.inf if "num_prompts" in flags else 1.0)
    if math.isinf(rate):
        _refuse(flags, ("burstiness",), "needs a --request-rate")
        if "num_prompts" not in flags:
            raise ConfigError("--request-rate is inf; then --num-prompts must say how many")
        return {"process": "once"}
    if "burstiness" in flags:
        return {"process": "gamma", "rate": rate, "burstiness": flags["burstiness"]}
    return {"process": "poisson", "rate": rate}


def _refuse(flags: Flags, names: Sequence[str], why: str) -> None:
    for name in names:
        if name in flags:
            raise ConfigError(f"{_spelled(name)} {why}")


def _spelled(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def parse_goodput(bounds: Sequence[str]) -> dict[str, float]:
    """{measure: milliseconds} of "ttft:500". Raises ConfigError."""
    found: dict[str, float] = {}
    for bound in bounds:
        name, _, number = bound.partition(":")
        if name in found:
            raise ConfigError(f"goodput is {bound!r}, and another bound of {name} is given; there can be one")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"goodput is {bound!r}; it must be like ttft:500, in milliseconds") from None
        if name not in GOODPUT_MEASURES:
            raise ConfigError(f"goodput is {bound!r}; measures are {', '.join(GOODPUT_MEASURES)}")
    return found


def parse_percentiles(text: str) -> list[float]:
    """Of "50,99,99.9". Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--metric-percentiles is {text!r}; it must be like 50,90,99") from None
    if not all(0 < percent <= 100 for percent in found):
        raise ConfigError(f"--metric-percentiles is {text!r}; each must be above 0 and at most 100")
    return found


def parse_sweep(text: str) -> list[float]:
    """Of "1,2,4", or "1:16:5": so many points, evenly apart on a logarithmic scale. Raises ConfigError."""
    try:
        if ":" in text:
            low, high, count = text.split(":")
            first, last, num_points = float(low), float(high), int(count)
            if not (0 < first < last < math.inf and 2 <= num_points <= 100):
                raise ValueError
            return [float(f"{first * (last / first) ** (i / (num_points - 1)):.4g}") for i in range(num_points)]
        points = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep is {text!r}; it must be like 1,2,4 or FROM:TO:COUNT such as 1:16:5") from None
    if not all(0 < point < math.inf for point in points) or len(points) > 100:
        raise ConfigError(f"--sweep is {text!r}; it must hold at most 100 numbers above 0")
    return points


def parse_address(text: str, flag: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """HOST:PORT. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or not is_number or not lowest_port <= int(port) <= 65535:
        raise ConfigError(f"{flag} is {text!r}; it must be HOST:PORT, with a port from {lowest_port} to 65535")
    return host.strip("[]"), int(port)
