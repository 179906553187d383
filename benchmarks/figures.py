"""Several line charts with one legend, as an SVG that stands by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from firm_jax.charts import COLOURS, Point, line_chart

_WIDTH, _HEIGHT, _HEAD = 420, 210, 26
_STYLE = (
    "text{font-family:sans-serif;fill:#333}.head{font-size:13px}.tick{font-size:11px}.grid{stroke:#ddd;stroke-width:1}"
)


@dataclass(frozen=True)
class Panel:
    """series: name -> points (x, y). errors: name -> points (x, standard error), which become bands. from_zero: the y
    axis has zero on it."""

    heading: str
    series: Mapping[str, Sequence[Point]]
    errors: Mapping[str, Sequence[Point]] | None = None
    from_zero: bool = False


def figure(panels: Sequence[Panel], columns: int) -> str:
    """The panels in rows of `columns`. All have the same series in the same order, and one legend below them."""
    parts = []
    for number, panel in enumerate(panels):
        left, top = number % columns * _WIDTH, number // columns * (_HEAD + _HEIGHT)
        parts.append(f'<text class="head" x="{left + 52}" y="{top + 18}">{panel.heading}</text>')
        placed = f'<svg x="{left}" y="{top + _HEAD}" width="{_WIDTH}" height="{_HEIGHT}" '
        chart = line_chart(panel.series, panel.errors, panel.heading, panel.from_zero)
        parts.append(chart.replace("<svg ", placed, 1))
    width, bottom = _WIDTH * columns, -(-len(panels) // columns) * (_HEAD + _HEIGHT)
    names = list(panels[0].series)
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        left, down = 60 + place * (width // len(names)), bottom + 18
        parts.append(f'<circle cx="{left}" cy="{down - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text class="head" x="{left + 10}" y="{down}">{name}</text>')
    return (
        f'<svg viewBox="0 0 {width} {bottom + 34}" width="{width}" xmlns="http://www.w3.org/2000/svg">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
