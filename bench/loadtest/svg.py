"""Small plots as SVG text: enough for a report in one file, without a plotting library where load is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")
MAX_SERIES = 8
MAX_POINTS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points that belong together."""

    name: str
    points: Sequence[tuple[float, float]]
    has_marks: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers, about five of them."""
        raw = (self.high - self.low) / 5
        magnitude = 10 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series], *, limit: float | None = None) -> str:
    """Values over x, from 0 up; `limit` is a dashed line across."""
    kept = [Series(name=s.name, points=_thinned(s.points), has_marks=s.has_marks) for s in series if s.points][
        :MAX_SERIES
    ]
    values = [point for s in kept for point in s.points]
    if not values:
        return _empty(title)
    x = _Scale(*_widened(min(v[0] for v in values), max(v[0] for v in values)), _LEFT, WIDTH - _RIGHT)
    highest = max([v[1] for v in values] + ([] if limit is None else [limit]))
    y = _Scale(0.0, highest * 1.05 or 1.0, HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(x, y, x_label, y_label)]
    for s, colour in zip(kept, COLOURS, strict=False):
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in s.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if s.has_marks:
            parts += [
                f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}">'
                f"<title>{_number(at)}: {_number(value)}</title></circle>"
                for at, value in s.points
            ]
    if limit is not None:
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" stroke="#444" '
            'stroke-dasharray="5 3"/>'
        )
    return _figure(title, [*parts, *_legend([s.name for s in kept])])


def histogram(title: str, x_label: str, values: Sequence[float], num_bins: int = 40) -> str:
    """Shares of the values; what lies beyond the 99.5th percentile is in the last bar."""
    if not len(values):
        return _empty(title)
    ordered = sorted(values)
    low, high = _widened(ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))])
    counts = [0] * num_bins
    for value in ordered:
        counts[min(num_bins - 1, max(0, int((value - low) / (high - low) * num_bins)))] += 1
    x = _Scale(low, high, _LEFT, WIDTH - _RIGHT)
    y = _Scale(0.0, max(counts) / len(ordered) * 1.05, HEIGHT - _BOTTOM, _TOP)
    width = (high - low) / num_bins
    bars = []
    for index, count in enumerate(counts):
        if count:
            left, right = x(low + index * width), x(low + (index + 1) * width)
            top = y(count / len(ordered))
            bars.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(0.5, right - left - 0.6):.1f}" '
                f'height="{HEIGHT - _BOTTOM - top:.1f}" fill="{COLOURS[0]}"><title>{count}</title></rect>'
            )
    return _figure(title, [*_axes(x, y, x_label, "share of all"), *bars])


def bars(title: str, y_label: str, named: Sequence[tuple[str, float]]) -> str:
    """One bar a name."""
    kept = list(named)[:12]
    if not kept:
        return _empty(title)
    y = _Scale(0.0, max(value for _, value in kept) * 1.1 or 1.0, HEIGHT - _BOTTOM, _TOP)
    slot = (WIDTH - _LEFT - _RIGHT) / len(kept)
    parts = [*_axes(None, y, "", y_label)]
    for index, (name, value) in enumerate(kept):
        left, top = _LEFT + slot * (index + 0.15), y(value)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{slot * 0.7:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}" '
            f'fill="{COLOURS[index % len(COLOURS)]}"><title>{escape(name)}: {_number(value)}</title></rect>'
        )
        middle = left + slot * 0.35
        parts.append(_text(middle, top - 4, _number(value), anchor="middle"))
        parts.append(_text(middle, HEIGHT - _BOTTOM + 16, name[: max(6, int(slot / 6))], anchor="middle"))
    return _figure(title, parts)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return points[:: max(1, math.ceil(len(points) / MAX_POINTS))]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(x: _Scale | None, y: _Scale, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e3e3"/>')
        parts.append(_text(_LEFT - 6, at + 4, _number(value), anchor="end"))
    for value in x.ticks() if x is not None else ():
        assert x is not None
        parts.append(_text(x(value), bottom + 16, _number(value), anchor="middle"))
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#888"/>')
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 8, x_label, anchor="middle"))
    parts.append(
        f'<text transform="translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    if len(names) < 2 and not (names and names[0]):
        return []
    parts, left = [], float(_LEFT)
    for name, colour in zip(names, COLOURS, strict=False):
        shown = name[:24]
        parts.append(f'<rect x="{left:.0f}" y="{_TOP - 12}" width="9" height="9" fill="{colour}"/>')
        parts.append(_text(left + 12, _TOP - 4, shown))
        left += 24 + 6.2 * len(shown)
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="11"><title>{escape(title)}</title>'
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="bold">{escape(title)}</text>{"".join(parts)}</svg>'
    )


def _empty(title: str) -> str:
    return _figure(title, [_text(WIDTH / 2, HEIGHT / 2, "nothing was measured", anchor="middle")])
