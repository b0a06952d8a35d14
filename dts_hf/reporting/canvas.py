"""How every figure of a run looks: panels, lines, the range of an axis, legends. Readable in grey and on a phone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dts_hf.reporting.curves import Curve, moving_mean, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_LABEL = "optimizer step"
SMOOTH_FROM = 60  # with fewer points than this the raw values alone are readable
LINE_FROM = 3  # two points are joined by any line: it would show a trend that nobody has seen
MARKERS_UP_TO = 30
#: The first points of a run may be so much larger than the rest that they press it flat: how much is that.
LOG_FROM, CLIP_FROM = 8.0, 4.0
# A figure is about 340 pixels wide on a phone and 480 on a screen: at 4.4 inches its letters are 11 and 15 pixels high
WIDTH, LETTERS, DPI = 4.4, 11, 160


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. The lines are told apart by dash and marker as well (colours: Okabe and Ito)."""

    background: str
    text: str
    grid: str
    blue: str
    orange: str
    green: str
    purple: str


LIGHT = Theme("#ffffff", "#1f2328", "#d9dde2", "#0072b2", "#d55e00", "#00805c", "#a4427f")
DARK = Theme("#181b20", "#e6e8eb", "#363b44", "#56b4e9", "#ff9f4a", "#3fcfa4", "#e59ac6")


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    # A few lines in four colours need no 16 million: a third of the bytes, in a page that is mailed
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def panels(heights: Sequence[float], theme: Theme) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other, ``heights`` relative to each other (3: a main panel, 2: one below it)."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    size = (WIDTH, 0.8 + 0.62 * sum(heights) + 0.35 * len(heights))
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.background)
    # One x axis for all panels: a jump of the gap is found above as one of the temperature
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))[:, 0]
    for axis in axes:
        axis.set_facecolor(theme.background)
        axis.grid(color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=theme.text, labelsize=LETTERS - 1)
        axis.yaxis.label.set(color=theme.text, fontsize=LETTERS - 1)
        axis.xaxis.label.set(color=theme.text, fontsize=LETTERS)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.text)
    return figure, list(axes)


def line(axis: Axes, data: Curve, label: str, colour: str, style: str = "-", smooth: bool = True) -> None:
    """Draw a curve; of many points thin as it was logged and thick as its moving mean, of fewer than three no line.

    Args:
        axis: where.
        data: the whole curve; it is thinned here, after it was smoothed.
        label: its name in the legend.
        colour: one of a ``Theme``.
        style: of the line, in matplotlib's words.
        smooth: whether a moving mean says more than the values themselves.
    """
    marker = "o" if len(data.values) <= MARKERS_UP_TO else ""
    if smooth and len(data.values) >= SMOOTH_FROM:
        axis.plot(*thinned(data), color=colour, linewidth=0.7, alpha=0.35)
        data = Curve(data.steps, moving_mean(data.values))
    style = style if len(data.finite) >= LINE_FROM else ""
    axis.plot(*thinned(data), color=colour, ls=style, lw=1.9, marker=marker, markersize=4.5, label=label)


def points(axis: Axes, data: Curve, label: str, colour: str) -> None:
    """Draw single points, such as held-out scores; the dotted line between them only from three on.

    Args:
        axis: where.
        data: the points.
        label: their name in the legend.
        colour: one of a ``Theme``.
    """
    style = ":" if len(data.finite) >= LINE_FROM else ""
    data = thinned(data)
    marker = "D" if len(data.values) <= MARKERS_UP_TO else ""
    axis.plot(*data, color=colour, ls=style, lw=1.4, marker=marker, markersize=4.5, label=label, zorder=4)


def describe_smoothing(*curves: Curve) -> str:
    """A sentence on thin and thick lines, where there are any."""
    smoothed = any(len(data.values) >= SMOOTH_FROM for data in curves)
    return " Thin lines are the logged values, thick ones their moving mean." if smoothed else ""


def set_range(
    axis: Axes, curves: Sequence[Curve], floor: float | None = None, ceiling: float | None = None, tame: bool = False
) -> str:
    """Set the y range: from ``floor`` if all data lie above it, with some air, never hair-thin around a constant.

    Args:
        axis: whose.
        curves: what is drawn in it.
        floor: of the quantity, such as 0.
        ceiling: of the quantity.
        tame: whether first points that dwarf the rest may make the axis logarithmic, or be cut off where there are
            values below 0.

    Returns:
        A sentence for the caption on what was done to the axis; empty for an ordinary one.
    """
    values = [value for data in curves for value in data.finite]
    low, high = min(values), max(values)
    note = ""
    if tame and low > 0 and high > LOG_FROM * statistics.median(values):
        _logarithmic(axis, low, high)
        return " The vertical axis is logarithmic."
    if tame:
        # All but the first tenth of each curve: what a run looks like once it has found its feet
        rest = [value for data in curves for value in data.finite[-(-len(data.finite) // 10) :]] or values
        calm = (min(rest), max(rest))
        if calm[1] > calm[0] and high - low > CLIP_FROM * (calm[1] - calm[0]):
            air = 0.25 * (calm[1] - calm[0])
            far, (low, high) = max(values, key=lambda v: abs(v - calm[0])), (calm[0] - air, calm[1] + air)
            outside = sum(not low <= value <= high for value in values)
            note = f" The first points ({outside}, as far as {far:.3g}) lie outside of the picture."
    # Without the last two a policy that holds its temperature would be drawn as noise of the last bits
    air = max(0.08 * (high - low), 0.1 * abs(high) if not note else 0.0, 0.05 if not note else 0.0)
    bottom, top = low - air, high + air
    if floor is not None and low >= floor:
        bottom = floor - 0.03 * (top - floor)
    if ceiling is not None and high <= ceiling:
        top = min(top, ceiling + 0.04 * (ceiling - bottom))
    axis.set_ylim(bottom, top)
    return note


def _logarithmic(axis: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    # Numbers as people write them: 0.2, 5, 20. Powers of ten alone would leave two labels on most of these axes
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=9))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(low / 1.25, high * 1.25)


def finish(figure: Figure, steps: Sequence[float]) -> None:
    """Legends above the panels, and the one x axis below the last."""
    from matplotlib.ticker import MaxNLocator

    for axis in figure.axes:
        colour = axis.yaxis.label.get_color()
        labels = axis.get_legend_handles_labels()[1]
        # The axis names a line that stands alone, unless the line's name says more: held-out points are no training loss
        about = axis.get_ylabel()
        if len(labels) > 1 or any(name not in about and about.partition("\n")[0] not in name for name in labels):
            # Above the axes: a legend inside covers data sooner or later.
            axis.legend(
                loc="lower left",
                bbox_to_anchor=(-0.1, 1.0),
                ncols=2 if len(labels) == 4 or sum(map(len, labels)) > 36 else 3,
                frameon=False,
                fontsize=LETTERS - 1,
                labelcolor=colour,
                borderaxespad=0.2,
                handlelength=1.8,
                handletextpad=0.5,
                columnspacing=1.0,
            )
    bottom = figure.axes[-1]
    bottom.set_xlabel(STEP_LABEL)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    first, last = min(steps, default=0.0), max(steps, default=1.0)
    air = 0.02 * (last - first) if last > first else 1.0
    bottom.set_xlim(first - air, last + air)
    figure.align_ylabels()
