"""Regular expressions that come with a checkpoint. A stranger wrote them, so they are matched in a process that may be ended."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_LENGTH = 1000
MAX_CPU_S = 3
"""Of processor time, for all expressions and names together. One that is not made to be slow needs a few milliseconds."""
_MAX_WAIT_S = 60.0
"""On a machine that is busy otherwise."""
_PROGRAM = Path(__file__).with_name("pattern_process.py")


class PatternError(ValueError):
    """An expression that cannot be used. The message goes on after its text and "which"."""

    def __init__(self, message: str, pattern: str) -> None:
        super().__init__(message)
        self.pattern = pattern


def matching(patterns: Sequence[str], names: Sequence[str], *, whole: bool) -> frozenset[str]:
    """The names of which a regular expression of Python's matches the beginning, or the `whole`. Raises PatternError."""
    if not patterns:
        return frozenset()
    if too_long := next((pattern for pattern in patterns if len(pattern) > MAX_LENGTH), ""):
        raise PatternError(f"has {len(too_long)} characters; allowed: {MAX_LENGTH}", too_long)
    asked = json.dumps({"patterns": [*patterns], "names": [*names], "whole": whole})
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(MAX_CPU_S)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_MAX_WAIT_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        others = f" with {len(patterns) - 1} others" if len(patterns) > 1 else ""
        raise PatternError(
            f"takes{others} more than {MAX_CPU_S} s, or more memory than it may, to be matched", patterns[0]
        ) from error
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise PatternError(f"is no pattern: {answer['error']}", answer["pattern"])
    return frozenset(answer["matched"])
