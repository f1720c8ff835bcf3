"""Server-sent events, as the HTML standard has them read: lines end with LF, CR or both, and an empty one ends an event."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import NamedTuple

MAX_EVENT_BYTES = 8 << 20


class Event(NamedTuple):
    """What a server sent at a time."""

    name: bytes
    """Empty for one without a name."""
    data: bytes


class EventReader:
    """Takes bytes as they come."""

    def __init__(self) -> None:
        self._has_begun = False
        self._rest = b""
        """Of a line that has not ended."""
        self._ends_in_cr = False
        """A LF that comes next belongs to the line that has ended."""
        self._name = b""
        self._data: list[bytes] = []
        self._num_bytes = 0

    def feed(self, received: bytes) -> Iterator[Event]:
        """The events that are complete now. Raises ValueError for one that is too long."""
        if self._ends_in_cr and received:
            received, self._ends_in_cr = received.removeprefix(b"\n"), False
        if not received:
            return
        self._ends_in_cr = received.endswith(b"\r")
        text = self._rest + received
        lines = text.splitlines()
        self._rest = b"" if text.endswith((b"\n", b"\r")) else lines.pop()
        for line in lines:
            if line:
                self._take(line)
            elif self._data:
                yield self._complete()
            else:
                self._name = b""
        if len(self._rest) + self._num_bytes > MAX_EVENT_BYTES:
            raise ValueError(f"an event has more than {MAX_EVENT_BYTES} bytes")

    def end(self) -> Iterator[Event]:
        """The one that the end of the body completes: the standard drops it, and servers that leave out the last line ends
        mean it."""
        if self._rest:
            self._take(self._rest)
        if self._data:
            yield self._complete()

    def _take(self, line: bytes) -> None:
        if not self._has_begun:
            line, self._has_begun = line.removeprefix(BOM_UTF8), True
        if line.startswith(b"data:"):
            value = line[5:].removeprefix(b" ")
            self._data.append(value)
            self._num_bytes += len(value)
        elif line.startswith(b"event:"):
            self._name = line[6:].removeprefix(b" ")

    def _complete(self) -> Event:
        event = Event(self._name, self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
        self._name, self._data, self._num_bytes = b"", [], 0
        return event
