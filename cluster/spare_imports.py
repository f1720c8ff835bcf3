"""What an idle worker process of Ray does until somebody uses it: it waits for a note of what will be needed, and imports that.

In no hurry: the thread that does so has the lowest priority, and ends. (A process that had lowered its own could not raise it
again. SCHED_IDLE would be too low: who uses the process in the middle waits for what is being imported.)

No other thread imports anything meanwhile. Python has a lock for each module, and where two threads import modules that import
each other, it gives one of them a module that is not complete. So an actor could fail for good that came into the process.
"""

import _imp
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOOK_PERIOD_S = 1.0
NUM_LOOKS = 3
"""At which a process must be unused before it imports anything: Ray starts most of them for somebody who waits for it."""
LOWEST_PRIORITY = 19
_UNUSED = b"ray::IDLE"


def note_of_modules() -> Path:
    """Where it is written what is imported. The directory is the private cluster's own."""
    return Path(tempfile.gettempdir()) / "packtrain-spares"


def is_unused() -> bool:
    """Ray calls a process so until it gives it an actor or a task."""
    return Path("/proc/self/cmdline").read_bytes().startswith(_UNUSED)


def import_when_noted(note: Path) -> None:
    """Import the modules that the note names, as long as the process is unused. Lowers the priority of its thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    num_looks = 0
    while num_looks < NUM_LOOKS or not note.exists():
        time.sleep(LOOK_PERIOD_S)
        num_looks += 1
        if not is_unused():
            return
    for module in note.read_text().split():
        while is_unused() and not _import_alone(module):
            time.sleep(LOOK_PERIOD_S)


def _import_alone(module: str) -> bool:
    """Import it while no other thread of the process begins to import anything. False, and nothing is imported, when another
    thread is at it already: each of the two could wait for what the other holds."""
    _imp.acquire_lock()  # every thread takes it for a moment before it takes the lock of a module
    try:
        locks: dict[str, Callable[[], object]] = importlib._bootstrap._module_locks  # type: ignore[attr-defined]
        if any(lock() is not None for lock in locks.copy().values()):
            return False
        if is_unused():
            importlib.import_module(module)
        return True
    finally:
        _imp.release_lock()
