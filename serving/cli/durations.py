"""Lengths of time on the command line."""

import re

import typer

MAX_DAYS = 36_500
"""No date before or after it is out of a calendar's range."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration_s(text: str, option: str) -> float:
    """Seconds. Raises BadParameter, which names the option."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(
            f"a length of time is a number and one of s, m, h, d, such as 24h; not {text!r}", param_hint=option
        )
    seconds = int(match[1]) * _UNITS_S[match[2]]
    if seconds > MAX_DAYS * _UNITS_S["d"]:
        raise typer.BadParameter(f"a length of time is at most {MAX_DAYS}d; not {text!r}", param_hint=option)
    return float(seconds)
