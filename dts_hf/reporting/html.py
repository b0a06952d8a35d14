"""``report.html``: one page that needs nothing but itself, with scores, figures and answers side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from dts_hf.reporting.model_card import TEMPLATES, limits, settings, summary
from dts_hf.reporting.plots import DARK, LIGHT, draw
from dts_hf.reporting.tables import MEASURES, format_counts, score_lines
from dts_hf.runs.directory import RunDirectory

SAMPLES = 12


@dataclass(frozen=True)
class Answer:
    """What one model answered to the prompt of a sample."""

    label: str
    text: str
    score: float | None
    tokens: int | None
    finished: bool


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers of every model that has one."""

    key: str
    prompt: str
    instruction: str
    input: str
    references: Sequence[str]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page."""

    label: str
    value: str
    note: str


def render_html(run: RunDirectory) -> str:
    """The whole page. Every text of a model or of the data is escaped; figures are data URIs; nothing is fetched."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    facts = gather(run)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    samples, answered = choose_samples(facts)
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        summary=summary(facts),
        headlines=headlines(facts),
        labels=[MODEL_LABELS[model] for model in MODELS],
        lines=score_lines(facts),
        counts=format_counts(facts),
        intervals=_format_interval(facts),
        teacher_is_reference=teacher_is_reference(facts),
        figures=[
            (light, _data_uri(light.png()) if light.figure else "", _data_uri(dark.png()) if dark.figure else "")
            for light, dark in zip(draw(facts, LIGHT), draw(facts, DARK), strict=True)
        ],
        samples=samples,
        answered=answered,
        settings=settings(facts),
        limits=limits(facts),
        protocol=publishable(facts.metrics.get("protocol") or {}),
        recipe=_yaml(publishable(facts.recipe)) if facts.recipe else "",
    )


def choose_samples(facts: Facts, count: int = SAMPLES) -> tuple[list[Sample], int]:
    """Samples spread evenly over the student's scores, best first, and how many prompts they were chosen from.

    The prompts are sorted by the student's ROUGE-L and taken at even distances, the best and the worst among them,
    so that the choice flatters nobody. The first seed counts where several were generated.
    """
    if facts.task:  # a class has nothing to be read side by side
        return [], 0
    by_model = {model: _first_answers(facts.predictions.get(model) or []) for model in MODELS}
    lead = next((by_model[model] for model in reversed(MODELS) if by_model[model]), {})
    order = sorted(lead, key=lambda key: (-(number(lead[key].get("rougeL")) or 0.0), key))
    spread = [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)] if len(order) > count else order
    samples = []
    for key in spread:
        row = lead[key]
        answers = [_answer(MODEL_LABELS[model], by_model[model][key]) for model in MODELS if key in by_model[model]]
        instruction, given = str(row.get("instruction") or ""), str(row.get("input") or "")
        samples.append(
            Sample(
                key[1],
                str(row.get("prompt") or ""),
                instruction,
                given,
                [str(r) for r in row.get("references") or []],
                answers,
            )
        )
    return samples, len(order)


def headlines(facts: Facts) -> list[Headline]:
    """The four numbers a reader looks for first; those that the run does not have are left out."""
    measures = {measure.key: measure for measure in MEASURES}
    set_name = facts.sets[0] if facts.sets else ""
    of_set = f", {set_name}" if len(facts.sets) > 1 else ""

    def values(key: str) -> tuple[float | None, ...]:
        return tuple(measures[key].value(facts, model, set_name) for model in MODELS)

    found = []
    for key in list((facts.metrics.get("task") or {}).get("metrics") or ())[:2]:
        teacher, before, after = values(key)
        if after is not None:
            note = _beside(("before", before, ".1f"), ("teacher", teacher, ".1f"))
            found.append(Headline(f"{measures[key].label}{of_set}, x 100", f"{after:.1f}", note))
    teacher, before, after = values("rougeL")
    if after is not None:
        found.append(
            Headline(
                f"ROUGE-L{of_set}", f"{after:.1f}", _beside(("before", before, ".1f"), ("teacher", teacher, ".1f"))
            )
        )
    _, before, after = values("kl")
    if after is not None:
        fall = f" ({100 * (after - before) / before:+.0f} %)" if before else ""
        found.append(
            Headline("held-out KL, nats per label", f"{after:.2f}", _beside(("before", before, ".2f")) + fall)
        )
    teacher, before, after = values("repeats_4gram")
    if after is not None:
        note = _beside(("before", before, ".0f"), ("teacher", teacher, ".0f"), unit=" %")
        found.append(Headline(f"answers that repeat a 4-gram{of_set}", f"{after:.0f} %", note))
    teacher, _, after = values("parameters")
    if after is not None:
        share = share_of(after, teacher)
        found.append(Headline("parameters", format_count(after), f"{share:.0f} % of the teacher's" if share else ""))
    return found


# -------------------------------------------------------------------------------------------------------- helpers


def _first_answers(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault((str(row.get("set", "")), str(row.get("id", ""))), row)
    return first


def _answer(label: str, row: Mapping[str, Any]) -> Answer:
    score = number(row.get("rougeL"))
    tokens = number(row.get("tokens"))
    return Answer(
        label,
        str(row.get("prediction") or "").strip(),
        None if score is None else points(score),
        None if tokens is None else int(tokens),
        bool(row.get("finished", True)),
    )


def _beside(*others: tuple[str, float | None, str], unit: str = "") -> str:
    return ", ".join(f"{name} {value:{form}}{unit}" for name, value, form in others if value is not None)


def _format_interval(facts: Facts) -> str:
    """``teacher ± 3.1, student after ± 4.0 (validation)`` for every set with predictions."""
    parts = []
    for set_name in facts.sets:
        halves = [(MODEL_LABELS[m], half) for m in MODELS if (half := interval(facts, m, set_name)) is not None]
        if halves:
            parts.append(", ".join(f"{label} ± {half:.1f}" for label, half in halves) + f" ({set_name})")
    return "; ".join(parts)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
