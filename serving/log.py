"""One line a record on standard error: time, level, process, module, message. Never a prompt, never a key."""

import logging
import os

from serving.config import log_level


def configure_logging() -> None:
    """Set up this process's logging at the level of $PACKTRAIN_LOG_LEVEL (INFO when unset)."""
    logging.basicConfig(
        level=log_level(),
        format=f"%(asctime)s %(levelname)s [{os.getpid()}] %(name)s: %(message)s",
    )
