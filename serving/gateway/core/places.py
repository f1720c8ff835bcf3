"""Where something stands in a JSON value."""

from dataclasses import dataclass

from serving.gateway.core.strict_json import shown_name


@dataclass(frozen=True, slots=True)
class Place:
    """A path. It becomes a text only for an error: the texts of all places in a value can be far longer than the value."""

    step: str | int
    """The name of a field, or an index of a list; of the outermost what the value is called, or ""."""
    outer: "Place | None" = None

    def at(self, *steps: str | int) -> "Place":
        """Further inside."""
        place = self
        for step in steps:
            place = Place(step, place)
        return place

    def __str__(self) -> str:
        shown: list[str] = []
        place = self
        while place.outer is not None:
            shown.append(f"[{place.step}]" if isinstance(place.step, int) else f".{shown_name(place.step)}")
            place = place.outer
        return f"{place.step}{''.join(reversed(shown))}".removeprefix(".")
