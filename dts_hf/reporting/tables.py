"""The scores of teacher, student before and student after as tables: for the terminal (rich) and for markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dts_hf.console import harmless
from dts_hf.reporting.facts import MODEL_LABELS, MODELS, Facts, format_count, gather, number
from dts_hf.runs.directory import RunDirectory

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "-"


@dataclass(frozen=True)
class Measure:
    """One number of ``metrics.json``: where it stands and how it is written."""

    key: str
    label: str
    better: Literal["higher", "lower", ""]
    where: Literal["model", "set", "teacher_forced", "own_text"]
    scale: float = 1.0
    digits: int = 1
    unit: str = ""
    in_summary: bool = True

    @property
    def meaning(self) -> str:
        """What the number says, in a sentence or two."""
        return MEANINGS[self.key]

    def value(self, facts: Facts, model: str, set_name: str = "") -> float | None:
        """The number in the unit it is shown in; None where the run does not have it."""
        entry = facts.model(model)
        if self.where == "set":
            found = (entry.get("sets", {}).get(set_name, {}).get(self.key) or {}).get("mean")
        elif self.where == "teacher_forced":
            losses = entry.get("teacher_forced") or {}
            found = (losses.get("sets", {}).get(set_name, {}) if set_name else losses).get(self.key)
        elif self.where == "own_text":
            found = (entry.get("own_text") or {}).get(self.key.removeprefix("own_"))
        else:
            found = entry.get(self.key)
        value = number(found)
        return None if value is None else value * self.scale

    def spread(self, facts: Facts, model: str, set_name: str) -> float | None:
        """Standard deviation over seeds, where more than one seed was generated."""
        entry = facts.model(model).get("sets", {}).get(set_name, {}) if self.where == "set" else {}
        # Of one seed there is no spread, which is not the same as a spread of 0
        if len(entry.get("seeds") or ()) < 2:
            return None
        value = number((entry.get(self.key) or {}).get("sd"))
        return None if value is None else value * self.scale

    def text(self, value: float | None, signed: bool = False) -> str:
        """``value`` as it is printed, without its unit; a ``signed`` change of nothing is a dash."""
        if value is None or (signed and value == 0):
            return ABSENT
        if self.key == "parameters":
            return ("+" if signed and value > 0 else "") + format_count(value)
        return f"{value:{'+' if signed else ''}.{self.digits}f}"


MEASURES = (
    Measure("parameters", "parameters", "", "model"),
    Measure("rougeL", "ROUGE-L", "higher", "set", scale=100.0),
    Measure("accuracy", "accuracy", "higher", "set", scale=100.0),
    Measure("f1", "F1", "higher", "set", scale=100.0),
    Measure("matthews_correlation", "Matthews correlation", "higher", "set", scale=100.0),
    Measure("pearson", "Pearson correlation", "higher", "set", scale=100.0),
    Measure("spearmanr", "Spearman correlation", "higher", "set", scale=100.0),
    Measure("label_ce", "held-out cross-entropy of the labels", "lower", "set", digits=3, unit="nats per row"),
    Measure("label_mse", "held-out squared error", "lower", "set", digits=3),
    Measure("teacher_kl", "held-out KL from the teacher at T = 1", "lower", "set", digits=4, unit="nats per row"),
    Measure("teacher_agreement", "same class as the teacher", "higher", "set", scale=100.0, unit="%"),
    Measure("exact_match", "exact match", "higher", "set", scale=100.0, unit="%"),
    Measure("kl", "held-out KL at T = 1", "lower", "teacher_forced", digits=3, unit="nats per label"),
    Measure("ce", "held-out cross-entropy", "lower", "teacher_forced", digits=3, unit="nats per label"),
    Measure("top1_agreement", "same first choice as the teacher", "higher", "teacher_forced", scale=100.0, unit="%"),
    Measure(
        "reverse_kl", "held-out reverse KL at T = 1", "lower", "teacher_forced", digits=3, unit="nats per label",
        in_summary=False,
    ),
    Measure("own_kl", "KL on the student's own answers", "lower", "own_text", digits=3, unit="nats per token"),
    Measure("own_reverse_kl", "reverse KL on its own answers", "lower", "own_text", digits=3, unit="nats per token"),
    Measure("ece", "held-out calibration error", "lower", "teacher_forced", scale=100.0, unit="points", in_summary=False),
    Measure("entropy", "held-out entropy", "", "teacher_forced", digits=3, unit="nats", in_summary=False),
    Measure("repeats_4gram", "answers that repeat a 4-gram", "lower", "set", scale=100.0, unit="%"),
    Measure("cut_at_limit", "answers cut at the limit", "lower", "set", scale=100.0, unit="%"),
    Measure("empty", "empty answers", "lower", "set", scale=100.0, unit="%", in_summary=False),
    Measure("mean_tokens", "mean length of an answer", "", "set", unit="tokens"),
    Measure("distinct_1", "different words of all words", "", "set", scale=100.0, unit="%", in_summary=False),
    Measure("distinct_2", "different pairs of words of all pairs", "", "set", scale=100.0, unit="%", in_summary=False),
)  # fmt: skip
#: What each measure means, for a reader who meets it for the first time.
MEANINGS = {
    "parameters": "How many weights the model has: its size.",
    "rougeL": "How much of the reference answer's wording, in the same order, the generated answer shares: 0 is "
    "nothing, 100 is the same words. It measures overlap, not truth.",
    "accuracy": "Share of held-out rows whose class is right, in percent.",
    "f1": "Harmonic mean of precision and recall of class 1, x 100.",
    "matthews_correlation": "Correlation of predicted and true classes, x 100.",
    "pearson": "Linear correlation of predicted and true scores, x 100.",
    "spearmanr": "Correlation of the ranks of predicted and true scores, x 100.",
    "label_ce": "How surprised the model is, on average, by the label of a held-out row. 0 would be no surprise.",
    "label_mse": "Mean squared distance of the predicted score from the true one.",
    "teacher_kl": "How far the model's class probabilities are from the teacher's. Always taken at temperature 1.",
    "teacher_agreement": "How often the model chooses the class that the teacher chooses.",
    "exact_match": "Share of answers equal to a reference once case, punctuation and spaces are set aside. Small for "
    "open questions, where many answers are right.",
    "kl": "How far the model's next-word probabilities are from the teacher's, on reference answers it was not "
    "trained on. 0 means it predicts exactly as the teacher does. Always taken at temperature 1, so that "
    "runs with different temperatures can be compared.",
    "ce": "How surprised the model is, on average, by each token of the reference answers. 0 would be no surprise.",
    "top1_agreement": "How often the model's most probable next token is the teacher's most probable one.",
    "reverse_kl": "The same distance measured from the student's side: it counts what the student finds likely and the "
    "teacher does not, where KL counts what the teacher finds likely and the student does not.",
    "own_kl": "KL from the teacher as above, but on answers that the student itself has sampled: what it is like where the "
    "student really goes.",
    "own_reverse_kl": "The same from the student's side: how unlikely the teacher finds what the student says.",
    "ece": "How far the probability of the model's first choice is from how often that choice is right, over 15 bins of "
    "probability. 0: it is right as often as it is sure.",
    "entropy": "How undecided the model is about the next token: 0 is certain of one. Neither more nor less is better; near "
    "the teacher's is a good sign.",
    "repeats_4gram": "Share of answers in which the same four words in a row occur twice: the mark of a model that runs in "
    "circles. Lists and quotations repeat a little by nature, so compare it with the teacher's share.",
    "cut_at_limit": "Share of answers that had not ended when the limit of new tokens was reached.",
    "empty": "Share of answers without any text.",
    "mean_tokens": "Tokens per generated answer. Neither more nor less is better; close to the teacher's is a good sign.",
    "distinct_1": "How many of the words of all answers together are different ones. Longer answers have fewer, so look at "
    "the length as well.",
    "distinct_2": "The same of pairs of neighbouring words.",
}


@dataclass(frozen=True)
class Line:
    """One row of the table of scores. ``values`` and ``spreads`` have one entry for each model of the table."""

    measure: Measure
    label: str
    values: tuple[float | None, ...]
    spreads: tuple[float | None, ...]
    change: float | None

    @property
    def cells(self) -> list[str]:
        """The printed values, ``mean ± sd`` where there is a spread over seeds."""
        return [
            self.measure.text(value) + (f" ± {self.measure.text(spread)}" if spread is not None else "")
            for value, spread in zip(self.values, self.spreads, strict=True)
        ]

    @property
    def change_text(self) -> str:
        """Student after minus student before."""
        return self.measure.text(self.change, signed=True)

    @property
    def improved(self) -> bool | None:
        """Whether the student got better; None where no direction is better, or nothing changed."""
        if not self.measure.better or not self.change:
            return None
        return (self.change > 0) == (self.measure.better == "higher")


def score_lines(facts: Facts, keep: Callable[[Measure], bool] = lambda measure: True) -> list[Line]:
    """The table of scores: a line for each measure (and evaluation set) that at least one model has."""
    lines = []
    sets = {"set": facts.sets, "teacher_forced": facts.loss_sets, "model": [""], "own_text": [""]}
    for measure in filter(keep, MEASURES):
        for set_name in sets[measure.where]:
            values = tuple(measure.value(facts, model, set_name) for model in MODELS)
            if all(value is None for value in values):
                continue
            before, after = values[1:]
            # A run with one set need not say its name in every line
            label = measure.label + (f", {set_name}" if set_name and len(sets[measure.where]) > 1 else "")
            lines.append(
                Line(
                    measure,
                    label,
                    values,
                    tuple(measure.spread(facts, model, set_name) for model in MODELS),
                    None if before is None or after is None else after - before,
                )
            )
    return lines


def format_counts(facts: Facts) -> str:
    """What the scores rest on: ``validation: 64 prompts, sampled with seed 10; ...``."""
    parts = []
    for set_name in facts.sets:
        entry = next(e for m in MODELS if (e := facts.model(m).get("sets", {}).get(set_name)))
        words = f"{set_name}: {facts.rows_in(set_name)} {'rows' if facts.task else 'prompts'}"
        if entry.get("dropped"):
            words += f" ({entry['dropped']} more were too long and left out)"
        seeds = entry.get("seeds") or []
        if len(seeds) > 1:
            words += f", mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
        elif seeds and (facts.metrics.get("protocol") or {}).get("do_sample"):
            words += f", sampled with seed {seeds[0]}"
        parts.append(words)
    tokens = [n for m in MODELS if (n := number((facts.model(m).get("teacher_forced") or {}).get("n_tokens")))]
    of_sets = [(name, facts.model("student")["teacher_forced"]["sets"][name]) for name in facts.loss_sets if name]
    parts += [
        f"losses over {losses['n_tokens']} tokens of {name}" for name, losses in of_sets if losses.get("n_tokens")
    ]
    if tokens:
        measures = "KL, cross-entropy and agreement" if facts.learns_from_teacher else "cross-entropy"
        parts.append(f"{measures} over {tokens[0]:.0f} tokens")
    own = facts.model("student").get("own_text") or {}
    if own.get("n_tokens"):
        parts.append(f"on its own answers over {own['n_tokens']} tokens of {own['n']} answers")
    return "; ".join([*parts, *_of_harness(facts)])


def _of_harness(facts: Facts) -> Iterator[str]:
    """Scores by tasks of lm_eval in words, those of each model."""
    for model in MODELS:
        found = facts.model(model).get("harness") or {}
        for task, entry in (found.get("tasks") or {}).items():
            scores = ", ".join(
                f"{key.partition(',')[0]} {value:.3f}"
                for key, value in entry["measures"].items()
                if "_stderr" not in key
            )
            yield f"lm_eval {found['lm_eval']}, {MODEL_LABELS[model]}, {task} ({entry['samples']} examples): {scores}"


def summary_table(run: RunDirectory) -> Table:
    """The table printed at the end of a run: teacher, student before, student after, and the change."""
    from rich.table import Table
    from rich.text import Text

    facts = gather(run)
    # The names of run and sets are those of files: neither control characters nor rich's own marks act on the terminal
    counts = Text(harmless(format_counts(facts)), style="table.caption")
    table = Table(title=Text(harmless(f"{facts.name}: scores"), style="table.title"), caption=counts or None)
    lines = score_lines(facts, keep=lambda measure: measure.in_summary)
    if not lines:
        table.add_column("This run has no scores yet: it was not evaluated.")
        return table
    table.add_column("")
    for model in MODELS:
        table.add_column(MODEL_LABELS[model], justify="right")
    table.add_column("change", justify="right")
    table.add_column("better")
    for line in lines:
        style = {True: "green", False: "red", None: ""}[line.improved]
        unit = f" ({line.measure.unit})" if line.measure.unit else ""
        table.add_row(
            Text(harmless(line.label + unit)), *line.cells, Text(line.change_text, style), line.measure.better
        )
    return table


def markdown_scores(facts: Facts) -> str:
    """The same scores as a markdown table; one sentence instead where the run was not evaluated."""
    lines = score_lines(facts)
    unscored = "This student was not evaluated: it has no scores."
    if not lines:
        return unscored
    rows = [
        ["", *(MODEL_LABELS[model] for model in MODELS), "change", "better"],
        ["---", *["---:"] * (len(MODELS) + 1), "---"],
    ]
    for line in lines:
        unit = f" ({line.measure.unit})" if line.measure.unit else ""
        rows.append([line.label + unit, *line.cells, line.change_text, line.measure.better])
    # A column's name may hold a bar (a set's name is a file's), which would start another cell
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return table if any(line.measure.where != "model" for line in lines) else f"{table}\n\n{unscored}"
