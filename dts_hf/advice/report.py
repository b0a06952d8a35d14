"""What a person reads of the advice: tables, a line for each rule, and with ``--output`` JSON, CSV and a page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from dts_hf.advice.advise import Advice
from dts_hf.advice.measured import Measured, short
from dts_hf.advice.rules import Judged, Verdict
from dts_hf.console import duration
from dts_hf.files import json_text, write_text_atomic

#: Rows of the table at T = 1, by the name of a value.
AT_ONE = {
    "teacher_ce": "teacher's cross-entropy, nats", "student_ce": "student's, untrained", "gap": "gap",
    "negative": "labels with a gap below 0", "confidence": "teacher's confidence", "correct": "teacher's accuracy",
    "p_target": "teacher's mean p(label)", "ece": "teacher's calibration error",
    "kl": "KL(teacher || student), nats", "agreement": "same first choice",
}  # fmt: skip
#: Columns of the table by temperature: the name of a curve, and what it is called.
BY_T = {
    "entropy": "entropy", "binary": "label?", "relation": "others?", "held_out_entropy": "held out",
    "support": "support", "mass_128": "top 128", "kd_share": "KD share", "cosine": "cosine",
}  # fmt: skip


def title(advice: Advice) -> str:
    """What was measured, in one line."""
    now = advice.found.situation
    held_out = f", {now.held_out_rows} held-out rows ({now.held_out_labels:,} labels)" if now.held_out_rows else ""
    return f"{advice.name}: {now.rows} training rows ({now.labels:,} labels){held_out}, {duration(advice.seconds)}"


def table_by_temperature(found: Measured) -> list[dict[str, str]]:
    """A row for each temperature; what was not measured is left out."""
    columns = {name: head for name, head in BY_T.items() if name in found.curves}
    return [
        {"T": f"{t:g}", **{head: short(found.curves[name][place].value) for name, head in columns.items()}}
        for place, t in enumerate(found.situation.grid)
    ]


def table_at_one(found: Measured) -> list[dict[str, str]]:
    """A row for each quantity at T = 1, with its interval."""
    rows = []
    for name, words in AT_ONE.items():
        row = {"at T = 1": words, "training rows": str(found.values[name])}
        if found.situation.held_out_rows:
            row["held-out rows"] = str(found.values[f"held_out_{name}"])
        rows.append(row)
    return rows


def table_of_arms(advice: Advice) -> list[dict[str, str]]:
    """A row for each arm of the sweep."""
    return [{"arm": str(number), "what is trained": arm.label} for number, arm in enumerate(advice.arms, 1)]


def lines(advice: Advice) -> Iterator[str]:
    """Notes, what fired, and what one cannot say."""
    yield from (f"note: {note}" for note in advice.found.notes)
    for one in advice.with_verdict(Verdict.FIRES):
        yield f"- {one.advice}. [{one.rule.id}; {one.rule.domain}; {one.rule.strength}]"
    for one in advice.with_verdict(Verdict.CANNOT_SAY):
        yield f"- cannot say: {one.rule.id} ({one.measured})"


def explained(advice: Advice) -> Iterator[str]:
    """Every rule with its condition, what was measured, its source, domain and strength."""
    for one in advice.judged:
        yield f"{one.rule.id}: {one.verdict.value}"
        yield from (f"  {key:9} {text}" for key, text in facts(one).items())


def facts(judged: Judged) -> dict[str, str]:
    """A rule in words."""
    rule = judged.rule
    said = {"advice": judged.advice} if judged.fires else {}
    return {
        "fires if": rule.condition, "measured": judged.measured, **said, "source": rule.source, "domain": rule.domain,
        "strength": rule.strength,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- files


def write_report(folder: Path, advice: Advice) -> Path:
    """Write ``advice.json``, ``curves.csv`` and ``advice.html``; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "advice.json", json_text(advice.as_dict()))
    write_text_atomic(folder / "curves.csv", curves_as_csv(advice.found))
    page = folder / "advice.html"
    write_text_atomic(page, render(advice))
    return page


def curves_as_csv(found: Measured) -> str:
    """A line for each curve and temperature, with the interval; every digit that there is."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rows", "curve", "temperature", "value", "low", "high"])
    for name, curve in found.curves.items():
        where = "held_out" if name.startswith("held_out_") else "train"
        for t, point in zip(found.situation.grid, curve, strict=True):
            writer.writerow([where, name.removeprefix("held_out_"), t, point.value, point.low, point.high])
    return text.getvalue()


def render(advice: Advice) -> str:
    """The whole page: figures are data URIs, and nothing is fetched."""
    from dts_hf.advice.figures import draw  # matplotlib takes seconds to load
    from dts_hf.reporting.canvas import DARK, LIGHT
    from dts_hf.reporting.model_card import rendered

    figures = [
        (light, _data_uri(light.png()), _data_uri(dark.png()))
        for light, dark in zip(draw(advice.found, LIGHT), draw(advice.found, DARK), strict=True)
    ]
    return rendered(
        "advice.html.jinja", autoescape=True,
        title=title(advice), notes=advice.found.notes, figures=figures,
        at_one=table_at_one(advice.found), by_temperature=table_by_temperature(advice.found), arms=table_of_arms(advice),
        groups=[(verdict.value, [(one.rule.id, facts(one)) for one in advice.with_verdict(verdict)]) for verdict in Verdict],
    )  # fmt: skip


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
