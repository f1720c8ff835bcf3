"""How much is tried: less by day, all of it by night, as hypothesis does by its profile (tests/conftest.py)."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings

T = TypeVar("T")

DAY, NIGHT = "day", "night"


def is_night() -> bool:
    """Whether everything is tried."""
    return settings.get_current_profile_name() == NIGHT


def by_day(number: int, *, by_night: int) -> int:
    """How many cases are tried, of those that hypothesis does not draw."""
    return by_night if is_night() else number


def rest_by_night(cases: Sequence[T], *, by_day: Sequence[T], has_names: bool = False) -> list[ParameterSet]:
    """Parameters of a test, of which those that are not tried by day run with the nightly cases.

    has_names: whether each case is a tuple with a value for each of several names.
    """
    return [
        pytest.param(
            *(case if has_names and isinstance(case, tuple) else (case,)),
            marks=() if case in by_day else (pytest.mark.nightly,),
        )
        for case in cases
    ]
