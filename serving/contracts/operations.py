"""What operators ask for while the cluster runs, as the Admin service asks the driver."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.contracts.models import AdapterCard


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a change has come, as a line for people and as numbers."""

    stage: str
    """A stable word: checking, starting, replacing, draining, stopping, telling, done."""
    text: str
    num_done: int = 0
    """Groups, of `num_total`."""
    num_total: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatus:
    """One model as the driver knows it."""

    name: str
    state: str
    """serving, or what is being done with it: starting, replacing, removing."""
    num_groups: int
    """That there are to be."""
    num_running: int
    config: str
    """Its entry of the configuration, as it was given (JSON)."""
    change: str = ""
    """The last progress of a change that is under way; "" when none is."""


class Operations(Protocol):
    """Changes what is served. Every method but `status` returns when the change is made, and reports how far it has come. Only
    one change is made at a time.

    Raises ValidationError for what was asked for wrongly, UnknownModelError, NotFoundError for a group that is not there, and
    ChangeError when the change cannot be made: then what was served before still is.
    """

    def status(self) -> Sequence[ModelStatus]: ...

    def deploy(self, entry: str, max_unavailable: int, report: Report, *, only_check: bool) -> None:
        """Serve one more model, or one of them in another way; `entry` is one entry of `models`, as YAML or JSON."""
        ...

    def undeploy(self, model: str, report: Report) -> None: ...

    def scale(
        self, model: str, report: Report, *, num_groups: int | None, min_groups: int | None, max_groups: int | None
    ) -> None:
        """Another number of groups, or for a model with autoscaling other bounds."""
        ...

    def restart(self, model: str, max_unavailable: int, report: Report) -> None:
        """Replace all groups, `max_unavailable` at a time, by new ones of the same configuration."""
        ...

    def drain(self, group: str, grace_s: float | None, report: Report) -> None:
        """Replace one group: it takes nothing new, and what it runs ends within the grace or goes on elsewhere."""
        ...

    def adapters(self) -> Sequence[AdapterCard]:
        """Those of all models, by name."""
        ...

    def add_adapter(self, name: str, model: str, source: str, tenants: tuple[str, ...] | None) -> AdapterCard:
        """Serve a LoRA adapter of a model, once every rank of every running group has loaded it. AlreadyExistsError for a name
        that is taken. It does not report."""
        ...

    def remove_adapter(self, name: str) -> AdapterCard:
        """Serve it no more. What runs may finish. It does not report."""
        ...
