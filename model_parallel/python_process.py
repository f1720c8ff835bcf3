"""Python modules as processes of their own."""

import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs an installed module. The current directory is not searched for modules: it may be that of a checkpoint, and
    nothing that comes with weights is run."""
    return [sys.executable, "-P", "-m", module, *arguments]
