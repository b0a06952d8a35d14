"""The layers of the package and what imports what, read from the source: ``python -m tests.support.layers`` prints both.

An import is one wherever it stands: at the top of a module, inside a function, or for annotations only
(``TYPE_CHECKING``). A circle of modules that only annotations close is still a circle to whoever reads them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "dts_hf"

#: From the ground up: (layer, its rooms and modules). A module may import those below it, and those of its own layer. A
#: module that is named stands there and not with its room.
LAYERS = (
    ("ground", ("console", "errors", "files", "registry")),
    ("processes", ("distributed",)),
    ("mathematics", ("temperature", "divergences", "models.head", "loss")),
    ("recipe", ("evaluation.protocol", "data.columns", "data.routes", "on_policy.settings", "recipe")),
    ("rows and models", ("data", "models", "alignment")),
    ("text", ("generation", "teachers", "on_policy")),
    ("runs", ("runs",)),
    ("publication", ("reporting", "hub")),
    ("training", ("training",)),
    ("results", ("evaluation", "inference", "serving")),
    ("sets", ("data_prep",)),
    ("tasks", ("task", "language_modeling", "classification")),
    ("the line", ("distill",)),
    ("judges", ("doctor", "advice", "experiments")),
    ("first recipe", ("starter",)),
    ("commands", ("cli", "__main__", "dts_hf")),
)
MOST_TOP_LEVEL_MODULES = 8


class Import(NamedTuple):
    """``when``: ``loading`` (at the top), ``calling`` (inside a function) or ``typing`` (for annotations only)."""

    module: str
    when: str
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports_in(node: ast.AST, when: str = "loading") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, when, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"line {child.lineno}: write imports out in full"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(inner if inner in FILES else child.module, when, child.lineno)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imports_in(child, "typing")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_in(child, "calling" if when == "loading" else when)
        else:
            yield from imports_in(child, when)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(imports_in(tree_of(module)))


def ours(module: str) -> bool:
    return module.partition(".")[0] == "dts_hf"


def inside(module: str) -> str:
    """``dts_hf.temperature.dts`` is ``temperature.dts`` inside the package; the package itself is ``dts_hf``."""
    return module.removeprefix("dts_hf.")


def room(module: str) -> str:
    return inside(module).split(".")[0]


def layer(module: str) -> int | None:
    """How high ``module`` stands: where it is named itself, else where its room is; None: nowhere."""
    for name in (inside(module), room(module)):
        for height, (_, names) in enumerate(LAYERS):
            if name in names:
                return height
    return None


def top_level_modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def reach_up() -> list[str]:
    """Imports of something that stands higher. The package itself hands out public names, lazily, and may."""
    found = []
    for module in FILES:
        if module == "dts_hf":
            continue
        height = layer(module)
        for item in imports_of(module):
            other = layer(item.module) if ours(item.module) else None
            if other is not None and height is not None and other > height:
                found.append(f"{module}, line {item.line}: {item.module} ({item.when})")
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import each other, however (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in {item.module for item in imports_of(module)} & FILES.keys() - {"dts_hf"}:
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in FILES:
        if module not in number:
            visit(module)
    return found


def main() -> int:
    top, up, round_trips = top_level_modules(), reach_up(), circles()
    homeless = [module for module in FILES if layer(module) is None]
    for height, (name, rooms) in reversed(list(enumerate(LAYERS))):
        print(f"{height:3}  {name:16} {', '.join(rooms)}")
    print(f"top-level modules: {len(top)} of at most {MOST_TOP_LEVEL_MODULES} ({', '.join(top)})")
    print(f"circles, imports for annotations included: {len(round_trips)}", *round_trips, sep="\n  ")
    print(f"imports from above: {len(up)}", *up, sep="\n  ")
    print(f"modules without a layer: {len(homeless)}", *homeless, sep="\n  ")
    return int(bool(len(top) > MOST_TOP_LEVEL_MODULES or up or round_trips or homeless))


if __name__ == "__main__":
    sys.exit(main())
