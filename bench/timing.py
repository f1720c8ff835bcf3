"""The fixed work that every engine is timed on, and how: in turn, in one run, so that figures of a drifting machine compare.

Prompts are random token ids from a fixed seed, end-of-sequence is ignored, decoding is greedy, prefix caching is off, and a time
counts prefill and decode together. Quote medians, and ratios of one run; never a lone time.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rich.table import Table

PAUSE_S = 0.3
"""Between two engines: the threads of the one before have stopped spinning by then."""
MAX_NEW_TOKENS_IN_WARM_UP = 4
FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 30_000


class Workload(NamedTuple):
    """Sequences that start together, and what each takes and gives."""

    batch: int
    num_prompt_tokens: int
    num_new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch} × {self.num_prompt_tokens}→{self.num_new_tokens}"

    @property
    def is_prefill(self) -> bool:
        """Told in seconds; everything else in output tokens a second."""
        return self.num_prompt_tokens > self.num_new_tokens * 8

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; special tokens, which come first in most vocabularies, are left out of a large one."""
        draw = random.Random(seed)
        first, last = (
            (FIRST_TOKEN_ID, min(LAST_TOKEN_ID, vocab_size)) if vocab_size > LAST_TOKEN_ID else (0, vocab_size)
        )
        return [[draw.randrange(first, last) for _ in range(self.num_prompt_tokens)] for _ in range(self.batch)]


WORKLOADS = (Workload(1, 32, 128), Workload(8, 128, 128), Workload(32, 128, 128), Workload(1, 1024, 4))


class ContenderFailedError(Exception):
    """An engine that can be timed no further. The message says why."""


class Contender(Protocol):
    """One engine that is ready to be timed."""

    @property
    def name(self) -> str: ...

    @property
    def max_repeats(self) -> int:
        """Most repeats of a workload: a slow engine would cost the run more than its figure is worth."""
        ...

    def run(self, workload: Workload, seed: int) -> float:
        """Seconds of one run. Raises ContenderFailedError."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One engine on one workload."""

    contender: str
    workload: Workload
    seconds: tuple[float, ...]
    """Of every repeat."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time."""
        return self.workload.batch * self.workload.num_new_tokens / self.median_s

    def as_data(self) -> dict[str, Any]:
        return {"contender": self.contender, "workload": list(self.workload), "seconds": list(self.seconds)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "Timing":
        return cls(contender=data["contender"], workload=Workload(*data["workload"]), seconds=tuple(data["seconds"]))


def time_in_turn(
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    num_repeats: int,
    report: Callable[[str], None],
    *,
    pause_s: float = PAUSE_S,
) -> tuple[list[Timing], dict[str, str]]:
    """Every workload `num_repeats` times: each engine once, then each again. Before that each runs it short, uncounted.

    Returns the timings, and by name why an engine failed. One that has failed is asked no more; its earlier timings count.
    """
    seconds: dict[tuple[str, Workload], list[float]] = {}
    failures: dict[str, str] = {}

    def run(contender: Contender, workload: Workload, seed: int) -> float | None:
        if contender.name in failures:
            return None
        time.sleep(pause_s)
        try:
            return contender.run(workload, seed)
        except ContenderFailedError as error:
            failures[contender.name] = str(error)
            report(f"{contender.name} failed: {error}")
            return None

    for workload in workloads:
        short = workload._replace(num_new_tokens=min(workload.num_new_tokens, MAX_NEW_TOKENS_IN_WARM_UP))
        for contender in contenders:
            run(contender, short, 0)
        for repeat in range(1, num_repeats + 1):
            for contender in contenders:
                if repeat <= contender.max_repeats and (took_s := run(contender, workload, repeat)) is not None:
                    seconds.setdefault((contender.name, workload), []).append(took_s)
                    report(f"{workload}  {repeat}/{num_repeats}  {contender.name}: {took_s:.3f} s")
    timings = [
        Timing(contender=name, workload=workload, seconds=tuple(times)) for (name, workload), times in seconds.items()
    ]
    return timings, failures


def cell(timing: Timing | None) -> str:
    """As it stands in a table: output tokens a second, or seconds where prefill is all."""
    if timing is None:
        return "-"
    return f"{timing.median_s:.2f} s" if timing.workload.is_prefill else f"{timing.tokens_per_s:.1f}"


def as_rows(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: a row an engine, a column a workload."""
    workloads = list(dict.fromkeys(timing.workload for timing in timings))
    found = {(timing.contender, timing.workload): timing for timing in timings}
    names = dict.fromkeys(timing.contender for timing in timings)
    header = ["output tokens/s", *(str(workload) for workload in workloads)]
    return header, [[name, *(cell(found.get((name, workload))) for workload in workloads)] for name in names]


def as_table(timings: Sequence[Timing], title: str) -> Table:
    """For the terminal."""
    header, rows = as_rows(timings)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table
