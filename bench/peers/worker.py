"""The peer's side of a bench: a loop that answers timed work. Standard library alone, since it runs in the peers' environments.

A line of JSON on standard input is work, {"prompts": [[token ids]], "num_new_tokens": n}; a line on standard output is its
answer, {"seconds": s}. The first line out is {"detail": "..."}, once the engine is ready. What libraries print goes to
standard error.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
"""See prctl(2)."""

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], int]
"""Run all prompts to so many new tokens each, greedily and never ending earlier; returns how many tokens came in all."""


def end_with_starter() -> None:
    """Be killed when the process that started this one ends in any way, also while this one is stopped or computes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def serve(load: Callable[[], tuple[Generate, str]]) -> None:
    """Make the engine, then time it on what is asked until standard input ends."""
    end_with_starter()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def send(message: dict[str, object]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        generate, detail = load()
        send({"detail": detail})
        for line in sys.stdin:
            work = json.loads(line)
            prompts, num_new_tokens = work["prompts"], work["num_new_tokens"]
            began_s = time.perf_counter()
            num_tokens = generate(prompts, num_new_tokens)
            took_s = time.perf_counter() - began_s
            if num_tokens != len(prompts) * num_new_tokens:
                raise RuntimeError(f"{num_tokens} tokens came; {len(prompts) * num_new_tokens} were asked for")
            send({"seconds": took_s})
