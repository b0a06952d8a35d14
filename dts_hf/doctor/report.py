"""The doctor's screen: one line per check, what is wrong and what to do below it, rows in colour, memory by strategy."""

from __future__ import annotations

import shutil
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dts_hf.console import duration, gb, harmless
from dts_hf.doctor.diagnosis import Check, Diagnosis, PicturedRow

MARKS = {
    "ok": ("ok", "green"), "skipped": ("-", "dim"), "warning": ("warn", "bold yellow"), "error": ("ERROR", "bold red"),
}  # fmt: skip
#: Style of each kind of token, and the characters of a segment that are shown: from its beginning, and up to its end.
KINDS = {
    "masked": ("dim", 16, 110), "learned": ("green", 110, 40),
    "aligned": ("bold underline green", 110, 40), "end": ("bold black on green", 40, 0), "padding": ("dim italic", 0, 0),
}  # fmt: skip
#: What stands around learned tokens where there are no colours.
OPEN, CLOSE = "«", "»"
WIDEST = 120
#: Columns of the memory table, so few that they fit into 80, and the parts that each sums up; ``--json`` has all.
COLUMNS = {
    "student": ("student",), "optim.": ("gradients", "optimizer"), "teacher": ("teacher",),
    "work": ("activations", "loss", "buffers"), "peak": ("total",),
}  # fmt: skip


def screen(diagnosis: Diagnosis, *, colours: bool = True) -> Group:
    """Everything that a person reads; without colours what is learned stands between marks."""
    parts: list[Any] = [_checks(diagnosis)]
    if diagnosis.picture:
        learned = any(segment.kind in ("learned", "aligned") for row in diagnosis.picture for segment in row.segments)
        count, how = len(diagnosis.picture), "green" if colours else f"between {OPEN} and {CLOSE}"
        title = f"what is learned ({how}) of {count} rows; prompt and padding are not"
        if colours and any(segment.kind == "aligned" for row in diagnosis.picture for segment in row.segments):
            title += "; underlined: the same for the teacher"
        parts.append(_rule(title if learned else f"{count} rows and their labels ({how})"))
        parts += [_pictured(row, colours) for row in diagnosis.picture]
    if diagnosis.memory:
        free = f"{gb(diagnosis.device['memory'])} free on this {diagnosis.device['name']}"
        parts += [_rule(f"estimated memory per device, GB ({free})"), _memory(diagnosis)]
    return Group(*parts, Rule(style="dim"), _verdict(diagnosis))


def print_screen(diagnosis: Diagnosis) -> None:
    """``screen``, as wide as the terminal."""
    console = Console(width=min(shutil.get_terminal_size((100, 40)).columns, WIDEST))
    console.print(screen(diagnosis, colours=console.is_terminal and not console.no_color))


def _text(text: str, style: str = "") -> Text:
    """Names and rows of the user's files, which must not act on the terminal."""
    return Text(harmless(text), style=style)


def _rule(title: str) -> Rule:
    return Rule(_text(title, "bold"), align="left", style="dim")


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
    lines = [_text(check.skipped or "", "dim"), _text(check.summary)]
    for problem in check.problems:
        lines.append(_text(problem.text, "red" if problem.level == "error" else "yellow"))
        lines.append(_text(f"→ {problem.advice}" if problem.advice else ""))
    return Text("\n").join(line for line in lines if line.plain)


def _pictured(row: PicturedRow, colours: bool) -> Padding:
    text = Text.assemble((harmless(f"{row.id}: "), "bold"))
    marked = False
    for segment in row.segments:
        if (segment.kind in ("learned", "aligned", "end")) != marked and not colours:
            text.append(CLOSE if marked else OPEN)
            marked = not marked
        style, first, last = KINDS[segment.kind]
        visible = harmless(segment.text).replace("\n", "⏎")
        if segment.kind == "padding":
            visible = f" +{segment.tokens} padding"
        elif len(visible) > first + last + 5:
            visible = f"{visible[:first]} … {visible[-last:] if last else ''}"
        text.append(visible, style=style)
    text.append(CLOSE if marked else "")
    return Padding(text, (0, 0, 0, 2))


def _memory(diagnosis: Diagnosis) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("  strategy", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for entry in diagnosis.memory:
        name = "one process" if entry["strategy"] == "single" else f"{entry['strategy']} x {entry['devices']}"
        name += ", teacher too" if entry["placement"] == "sharded" else ""
        mark = Text("fits", style="green") if entry["fits"] else Text("too much", style="red")
        cells = [Text(_gigabytes(sum(entry[part] for part in parts))) for parts in COLUMNS.values()]
        cells[-1].stylize("bold")
        table.add_row(Text(f"  {name}"), *cells, mark)
    return table


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 9.995e9 else f"{value / 1e9:,.1f}"


def _verdict(diagnosis: Diagnosis) -> Text:
    levels = [problem.level for problem in diagnosis.problems]
    counts = {level: levels.count(level) for level in ("error", "warning") if level in levels}
    said = " and ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items())
    text = f"{diagnosis.recipe}: {said or 'nothing wrong found'} ({duration(diagnosis.seconds)})"
    return _text(text, {"error": "bold red", "warning": "bold yellow"}.get(diagnosis.status, "bold green"))
