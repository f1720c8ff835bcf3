"""Adapters that come and go while the cluster runs: the rules, and the calls of the groups."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from model_parallel.errors import ConfigError, EngineError
from serving.config import (
    MAX_MODEL_NAME_LENGTH,
    MAX_TENANT_ID_LENGTH,
    MODEL_NAME,
    TENANT_ID,
    AdapterEntry,
    ModelEntry,
    repeated,
)
from serving.contracts.errors import AlreadyExistsError, ChangeError, NotFoundError, ValidationError
from serving.contracts.models import AdapterCard
from serving.contracts.served import Served, ServedModel
from serving.contracts.start_failure import plain_reason
from serving.models.group_spec import GroupSpec, describe_card
from serving.tenants.keys import without_secrets

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 120.0
"""For all groups of a model together; leaders give up before."""
UNLOAD_TIMEOUT_S = 10.0
MAX_ADAPTERS = 1024
"""Every gateway keeps them all, and lists of models name them."""
MAX_TENANTS = 64
_MAX_SOURCE_LENGTH = 4096


def checked_entry(name: str, source: str, tenants: tuple[str, ...] | None) -> AdapterEntry:
    """What can be seen without reading the directory. Raises ValidationError."""
    if len(name) > MAX_MODEL_NAME_LENGTH or not re.fullmatch(MODEL_NAME, name):
        raise ValidationError(
            "name",
            f"name must be 1 to {MAX_MODEL_NAME_LENGTH} letters and digits, and . _ / - after the first, not {name[:80]!r}",
        )
    if not source.startswith("/") or len(source) > _MAX_SOURCE_LENGTH or not source.isprintable():
        raise ValidationError("source", f"source must be the absolute path of a directory, not {source[:80]!r}")
    if tenants is not None and not 1 <= len(tenants) <= MAX_TENANTS:
        raise ValidationError("tenants", f"tenants must be 1 to {MAX_TENANTS} ids, or unset, not {len(tenants)}")
    for tenant in tenants or ():
        if len(tenant) > MAX_TENANT_ID_LENGTH or not re.fullmatch(TENANT_ID, tenant):
            raise ValidationError(
                "tenants",
                f"tenants must be ids of 1 to {MAX_TENANT_ID_LENGTH} lower-case letters, digits and inner hyphens, not "
                f"{without_secrets(tenant)[:80]!r}",
            )
    if tenants is not None and (twice := repeated(tenants)) is not None:
        raise ValidationError("tenants", f"tenants must be different, and {twice!r} is there more than once")
    return AdapterEntry(name=name, source=Path(source), tenants=tenants)


def all_adapters(served: Served) -> Iterator[AdapterCard]:
    """Of all models, in any state."""
    for model in served.models.values():
        yield from model.adapters


def check_name(name: str, served: Served) -> None:
    """Raises AlreadyExistsError for one that is taken, ValidationError when there are too many."""
    taken = {card.name for card in all_adapters(served)}
    if name in taken or name in served.models:
        raise AlreadyExistsError(f"there is a model or adapter {name!r} already")
    if len(taken) >= MAX_ADAPTERS:
        raise ValidationError("name", f"there are {MAX_ADAPTERS} adapters already, which is the most; remove one")


def check_names(given: ModelEntry, served: Served) -> None:
    """Of a model that comes or changes, and of its adapters. That they differ from those of the configuration, the configuration
    says itself; its own adapters may take the place of those that were added to it. Raises AlreadyExistsError."""
    own = {adapter.name for adapter in given.lora.adapters} if given.lora is not None else set()
    for card in all_adapters(served):
        if not card.is_configured and (card.name == given.name or (card.name in own and card.parent != given.name)):
            raise AlreadyExistsError(f"there is an adapter {card.name!r} of {card.parent} already; remove it first")


def check_still_fit(before: ServedModel, spec: GroupSpec) -> None:
    """Adapters that were added to a model must fit its groups as they are to be. Raises ConfigError, CheckpointError."""
    own = {card.name for card in spec.adapters}
    for card in before.adapters:
        if not card.is_configured and card.name not in own:
            entry = AdapterEntry(name=card.name, source=Path(card.ref.path), tenants=card.tenants)
            try:
                describe_card(entry, card.parent, spec.model, spec.parallel, spec.adapter_config, is_configured=False)
            except EngineError as error:
                raise ConfigError(
                    f"adapter {card.name!r}, which was added, does not fit; remove it first: {error}"
                ) from error


def find_added(name: str, served: Served) -> AdapterCard:
    """Raises NotFoundError, and ValidationError for one that stands in its model's configuration."""
    for card in all_adapters(served):
        if card.name == name:
            if card.is_configured:
                raise ValidationError(
                    "name", f"adapter {name!r} stands in the configuration of {card.parent}; deploy that without it"
                )
            return card
    raise NotFoundError(f"there is no adapter {name[:MAX_MODEL_NAME_LENGTH]!r}")


def is_served(card: AdapterCard, served: Served) -> bool:
    """The same files are served, perhaps under another name."""
    return any(o.ref.digest == card.ref.digest and o.parent == card.parent for o in all_adapters(served))


class Groups:
    """All running groups of one model, as far as adapters are concerned."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def load(self, card: AdapterCard) -> None:
        """Returns when every rank of every group has it. Raises ChangeError that says why one has not."""
        try:
            answers = self._tell("load_adapter", card, LOAD_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ChangeError(f"the groups of {card.parent} cannot be asked: {plain_reason(str(error))}") from error
        problems = [
            answer if isinstance(answer, str) else f"it was lost meanwhile ({type(answer).__name__})"
            for answer in answers
            if answer != ""
        ]
        if problems:
            which = "the group" if len(answers) == 1 else f"{len(problems)} of {len(answers)} groups"
            raise ChangeError(f"{which} could not load the adapter: {problems[0]}")

    def unload(self, card: AdapterCard) -> None:
        """Have them drop it as soon as no request needs it. Where one cannot be told, it goes when its room is needed."""
        try:
            answers = self._tell("unload_adapter", card, UNLOAD_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("adapter %s stays loaded until its room is needed: %s", card.name, type(error).__name__)
            return
        for lost in (answer for answer in answers if isinstance(answer, Exception)):
            logger.warning("a group cannot be told to unload adapter %s: %s", card.name, type(lost).__name__)

    def _tell(self, method: str, card: AdapterCard, timeout_s: float) -> list[object]:
        """What each group answers; an exception for one that cannot."""
        broadcast = self._handle.broadcast(method, msgspec.msgpack.encode(card))
        return list(broadcast.results(timeout_s=timeout_s, return_exceptions=True))
