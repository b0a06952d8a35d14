"""The table of docs/trainer.md, read from the docstrings of tests/training/test_hf_*.py; its text is written by hand.

A docstring is a row: ``works: ...``, ``refused: ...`` or ``differs: ...``. So no row is without a test, and no test
without a row.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
TESTS = DOCS.parent / "tests" / "training"
BEGIN, END = "<!-- behaviours: written by docs/generate.py -->", "<!-- end of behaviours -->"
OUTCOMES = ("works", "differs", "refused")
TITLES = {
    "arguments": "Arguments, models and adapters",
    "callbacks": "Callbacks, logs and trackers",
    "checkpoints": "Checkpoints and resume",
    "evaluation": "Evaluation, prediction, generated answers",
    "optimisation": "Optimisation and rows",
    "saving": "Saving",
    "search": "model_init and hyperparameter search",
}


def trainer_page() -> str:
    """The page as it is, with the table of today's tests."""
    text = (DOCS / "trainer.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def table() -> str:
    """One table for each file of tests."""
    parts = []
    for path in sorted(TESTS.glob("test_hf_*.py")):
        kind = path.stem.removeprefix("test_hf_")
        lines = [f"### {TITLES[kind]}", "", "| behaviour | | test |", "| --- | --- | --- |"]
        rows = rows_of(path)
        for outcome in OUTCOMES:
            lines += [
                f"| {text.replace('|', '/')} | {outcome} | `{name}` |" for kind, text, name in rows if kind == outcome
            ]
        parts.append("\n".join([*lines, "", f"The tests are in `tests/training/{path.name}`."]))
    return "\n\n".join(parts)


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    """(outcome, behaviour, test) of every test in ``path``.

    Raises:
        ValueError: the docstring of a test is no row.
    """
    rows = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        found = re.fullmatch(rf"({'|'.join(OUTCOMES)}): (.+)", ast.get_docstring(node) or "", re.S)
        if found is None:
            raise ValueError(f"{path.name}: {node.name} has no docstring 'works: ...', 'refused: ...' or 'differs: ...'")
        rows.append((found[1], " ".join(found[2].split()), node.name))
    return rows
