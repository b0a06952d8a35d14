"""No function of the package is longer than a page: lines from ``def`` to its last one, without its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.layers import FILES, tree_of

LONGEST = 60
LONGEST_KERNEL = 90  # what a kernel keeps in registers has to be named in one place


def lengths() -> Iterator[tuple[str, int]]:
    for module in FILES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                text = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                docstring = 0 if text is None else (text.end_lineno or text.lineno) - text.lineno + 1
                yield f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def test_no_function_is_longer_than_a_page() -> None:
    assert not {
        name: lines for name, lines in lengths() if lines > (LONGEST_KERNEL if name.endswith("_kernel") else LONGEST)
    }
