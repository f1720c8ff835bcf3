"""Whether a process of a test still runs."""

import psutil


def is_running(pid: int) -> bool:
    """A killed process that nobody has waited for is a zombie, which does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
