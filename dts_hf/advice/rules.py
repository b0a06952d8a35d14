"""What a rule is: data that says when it holds, what it advises, who says so, of what, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from dts_hf.advice.measured import Estimate, Measured, Situation

#: Fewer labels say nothing (ours). A classifier's labels are rows, and so independent of each other: there rows count.
FEWEST_LABELS, FEWEST_ROWS = 2000, 64
NOT_ENOUGH = "{labels:,} labels of {where} rows, expected {fewest:,} at least (--rows)"


class Verdict(Enum):
    """What became of a rule."""

    FIRES = "fires"
    SILENT = "does not fire"
    CANNOT_SAY = "cannot say"
    ELSEWHERE = "not applicable"


#: A verdict and the numbers behind it, in words.
Finding: TypeAlias = tuple[Verdict, str]


@dataclass(frozen=True)
class Rule:
    """A piece of advice, and everything that a person needs to disbelieve it.

    Attributes:
        id: stable, for programs.
        condition: when it fires, in words; a threshold of ours is called so.
        advice: what to do then; fields in braces are filled in from ``numbers``.
        source: who says so.
        domain: where that was found.
        strength: how well it is supported.
        reads: the samples that the condition looks at: ``train``, ``held_out``; empty: the recipe alone.
        applies: why the rule has nothing to say about a situation; empty: it has.
        test: the condition.
        numbers: what ``advice`` quotes.
    """

    id: str
    condition: str
    advice: str
    source: str
    domain: str
    strength: str
    reads: tuple[str, ...]
    test: Callable[[Measured], Finding]
    applies: Callable[[Situation], str] = lambda situation: ""
    numbers: Callable[[Measured], dict[str, float]] = lambda found: {}


@dataclass(frozen=True)
class Judged:
    """A rule and what became of it on one sample."""

    rule: Rule
    verdict: Verdict
    measured: str
    advice: str

    @property
    def fires(self) -> bool:
        return self.verdict is Verdict.FIRES


def judge(rule: Rule, found: Measured) -> Judged:
    """What ``rule`` says of a sample."""
    situation = found.situation
    if reason := rule.applies(situation):
        return Judged(rule, Verdict.ELSEWHERE, reason, "")
    for where in rule.reads:
        if reason := _too_few(situation, where):
            return Judged(rule, Verdict.CANNOT_SAY, reason, "")
    verdict, words = rule.test(found)
    advice = rule.advice.format(**rule.numbers(found)) if verdict is Verdict.FIRES else ""
    return Judged(rule, verdict, words, advice)


def _too_few(situation: Situation, where: str) -> str:
    held_out = where == "held_out"
    labels, rows = (
        (situation.held_out_labels, situation.held_out_rows) if held_out else (situation.labels, situation.rows)
    )
    if held_out and not rows:
        return "the recipe has no held-out rows (data.validation)"
    count, fewest = (rows, FEWEST_ROWS) if situation.classifier else (labels, FEWEST_LABELS)
    word = "held-out" if held_out else "training"
    return "" if count >= fewest else NOT_ENOUGH.format(labels=count, where=word, fewest=fewest)


# ------------------------------------------------------------------------------------------------------ conditions


def above(name: str, estimate: Estimate, limit: float) -> Finding:
    """Whether a number is above ``limit``; cannot say where its interval holds the limit."""
    return _beside(name, estimate, limit, estimate.low > limit, estimate.high < limit)


def below(name: str, estimate: Estimate, limit: float) -> Finding:
    """Whether a number is below ``limit``; cannot say where its interval holds the limit."""
    return _beside(name, estimate, limit, estimate.high < limit, estimate.low > limit)


def _beside(name: str, estimate: Estimate, limit: float, yes: bool, no: bool) -> Finding:
    verdict = Verdict.FIRES if yes else Verdict.SILENT if no else Verdict.CANNOT_SAY
    return verdict, f"{name} {estimate}, limit {limit:g}"


def every(findings: Sequence[Finding]) -> Finding:
    """Fires where all do, is silent where one is; else one cannot say."""
    verdicts = [verdict for verdict, _ in findings]
    words = "; ".join(text for _, text in findings)
    return next((one for one in (Verdict.SILENT, Verdict.CANNOT_SAY) if one in verdicts), Verdict.FIRES), words


def either(findings: Sequence[Finding]) -> Finding:
    """Fires where one does, is silent where all are; else one cannot say."""
    verdicts = [verdict for verdict, _ in findings]
    words = "; ".join(text for _, text in findings)
    return next((one for one in (Verdict.FIRES, Verdict.CANNOT_SAY) if one in verdicts), Verdict.SILENT), words


def fact(holds: bool, words: str) -> Finding:
    """Of the recipe, which is known exactly."""
    return (Verdict.FIRES if holds else Verdict.SILENT), words
