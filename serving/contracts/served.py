"""What is served, as the driver writes it into Ray's control store: for the gateways, and for the driver that comes after it."""

from typing import Literal

import msgspec

from serving.contracts.models import AdapterCard, ModelCard

APP_NAME = "packtrain"
"""Serve's application of the gateways. Each model has one of its own, so that models come and go without the gateways."""
RECORD_KEY = "packtrain/served"
"""Of the record in Ray's control store, which lives as long as the groups that it is about."""
_MODEL_APP = f"{APP_NAME}-model-"

State = Literal["starting", "serving", "replacing", "removing"]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model, and how far a change of it has come."""

    card: ModelCard
    given: str
    """Its entry of the configuration, as somebody wrote it (JSON)."""
    chosen: str
    """The same with everything that was left to us (JSON)."""
    revision: int
    """Goes up whenever its groups are to be replaced."""
    state: State
    """Gateways know those that serve, and those whose groups are being replaced: what no group can take waits then."""
    adapters: tuple[AdapterCard, ...] = ()
    """Of the model: those of its entry, and those that were added."""
    replacement: "Replacement | None" = None
    """While its groups are replaced by those of another configuration."""

    @property
    def is_shown(self) -> bool:
        """Clients may ask for it."""
        return self.state in ("serving", "replacing")

    @property
    def settled(self) -> "ServedModel":
        """As it is to be when the replacement of its groups has ended."""
        return self.replacement.after if self.replacement else self


class Replacement(msgspec.Struct, frozen=True, kw_only=True):
    """A model before and after its groups are replaced: Serve has been told one of the two revisions."""

    before: ServedModel
    after: ServedModel


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The driver that has deployed what is served."""

    job: str
    """Its id as a job of Ray, which no other driver of the cluster gets."""
    is_detached: bool
    """What is served goes on when the driver ends."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """All models."""

    generation: int
    """Goes up with every change."""
    models: dict[str, ServedModel]
    owner: Owner | None = None
    """None where nothing is served."""

    @property
    def shown(self) -> dict[str, ServedModel]:
        """Those that clients may ask for."""
        return {name: model for name, model in self.models.items() if model.is_shown}

    @property
    def adapters(self) -> tuple[AdapterCard, ...]:
        """Those that clients may ask for."""
        return tuple(adapter for model in self.shown.values() for adapter in model.adapters)


class GatewayModels(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway answers when it is told to look at the record."""

    gateway: str
    generation: int
    """Of the record that it goes by now."""
    num_open: dict[str, int]
    """Open requests of each model that has any, models that are not served any more included."""
    problems: dict[str, str]
    """Why it cannot serve a model of the record."""


def app_name(model: str) -> str:
    """Of the Serve application that has a model's groups."""
    return _MODEL_APP + _slug(model)


def deployment_name(model: str) -> str:
    """Of the deployment whose replicas are the groups of a model."""
    return f"ReplicaGroup-{_slug(model)}"


def is_ours(app: str) -> bool:
    """Whether a Serve application is one of Packtrain's."""
    return app == APP_NAME or app.startswith(_MODEL_APP)


def _slug(model: str) -> str:
    """Serve makes file names of it. No model's name has a tilde."""
    return model.replace("/", "~")
