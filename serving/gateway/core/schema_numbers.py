"""Numbers of a JSON schema, as the compiler of grammars can hold answers to them.

The compiler reads every number as a float64, and writes bounds out digit by digit. What it would change silently is refused here
by name, or made a little stricter.
"""

import math
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from serving.contracts.errors import ValidationError
from serving.gateway.core.places import Place

FARTHEST = 2**63 - 1024
"""The largest float64 below 2^63: the compiler can spell no bound beyond it."""
_LARGEST = 17976931348623157 * 10**292
"""The largest float64, as it is spelt: JavaScript's Number.MAX_VALUE. It is a little more."""
_MOST_EXACT = 2**53
"""From here on a whole number may be no float64."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_NEAREST_ZERO = 1e-40
"""Instead of a zero that is excluded. The digits of one still nearer would be nested more deeply than the compiler allows."""


def check_exact(place: Place, value: Any) -> None:
    """Of a value that an answer may have to be. Raises ValidationError for a number that the compiler would change."""
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            check_exact(place, inner)
    elif _is_number(value) and not _is_kept(value):
        raise ValidationError(
            str(place),
            f"{place} has {value!s:.60}, which could not be held to exactly; "
            f"allowed: whole numbers from -{_MOST_EXACT} to {_MOST_EXACT}, fractions of up to 15 digits, and texts",
        )


def _is_kept(number: float) -> bool:
    """Whether the compiler writes these digits: of an int64 all, where it is a float64 as well, else the float64's shortest."""
    if isinstance(number, float) and abs(number) < 2**63:
        return _as_read(number) == number
    if abs(number) >= 2**63:
        return abs(number) <= sys.float_info.max and int(Decimal(repr(float(number)))) == number
    return float(number) == number


def _as_read(number: float) -> float:
    """By the compiler, which is exact up to 15 digits, and otherwise may err in the last."""
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    assert isinstance(exponent, int)  # it is finite
    whole, power = float("".join(map(str, digits))), float(f"1e{abs(exponent)}")
    return math.copysign(whole * power if exponent >= 0 else whole / power, number)


def separate_exclusions(part: dict[str, Any]) -> None:
    """Until draft 4 exclusiveMinimum said whether minimum is excluded, and the compiler takes that. Here it becomes a number."""
    for inclusive, exclusive in (_LOWER, _UPPER):
        if isinstance(part.get(exclusive), bool) and part.pop(exclusive) and inclusive in part:
            part[exclusive] = part.pop(inclusive)


def excluded_bounds(parts: Sequence[dict[str, Any]]) -> frozenset[tuple[str, float]]:
    """Whole bounds, by keyword, that are excluded while a bound of the other side is less than 1 away and farther from zero, in
    whichever part of a schema that may be added to theirs. The compiler would allow these bounds themselves."""
    found: set[tuple[str, float]] = set()
    for sign, (_, excluded), others in ((1, _LOWER, _UPPER), (-1, _UPPER, _LOWER)):
        far = [part[key] for part in parts for key in others if _is_number(part.get(key))]
        for bound in (part[excluded] for part in parts if _is_number(part.get(excluded))):
            is_whole = sign * bound >= 0 and bound == math.floor(bound)
            if is_whole and any(0 < sign * (other - bound) < 1 for other in far):
                found.add((excluded, bound))
    return frozenset(found)


def tighten(place: Place, part: dict[str, Any], excluded: frozenset[tuple[str, float]]) -> None:
    """Change the bounds of a part into those that the compiler can hold to. `excluded`: excluded_bounds of the whole schema.

    None allows what the schema does not. Of what it does they leave out only what lies between a bound and the next float64s, or
    within 15 digits of one that is excluded; and numbers beyond an int64. Raises ValidationError for bounds out of reach.
    """
    for sign, (inclusive, exclusive) in ((1, _LOWER), (-1, _UPPER)):
        for key in (exclusive, inclusive):
            if _is_number(part.get(key)):
                _tighten(place.at(key), part, key, inclusive, sign, is_facing=(key, part[key]) in excluded)


def _tighten(place: Place, part: dict[str, Any], key: str, inclusive: str, sign: int, *, is_facing: bool) -> None:
    """One bound. Times `sign` it is a lower one."""
    given = part[key]
    bound = sign * given
    if bound <= -_LARGEST:
        del part[key]  # it excludes no float64
        return
    bound = max(bound, -FARTHEST)
    if bound > FARTHEST:
        raise ValidationError(
            str(place),
            f"{place} is {given!s:.60}; allowed: numbers from -{FARTHEST} to {FARTHEST}, or none where there is no bound",
        )
    nearest = float(bound)
    if nearest < bound:
        nearest = math.nextafter(nearest, math.inf)
    if nearest == sign * given and key != inclusive and (is_facing or abs(bound) >= _MOST_EXACT):
        nearest = _just_above(int(bound))
    if not nearest.is_integer() and sign * _as_read(sign * nearest) < nearest:
        nearest = math.nextafter(nearest, math.inf)
    if abs(bound) >= _MOST_EXACT and not _is_whole(part):
        # Of a number that may have a fraction the compiler writes the shortest digits, and zeros after them.
        while (written := Decimal(repr(nearest))) < bound or (written == bound and key != inclusive):
            nearest = math.nextafter(nearest, math.inf)
    tightest = sign * nearest
    if tightest != given:
        del part[key]
        if key != inclusive and _is_number(part.get(inclusive)):
            tightest = sign * max(nearest, sign * part[inclusive])
        key = inclusive
    part[key] = int(tightest) if tightest == math.floor(tightest) else tightest


def _just_above(bound: int) -> float:
    """A number that the compiler reads as it is written: of 15 digits, or a whole one."""
    if abs(bound) >= _MOST_EXACT:
        return math.nextafter(float(bound), math.inf)
    return bound + 10.0 ** min(len(str(abs(bound))) - 15, 0) if bound else _NEAREST_ZERO


def _is_whole(part: dict[str, Any]) -> bool:
    """Whether the numbers that a part allows are integers."""
    kinds = part.get("type")
    return "integer" in kinds and "number" not in kinds if isinstance(kinds, list) else kinds == "integer"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
