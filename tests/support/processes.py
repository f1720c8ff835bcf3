"""Processes that tests start: how, and whether they still run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def started_with_hang_up(*, ignored: bool = False) -> Iterator[None]:
    """Processes that are started within the block begin with SIGHUP ignored, as after nohup, or not ignored, whatever this
    process was started with (`nohup make test`, for example)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def is_running(pid: int) -> bool:
    """A killed process that nobody has waited for is a zombie, which does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
