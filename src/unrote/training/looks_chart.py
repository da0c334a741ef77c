"""What a monitor has seen along training, as a picture: one SVG file that follows light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, TOP = 720, 64, 16, 30
PANEL, GAP, BOTTOM = 170, 34, 40
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.grid{stroke:#ccc}.line{fill:none;stroke-width:2.2}"
    ".a{stroke:#b3261e}.b{stroke:#3f6fb5;stroke-dasharray:6 4}.dot.a{fill:#b3261e}.dot.b{fill:#3f6fb5}"
    ".band{fill:#b3261e;opacity:.13}.mark{stroke:#2e7d32;stroke-width:1.6}.limit{stroke:#b3261e;stroke-dasharray:2 4}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}.a{stroke:#f2837b}.b{stroke:#8ab4f8}"
    ".dot.a,.band{fill:#f2837b}.dot.b{fill:#8ab4f8}.mark{stroke:#81c784}.limit{stroke:#f2837b}}"
)

Look = Mapping[str, Any]


@dataclass(frozen=True)
class _Panel:
    """One set of axes: from no samples to ``end``, and from 0 to ``high``, ``top`` pixels from above."""

    top: float
    end: float
    high: float

    def at(self, samples: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * samples / self.end
        return x, self.top + PANEL * (1 - min(value, self.high) / self.high)

    def line(self, looks: Sequence[Look], values: Sequence[float], kind: str) -> str:
        places = [self.at(look["samples"], value) for look, value in zip(looks, values, strict=True)]
        dots = "".join(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)
        return f'<polyline class="line {kind}" points="{_points(places)}"/>{dots}'

    def frame(self, words: str, *, percent: bool) -> str:
        parts = [f'<text x="{LEFT}" y="{self.top - 9}">{escape(words)}</text>']
        for quarter in range(5):
            value = self.high * quarter / 4
            _, y = self.at(0, value)
            label = f"{100 * value:.3g} %" if percent else f"{value:.3g}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        return "".join(parts)


def looks_chart(looks: Sequence[Look], label: str, limit: float | None, used: int | None) -> str:
    """The looks as SVG: shares of copies with the 95 % band of ``label``'s, and the Fréchet distance if it is known.

    Args:
        looks: lines of the log with ``samples`` and ``monitor``; at least one.
        label: the measure that may stop the training, such as ``mq@0.5``.
        limit: the share of it that is still allowed; None where nothing stops.
        used: samples seen by the weights that the run finishes with; None while it is not finished.
    """
    found = [look["monitor"] for look in looks]
    distances = [one["frechet"] for one in found if "frechet" in one]
    end = float(looks[-1]["samples"])
    highest = max(max(one["interval"][1], one["copied"]) for one in found)
    panels = [_Panel(TOP, end, min(1.0, 1.1 * max(highest, limit or 0.0)))]
    parts = [panels[0].frame(f"share of samples: {label} (line, 95 % band), near-copies (dashed)", percent=True)]
    low = [panels[0].at(look["samples"], one["interval"][0]) for look, one in zip(looks, found, strict=True)]
    high = [panels[0].at(look["samples"], one["interval"][1]) for look, one in zip(looks, found, strict=True)]
    parts.append(f'<polygon class="band" points="{_points([*low, *reversed(high)])}"/>')
    parts.append(panels[0].line(looks, [one["copied"] for one in found], "b"))
    parts.append(panels[0].line(looks, [one[label] for one in found], "a"))
    if limit is not None:
        _, y = panels[0].at(0, limit)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if len(distances) == len(looks):
        panels.append(_Panel(TOP + PANEL + GAP, end, 1.1 * max(distances) or 1.0))
        parts.append(panels[1].frame("Fréchet distance to held-out images (lower is better)", percent=False))
        parts.append(panels[1].line(looks, distances, "a"))
    bottom = panels[-1].top + PANEL
    if used is not None:
        x, _ = panels[0].at(used, 0)
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">finished with {used:,}</text>')
    height = bottom + BOTTOM
    words = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 8}" text-anchor="middle">samples seen, to {end:,.0f}'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Looks at samples along training"><style>{STYLE}</style>{"".join(parts)}{words}</text></svg>\n'
    )


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
