"""What an idle worker process of Ray does until somebody uses it: it waits for a note of what will be needed, and imports that.

In no hurry: the thread that does so gets what of the processor nobody else wants, and ends. (A process that had lowered its own
priority could not raise it again.)
"""

import importlib
import os
import tempfile
import threading
import time
from pathlib import Path

LOOK_PERIOD_S = 1.0
_UNUSED = b"ray::IDLE"


def note_of_modules() -> Path:
    """Where it is written what is imported. The directory is the private cluster's own."""
    return Path(tempfile.gettempdir()) / "packtrain-spares"


def is_unused() -> bool:
    """Ray calls a process so until it gives it an actor or a task."""
    return Path("/proc/self/cmdline").read_bytes().startswith(_UNUSED)


def import_when_noted(note: Path) -> None:
    """Import the modules that the note names, as long as the process is unused. Lowers the priority of its thread."""
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
    while not note.exists():
        time.sleep(LOOK_PERIOD_S)
        if not is_unused():
            return
    for module in note.read_text().split():
        if not is_unused():
            return
        importlib.import_module(module)
