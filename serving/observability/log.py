"""Logs: one record a line on standard error, as JSON or as text. Never a prompt, never a key.

A record says when, how serious, which process (gateway, group, rank), which request, and what happened (`event`).
Whatever a record holds, it cannot forge another one or speak to a terminal: control characters are written as escapes.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType

from serving.config import log_format, log_level

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the current task handles. Made by the server; unique."""

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {0x2028: "\\u2028", 0x2029: "\\u2029"}

_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def configure_logging(process: str, *, error_messages: bool = True) -> None:
    """Set up this process's logging at $PACKTRAIN_LOG_LEVEL, in $PACKTRAIN_LOG_FORMAT.

    Without `error_messages` an exception is logged as its type and place alone. A gateway must do so, because the message of
    somebody else's exception may quote what a client sent.
    """
    kind = JsonFormatter if log_format() == "json" else TextFormatter
    # Not sys.stderr: Ray Serve replaces that with a logger of its own, which keeps a thousand records back.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(kind(process, error_messages=error_messages))
    logging.basicConfig(level=log_level(), handlers=[handler])
    # Alembic logs two lines whenever a database is opened; `serving.tenants.store.database` logs a change of the schema.
    logging.getLogger("alembic").setLevel(logging.WARNING)


def log_event(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log an event with named values beside it."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", event, extra={"fields": fields})


class Trouble:
    """What fails again and again is told when it begins, when its reason changes, and when it is over."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told = ""

    def met(self, problem: str) -> None:
        """It has failed, once more perhaps."""
        if problem != self._told:
            self._told = problem
            self._logger.warning("%s", problem)

    def over(self, event: str) -> None:
        """It has not failed this time."""
        if self._told:
            self._told = ""
            self._logger.warning("%s", event)


class _Formatter(logging.Formatter):
    def __init__(self, process: str, *, error_messages: bool = True) -> None:
        super().__init__()
        self._process = process
        self._error_messages = error_messages

    def formatException(self, ei: _ErrorInfo) -> str:  # noqa: N802 - logging's name
        if self._error_messages:
            return super().formatException(ei)
        return "\n".join(_places(ei[1]))

    def _time(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03d}Z"

    def _values(self, record: logging.LogRecord) -> dict[str, object]:
        """What the record carries beside its event: the request that it belongs to, and its own fields."""
        values: dict[str, object] = {"request_id": request_id.get()} if request_id.get() else {}
        values.update(getattr(record, "fields", {}))
        return values

    def _error(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Printable ASCII only: json escapes all but one of the other characters."""
        item: dict[str, object] = {
            "time": self._time(record),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "event": record.getMessage(),
            **self._values(record),
        }
        if error := self._error(record):
            item["error"] = error
        return json.dumps(item, default=str).replace("\x7f", "\\u007f")


class TextFormatter(_Formatter):
    """For people: `time level [process pid] logger: event key=value`; the lines of an exception are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Lines after the first begin with a bar, so that none can be taken for a record."""
        values = "".join(f" {name}={value}" for name, value in self._values(record).items())
        where = f"[{self._process} {os.getpid()}] {record.name}"
        lines = [f"{self._time(record)} {record.levelname} {where}: {record.getMessage()}{values}"]
        lines += [f"  | {line}" for line in self._error(record).split("\n") if line]
        return "\n".join(line.translate(_ESCAPES) for line in lines)


def _places(error: BaseException | None) -> Iterator[str]:
    """Types of an exception and of its causes, and the lines that they came from."""
    while error is not None:
        yield f"{type(error).__module__}.{type(error).__qualname__}"
        for entry in traceback.format_tb(error.__traceback__):
            yield from entry.rstrip("\n").split("\n")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
