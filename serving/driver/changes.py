"""The rules of changing what is served while it runs. Pure: what is asked for, what it means, and why not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from model_parallel.errors import ConfigError
from serving.config import ModelEntry, ServingConfig, parse_config
from serving.contracts.models import ModelCard
from serving.contracts.yaml_files import parse_yaml

NUMBER_FIELDS = frozenset({"num_groups", "autoscaling"})
"""How many groups there are; those that run stay."""
GATEWAY_FIELDS = frozenset({"chat", "generation_config", "allow_parse_special", "source"})
"""What gateways alone go by; no group is replaced. Another source is only another name of the same files."""
SIZE_FIELDS = ("device", "dtype", "threads_per_rank", "kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens")
"""What may be left to us. A model that runs keeps what was chosen."""
GONE = ("STOPPING", "STOPPED")
"""Serve's names of the states of a group that is being stopped."""
_KEEPS_FILES = (
    "a running model keeps its files, since its answers go on in the groups that replace others. Deploy the other one under "
    "another name, or undeploy this one first"
)
_AUTO = (None, "auto")


def parse_entry(text: str, running: ServingConfig, origin: str) -> ModelEntry:
    """One entry of `models` as YAML or JSON, which must fit the others that are served. Raises ConfigError."""
    data = parse_yaml(text, origin)
    if not isinstance(data, dict):
        raise ConfigError(f"{origin} must be one entry of models, a mapping with `name:` and `source:`")
    others = [entry for entry in dumped(running.models) if entry["name"] != data.get("name")]
    config = parse_config({**_rest(running), "models": [data, *others]}, origin=origin)
    return config.models[0]


def with_models(config: ServingConfig, entries: Iterable[ModelEntry], origin: str) -> ServingConfig:
    """The configuration with these models in place of its own. Raises ConfigError."""
    return parse_config({**_rest(config), "models": dumped(entries)}, origin=origin)


def dumped(entries: Iterable[ModelEntry]) -> list[dict[str, Any]]:
    """Entries as plain data; what nobody set stays unset."""
    return [entry.model_dump(mode="json", exclude_unset=True) for entry in entries]


def entry_of(text: str) -> ModelEntry:
    """From what `entry_text` made."""
    return ModelEntry.model_validate(json.loads(text))


def entry_text(entry: ModelEntry) -> str:
    """An entry as JSON; what nobody set stays unset."""
    return entry.model_dump_json(exclude_unset=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What another entry of the same model changes."""

    fields: Mapping[str, tuple[object, object]]
    """(before, after) of each field that differs."""

    @property
    def replaces_groups(self) -> bool:
        """Groups must be started anew for it."""
        return bool(self.fields.keys() - NUMBER_FIELDS - GATEWAY_FIELDS)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {_shown(before)} → {_shown(after)}" for name, (before, after) in self.fields.items())


def difference(before: ModelEntry, after: ModelEntry) -> Difference:
    """Of the entries as they were given. A default that is written out is no difference."""
    fields = {
        name: (getattr(before, name), getattr(after, name))
        for name in ModelEntry.model_fields
        if getattr(before, name) != getattr(after, name)
    }
    return Difference(fields=fields)


def check_same_files(before: ModelCard, after: ModelCard) -> None:
    """Raises ConfigError for what a running model cannot become: its answers would go on in other words."""
    if before.source != after.source:
        raise ConfigError(
            f"models.{after.name}.source is {after.source} and the model that is served is {before.source}; {_KEEPS_FILES}"
        )
    if before.weights and before.weights != after.weights:
        raise ConfigError(
            f"models.{after.name}.source: the weights at {after.source} are not those that are served; {_KEEPS_FILES}"
        )


def with_sizes_kept(given: ModelEntry, before: ModelEntry, chosen: ModelEntry) -> ModelEntry:
    """`given` with the sizes that were `chosen` for the running entry `before`, where both leave them to us."""
    kept = {
        name: getattr(chosen, name)
        for name in SIZE_FIELDS
        if getattr(given, name) in _AUTO and getattr(before, name) in _AUTO
    }
    return given.model_copy(update=kept)


def scaled(
    entry: ModelEntry, *, num_groups: int | None = None, min_groups: int | None = None, max_groups: int | None = None
) -> dict[str, Any]:
    """The entry, as plain data, with another number of groups or other bounds. Raises ConfigError for what the entry does not
    have; whether the numbers are good is for `parse_entry` to say."""
    data = dumped([entry])[0]
    scaling = entry.autoscaling
    follows_load = scaling is not None and scaling.mode == "on"
    if num_groups is not None and (min_groups is not None or max_groups is not None):
        raise ConfigError("either the number of groups is given, or its bounds")
    if num_groups is not None:
        if follows_load:
            raise ConfigError(
                f"models.{entry.name}: the autoscaler decides how many groups there are; give min_groups and max_groups, or "
                "deploy the model with autoscaling.mode off or advise"
            )
        return data | {"num_groups": num_groups}
    if min_groups is None and max_groups is None:
        raise ConfigError("the number of groups is missing, or min_groups and max_groups")
    if scaling is None:
        raise ConfigError(f"models.{entry.name} has no autoscaling, and so no bounds; give the number of groups")
    bounds = {"min_groups": min_groups, "max_groups": max_groups}
    data["autoscaling"] |= {name: value for name, value in bounds.items() if value is not None}
    low, high = data["autoscaling"].get("min_groups", scaling.min_groups), data["autoscaling"]["max_groups"]
    # What a model begins with lies within its bounds.
    return data | {"num_groups": max(1, min(max(entry.num_groups, low), high))}


def follows_load(entry: ModelEntry) -> bool:
    """Whether the autoscaler decides on the number of its groups."""
    return entry.autoscaling is not None and entry.autoscaling.mode == "on"


def check_max_unavailable(max_unavailable: int, num_groups: int) -> None:
    """Raises ConfigError."""
    most = max(1, num_groups - 1)
    if not 1 <= max_unavailable <= most:
        raise ConfigError(
            f"max_unavailable is {max_unavailable}; of {num_groups} groups 1 to {most} may be replaced at a time"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """How far the replacement of some groups has come."""

    num_new: int
    """Other groups that run."""
    num_left: int
    """Old groups that are still to be stopped."""
    num_stopping: int
    num_starting: int
    num_target: int
    """Groups that there are to be."""

    @property
    def is_over(self) -> bool:
        """All groups are new, and run."""
        return (
            not self.num_left and not self.num_stopping and not self.num_starting and (self.num_new >= self.num_target)
        )

    def told(self, what: str) -> str:
        """As a line; `what` the new groups do or are."""
        doing = [
            f"{number} {what}"
            for number, what in ((self.num_stopping, "draining"), (self.num_starting, "starting"))
            if number
        ]
        return f"{self.num_new} of {self.num_target} groups {what}" + "".join(f", {what}" for what in doing)


def rollout(old: frozenset[str], states: Mapping[str, str], target: int) -> Rollout:
    """`old` are the ids of the groups that ran before, `states` those of all groups now (Serve's names) by id."""
    alive = {group: state for group, state in states.items() if state not in GONE}
    return Rollout(
        num_new=sum(state == "RUNNING" and group not in old for group, state in alive.items()),
        num_left=sum(group in old for group in alive),
        num_stopping=len(states) - len(alive),
        num_starting=sum(state != "RUNNING" and group not in old for group, state in alive.items()),
        num_target=target,
    )


def _rest(config: ServingConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True, exclude={"models"})


def _shown(value: object) -> str:
    if hasattr(value, "model_dump"):
        value = value.model_dump(exclude_unset=True)
    return "unset" if value is None else str(value)
