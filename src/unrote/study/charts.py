"""Pareto plots: one curve per method in (Fréchet distance, memorization), as inline SVG on logarithmic axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from unrote.study.curves import Curve

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 22, 48
COLOURS = 10


@dataclass(frozen=True)
class Axes:
    """The ranges of both axes, both logarithmic: low and high, above 0. ``zero`` is where no copies are drawn."""

    distance: tuple[float, float]
    memorized: tuple[float, float]
    zero: float

    @staticmethod
    def around(curves: Sequence[Curve], halves: Sequence[float]) -> "Axes":
        """Axes that hold all points."""
        distances = np.concatenate([curve.distance for curve in curves])
        highest = max(float(curve.memorized.max()) for curve in curves)
        zero = min(halves)
        low, high = float(distances.min()) * 0.94, float(distances.max()) * 1.06
        return Axes((low, high), (zero, max(highest, 4 * zero) * 1.15), zero)

    def x(self, distance: float) -> float:
        """Pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * _part(distance, self.distance)

    def y(self, memorized: float) -> float:
        """Pixels from the top; 0 lies on the lower edge."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - _part(max(memorized, self.zero), self.memorized))


def pareto_chart(curves: Mapping[str, Sequence[Curve]], *, words: str, target: float | None, share: bool) -> str:
    """The curves of all methods: a faint line per seed, a strong one through the geometric means of its points.

    Args:
        curves: of each method, one per seed.
        words: what memorization is.
        target: the Fréchet distance that is marked as equal quality.
        share: whether memorization is a share, shown in per cent, or a count.
    """
    every = [curve for own in curves.values() for curve in own]
    axes = Axes.around(every, [curve.half for curve in every])
    lines = []
    for number, (method, own) in enumerate(curves.items()):
        style = f"m{number % COLOURS}{' second' if number // COLOURS % 2 else ''}{' base' if number == 0 else ''}"
        faint = "".join(_line(axes, curve.distance, curve.memorized, f"faint {style}") for curve in own)
        lines.append(f"<g><title>{escape(method)}</title>{faint}{_mean_line(axes, own, style)}</g>")
    label = f"{words} against Fréchet distance, a line per method"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(axes, share)}{_target(axes, target)}{''.join(lines)}"
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        "Fréchet distance to held-out images (lower is better)</text>"
        f'<text x="{LEFT - 58}" y="{TOP - 8}">{escape(words)} (lower is better)</text></svg>' + _legend(list(curves))
    )


def chart_style() -> str:
    """Colours of the curves, the first one (the baseline) in ink."""
    hues = (0, 212, 28, 152, 282, 340, 188, 52, 250, 95)
    light = "".join(f".m{i}{{--c:hsl({hue} 70% 40%)}}" for i, hue in enumerate(hues) if i)
    dark = "".join(f".m{i}{{--c:hsl({hue} 75% 68%)}}" for i, hue in enumerate(hues) if i)
    return (
        f".m0{{--c:var(--ink)}}{light}@media (prefers-color-scheme: dark){{{dark}}}"
        ".faint{opacity:.22;stroke-width:1.2}.base{stroke-width:3.2}.faint.base{stroke-width:1.4}"
        ".second{stroke-dasharray:6 4}.key.second{border-top-style:dashed}.dot{fill:var(--c)}"
        "g:hover>.line{stroke-width:4}"
    )


def _mean_line(axes: Axes, curves: Sequence[Curve], style: str) -> str:
    """Through the geometric means over seeds of the first points, the second ones, ...; nothing if counts differ."""
    if len({len(curve.distance) for curve in curves}) != 1:
        return ""
    distance = np.exp(np.mean([np.log(curve.distance) for curve in curves], axis=0))
    half = curves[0].half
    memorized = np.exp(np.mean([np.log(curve.memorized + half) for curve in curves], axis=0)) - half
    dots = "".join(
        f'<circle class="dot {style}" cx="{axes.x(d):.1f}" cy="{axes.y(m):.1f}" r="{2 + 0.6 * place:.1f}"/>'
        for place, (d, m) in enumerate(zip(distance.tolist(), memorized.tolist(), strict=True))
    )
    return _line(axes, distance, memorized, style) + dots


def _line(axes: Axes, distance: np.ndarray, memorized: np.ndarray, style: str) -> str:
    places = zip(distance.tolist(), memorized.tolist(), strict=True)
    points = " ".join(f"{axes.x(d):.1f},{axes.y(m):.1f}" for d, m in places)
    return f'<polyline class="line {style}" points="{points}"/>'


def _grid(axes: Axes, share: bool) -> str:
    across = "".join(
        f'<line class="grid" x1="{axes.x(tick):.1f}" x2="{axes.x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{axes.x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(*axes.distance)
    )
    marks = [(tick, f"{100 * tick:g}%" if share else f"{tick:g}") for tick in _ticks(*axes.memorized)]
    # What is none has no logarithm: it is drawn where half a count would be.
    marks = [(axes.zero, "0"), *(mark for mark in marks if mark[0] > 1.6 * axes.zero)]
    return across + "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(tick):.1f}" y2="{axes.y(tick):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{axes.y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
        for tick, label in marks
    )


def _target(axes: Axes, target: float | None) -> str:
    if target is None or not axes.distance[0] <= target <= axes.distance[1]:
        return ""
    x = axes.x(target)
    anchor, beside = ("start", x + 5) if x < WIDTH / 2 else ("end", x - 5)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{beside:.1f}" y="{TOP + 12}" text-anchor="{anchor}">equal quality</text>'
    )


def _legend(methods: Sequence[str]) -> str:
    keys = "".join(
        f'<li><span class="key m{i % COLOURS}{" second" if i // COLOURS % 2 else ""}"></span>{escape(name)}</li>'
        for i, name in enumerate(methods)
    )
    return f'<ul class="legend">{keys}</ul>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten in the range; 1, 1.5, 2, 3, 5, 7 if it is short."""
    steps = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _part(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
