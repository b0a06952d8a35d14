"""What dts_hf needs of transformers' Trainer that is no public name: all of it is listed, and is as it was.

Where this fails on a new release of transformers, it says what has changed; look at every use of that name.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Trainer

from dts_hf.training.resumable_trainer import PRIVATE_NAMES
from tests.support.layers import FILES, tree_of


def signature(function: object) -> str:
    """Names, kinds and defaults of its parameters; what they are annotated with changes nothing for a caller."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_attributes(source: ast.AST) -> set[str]:
    """Private attributes that are set on ``self`` anywhere in ``source``."""
    return {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }


TRAINER = ast.parse(Path(inspect.getsourcefile(Trainer)).read_text(encoding="utf-8"))  # type: ignore[arg-type]
#: Every private name that a Trainer has: its methods, and what it sets on itself.
OF_TRAINER = {name for name in vars(Trainer) if is_private(name)} | private_attributes(TRAINER)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_private_names_are_as_they_were(name: str) -> None:
    expected = PRIVATE_NAMES[name]
    if expected is None:
        assert name in private_attributes(TRAINER), f"Trainer.{name}: expected an attribute, now nothing sets it"
        return
    now = signature(vars(Trainer)[name]) if name in vars(Trainer) else "gone"
    assert now == expected, f"Trainer.{name} has changed: expected {expected}, now {now}"


def uses(module: str) -> Iterator[tuple[str, int]]:
    """(private name of the Trainer, line): methods of a trainer's class, and ``self._x``, ``super()._x``, ``trainer._x``."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ClassDef) and is_trainer(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef) and inner.name in OF_TRAINER:
                    yield inner.name, inner.lineno
                if (
                    isinstance(inner, ast.Attribute)
                    and inner.attr in OF_TRAINER
                    and holder(inner) in ("self", "super")
                ):
                    yield inner.attr, inner.lineno
        if isinstance(node, ast.Attribute) and node.attr in OF_TRAINER and holder(node) == "trainer":
            yield node.attr, node.lineno
        # getattr(self, "_x", ...) reads it as well
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and argument.value in OF_TRAINER and named(node.args[0]):
                    yield str(argument.value), node.lineno


def is_trainer(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith(("Trainer", "DistillationBase")) for base in node.bases)


def holder(node: ast.Attribute) -> str | None:
    """Of ``self._x``, ``super()._x``, ``trainer._x`` and ``self.trainer._x``: who has it."""
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id
    return value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else None


def named(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "trainer")


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    found = {(name, module): line for module in FILES for name, line in uses(module)}
    missing = [f"{module}, line {line}: {name}" for (name, module), line in found.items() if name not in PRIVATE_NAMES]
    assert not missing, "private names of the Trainer that resumable_trainer.PRIVATE_NAMES does not list"
    assert {name for name, _ in found} == set(PRIVATE_NAMES), "in the table, and used nowhere"


def test_they_are_used_in_the_base_alone() -> None:
    """What is not a base of the trainers reaches the Trainer's own state through methods of theirs."""
    homes = {module for module in FILES if list(uses(module))}
    assert homes == {"dts_hf.training.even_batches", "dts_hf.training.resumable_trainer"}


def test_a_change_is_found_and_a_name_that_is_not_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics=None: None)
    with pytest.raises(
        AssertionError, match=r"expected \(self, model, trial\), now \(self, model, trial, metrics=None\)"
    ):
        test_the_private_names_are_as_they_were("_save_checkpoint")
    monkeypatch.delitem(PRIVATE_NAMES, "_tr_loss")
    with pytest.raises(AssertionError, match="does not list"):
        test_every_private_name_that_is_used_is_in_the_table()
