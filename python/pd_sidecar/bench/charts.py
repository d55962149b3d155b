"""Draws charts as SVG. A report is one file without a network, and an engine's environment has no library for that."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 12, 44
MOST_POINTS = 2000
"""More points of a series are thinned out: a browser draws 100,000 circles slowly."""


@dataclass(frozen=True)
class Series:
    """The points of one server, in the order of their x values."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, x: str, y: str, all_series: Sequence[Series], *, kind: str = "line") -> str:
    """Returns a chart as HTML. `kind` is `line`, `steps` or `dots`. Axes begin at 0. Empty series are left out."""
    shown = [series for series in all_series if series.points]
    if not shown:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>No data.</p></figure>"
    right = nice(max(point[0] for series in shown for point in series.points))
    top = nice(max(point[1] for series in shown for point in series.points))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = LEFT + point[0] / right * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - point[1] / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [*_axes(x, y, right, top)]
    for index, series in enumerate(all_series):
        if series in shown:
            points = [place(point) for point in thinned(series.points)]
            parts.append(_drawn(points, COLOURS[index % len(COLOURS)], kind, escape(series.name)))
    legend = " ".join(
        f'<span style="color:{COLOURS[index % len(COLOURS)]}">&#9632;</span> {escape(series.name)}'
        for index, series in enumerate(all_series)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}<div>{legend}</div></figure>"


def nice(value: float) -> float:
    """Returns the end of an axis: the next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.9999)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most `MOST_POINTS` of the points, and always the last."""
    step = -(-len(points) // MOST_POINTS)
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _axes(x: str, y: str, right: float, top: float) -> list[str]:
    base, edge = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for step in range(6):
        share = step / 5
        across, up = LEFT + share * (edge - LEFT), base - share * (base - TOP)
        parts.append(f'<line x1="{LEFT}" x2="{edge}" y1="{up:.1f}" y2="{up:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{share * top:g}</text>')
        parts.append(f'<text x="{across:.1f}" y="{base + 16}" text-anchor="middle">{share * right:g}</text>')
    middle = (LEFT + edge) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + base) / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return parts


def _drawn(points: list[tuple[float, float]], colour: str, kind: str, name: str) -> str:
    title = f"<title>{name}</title>"
    if kind == "dots" or len(points) == 1:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in points)
        return f'<g fill="{colour}" fill-opacity="0.6">{title}{dots}</g>'
    if kind == "steps":
        corners = [corner for (x, y), (after, _) in itertools.pairwise(points) for corner in ((x, y), (after, y))]
        points = [*corners, points[-1]]
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2">{title}</polyline>'
