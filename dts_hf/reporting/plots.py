"""The figures of a run: temperature and gap, losses, scores, and what the optimizer did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dts_hf.files import check_no_link, write_bytes_atomic
from dts_hf.loss.statistics import CE, GAP, KD, KL, TEACHER_CE, TEMPERATURE
from dts_hf.reporting.canvas import (
    LIGHT,
    Theme,
    describe_smoothing,
    finish,
    line,
    panels,
    points,
    set_range,
    to_png,
)
from dts_hf.reporting.curves import Curve, curve, difference, in_words, share_of_soft_loss
from dts_hf.reporting.facts import MODEL_LABELS, Facts, gather, kept_best, number
from dts_hf.reporting.tables import MEASURES
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.links import make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dts_hf.reporting.tables import Measure

#: A temperature closer to its plain cosine than this follows it: the log is rounded to about that.
SAME_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Drawing:
    """A figure, or the reason why the run has none.

    Attributes:
        name: the file name without its ending.
        title: the heading above it.
        caption: how to read it.
        figure: what was drawn; None where there was nothing to draw.
        note: why there is no figure.
        alt: what it shows, in words, for those who cannot see it.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None
    note: str = ""
    alt: str = ""

    def png(self) -> bytes:
        """The figure as a PNG file."""
        assert self.figure is not None
        return to_png(self.figure)


def write_figures(run: RunDirectory) -> list[Path]:
    """Write ``figures/*.png`` and return their paths. A figure without data is not written, and an old one removed."""
    written = []
    check_no_link(run.figures_path)
    for drawing in draw(gather(run)):
        path = run.figures_path / f"{drawing.name}.png"
        if drawing.figure is None:
            path.unlink(missing_ok=True)
            continue
        make_folder(path.parent)
        # Never half a picture where a card points to one: a report is also written while a run goes on
        write_bytes_atomic(path, drawing.png())
        written.append(path)
    return written


def draw(facts: Facts, theme: Theme = LIGHT) -> list[Drawing]:
    """Draw every figure of the run."""
    scores = draw_task_scores if facts.task else draw_rouge
    return [part(facts, theme) for part in (draw_temperature, draw_losses, scores, draw_optimizer)]


def draw_temperature(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """The temperature over steps beside the plain cosine, what separates the two, and the gap that drives it."""
    title = "Temperature"
    keys = (TEMPERATURE.log, "temperature_cosine", GAP.log, "held_out_gap")
    used, cosine, gap, held_out = (curve(facts.log, key) for key in keys)
    if used.empty:
        return Drawing("temperature", title, "", None, "The log holds no temperature, so there is nothing to draw.")
    added = difference(used, cosine)
    follows = not added.empty and max(map(abs, added.finite)) < SAME_TEMPERATURE
    lower = [
        (label, data, colour)
        for label, data, colour in (
            ("T - cosine", added, theme.purple),
            ("gap\n(nats per label)", gap, theme.green),
            ("held-out gap\n(nats per label)", held_out, theme.orange),
        )
        if not data.empty and not (data is added and follows)
    ]
    figure, (top, *below) = panels([3, *(2 for _ in lower)], theme)
    line(top, used, "temperature used", theme.blue, smooth=False)
    caption = "Top: the temperature that divided the logits at each step"
    if not cosine.empty:
        line(top, cosine, "plain cosine", theme.orange, "--", smooth=False)
        caption += ", and the plain cosine schedule it would follow if nothing reacted to training"
    caption += "."
    top.set_ylabel("temperature")
    set_range(top, [used, cosine])
    for axis, (label, data, colour) in zip(below, lower, strict=True):
        axis.axhline(0, color=theme.text, linewidth=0.8, linestyle=(0, (1, 2)))
        line(axis, data, label, colour, smooth=data is gap)
        axis.set_ylabel(label)
        note = set_range(axis, [data], tame=True)
        if data is added:
            caption += (
                " T - cosine: how far what happened in training moved the temperature from that schedule." + note
            )
        elif data is held_out:
            caption += f" Held-out gap: the same on held-out rows, as it drove the temperature.{note}"
        else:
            caption += (
                " Gap: the student's cross-entropy minus the teacher's on the training answers; above 0 the student is "
                f"the worse of the two.{note}{describe_smoothing(gap)}"
            )
    finish(figure, used.steps)
    if follows:
        caption += " The two are the same throughout: nothing moved the temperature from its schedule."
    if gap.empty:
        caption += " The log holds no gap."
    shown = (("temperature", used), ("plain cosine", cosine), ("gap", gap))
    return Drawing("temperature", title, caption, figure, alt=_alt(title, used.steps, shown))


def draw_losses(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """Hard-label losses above, soft ones below (KD loss, KL at T = 1), and how the loss is shared between them."""
    title = "Losses"
    columns, hard_label, unit = (CE.log, TEACHER_CE.log, CE.held_out_log), "cross-entropy", "nats per label"
    if facts.task.get("subset") == "stsb":  # a regression
        columns, hard_label, unit = (CE.regression, TEACHER_CE.regression, f"eval_{CE.regression}"), "error", "squared"
    hard = [
        (curve(facts.log, columns[0]), "student", theme.blue, "-"),
        (curve(facts.log, columns[1]), "teacher", theme.orange, "--"),
        (curve(facts.log, columns[2], "eval"), "held-out", theme.purple, "points"),
    ]
    soft = [
        (curve(facts.log, KD.log), "KD loss", theme.blue, "-"),
        (curve(facts.log, KL.log), "KL at T = 1", theme.green, "-."),
        (curve(facts.log, KL.held_out_log, "eval"), "held-out KL", theme.purple, "points"),
    ]
    groups = [
        (label, group)
        for label, lines in ((hard_label, hard), ("distance to the teacher", soft))
        if (group := [one for one in lines if not one[0].empty])
    ]
    if not groups:
        return Drawing("losses", title, "", None, "The log holds no losses, so there is nothing to draw.")
    share = _share_of_soft_loss(facts, soft[0][0], hard[0][0])
    figure, axes = panels([3] * len(groups) + [2] * (not share.empty), theme)
    notes = []
    for axis, (label, group) in zip(axes, groups, strict=False):
        for data, name, colour, style in group:
            if style == "points":
                points(axis, data, name, colour)
            else:
                line(axis, data, name, colour, style)
        axis.set_ylabel(f"{label}\n({unit})")
        notes.append(set_range(axis, [data for data, *_ in group], floor=0.0, tame=True))
    if not share.empty:
        line(axes[-1], share, "share", theme.blue)
        axes[-1].set_ylabel("KD's share\nof the loss (%)")
        axes[-1].set_ylim(-3, 103)
    drawn = [data for _, group in groups for data, *_ in group]
    finish(figure, [step for data in drawn for step in data.steps])
    caption = _caption_of_losses(facts, [label for label, _ in groups], hard_label, notes)
    if not share.empty:
        caption += (
            " KD's share: what part of the loss that was minimised is the KD loss, with its weight; the rest is the "
            "loss on the labels. It is a share of the loss, not of its gradient."
        )
    caption += describe_smoothing(*(data for _, group in groups for data, *_, style in group if style != "points"))
    shown = [(name, data) for _, group in groups for data, name, *_ in group]
    return Drawing("losses", title, caption.strip(), figure, alt=_alt(title, drawn[0].steps, shown))


def _share_of_soft_loss(facts: Facts, soft: Curve, hard: Curve) -> Curve:
    """The KD loss's share of the loss, where both parts have a weight."""
    weight = curve(facts.log, "kd_ratio")
    ratio = number(facts.section("loss").get("kd_ratio"))
    if soft.empty or hard.empty or (weight.empty and (ratio is None or not 0 < ratio < 1)):
        return Curve([], [])
    return share_of_soft_loss(soft, hard, (ratio or 0.0) if weight.empty else weight)


def _caption_of_losses(facts: Facts, labels: Sequence[str], hard_label: str, notes: Sequence[str]) -> str:
    caption = ""
    for label, note in zip(labels, notes, strict=True):
        if label == "cross-entropy":
            what = "label" if facts.task else "token of the reference answers"
            caption += (
                f" Cross-entropy: how surprised a model is by each {what}, on training batches "
                "(lines) and held-out rows (points)."
            )
        elif label != "error" and hard_label != "error":
            caption += (
                " Distance to the teacher: the KD loss that is minimised depends on the temperature (and its T² factor), "
                "so its fall is partly the schedule's; KL at T = 1 is the same yardstick for every step and every run."
            )
        caption += note
    return caption


def draw_rouge(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """ROUGE-L of the student over steps; teacher and student before training as level lines."""
    title = "ROUGE-L on held-out prompts"
    measure = next(measure for measure in MEASURES if measure.key == "rougeL")
    set_name = facts.sets[0] if facts.sets else ""
    of_student = [record for record in facts.log if record.get("model", "student") == "student"]
    during = _scaled(curve(of_student, "rougeL", "generation"), measure)
    final = measure.value(facts, "student", set_name)
    if during.empty and final is None:
        return Drawing("rouge", title, "", None, "No answers were generated, so there is no ROUGE-L to draw.")
    last = _last_step(facts)  # the final score stands there, whatever was logged last
    figure, (axis,) = panels([4], theme)
    shown, words = [during], [("student during training", during)]
    for model, colour, style in (("teacher", theme.orange, "--"), ("student_before", theme.purple, ":")):
        value = measure.value(facts, model, set_name)
        if value is not None:
            label = f"{MODEL_LABELS[model]} ({value:.1f})"
            axis.axhline(value, color=colour, linestyle=style, linewidth=1.8, label=label)
            shown.append(Curve([last], [value]))
            words.append((MODEL_LABELS[model], shown[-1]))
    if not during.empty:
        line(axis, during, "during training", theme.blue, smooth=False)
    if final is not None:
        spread = measure.spread(facts, "student", set_name)
        axis.errorbar(
            [last], [final], yerr=None if spread is None else [spread], fmt="s", color=theme.blue, markersize=8,
            markeredgecolor=theme.background, capsize=4, label=f"student after ({final:.1f})", zorder=5,
        )  # fmt: skip
        shown.append(Curve([last], [final]))
        words.append((MODEL_LABELS["student"], shown[-1]))
    axis.set_ylabel("ROUGE-L\n(0 to 100)")
    set_range(axis, shown, floor=0.0, ceiling=100.0)
    finish(figure, [0.0, *during.steps, last])
    rows = facts.rows_in(set_name)
    caption = "Word overlap of generated answers with the reference answers"
    caption += f", {rows} prompts of the set {set_name!r} at the end of training. " if rows else ". "
    if not during.empty:
        caption += "Points during training may rest on fewer prompts than the final score. "
    return Drawing("rouge", title, caption.strip(), figure, alt=_alt(title, [0.0, last], words))


def draw_task_scores(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """The task's metrics on the held-out rows over steps; the teacher's headline as a level line."""
    title = "Scores on held-out rows"
    names = list((facts.metrics.get("task") or {}).get("metrics") or ())
    measures = [measure for name in names for measure in MEASURES if measure.key == name]
    curves = [_scaled(curve(facts.log, f"eval_{measure.key}", "eval"), measure) for measure in measures]
    drawn = [(measure, found) for measure, found in zip(measures, curves, strict=True) if not found.empty]
    if not drawn:
        return Drawing("scores", title, "", None, "No held-out rows were scored, so there is nothing to draw.")
    figure, (axis,) = panels([4], theme)
    shown, words = [], []
    for (measure, found), colour in zip(drawn, (theme.blue, theme.green), strict=False):
        label = f"student, {measure.label.removesuffix(' correlation')}"
        line(axis, found, label, colour, smooth=False)
        shown.append(found)
        words.append((label, found))
    teacher = drawn[0][0].value(facts, "teacher", facts.sets[0] if facts.sets else "")
    if teacher is not None:
        label = f"teacher ({teacher:.1f})"
        axis.axhline(teacher, color=theme.orange, linestyle="--", linewidth=1.8, label=label)
        shown.append(Curve([0.0], [teacher]))
        words.append(("teacher", shown[-1]))
    axis.set_ylabel("score\n(x 100)")
    set_range(axis, shown, ceiling=100.0)
    finish(figure, drawn[0][1].steps)
    caption = "Each point is one pass over the held-out rows."
    if kept_best(facts):
        caption += " The student that is kept is that of the best first metric."
    return Drawing("scores", title, caption, figure, alt=_alt(title, drawn[0][1].steps, words))


def draw_optimizer(facts: Facts, theme: Theme = LIGHT) -> Drawing:
    """Learning rate, gradient norm and speed: what to look at when a loss does not fall."""
    title = "Optimizer and speed"
    kinds = [
        ("learning rate", "learning_rate", theme.blue, False),
        ("gradient norm", "grad_norm", theme.purple, True),
        ("tokens\nper second", "tokens_per_second", theme.green, True),
    ]
    drawn = [
        (label, data, colour, smooth)
        for label, key, colour, smooth in kinds
        if not (data := curve(facts.log, key)).empty
    ]
    if not drawn:
        return Drawing(
            "optimizer", title, "", None, "The log holds neither learning rate nor gradient norm nor speed."
        )
    figure, axes = panels([1.7] * len(drawn), theme)
    caption = ""
    for axis, (label, data, colour, smooth) in zip(axes, drawn, strict=True):
        line(axis, data, label, colour, smooth=smooth)
        axis.set_ylabel(label)
        if label == "learning rate":
            # Its values are far below the air that set_range leaves around a constant
            axis.set_ylim(0, 1.1 * max(data.finite) or 1.0)
            axis.yaxis.set_major_formatter("{x:g}")
            caption += "The learning rate as the schedule set it."
        elif label == "gradient norm":
            caption += " The gradient's norm before clipping: spikes are batches that pull hard."
            caption += set_range(axis, [data], floor=0.0, tame=True)
        else:
            set_range(axis, [data], floor=0.0)
            caption += " Tokens per second are prompt and answer, over all processes."
    finish(figure, [step for _, data, *_ in drawn for step in data.steps])
    caption += describe_smoothing(*(data for _, data, _, smooth in drawn if smooth))
    words = [(label.replace("\n", " "), data) for label, data, *_ in drawn]
    return Drawing("optimizer", title, caption.strip(), figure, alt=_alt(title, drawn[0][1].steps, words))


# -------------------------------------------------------------------------------------------------------- helpers


def _last_step(facts: Facts) -> float:
    steps = [float(record["step"]) for record in facts.log if "step" in record]
    return max([*steps, number((facts.metrics.get("training") or {}).get("steps")) or 0.0])


def _scaled(data: Curve, measure: Measure) -> Curve:
    return Curve(data.steps, [value * measure.scale for value in data.values])


def _alt(title: str, steps: Sequence[float], curves: Sequence[tuple[str, Curve]]) -> str:
    span = f"steps {min(steps):.0f} to {max(steps):.0f}" if steps else "the run"
    return f"{title}, {span}: " + "; ".join(filter(None, (in_words(label, data) for label, data in curves))) + "."
