"""The figures of the advice: entropy and its parts, what k tokens hold, and the gradient, against the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dts_hf.advice.measured import Estimate, Measured, short
from dts_hf.reporting.canvas import Theme, finish, line, panels, set_range
from dts_hf.reporting.curves import Curve
from dts_hf.reporting.plots import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Parts of the entropy, top to bottom: the curve's name, and what its axis says.
PARTS = {
    "entropy": "entropy H\n(nats)",
    "binary": "of it: is it\nthe label?",
    "relation": "of it: which\nother class?",
}
#: Numbers of tokens of which the share is drawn.
DRAWN = (1, 16, 128, 1024)


def draw(found: Measured, theme: Theme) -> list[Drawing]:
    """Every figure that there are numbers for."""
    return [draw_entropy(found, theme), draw_gradient(found, theme), draw_mass(found, theme)]


def draw_entropy(found: Measured, theme: Theme) -> Drawing:
    """The teacher's entropy and the two terms of its chain rule, on training and on held-out rows."""
    figure, axes = panels([3, 2, 2], theme)
    for axis, (name, label) in zip(axes, PARTS.items(), strict=True):
        lines = [("training rows", name, theme.blue, "-")]
        if f"held_out_{name}" in found.curves:
            lines.append(("held-out rows", f"held_out_{name}", theme.orange, "--"))
        for words, key, colour, style in lines:
            _line(axis, found, key, words if axis is axes[0] else "", colour, style)
        axis.set_ylabel(label)
        set_range(axis, [_curve(found, key) for _, key, _, _ in lines], floor=0.0)
    _finish(figure, found)
    caption = (
        "Mean over labels of the entropy of the teacher's softmax at T, and the two terms it is the sum of: how unsure "
        "the teacher is of the label, and how it spreads the rest over the other classes. Bands are 95 % intervals "
        "over rows. Where the solid line lies far below the dashed one, the teacher knows the training rows by heart. "
        "The definitions are ours."
    )
    return _drawing("entropy", "The teacher's entropy against T", caption, figure, found, list(PARTS))


def draw_gradient(found: Measured, theme: Theme) -> Drawing:
    """How much of the gradient on the logits is the soft loss's, and how far both parts agree."""
    figure, (top, bottom) = panels([2, 2], theme)
    _line(top, found, "kd_share", "", theme.blue, "-")
    top.set_ylabel("the teacher's share\nof the gradient")
    set_range(top, [_curve(found, "kd_share")], floor=0.0, ceiling=1.0)
    _line(bottom, found, "cosine", "", theme.green, "-")
    bottom.set_ylabel("cosine between\nboth parts")
    set_range(bottom, [_curve(found, "cosine")], ceiling=1.0)
    _finish(figure, found)
    caption = (
        "On training rows, before the first step, at the recipe's loss.kd_ratio and with its divergence: the norm of "
        "the soft loss's gradient by the student's logits as a share of the sum of both norms, and the cosine of the "
        "angle between the two."
    )
    return _drawing("gradient", "Labels and teacher in the gradient", caption, figure, found, ["kd_share", "cosine"])


def draw_mass(found: Measured, theme: Theme) -> Drawing:
    """How much of the teacher's probability its likeliest tokens hold."""
    sizes = [size for size in DRAWN if size in found.sizes]
    figure, (axis,) = panels([3], theme)
    colours = (theme.blue, theme.orange, theme.green, theme.purple)
    for size, colour, style in zip(sizes, colours, ("-", "--", "-.", ":"), strict=False):
        _line(axis, found, f"mass_{size}", f"the first {size:,}" if size > 1 else "the first", colour, style)
    axis.set_ylabel("share of the probability")
    set_range(axis, [_curve(found, f"mass_{size}") for size in sizes], floor=0.0, ceiling=1.0)
    _finish(figure, found)
    caption = (
        "On training rows: the share of the teacher's probability at T that its likeliest tokens hold. A compact cache "
        "keeps so many of them."
    )
    return _drawing(
        "mass", "What the likeliest classes hold", caption, figure, found, [f"mass_{size}" for size in sizes]
    )


# -------------------------------------------------------------------------------------------------------------- helpers


def _curve(found: Measured, name: str) -> Curve:
    return Curve(list(found.situation.grid), [point.value for point in found.curves[name]])


def _line(axis: Axes, found: Measured, name: str, label: str, colour: str, style: str) -> None:
    points: Sequence[Estimate] = found.curves[name]
    low, high = [point.low for point in points], [point.high for point in points]
    axis.fill_between(found.situation.grid, low, high, color=colour, alpha=0.18, linewidth=0)
    line(axis, _curve(found, name), label or "_", colour, style, smooth=False)


def _finish(figure: Figure, found: Measured) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    grid = found.situation.grid
    finish(figure, grid)
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(grid))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlim(grid[0] / 1.08, grid[-1] * 1.08)
    figure.axes[-1].set_xlabel("temperature T")


def _drawing(name: str, title: str, caption: str, figure: Figure, found: Measured, curves: Sequence[str]) -> Drawing:
    first, last = found.situation.grid[0], found.situation.grid[-1]
    ends = (
        f"{one} from {short(found.curves[one][0].value)} to {short(found.curves[one][-1].value)}" for one in curves
    )
    return Drawing(name, title, caption, figure, alt=f"{title}, from T = {first:g} to {last:g}: {', '.join(ends)}.")
