"""The layers in docs/architecture.md, from the table that the tests hold the imports to; its text is written by hand."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
if str(DOCS.parent) not in sys.path:
    sys.path.insert(0, str(DOCS.parent))

from tests.support.layers import FILES, LAYERS  # noqa: E402

MARKED = re.compile(r"(<!-- layers -->\n).*?(<!-- /layers -->)", re.DOTALL)


def architecture_page() -> str:
    """docs/architecture.md with its layers as they are now."""
    page, found = MARKED.subn(
        lambda place: f"{place[1]}{layers()}\n{place[2]}", (DOCS / "architecture.md").read_text("utf-8")
    )
    if found != 1:
        raise ValueError(f"docs/architecture.md: expected one place for its layers, found {found}")
    return page


def layers() -> str:
    """A row for each room and module that a layer names, from the ground up."""
    lines = ["| layer | room | what it is for |", "| --- | --- | --- |"]
    for name, rooms in LAYERS:
        for position, room in enumerate(room for room in rooms if purpose(room)):
            lines.append(f"| {'' if position else name} | {link(room)} | {purpose(room)} |")
    return "\n".join(lines)


def link(room: str) -> str:
    if room == "dts_hf":
        return "[dts_hf](../dts_hf/__init__.py)"
    path = FILES[f"dts_hf.{room}"]
    place = path.parent if path.name == "__init__.py" else path
    return f"[{room}](../{place.relative_to(DOCS.parent).as_posix()})"


def purpose(room: str) -> str:
    """The first paragraph of its docstring; empty where there is no such room yet."""
    path = FILES.get(room if room == "dts_hf" else f"dts_hf.{room}")
    if path is None:
        return ""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")
