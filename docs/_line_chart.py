"""A line chart as an SVG file of plain text: no library, the same bytes on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 30, 40
COLOURS = ("#1f5fa8", "#b4520b")
INK, GRID = "#333333", "#dddddd"


@dataclass(frozen=True)
class Line:
    """One curve over progress 0 to 1: its mean at equal steps and, where rows differ, the lowest and highest row."""

    label: str
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(
    lines: Sequence[Line],
    y_label: str,
    title: str,
    start: float = 0.0,
    *,
    marks: Sequence[str] = ("0", "0.25", "0.5", "0.75", "1"),
    x_label: str = "progress",
    of_bands: str = "lowest to highest token",
) -> str:
    """The chart of up to two lines, whose first points lie at ``start``. Coordinates are rounded to a tenth of a pixel.

    ``marks`` are the words under the x axis, equally far apart, and ``of_bands`` says what bands are, beside the lines.
    """
    values = [value for line in lines for part in (line.mean, line.low, line.high) for value in part or ()]
    ticks = _ticks(min(values), max(values))

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    def points(curve: Sequence[float]) -> list[str]:
        return [f"{x(start + (1 - start) * k / (len(curve) - 1)):.1f},{y(value):.1f}" for k, value in enumerate(curve)]

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in ticks:
        out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for place, mark in enumerate(marks):
        share = place / (len(marks) - 1)
        out.append(f'<path d="M{x(share):.1f} {HEIGHT - BOTTOM}v4" stroke="{INK}"/>')
        out.append(f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(mark)}</text>')
    out.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>')
    out.append(f'<text x="{x(0.5):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>')
    out.append(f'<text x="{LEFT - 6}" y="18" text-anchor="end" font-weight="bold">{escape(y_label)}</text>')
    for line, colour in zip(lines, COLOURS):  # all bands under all lines
        if line.low is not None and line.high is not None:
            outline = " ".join([*points(line.high), *reversed(points(line.low))])
            out.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15"/>')
    for number, (line, colour) in enumerate(zip(lines, COLOURS)):
        dash = ' stroke-dasharray="6 4"' if number else ""
        style = f'fill="none" stroke="{colour}" stroke-width="2"{dash}'
        out.append(f'<polyline points="{" ".join(points(line.mean))}" {style}/>')
        at = LEFT + 16 + number * 190
        out.append(f'<path d="M{at} 14h26" {style}/>')
        band = f", {of_bands}" if line.low is not None and of_bands else ""
        out.append(f'<text x="{at + 32}" y="18">{escape(line.label + band)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to seven of them, that enclose the values."""
    if high - low < 0.5:
        low, high = low - 0.3, high + 0.3
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(k * step, 10) for k in range(first, last + 1)]
