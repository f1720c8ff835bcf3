"""Unit tests run without Ray. A test that needs it belongs in tests/integration."""

from typing import NoReturn

import pytest
import ray


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("a unit test started Ray; such a test belongs in tests/integration")


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's implicit start (`f.remote()` without `ray.init()`) goes through `ray.init` too."""
    monkeypatch.setattr(ray, "init", _refuse)
