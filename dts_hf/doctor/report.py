"""The doctor's screen: one line per check, what is wrong and what to do below it, two rows in colour, memory by strategy."""

from __future__ import annotations

import shutil
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dts_hf.doctor.diagnosis import Check, Diagnosis, PicturedRow
from dts_hf.doctor.resources import GB, duration, gb

MARKS = {
    "ok": ("ok", "green"),
    "skipped": ("-", "dim"),
    "warning": ("warn", "bold yellow"),
    "error": ("ERROR", "bold red"),
}
#: How each kind of token is shown.
STYLES = {"masked": "dim", "learned": "green", "end": "bold black on green", "padding": "dim italic"}
#: Characters of a segment that are shown: from its beginning, and up to its end.
SHOWN = {"masked": (16, 110), "learned": (110, 40), "end": (40, 0), "padding": (0, 0)}
WIDEST = 120
#: Columns of the memory table and the parts that each sums up.
WIDE: dict[str, tuple[str, ...]] = {
    "student": ("student",),
    "grads": ("gradients",),
    "optim.": ("optimizer",),
    "teacher": ("teacher",),
    "activ.": ("activations",),
    "loss": ("loss",),
    "buffers": ("buffers",),
    "peak": ("total",),
}
NARROW: dict[str, tuple[str, ...]] = {
    "student": ("student",),
    "optim.": ("gradients", "optimizer"),
    "teacher": ("teacher",),
    "work": ("activations", "loss", "buffers"),
    "peak": ("total",),
}


def screen(diagnosis: Diagnosis, width: int | None = None) -> Group:
    """Everything that a person reads.

    Args:
        width: columns; by default those of the terminal, 120 at most.
    """
    width = width or min(shutil.get_terminal_size((100, 40)).columns, WIDEST)
    parts: list[Any] = [_checks(diagnosis)]
    if diagnosis.picture:
        parts += [
            _rule(_picture_title(diagnosis)),
            *map(_pictured, diagnosis.picture),
        ]
    if diagnosis.memory:
        parts += [
            _rule(
                f"estimated memory per device, GB ({gb(diagnosis.device['memory'])} free on this {diagnosis.device['name']})"
            )
        ]
        parts += [_memory(diagnosis, WIDE if width >= 100 else NARROW)]
    parts += [Rule(style="dim"), _verdict(diagnosis)]
    return Group(*parts)


def print_screen(diagnosis: Diagnosis) -> None:
    console = Console(width=min(shutil.get_terminal_size((100, 40)).columns, WIDEST))
    console.print(screen(diagnosis, console.width))


def _rule(title: str) -> Rule:
    return Rule(Text(title, style="bold"), align="left", style="dim")


def _checks(diagnosis: Diagnosis) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        word, style = MARKS[check.status]
        table.add_row(Text(word, style=style), Text(check.name), _found(check))
    return table


def _found(check: Check) -> Text:
    lines = []
    if check.skipped is not None:
        lines.append(Text(check.skipped, style="dim"))
    if check.summary:
        lines.append(Text(check.summary))
    for problem in check.problems:
        lines.append(Text(problem.text, style="red" if problem.level == "error" else "yellow"))
        if problem.advice:
            lines.append(Text(f"→ {problem.advice}"))
    return Text("\n").join(lines)


def _picture_title(diagnosis: Diagnosis) -> str:
    kinds = {segment.kind for row in diagnosis.picture for segment in row.segments}
    if "learned" not in kinds:
        return "two rows and their labels (green)"
    return "what is learned (green) of two rows; prompt and padding are not"


def _pictured(row: PicturedRow) -> Padding:
    text = Text()
    text.append(f"{row.id}: ", style="bold")
    for segment in row.segments:
        text.append(_shortened(segment.kind, segment.text, segment.tokens), style=STYLES[segment.kind])
    return Padding(text, (0, 0, 0, 2))


def _shortened(kind: str, text: str, tokens: int) -> str:
    if kind == "padding":
        return f" +{tokens} padding"
    shown = text.replace("\n", "⏎")
    first, last = SHOWN[kind]
    if len(shown) <= first + last + 5:
        return shown
    return f"{shown[:first]} … {shown[len(shown) - last :] if last else ''}"


def _memory(diagnosis: Diagnosis, columns: dict[str, tuple[str, ...]]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("  strategy", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for entry in diagnosis.memory:
        name = "one process" if entry["strategy"] == "single" else f"{entry['strategy']} x {entry['devices']}"
        name += ", teacher too" if entry["placement"] == "sharded" else ""
        mark = Text("fits", style="green") if entry["fits"] else Text("too much", style="red")
        cells = [Text(_gigabytes(sum(entry[part] for part in parts))) for parts in columns.values()]
        cells[-1].stylize("bold")
        table.add_row(Text(f"  {name}"), *cells, mark)
    return table


def _gigabytes(value: float) -> str:
    return f"{value / GB:.2f}" if value < 9.995 * GB else f"{value / GB:,.1f}"


def _verdict(diagnosis: Diagnosis) -> Text:
    errors = sum(problem.level == "error" for problem in diagnosis.problems)
    warnings = len(diagnosis.problems) - errors
    counted = [
        f"{count} {word}{'s' if count > 1 else ''}"
        for count, word in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    words = " and ".join(counted) if counted else "nothing wrong found"
    style = "bold red" if errors else "bold yellow" if warnings else "bold green"
    return Text(f"{escape(diagnosis.recipe)}: {words} ({duration(diagnosis.seconds)})", style=style)
