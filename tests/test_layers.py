"""The package is a ladder: imports go down only, the mathematics knows torch alone, and nothing unsafe is called.

All of it is read from the source, so a module is checked without being imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dts_hf"

# From the ground up. A module may import those below it, and those beside it as long as they do not form a circle.
LADDER = (
    ("redaction",),
    ("errors", "exit_codes"),
    ("row_files", "run_lock", "discovery", "failures"),
    ("recipe_yaml", "recipe_check", "recipe", "run_directory", "sets"),
    ("checkpoints", "saved_scores"),
    ("response", "divergences", "temperature", "head", "packed_attention"),
    (
        "losses",
        "meters",
        "models",
        "pruning",
        "prompts",
        "data",
        "row_order",
        "tokenised",
        "router",
        "distribution",
        "sharding",
        "peers",
        "interruption",
    ),
    ("teachers",),
    (
        "generation",
        "evaluation",
        "teacher_answers",
        "callbacks",
        "trainer",
        "reporting",
        "run_end",
        "exact_resume",
        "run_start",
    ),
    ("distill", "classification"),
    ("doctor",),
    ("cli", "__main__"),
)
# Inside a function these import from anywhere: they hand over to code that is heavy to load.
MAY_REACH_UP = ("dts_hf", "dts_hf.cli.app", "dts_hf.recipe.problems")
MATHEMATICS = ("divergences", "temperature", "losses", "response", "head")
# ``dts-hf --help`` and the check of a recipe's own keys must not wait for these.
LIGHT = (
    "dts_hf",
    "redaction",
    "row_files",
    "run_lock",
    "errors",
    "exit_codes",
    "failures",
    "discovery",
    "recipe_yaml",
    "recipe_check",
    "recipe",
    "run_directory",
    "sets",
    "cli",
    "__main__",
)
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "matplotlib",
    "numpy",
    "pyarrow",
    "nltk",
}


class Import(NamedTuple):
    """``when``: ``loading`` (at the top), ``calling`` (inside a function) or ``typing`` (for annotations only)."""

    module: str
    when: str
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", FILES)


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


def top(module: str) -> str:
    """``dts_hf.temperature.dts`` stands on the rung of ``temperature``."""
    return module.split(".")[1] if "." in module else module


def rung(module: str) -> int:
    return next(height for height, names in enumerate(LADDER) if top(module) in names)


def ours(module: str) -> bool:
    return module.split(".")[0] == "dts_hf"


# -------------------------------------------------------------------------------------------------------------- layers


def test_every_module_has_its_place() -> None:
    known = {name for names in LADDER for name in names}
    assert {top(module) for module in FILES} - {"dts_hf"} == known


@every_module
def test_imports_go_down(module: str) -> None:
    if module == "dts_hf":
        assert not [found for found in imports_of(module) if ours(found.module) and found.when == "loading"]
        return
    up = [
        f"line {found.line}: {found.module} ({found.when})"
        for found in imports_of(module)
        if ours(found.module)
        and not (found.when == "calling" and module in MAY_REACH_UP)
        and (found.module == "dts_hf" or rung(found.module) > rung(module))
    ]
    assert not up, f"{module} imports from above: {up}"


def test_no_circle() -> None:
    below = {name: {found.module for found in imports_of(name) if found.when == "loading"} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join([*path, name])}"
        if name not in done:
            for other in below[name] & FILES.keys():
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@every_module
def test_the_mathematics_imports_torch_alone(module: str) -> None:
    if top(module) not in MATHEMATICS:
        return
    for found in imports_of(module):
        if ours(found.module):
            assert top(found.module) in ("errors", "discovery", *MATHEMATICS), f"line {found.line}: {found.module}"
        else:
            library = found.module.split(".")[0]
            assert library == "torch" or library in sys.stdlib_module_names, f"line {found.line}: {library}"


@every_module
def test_light_modules_load_nothing_heavy(module: str) -> None:
    if top(module) not in LIGHT:
        return
    for found in imports_of(module):
        if found.when == "loading":
            assert found.module.split(".")[0] not in HEAVY, f"line {found.line}: {found.module}"
            assert not ours(found.module) or top(found.module) in LIGHT, f"line {found.line}: {found.module}"


# -------------------------------------------------------------------------------------------------------------- safety


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# evaluate.load runs a file of the current folder; the others run code that comes with the data.
UNSAFE = (
    "evaluate.load",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "numpy.load",
    "np.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "eval",
    "exec",
)


@every_module
def test_nothing_unsafe_is_called(module: str) -> None:
    for name, call in calls(module):
        assert name not in UNSAFE, f"line {call.lineno}: {name}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        for option in ("trust_remote_code", "shell", "weights_only"):
            assert given.get(option) != ("False" if option == "weights_only" else "True"), (
                f"line {call.lineno}: {option}"
            )
    assert not {found.module.split(".")[0] for found in imports_of(module)} & {"pickle", "marshal", "shelve", "joblib"}
    imported = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom)]
    taken = {f"{node.module}.{alias.name}" for node in imported for alias in node.names}
    assert not taken & set(UNSAFE)


@every_module
def test_yaml_is_read_with_a_safe_loader(module: str) -> None:
    safe = {"yaml.SafeLoader"} | {
        node.name
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for name, call in calls(module):
        if name in ("yaml.load", "yaml.load_all"):
            loaders = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"]
            assert len(loaders) == 1 and loaders[0] in safe, f"line {call.lineno}"


@every_module
def test_code_from_the_hub_is_off_unless_asked_for(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
            assert node.value is not None and ast.unparse(node.value).startswith("Field(default=False")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            positional = node.args.posonlyargs + node.args.args
            defaults = dict(zip(reversed([a.arg for a in positional]), reversed(node.args.defaults)))
            defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d is not None}
            if "trust_remote_code" in defaults:
                assert ast.unparse(defaults["trust_remote_code"]) == "False", f"line {node.lineno}"


# ----------------------------------------------------------------------------------------------- the test tests itself


def test_imports_are_told_apart() -> None:
    source = (
        "import a\nif TYPE_CHECKING:\n    from b import c\ndef f():\n    import d\n    class E:\n        import e\n"
        "class G:\n    import g\ntry:\n    from dts_hf import errors\nexcept ImportError:\n    pass\n"
    )
    found = [(item.module, item.when) for item in imports_in(ast.parse(source))]
    assert found == [
        ("a", "loading"),
        ("b", "typing"),
        ("d", "calling"),
        ("e", "calling"),
        ("g", "loading"),
        ("dts_hf.errors", "loading"),
    ]
