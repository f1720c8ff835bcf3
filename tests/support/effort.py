"""How much is tried: less by day, all of it by night, as hypothesis does by its profile (tests/conftest.py)."""

from hypothesis import settings

DAY, NIGHT = "day", "night"


def is_night() -> bool:
    """Whether everything is tried."""
    return settings.get_current_profile_name() == NIGHT


def by_day(number: int, *, by_night: int) -> int:
    """How many cases are tried, of those that hypothesis does not draw."""
    return by_night if is_night() else number
