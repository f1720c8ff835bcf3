"""What a front end knows of one call besides its content."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.contracts.accounts import OPEN, Principal
from serving.contracts.observer import UNOBSERVED, RequestObserver

_MAX_LABEL_CHARS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call."""

    request_id: str
    """Made by the server."""
    arrived_s: float
    """On the generator's clock."""
    timeout_s: float | None
    """Left of the client's deadline at arrival."""
    principal: Principal = OPEN
    observer: RequestObserver = UNOBSERVED
    """Is told what happens to it."""
    is_streamed: bool = False
    """Parts of the answer go out before its end. Otherwise its usage is durable before any of it goes out."""
    ignored: list[str] = field(default_factory=list)
    """Fields that were not looked at, as the answer tells. Who does not look at one adds it."""

    def ignore(self, names: Sequence[str]) -> None:
        """Tell that these fields were not looked at."""
        self.ignored.extend(names)
        self.observer.ignored(len(names))


def printable_label(value: str) -> str:
    """A client's own name for its request, which is echoed and nothing else: cut, and fit for a header or a log."""
    return "".join(character for character in value if " " <= character <= "~")[:_MAX_LABEL_CHARS]


def trace_headers(headers: Sequence[tuple[str, str | bytes]]) -> dict[str, str]:
    """W3C trace context of a call, by names in lower case. Several values of `tracestate` are one list; of several `traceparent`
    nobody knows which is meant, and none counts."""
    parents, states = (
        [str(value) for name, value in headers if name == wanted] for wanted in ("traceparent", "tracestate")
    )
    if len(parents) != 1:
        return {}
    return {"traceparent": parents[0]} | ({"tracestate": ",".join(states)} if states else {})
