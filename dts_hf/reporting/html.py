"""``report.html``: one page that needs nothing but itself, with scores, figures and answers side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from dts_hf.recipe.yaml_files import dump_values
from dts_hf.reporting.canvas import DARK, LIGHT
from dts_hf.reporting.facts import (
    MODEL_LABELS,
    MODELS,
    Facts,
    format_count,
    gather,
    interval,
    number,
    points,
    publishable,
    share_of,
    teacher_is_reference,
)
from dts_hf.reporting.model_card import limits, rendered, settings, summary
from dts_hf.reporting.plots import draw
from dts_hf.reporting.tables import MEASURES, format_counts, score_lines
from dts_hf.runs.directory import RunDirectory

SAMPLES = 12


FirstAnswers: TypeAlias = dict[tuple[str, str], Mapping[str, Any]]


class Answer(NamedTuple):
    """What one model answered to the prompt of a sample."""

    label: str
    text: str
    score: float | None
    tokens: int | None
    finished: bool


class Sample(NamedTuple):
    """One prompt and the answers of every model that has one."""

    key: str
    prompt: str
    instruction: str
    input: str
    references: Sequence[str]
    answers: Sequence[Answer]


class Headline(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    note: str


def render_html(run: RunDirectory) -> str:
    """The whole page. Every text of a model or of the data is escaped; figures are data URIs; nothing is fetched."""
    facts = gather(run)
    samples, answered = choose_samples(facts)
    # Escaped as a whole and not where a text seems dangerous: prompts, answers and names are all data of a stranger
    return rendered(
        "report.html.jinja",
        autoescape=True,
        facts=facts,
        summary=summary(facts),
        headlines=headlines(facts),
        labels=[MODEL_LABELS[model] for model in MODELS],
        lines=score_lines(facts),
        counts=format_counts(facts),
        intervals=_format_interval(facts),
        teacher_is_reference=teacher_is_reference(facts),
        figures=[
            # Drawn twice, because an image in a page cannot ask for the reader's colour scheme
            (light, data_uri(light.png()) if light.figure else "", data_uri(dark.png()) if dark.figure else "")
            for light, dark in zip(draw(facts, LIGHT), draw(facts, DARK), strict=True)
        ],
        samples=samples,
        answered=answered,
        settings=settings(facts),
        limits=limits(facts),
        protocol=publishable(facts.metrics.get("protocol") or {}),
        recipe=dump_values(publishable(facts.recipe)) if facts.recipe else "",
    )


def choose_samples(facts: Facts, count: int = SAMPLES) -> tuple[list[Sample], int]:
    """Samples spread evenly over the student's scores, best first, and how many prompts they were chosen from.

    The prompts are sorted by the student's ROUGE-L and taken at even distances, the best and the worst among them,
    so that the choice flatters nobody. The first seed counts where several were generated.
    """
    if facts.task:  # a class has nothing to be read side by side
        return [], 0
    by_label = {MODEL_LABELS[model]: first_answers(facts.predictions.get(model) or []) for model in MODELS}
    # The student after training where it has answers, else whoever comes before: sorted by what the page is about
    lead = next((label for label in reversed(by_label) if by_label[label]), "")
    return side_by_side(by_label, lead, count), len(by_label.get(lead, ()))


def first_answers(rows: Sequence[Mapping[str, Any]]) -> FirstAnswers:
    """The first answer to each row of predictions, by set and id: its seed stands for all."""
    first: FirstAnswers = {}
    for row in rows:
        # Seeds in the order in which they were answered
        first.setdefault((str(row.get("set", "")), str(row.get("id", ""))), row)
    return first


def side_by_side(by_label: Mapping[str, FirstAnswers], lead: str, count: int) -> list[Sample]:
    """So many prompts, spread evenly over the scores of ``lead``, and the answers of each that has one.

    Args:
        by_label: answers by what they are called.
        lead: one of them, or a name that has none.
        count: of prompts at most, two at least.
    """
    of_lead = by_label.get(lead, {})
    order = sorted(of_lead, key=lambda key: (-(number(of_lead[key].get("rougeL")) or 0.0), key))
    spread = [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)] if len(order) > count else order
    samples = []
    for key in spread:
        row = of_lead[key]
        answers = [_answer(label, by_label[label][key]) for label in by_label if key in by_label[label]]
        prompt, instruction, given = (str(row.get(name) or "") for name in ("prompt", "instruction", "input"))
        references = [str(reference) for reference in row.get("references") or []]
        samples.append(Sample(key[1], prompt, instruction, given, references, answers))
    return samples


def headlines(facts: Facts) -> list[Headline]:
    """The four numbers a reader looks for first; those that the run does not have are left out."""
    measures = {measure.key: measure for measure in MEASURES}
    set_name = facts.sets[0] if facts.sets else ""
    of_set = f", {set_name}" if len(facts.sets) > 1 else ""

    def values(key: str) -> tuple[float | None, ...]:
        return tuple(measures[key].value(facts, model, set_name) for model in MODELS)

    lines = [
        (key, f"{measures[key].label}{of_set}, x 100", ".1f", "")
        for key in list((facts.metrics.get("task") or {}).get("metrics") or ())[:2]
    ]
    lines += [
        ("rougeL", f"ROUGE-L{of_set}", ".1f", ""),
        ("kl", "held-out KL, nats per label", ".2f", ""),
        ("repeats_4gram", f"answers that repeat a 4-gram{of_set}", ".0f", " %"),
    ]
    found = []
    for key, label, form, unit in lines:
        teacher, before, after = values(key)
        if after is not None:
            # The teacher's KL from itself is nothing to compare with
            others = [("before", before), ("teacher", None if key == "kl" else teacher)]
            note = ", ".join(f"{name} {value:{form}}{unit}" for name, value in others if value is not None)
            if key == "kl" and before:
                note += f" ({100 * (after - before) / before:+.0f} %)"
            found.append(Headline(label, f"{after:{form}}{unit}", note))
    teacher, _, after = values("parameters")
    if after is not None:
        share = share_of(after, teacher)
        found.append(Headline("parameters", format_count(after), f"{share:.0f} % of the teacher's" if share else ""))
    return found


def data_uri(png: bytes) -> str:
    """A picture as an address: one file that can be mailed, and that fetches nothing where it is opened."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# -------------------------------------------------------------------------------------------------------- helpers


def _answer(label: str, row: Mapping[str, Any]) -> Answer:
    score = number(row.get("rougeL"))
    tokens = number(row.get("tokens"))
    return Answer(
        label=label,
        text=str(row.get("prediction") or "").strip(),
        score=None if score is None else points(score),
        tokens=None if tokens is None else int(tokens),
        finished=bool(row.get("finished", True)),
    )


def _format_interval(facts: Facts) -> str:
    """``teacher ± 3.1, student after ± 4.0 (validation)`` for every set with predictions."""
    parts = []
    for set_name in facts.sets:
        halves = [(MODEL_LABELS[m], half) for m in MODELS if (half := interval(facts, m, set_name)) is not None]
        if halves:
            parts.append(", ".join(f"{label} ± {half:.1f}" for label, half in halves) + f" ({set_name})")
    return "; ".join(parts)
