"""The record of what is served, in Ray's control store. One driver writes it; gateways and the next driver read it."""

from collections.abc import Sequence

import msgspec

from cluster.ray_api import read_record, write_record
from serving.config import ModelEntry
from serving.contracts.served import RECORD_KEY, Owner, Served, ServedModel, State
from serving.driver.changes import entry_text
from serving.models.group_spec import GroupSpec


def read_served() -> Served | None:
    """None where nothing was served yet. Raises RayError, and msgspec.DecodeError for one of another version."""
    encoded = read_record(RECORD_KEY)
    return None if encoded is None else msgspec.msgpack.decode(encoded, type=Served)


def write_served(served: Served) -> None:
    """Raises RayError."""
    write_record(RECORD_KEY, msgspec.msgpack.encode(served))


def served_model(spec: GroupSpec, given: str, revision: int, state: State) -> ServedModel:
    """`given` is the entry as somebody wrote it, by `changes.entry_text`."""
    return ServedModel(
        card=spec.card,
        given=given,
        chosen=entry_text(spec.entry),
        revision=revision,
        state=state,
        adapters=spec.adapters,
    )


def with_added_adapters(model: ServedModel, before: ServedModel | None) -> ServedModel:
    """With the adapters that were added to what it was before, but for those whose names its own entry now has."""
    own = {adapter.name for adapter in model.adapters}
    added = [a for a in (before.adapters if before else ()) if not a.is_configured and a.name not in own]
    return msgspec.structs.replace(model, adapters=(*model.adapters, *added)) if added else model


def first_served(
    given: Sequence[ModelEntry], specs: Sequence[GroupSpec], before: Served | None, owner: Owner | None = None
) -> Served:
    """Of a stack that is deployed anew: what was given, and what came of it, in the same order."""
    generation = 1 + (before.generation if before else 0)
    models = {
        spec.card.name: served_model(spec, entry_text(entry), generation, "serving")
        for entry, spec in zip(given, specs, strict=True)
    }
    return Served(generation=generation, models=models, owner=owner)
