"""Rule 7 of CONTRIBUTING, read from the source: what public functions say of themselves.

A linter compares the sections that are there with the code (ruff: D, D417, DOC102, DOC202, DOC403); this asks for them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.layers import FILES, inside, tree_of

#: A function with so many parameters or more explains each of them.
EXPLAINED_FROM = 4
#: Here every function that takes a tensor names a shape, such as ``[N, H]``.
WITH_SHAPES = ("temperature", "loss", "models.head")
SHAPE = re.compile(r"\[(?:[\w.*+ -]+(?:, ?)?)*\]|0-d")
#: Classes whose public methods are the interface of another library, which documents them.
FOREIGN = ("TrainerCallback", "Trainer", "Dataset", "IterableDataset", "Sampler", "Module", "Metric", "Function")


class Documented(NamedTuple):
    """A public function or method, and the docstring of its class beside its own."""

    name: str
    node: ast.FunctionDef
    text: str
    overrides: bool


def is_public(name: str) -> bool:
    return not name.startswith("_")


def classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for module in FILES for node in tree_of(module).body if isinstance(node, ast.ClassDef)}


def base_names(node: ast.ClassDef) -> Iterator[str]:
    """The names of all classes above ``node``, as far as they stand in this package, and the first ones outside."""
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].split(".")[-1]
        yield name
        if name in classes():
            yield from base_names(classes()[name])


def documented_above(node: ast.ClassDef, method: str) -> bool:
    for name in base_names(node):
        if name in FOREIGN:
            return True
        for item in classes()[name].body if name in classes() else ():
            if isinstance(item, ast.FunctionDef) and item.name == method and ast.get_docstring(item):
                return True
    return False


def functions(module: str) -> Iterator[Documented]:
    for node in tree_of(module).body:
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in getattr(node, "decorator_list", ())):
            continue  # kernels have the same parameters, which their module explains once
        if isinstance(node, ast.FunctionDef) and is_public(node.name):
            yield Documented(node.name, node, ast.get_docstring(node) or "", overrides=False)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            for item in node.body:
                if not isinstance(item, ast.FunctionDef) or not (is_public(item.name) or item.name == "__init__"):
                    continue
                of_class = (ast.get_docstring(node) or "") if item.name == "__init__" else ""
                text = "\n".join(filter(None, (of_class, ast.get_docstring(item))))
                yield Documented(f"{node.name}.{item.name}", item, text, documented_above(node, item.name))


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [parameter for parameter in given if parameter.arg not in ("self", "cls")]


def raised(node: ast.AST) -> Iterator[str]:
    """What ``node`` itself raises: names of exceptions, or of functions that make one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ast.unparse(child.exc.func).split(".")[-1]
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield from raised(child)


def takes_tensors(node: ast.FunctionDef) -> bool:
    return any(p.annotation and re.search(r"\bTensor\b", ast.unparse(p.annotation)) for p in parameters(node))


def problems_of(function: Documented, with_shapes: bool) -> Iterator[str]:
    node, text = function.node, function.text
    property_like = any(ast.unparse(decorator) in ("property", "cached_property") for decorator in node.decorator_list)
    if not text and not function.overrides and not property_like:
        yield "has no docstring"
        return
    if function.overrides and node.name != "__init__":
        return
    if node.name == "command":  # its docstring is what ``--help`` prints, above the help of each parameter
        return
    if len(parameters(node)) >= EXPLAINED_FROM and not re.search(r"^\s*(Args|Attributes):", text, re.MULTILINE):
        yield f"has {len(parameters(node))} parameters and no Args"
    section = text.partition("Raises:")[2]
    for name in raised(node):
        if not section or (name[0].isupper() and name.endswith(("Error", "Interrupted")) and name not in section):
            yield f"raises {name} and does not say so"
    if with_shapes and takes_tensors(node) and not SHAPE.search(text):
        yield "takes tensors and names no shape"


@pytest.mark.parametrize("module", [module for module in FILES if module.count(".") >= 1])
def test_public_functions_say_what_they_are(module: str) -> None:
    place = inside(module)
    with_shapes = any(place == name or place.startswith(f"{name}.") for name in WITH_SHAPES)
    found = [
        f"{function.name} (line {function.node.lineno}) {problem}"
        for function in functions(module)
        for problem in problems_of(function, with_shapes)
    ]
    assert not found, "\n".join([module, *found])


def test_the_test_sees_what_is_missing() -> None:
    source = (
        "def silent(x): pass\n"
        'def many(a, b, c, d):\n    """Does."""\n'
        'def raises(x):\n    """Does.\n\n    Raises:\n        KeyError: never.\n    """\n    raise UserError(x)\n'
        'def shapeless(x: Tensor):\n    """Does."""\n'
        'def good(x: Tensor, a, b, c):\n    """Does.\n\n    Args:\n        x: ``[N, H]``.\n    """\n'
    )
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    found = {
        node.name: list(problems_of(Documented(node.name, node, ast.get_docstring(node) or "", False), True))
        for node in nodes
    }
    assert found == {
        "silent": ["has no docstring"],
        "many": ["has 4 parameters and no Args"],
        "raises": ["raises UserError and does not say so"],
        "shapeless": ["takes tensors and names no shape"],
        "good": [],
    }
