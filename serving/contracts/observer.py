"""What is told of a request while it runs, to whoever keeps metrics, traces and the access log.

`serving/observability/` listens; without it a gateway works the same and tells nobody.
"""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from model_parallel.engine.request import EngineOutput, SamplingParams
from serving.contracts.accounts import Principal, UsageRecord


class RequestObserver:
    """A context around one request, which is told what happens to it. This one does not listen."""

    def __enter__(self) -> "RequestObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The request is over. What is raised says how, unless `failed` or `ended` has."""

    def authenticated(self, principal: Principal) -> None:
        """Whose request it is."""

    def resolved(self, model: str, base: str) -> None:
        """It asks for this model, which is served and which the sender may use. `base` is the one that an adapter changes, else
        the model itself; there are few of those, and they stay."""

    def generates(self, operation: str, num_choices: int, sampling: SamplingParams) -> None:
        """It wants tokens. `operation` is "chat" or "text_completion"."""

    def ignored(self, num_fields: int) -> None:
        """It came with so many fields that this server does not know and has not looked at."""

    def submitted(self) -> Mapping[str, str]:
        """It goes to a group now, with the returned trace context."""
        return {}

    def accepted(self, engine: str) -> None:
        """The group of this id has accepted it."""

    def interrupted(self) -> None:
        """That group is lost, and another one is to accept the rest of it."""

    def received(self, outputs: Sequence[EngineOutput]) -> None:
        """Outputs have come from the group."""

    def settled(self, record: UsageRecord) -> None:
        """What it used is known."""

    def failed(self, code: str, reason: str, *, quota: str = "", engine: str = "") -> None:
        """It is answered with this status (its gRPC name) for this reason. `quota` is the one that is used up, `engine` the group
        that the error comes from."""

    def ended(self, code: str) -> None:
        """It ends with this status, and nobody is there to be told."""


Observe = Callable[[str, str, str, Mapping[str, str]], RequestObserver]
"""(front end, method, request id, headers) to an observer. Of the headers traceparent and tracestate count."""

UNOBSERVED = RequestObserver()


def unobserved(front_end: str, method: str, request_id: str, headers: Mapping[str, str]) -> RequestObserver:
    """For a gateway that nobody watches."""
    return UNOBSERVED
