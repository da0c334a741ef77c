"""The page's charts: inline SVG, coloured by the style sheet so that they follow light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 24, 46
INK_WIDTH, INK_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


@dataclass(frozen=True)
class Series:
    """Values in [0, 1] to draw. ``css_class`` colours them; ``dashed`` marks a control."""

    label: str
    values: np.ndarray
    css_class: str
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What the values are: ``words`` under the axis, a ``mark`` at the threshold."""

    words: str
    threshold: float
    mark: str


def ratio_axis(threshold: float) -> Axis:
    """The axis of neighbour ratios."""
    return Axis("neighbour ratio (0 = exact copy, 1 = nothing special)", threshold, f"near-copy below {threshold:g}")


def similarity_axis(threshold: float, words: str) -> Axis:
    """The axis of similarities; ``words`` say where the threshold comes from."""
    return Axis("cosine similarity to the nearest training image (1 = the same)", threshold, words)


_TOPS = (0.04, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Upper edges of a histogram; quarters of them are whole percents."""


def cumulative_chart(series: Sequence[Series], axis: Axis, *, label: str) -> str:
    """Share of images (y) with a value below x, one line per series."""
    grid = np.linspace(0.0, 1.0, 201)
    lines = []
    for one in series:
        shares = np.searchsorted(np.sort(one.values), grid, side="left") / len(one.values)
        points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in zip(grid, shares, strict=True))
        lines.append(f'<polyline class="line {one.css_class}" points="{points}"{_dash(one)}/>')
    return _frame("".join(lines), axis, top=1.0, label=label) + _legend(series)


def histogram_chart(series: Sequence[Series], axis: Axis, *, label: str, bins: int = 50) -> str:
    """Share of images (y) per bin of value (x): the first series filled, the others as outlines."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    shares = [np.histogram(np.clip(one.values, 0.0, 1.0), edges)[0] / len(one.values) for one in series]
    highest = max(float(share.max()) for share in shares)
    top = next(top for top in _TOPS if top >= highest)
    shapes = []
    for number, (one, share) in enumerate(zip(series, shares, strict=True)):
        if number == 0:
            shapes.append(_bars(edges, share / top, one.css_class))
        else:
            shapes.append(_steps(edges, share / top, one))
    return _frame("".join(shapes), axis, top=top, label=label) + _legend(series)


def _bars(edges: np.ndarray, heights: np.ndarray, css_class: str) -> str:
    width = INK_WIDTH * (edges[1] - edges[0])
    return "".join(
        f'<rect class="bar {css_class}" x="{_x(x) + 0.5:.1f}" y="{_y(h):.1f}" width="{width - 1:.1f}" '
        f'height="{INK_HEIGHT * h:.1f}"/>'
        for x, h in zip(edges[:-1], heights, strict=True)
        if h > 0
    )


def _steps(edges: np.ndarray, heights: np.ndarray, series: Series) -> str:
    corners = [(edges[0], 0.0)]
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        corners += [(left, height), (right, height)]
    points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in [*corners, (edges[-1], 0.0)])
    return f'<polyline class="line {series.css_class}" points="{points}"{_dash(series)}/>'


def _dash(series: Series) -> str:
    return ' stroke-dasharray="6 4"' if series.dashed else ""


def _frame(content: str, axis: Axis, *, top: float, label: str) -> str:
    """Axes, grid and threshold around ``content``; ``top`` is the share at the upper edge."""
    ticks = "".join(
        f'<text x="{_x(tick):.1f}" y="{TOP + INK_HEIGHT + 17}" text-anchor="middle">{tick:g}</text>'
        for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)
    )
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(part):.1f}" y2="{_y(part):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{_y(part) + 4:.1f}" text-anchor="end">{_share(part * top)}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    at = min(1.0, max(0.0, axis.threshold))
    anchor = "start" if at < 0.15 else "end" if at > 0.85 else "middle"
    mark = (
        f'<line class="mark" x1="{_x(at):.1f}" x2="{_x(at):.1f}" y1="{TOP}" y2="{TOP + INK_HEIGHT}"/>'
        f'<text x="{_x(at):.1f}" y="{TOP - 8}" text-anchor="{anchor}">{escape(axis.mark)}</text>'
    )
    words = f'<text x="{LEFT + INK_WIDTH / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis.words)}</text>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{grid}{ticks}{content}{mark}{words}</svg>"
    )


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<li><span class="key {one.css_class}{" dashed" if one.dashed else ""}"></span>{escape(one.label)}</li>'
        for one in series
    )
    return f'<ul class="legend">{entries}</ul>'


def _share(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.095 or value == 0 else f"{100 * value:.1f}%"


def _x(value: float) -> float:
    return LEFT + INK_WIDTH * value


def _y(part: float) -> float:
    return TOP + INK_HEIGHT * (1 - part)
