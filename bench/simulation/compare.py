"""Variants of one scenario side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_parallel.errors import ConfigError
from serving.contracts.yaml_files import parse_yaml

COMPARED = (
    "sent", "finished", "refused", "failed", "cancelled", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
    "output_throughput", "gpu_hours", "energy_kwh", "num_migrations", "num_preemptions", "jain_index",
    "num_cut",
)  # fmt: skip


def read_variants(data: Mapping[str, Any], variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Data by name. Raises ConfigError."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        name, changed = with_changes(data, variant)
        if name in found:
            raise ConfigError(f"variant {variant!r}: the name {name!r} stands twice; each needs its own")
        found[name] = changed
    return found


def with_changes(data: Mapping[str, Any], variant: str) -> tuple[str, dict[str, Any]]:
    """Name and data of "name: key.key=value key=value" over a scenario's data. Values are YAML. Raises ConfigError."""
    name, colon, changes = variant.partition(":")
    if not colon or not name.strip():
        raise ConfigError(f"variant {variant!r} must be like 'name: groups.num_groups=4 failures.migration=false'")
    changed: dict[str, Any] = _copied(dict(data))
    for change in changes.split():
        path, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"variant {name!r}: {change!r} must be like groups.num_groups=4")
        *parents, last = path.split(".")
        section = changed
        for parent in parents:
            inner = section.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"variant {name!r}: {path!r} is not in the scenario; {parent!r} has no keys")
            section = inner
        section[last] = parse_yaml(text, f"variant {name!r}: {text!r}")
    return name.strip(), changed


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
