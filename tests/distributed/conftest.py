"""Ranks do not search the current directory for modules, and some of these tests have doubles of ours as ranks."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
