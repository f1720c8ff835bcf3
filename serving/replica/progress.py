"""How far the ranks of this host have loaded, told from the leaders' processes to the one that started them.

Each leader keeps a small file in the private cluster's directory; the starter adds them up. Nothing waits for it.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PATTERN = "loading-*.json"
_WRITE_PERIOD_S = 0.1
_POLL_S = 0.2


class ProgressFile:
    """A leader's side: called with (rank, bytes loaded, bytes in all) as its ranks load."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"loading-{os.getpid()}.json"
        self._of_rank: dict[int, tuple[int, int]] = {}
        self._next_write_s = 0.0

    def __call__(self, rank: int, done_bytes: int, total_bytes: int) -> None:
        self._of_rank[rank] = (done_bytes, total_bytes)
        if time.monotonic() < self._next_write_s and done_bytes < total_bytes:
            return
        self._next_write_s = time.monotonic() + _WRITE_PERIOD_S
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps([sum(part) for part in zip(*self._of_rank.values(), strict=True)]))
        unfinished.replace(self._path)


def loaded_bytes(directory: Path) -> tuple[int, int]:
    """(bytes loaded, bytes in all) of all leaders that have begun; (0, 0) when none has."""
    pairs = [json.loads(path.read_text()) for path in directory.glob(_PATTERN)]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


@contextmanager
def watched_progress(directory: Path, on_load: Callable[[int, int], None]) -> Iterator[None]:
    """Call `on_load(bytes loaded, bytes in all)` a few times a second within the block."""
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_POLL_S):
            done, total = loaded_bytes(directory)
            if total:
                on_load(done, total)

    watcher = threading.Thread(target=watch, name="loading-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join(10 * _POLL_S)
