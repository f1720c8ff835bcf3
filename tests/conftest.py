"""What every suite may use."""

import gc
import logging
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from serving.models.fetch import fetch_model
from tests.support.effort import DAY, NIGHT

# By day the same cases each time, so that a change does not fail by the luck of a draw. By night many others, which are told
# when they fail. What an example costs depends on the machine, so nothing is said of its time.
_ANY_SPEED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile(DAY, max_examples=15, derandomize=True, **_ANY_SPEED)
settings.register_profile(NIGHT, max_examples=300, print_blob=True, **_ANY_SPEED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", DAY))
_LIBRARIES_WITH_MANY_LOGGERS = ("torch", "transformers")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without the garbage collector, which would go through what has been imported again and again: all of it lives as long as
    the process. For the same reason it need not go through it during the tests, which spares them a tenth of their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish() -> None:
    """Spare each test what only repeats itself: pytest adds its handler, six times a test, to each logger that does not pass on
    what it gets, of which torch has sixty."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in _LIBRARIES_WITH_MANY_LOGGERS:
            logger.propagate = True


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, the model of the demo: 9 query heads over 3 key/value heads, tied embeddings, Q4_1."""
    return fetch_model("smollm2-135m-instruct")
