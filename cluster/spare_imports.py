"""What an idle worker process of Ray does until somebody uses it: it waits for a note of what will be needed, and imports that.

In no hurry: the thread that does so has the lowest priority, and ends. (A process that had lowered its own could not raise it
again. SCHED_IDLE would be too low: who uses the process in the middle waits for what is being imported.)
"""

import importlib
import os
import tempfile
import threading
import time
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
        if not is_unused():
            return
        importlib.import_module(module)
