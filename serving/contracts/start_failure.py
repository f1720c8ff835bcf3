"""Why a gateway or a leader could not start, carried through Serve to the person who started it.

Serve reports a failed constructor as the text of a traceback, of which only what is told here is for people.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from model_parallel.errors import EngineError

_MARK = "packtrain-start-failure:"
_MARKED = re.compile(re.escape(_MARK) + r'("(?:[^"\\]|\\.)*")')


_TRACEBACKS = ("Traceback", "ray::")
"""How Python's begins, and Ray's of an error on the other side of a call."""
_NOT_FOR_PEOPLE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]| at 0x[0-9a-fA-F]+")


class StartError(Exception):
    """The stack did not come up. The message is for the person who started it."""


class StartFailedError(RuntimeError):
    """What `telling_start_failures` turns an error into."""


@contextmanager
def telling_start_failures() -> Iterator[None]:
    """Within a constructor: what is raised on purpose, and what the system refuses, arrives as its message alone."""
    try:
        yield
    except (EngineError, OSError) as error:
        raise StartFailedError(_MARK + json.dumps(str(error))) from error


def start_failures(text: str) -> list[str]:
    """The messages in whatever text Ray and Serve made of such errors, each once."""
    return list(dict.fromkeys(json.loads(found) for found in _MARKED.findall(text)))


def plain_reason(text: str) -> str:
    """The shortest true account of an error's text: our own messages in it, else the last line of a traceback, else its first
    line; without colours of a terminal and addresses of objects."""
    text = _NOT_FOR_PEOPLE.sub("", text)
    if failures := start_failures(text):
        return "\n".join(failures)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no reason was given"
    return lines[-1] if any(line.startswith(_TRACEBACKS) for line in lines) else lines[0]
