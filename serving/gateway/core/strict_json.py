"""JSON as RFC 8259 has it, and not as Python reads it: no name twice, no NaN, no number that Python would change."""

import json
from decimal import Decimal
from typing import Any

from serving.contracts.errors import ValidationError

MAX_NAME_CHARS = 100


def read_json(text: str, *, field: str, title: str) -> Any:
    """The value of a text. Raises ValidationError about `field`, in which the text is called `title`; and RecursionError."""

    def number(spelling: str) -> int | float:
        """5.0 and 1e2 are the whole numbers that they are, as JSON has but one kind of number."""
        value = float(spelling)  # infinity for what is too large; who reads the number refuses that, by its place
        if not value:
            return 0  # whatever its exponent, which may be more than a Decimal can have
        return int(Decimal(spelling)) if value.is_integer() else value

    def constant(spelling: str) -> None:
        raise ValidationError(field, f"{title} is not valid JSON: it holds {spelling}")

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            name = shown_name(twice)
            place = f"{field}: {name}" if field else name
            raise ValidationError(field or name, f"{place} stands twice in one object")
        return data

    try:
        return json.loads(text, object_pairs_hook=named, parse_float=number, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ValidationError(field, f"{title} is not valid JSON at character {error.pos}: {error.msg}") from None
    except ValueError as error:
        if isinstance(error, ValidationError):
            raise
        raise ValidationError(field, f"{title} holds a number of thousands of digits") from None


def shown_name(name: str) -> str:
    """A field's name from a client, fit for an error."""
    name = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
    return name.encode(errors="replace").decode()
