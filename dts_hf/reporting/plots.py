"""The three figures of a run: temperature and gap, losses, ROUGE-L. Readable in grey and by the colour-blind."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dts_hf.loss.statistics import CE, GAP, KD, KL, TEACHER_CE, TEMPERATURE
from dts_hf.reporting.facts import MODEL_LABELS, Facts, gather, kept_best, number
from dts_hf.reporting.tables import MEASURES
from dts_hf.runs.directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_LABEL = "optimizer step"
SMOOTH_FROM = 60  # with fewer points than this the raw values alone are readable
MARKERS_UP_TO = 30


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


@dataclass(frozen=True)
class Drawing:
    """A figure, or the reason why the run has none. ``name`` is the file name without its ending."""

    name: str
    title: str
    caption: str
    figure: Figure | None
    note: str = ""

    def png(self) -> bytes:
        """The figure as a PNG file."""
        assert self.figure is not None
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=160, facecolor=self.figure.get_facecolor())
        return buffer.getvalue()


class Curve(NamedTuple):
    """Values over optimizer steps; a step without a number is NaN and leaves a hole in the line."""

    steps: list[float]
    values: list[float]

    @property
    def empty(self) -> bool:
        return all(math.isnan(value) for value in self.values)


def curve(records: Sequence[Mapping[str, Any]], key: str, kind: str = "train") -> Curve:
    """The values of ``key`` over the steps of the log records of one kind.

    The log of a run that was resumed has the steps since the checkpoint twice: the last record of a step counts.
    """
    found: dict[float, float] = {}
    for record in records:
        if record.get("kind") == kind and "step" in record:
            step, value = float(record["step"]), number(record.get(key))
            # Another record of the same step may hold other columns: it does not make a hole in this one
            if key in record or step not in found:
                found[step] = math.nan if value is None else value
    steps = sorted(found)
    return Curve(steps, [found[step] for step in steps])


def write_figures(run: RunDirectory) -> list[Path]:
    """Write ``figures/*.png`` and return their paths. A figure without data is not written, and an old one removed."""
    written = []
    for drawing in draw(gather(run)):
        path = run.figures_path / f"{drawing.name}.png"
        if drawing.figure is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never half a picture where a card points to one: a report is also written while a run goes on
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(drawing.png())
        os.replace(temporary, path)
        written.append(path)
    return written


def draw(facts: Facts, theme: Theme = LIGHT) -> list[Drawing]:
    """Draw every figure of the run."""
    scores = draw_task_scores if facts.task else draw_rouge
    return [draw_temperature(facts, theme), draw_losses(facts, theme), scores(facts, theme)]


def draw_temperature(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """The temperature over steps, the plain cosine beside it, and the gap that drives it in a panel below."""
    title = "Temperature"
    used, cosine, gap = (curve(facts.log, key) for key in (TEMPERATURE.log, "temperature_cosine", GAP.log))
    if used.empty:
        return Drawing("temperature", title, "", None, "The log holds no temperature, so there is nothing to draw.")
    if gap.empty:
        figure, (top,) = _panels([1], theme)
    else:
        figure, (top, bottom) = _panels([3, 2], theme)
        bottom.axhline(0, color=theme.text, linewidth=0.8, linestyle=(0, (1, 2)))
        _line(bottom, gap, "gap", theme.green)
        bottom.set_ylabel("gap\n(nats per label)")
    _line(top, used, "temperature used", theme.blue, smooth=False)
    if not cosine.empty:
        _line(top, cosine, "plain cosine, for comparison", theme.orange, "--", smooth=False)
    top.set_ylabel("temperature")
    _room(top, [*used.values, *cosine.values])
    _finish(figure, used.steps)
    caption = (
        "Top: the temperature that divided the logits at each step"
        + ("" if cosine.empty else ", and the plain cosine schedule it would follow if nothing reacted to training")
        + "."
    )
    if gap.empty:
        caption += " The log holds no gap."
    else:
        caption += (
            " Bottom: the gap, the student's cross-entropy minus the teacher's on the training answers; "
            "above 0 the student is the worse of the two."
        ) + _describe_smoothing(gap)
    return Drawing("temperature", title, caption, figure)


def draw_losses(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """Hard-label losses (student, teacher, held-out) above, soft ones (KD loss, KL at T = 1, held-out KL) below."""
    title = "Losses"
    columns, hard_label, unit = (CE.log, TEACHER_CE.log, CE.held_out_log), "cross-entropy", "nats per label"
    if facts.task.get("subset") == "stsb":  # a regression
        columns, hard_label, unit = (CE.regression, TEACHER_CE.regression, f"eval_{CE.regression}"), "error", "squared"
    hard = [
        (curve(facts.log, columns[0]), "student", theme.blue, "-"),
        (curve(facts.log, columns[1]), "teacher", theme.orange, "--"),
        (curve(facts.log, columns[2], "eval"), "student, held-out", theme.purple, "points"),
    ]
    soft = [
        (curve(facts.log, KD.log), "KD loss", theme.blue, "-"),
        (curve(facts.log, KL.log), "KL at T = 1", theme.green, "-."),
        (curve(facts.log, KL.held_out_log, "eval"), "held-out KL at T = 1", theme.purple, "points"),
    ]
    groups = [
        (label, group)
        for label, lines in ((hard_label, hard), ("distance to the teacher", soft))
        if (group := [line for line in lines if not line[0].empty])
    ]
    if not groups:
        return Drawing("losses", title, "", None, "The log holds no losses, so there is nothing to draw.")
    figure, axes = _panels([1] * len(groups), theme)
    for axis, (label, group) in zip(axes, groups, strict=True):
        for data, name, colour, style in group:
            if style == "points":
                axis.plot(data.steps, data.values, "D", color=colour, markersize=4.5, label=name, zorder=4)
            else:
                _line(axis, data, name, colour, style)
        axis.set_ylabel(f"{label}\n({unit})")
        _room(axis, [value for data, *_ in group for value in data.values], floor=0.0)
    _finish(figure, [step for _, group in groups for data, *_ in group for step in data.steps])
    caption = ""
    if groups[0][0] == "cross-entropy":
        what = "label" if facts.task else "token of the reference answers"
        caption += (
            f"Cross-entropy: how surprised a model is by each {what}, on training batches "
            "(lines) and held-out rows (points). "
        )
    if groups[-1][0] != hard_label and hard_label != "error":
        caption += (
            "Distance to the teacher: the KD loss that is minimised depends on the temperature (and its T² factor), "
            "so its fall is partly the schedule's; KL at T = 1 is the same yardstick for every step and every run."
        )
    caption = caption.strip() + _describe_smoothing(*(d for _, g in groups for d, *_, style in g if style != "points"))
    return Drawing("losses", title, caption, figure)


def draw_rouge(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """ROUGE-L of the student over steps; teacher and student before training as level lines."""
    title = "ROUGE-L on held-out prompts"
    measure = next(measure for measure in MEASURES if measure.key == "rougeL")
    set_name = facts.sets[0] if facts.sets else ""
    of_student = [record for record in facts.log if record.get("model", "student") == "student"]
    during = curve(of_student, "rougeL", "generation")
    during = Curve(during.steps, [value * measure.scale for value in during.values])
    final = measure.value(facts, "student", set_name)
    if during.empty and final is None:
        return Drawing("rouge", title, "", None, "No answers were generated, so there is no ROUGE-L to draw.")
    last = _last_step(facts)  # the final score stands there, whatever was logged last
    figure, (axis,) = _panels([1], theme)
    shown = list(during.values)
    for model, colour, style in (("teacher", theme.orange, "--"), ("student_before", theme.purple, ":")):
        value = measure.value(facts, model, set_name)
        if value is not None:
            label = f"{MODEL_LABELS[model]} ({value:.1f})"
            axis.axhline(value, color=colour, linestyle=style, linewidth=1.8, label=label)
            shown.append(value)
    if not during.empty:
        axis.plot(during.steps, during.values, "o-", color=theme.blue, markersize=4.5, label="student during training")
    if final is not None:
        spread = measure.spread(facts, "student", set_name)
        axis.errorbar(
            [last], [final], yerr=None if spread is None else [spread], fmt="s", color=theme.blue, markersize=8,
            markeredgecolor=theme.background, capsize=4, label=f"student after ({final:.1f})", zorder=5,
        )  # fmt: skip
        shown.append(final)
    axis.set_ylabel("ROUGE-L\n(0 to 100)")
    _room(axis, shown, floor=0.0, ceiling=100.0)
    _finish(figure, [0.0, *during.steps, last])
    rows = facts.rows_in(set_name)
    caption = "Word overlap of generated answers with the reference answers"
    caption += f", {rows} prompts of the set {set_name!r} at the end of training. " if rows else ". "
    if not during.empty:
        caption += "Points during training may rest on fewer prompts than the final score. "
    return Drawing("rouge", title, caption.strip(), figure)


def draw_task_scores(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """The task's metrics on the held-out rows over steps; the teacher's headline as a level line."""
    title = "Scores on held-out rows"
    names = list((facts.metrics.get("task") or {}).get("metrics") or ())
    measures = [measure for name in names for measure in MEASURES if measure.key == name]
    curves = [curve(facts.log, f"eval_{measure.key}", "eval") for measure in measures]
    drawn = [(measure, found) for measure, found in zip(measures, curves, strict=True) if not found.empty]
    if not drawn:
        return Drawing("scores", title, "", None, "No held-out rows were scored, so there is nothing to draw.")
    figure, (axis,) = _panels([1], theme)
    shown = []
    for (measure, found), colour in zip(drawn, (theme.blue, theme.green), strict=False):
        values, short = [value * measure.scale for value in found.values], measure.label.removesuffix(" correlation")
        axis.plot(found.steps, values, "o-", color=colour, markersize=4.5, label=f"student, {short}")
        shown += values
    teacher = drawn[0][0].value(facts, "teacher", facts.sets[0] if facts.sets else "")
    if teacher is not None:
        label = f"teacher ({teacher:.1f})"
        axis.axhline(teacher, color=theme.orange, linestyle="--", linewidth=1.8, label=label)
        shown.append(teacher)
    axis.set_ylabel("score\n(x 100)")
    _room(axis, shown, ceiling=100.0)
    _finish(figure, drawn[0][1].steps)
    caption = "Each point is one pass over the held-out rows."
    if kept_best(facts):
        caption += " The student that is kept is that of the best first metric."
    return Drawing("scores", title, caption, figure)


# -------------------------------------------------------------------------------------------------------- helpers


def _last_step(facts: Facts) -> float:
    steps = [float(record["step"]) for record in facts.log if "step" in record]
    return max([*steps, number((facts.metrics.get("training") or {}).get("steps")) or 0.0])


def _panels(heights: Sequence[int], theme: Theme) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(6.0, 1.2 + 1.95 * len(heights)), layout="constrained", facecolor=theme.background)
    # One x axis for all panels: a jump of the gap is found above as one of the temperature
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))[:, 0]
    for axis in axes:
        axis.set_facecolor(theme.background)
        axis.grid(color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=theme.text, labelsize=10)
        axis.yaxis.label.set(color=theme.text, fontsize=10.5)
        axis.xaxis.label.set(color=theme.text, fontsize=10.5)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.text)
    return figure, list(axes)


def _line(axis: Axes, data: Curve, label: str, colour: str, style: str = "-", smooth: bool = True) -> None:
    values, marker = data.values, "o" if len(data.values) <= MARKERS_UP_TO else ""
    if smooth and len(values) >= SMOOTH_FROM:
        axis.plot(data.steps, values, color=colour, linewidth=0.7, alpha=0.35)
        values = moving_mean(values)
    axis.plot(data.steps, values, color=colour, ls=style, lw=1.9, marker=marker, markersize=4, label=label)


def moving_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the points; the window narrows at both ends and beside holes (NaN).

    It stays symmetric, because a one-sided mean would bend a falling line upwards before every hole.
    """
    most = max(1, len(values) // 40)  # on either side
    means = []
    for index, value in enumerate(values):
        window = [value]
        for reach in range(1, min(most, index, len(values) - 1 - index) + 1):
            pair = (values[index - reach], values[index + reach])
            if any(map(math.isnan, pair)):
                break
            window += pair
        means.append(math.nan if math.isnan(value) else sum(window) / len(window))
    return means


def _describe_smoothing(*curves: Curve) -> str:
    smoothed = any(len(data.values) >= SMOOTH_FROM for data in curves)
    return " Thin lines are the logged values, thick ones their moving mean." if smoothed else ""


def _room(axis: Axes, values: Sequence[float], floor: float | None = None, ceiling: float | None = None) -> None:
    """Set the y range: from ``floor`` if all data lie above it, with some air, never hair-thin around a constant."""
    finite = [value for value in values if not math.isnan(value)]
    low, high = min(finite), max(finite)
    # Without the last two a policy that holds its temperature would be drawn as noise of the last bits
    air = max(0.08 * (high - low), 0.1 * abs(high), 0.05)
    bottom, top = low - air, high + air
    if floor is not None and low >= floor:
        bottom = floor - 0.03 * (top - floor)
    if ceiling is not None and high <= ceiling:
        top = min(top, ceiling + 0.04 * (ceiling - bottom))
    axis.set_ylim(bottom, top)


def _finish(figure: Figure, steps: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in figure.axes:
        colour = axis.yaxis.label.get_color()
        entries = len(axis.get_legend_handles_labels()[0])
        if entries > 1:
            # Above the axes: a legend inside covers data sooner or later.
            axis.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=2 if entries == 4 else 3,
                frameon=False,
                fontsize=10,
                labelcolor=colour,
                borderaxespad=0.2,
                handlelength=2.3,
                handletextpad=0.5,
                columnspacing=1.1,
            )
    bottom = figure.axes[-1]
    bottom.set_xlabel(STEP_LABEL)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    first, last = min(steps, default=0.0), max(steps, default=1.0)
    air = 0.02 * (last - first) if last > first else 1.0
    bottom.set_xlim(first - air, last + air)
