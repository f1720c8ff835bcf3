"""How much is tried: less by day, all of it by night, as hypothesis does by its profile (tests/conftest.py)."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import settings

T = TypeVar("T")

DAY, NIGHT = "day", "night"


def is_night() -> bool:
    """Whether everything is tried."""
    return settings.get_current_profile_name() == NIGHT


def by_day(number: int, *, by_night: int) -> int:
    """How many cases are tried, of those that hypothesis does not draw."""
    return by_night if is_night() else number


def rest_by_night(cases: Sequence[T], *, by_day: Sequence[T]) -> list[object]:
    """Parameters of a test, of which those that are not tried by day run with the nightly cases."""
    return [case if case in by_day else pytest.param(case, marks=pytest.mark.nightly) for case in cases]
