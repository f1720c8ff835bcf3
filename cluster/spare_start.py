"""Ray's worker processes of a private cluster import this module as they start (`preload_python_modules`), and nobody else does:
it has a thread import what will be needed (spare_imports.py)."""

import threading

from cluster.spare_imports import import_when_noted, note_of_modules

threading.Thread(target=import_when_noted, args=(note_of_modules(),), name="spare-imports", daemon=True).start()
