"""Line charts as SVG text, so that a report needs nothing but a browser."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26
_MOST_POINTS, _MOST_DOTS = 300, 100
# Each stands out by 3:1 and more from white and from near black.
COLOURS = ("#3b76f0", "#c97a10", "#0b9668", "#e04848", "#8b5cf6", "#0a8fb0", "#d0438a", "#5f8f1c")

Point = tuple[float, float]


def line_chart(
    series: Mapping[str, Sequence[Point]],
    errors: Mapping[str, Sequence[Point]] | None = None,
    label: str = "",
    from_zero: bool = False,
) -> str:
    """Draw named series over one x axis.

    Args:
        series: Name -> points (x, y), ascending in x, all finite.
        errors: Name -> points (x, standard error): drawn as a band of one standard error about the line.
        label: What it is, for who cannot see it.
        from_zero: The y axis has zero on it, so that heights can be compared.

    Returns:
        An `<svg>` element. Dots on the lines tell their values when pointed at.
    """
    errors = {name: dict(points) for name, points in (errors or {}).items()}
    thinned = {name: _thin(points, _MOST_POINTS) for name, points in series.items() if points}
    xs = [x for points in thinned.values() for x, _ in points]
    lows = [y - errors.get(name, {}).get(x, 0) for name, points in thinned.items() for x, y in points]
    highs = [y + errors.get(name, {}).get(x, 0) for name, points in thinned.items() for x, y in points]
    lows += [0.0] * from_zero
    highs += [0.0] * from_zero
    x_low, x_high = min(xs), max(xs)
    x_high += x_high == x_low
    y_ticks = nice_ticks(min(lows), max(highs))
    y_low, y_high = min(y_ticks[0], min(lows)), max(y_ticks[-1], max(highs))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for tick in y_ticks:
        _, down = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{tick:.6g}</text>')
    for tick in nice_ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            across, _ = place(tick, y_low)
            parts.append(f'<text class="tick" x="{across}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    for (name, points), colour in zip(thinned.items(), _cycle(len(thinned)), strict=True):
        parts += _series(name, points, errors.get(name), colour, place)
    return "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers that cover [low, high]; steps are 1, 2, 2.5 or 5 times a power of ten."""
    if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = (low - margin, high + margin) if low else (0.0, 1.0)
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _series(name: str, points: Sequence[Point], error: Mapping[float, float] | None, colour: str, place) -> list[str]:
    parts = []
    if error:
        upper = [place(x, y + error.get(x, 0)) for x, y in points]
        lower = [place(x, y - error.get(x, 0)) for x, y in reversed(points)]
        parts.append(f'<polygon points="{_joined(upper + lower)}" fill="{colour}" opacity="0.15"/>')
    parts.append(
        f'<polyline points="{_joined([place(x, y) for x, y in points])}" fill="none" stroke="{colour}" '
        f'stroke-width="1.8" stroke-linejoin="round"/>'
    )
    for x, y in _thin(points, _MOST_DOTS):
        across, down = place(x, y)
        radius = 2.4 if len(points) <= 40 else 1.2
        tip = f"{escape(name)}: {y:.6g} at {x:g}"
        parts.append(f'<circle cx="{across}" cy="{down}" r="{radius}" fill="{colour}"><title>{tip}</title></circle>')
    return parts


def _thin(points: Sequence[Point], most: int) -> list[Point]:
    """Every n-th point, the last always: what a few hundred pixels can show."""
    stride = -(-len(points) // most)
    return [*points[:-1:stride], points[-1]]


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{across},{down}" for across, down in places)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
